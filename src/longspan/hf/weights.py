"""Sharded reading of Hugging Face folders: each rank reads the slices of the weights that it keeps.

    config.json      --load-->   the model on the meta device: its shapes, no weights
                                      |   parallelize(model, mesh, zero=3) shards it, still without weights, and then
    *.safetensors    --read-->   each rank reads its slices of every tensor; what no file holds (rotary tables) is computed
      or a seed      --draw-->   each rank draws one layer after the other, as the model's class does, and keeps its slices
                                      |   ... proves it, gathered block by block, and trains it

With zero=3 no rank ever holds more than its shard and the largest block; with tensor > 1 each rank reads all weights before
they are cut. Independent of how a model is sharded.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from longspan.errors import ModelError
from longspan.hf import _compat
from longspan.hf.blocks import blocks
from longspan.hf.names import tensor_names
from longspan.models.adapter import UNREAD

WEIGHTS = (".safetensors", ".bin")
"""How files of weights end; only the first kind can be read in parts."""


def load(
    folder: str | Path, *, config: PreTrainedConfig | None = None, dtype: torch.dtype | None = None, seed: int = 0
) -> PreTrainedModel:
    """Build the model of a folder on the meta device; ``parallelize(load(folder), mesh, zero=3)`` then reads each rank's shard.

    Afterwards its parameters equal those of ``from_pretrained(folder, dtype=dtype)``. A folder with a config alone means random
    weights, which depend on (config, seed) and on no layout.

    Args:
        folder: with config.json and, for weights, *.safetensors.
        config: replaces the config of the folder.
        dtype: of the parameters; default: the config's.
        seed: of random weights.

    Returns:
        The model, in training mode, without weights.

    Raises:
        ModelError: a folder without a config or with one that Transformers does not know; in ``parallelize``, on every rank
            alike, weights that are not those of the model by name and shape, or not the same on all ranks.
    """
    model = build_empty(config or read_config(folder), dtype)
    vars(model)[UNREAD] = FolderWeights(model, Path(folder), seed)
    return model


def load_whole(folder: str | Path | None, config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """The model with all its weights, on this rank's CPU, in training mode: those of ``from_pretrained(folder)``.

    Without a folder, or without weights in it, they are random and drawn from ``seed``.
    """
    kind: Any = class_of(config)
    if folder is not None and has_weights(folder):
        model: PreTrainedModel = kind.from_pretrained(folder, config=config, dtype=dtype)
    else:
        model = build_empty(config, dtype)
        FolderWeights(model, Path(folder or ""), seed).draw_into(model, torch.device("cpu"))
    model.train()
    return model


def has_weights(folder: str | Path) -> bool:
    """Whether the folder holds a .safetensors or .bin file."""
    return any(path.suffix in WEIGHTS for path in Path(folder).iterdir())


def read_config(folder: str | Path) -> PreTrainedConfig:
    """The config of a folder. Raises ModelError without a config.json, or if Transformers does not have its model class."""
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        there = "has no config.json" if path.is_dir() else "does not exist"
        raise ModelError(f"the folder '{folder}' {there}; name one that a Hugging Face model's save_pretrained wrote")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        class_of(config)
    except ModelError:
        raise
    except Exception as error:  # a config of something else fails in the library in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the config of '{folder}' is of no model that Transformers {transformers.__version__} has: {reason}"
        ) from error
    return config


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The model class that ``config.architectures`` names first; by default the causal language model of the config's class.

    Raises:
        ModelError: Transformers has no such class.
    """
    named = next(iter(config.architectures or ()), None)
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    found = getattr(transformers, named, None) if named else mapping.get(type(config), None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise ModelError(
            f"the config of model_type {config.model_type!r} names {named or 'no class'}, which is no model of Transformers "
            f"{transformers.__version__}; write one of its classes under architectures"
        )
    return found


def build_empty(config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model of this config on the meta device, in training mode; ``dtype`` None: the config's, else fp32."""
    kind: Any = class_of(config)
    with torch.device("meta"):
        model = _compat.build(kind, config, dtype or config.dtype or torch.float32)
    model.train()
    return model


class FolderWeights:
    """The source of the weights of a model on the meta device: the files of ``folder``, or ``seed`` if it has none."""

    def __init__(self, model: PreTrainedModel, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder.expanduser(), seed
        self.names = tensor_names(model)

    def facts(self, model: PreTrainedModel) -> dict[str, str]:
        """What must be equal on all ranks for them to get the same weights, as text by name.

        These are the config and, for each stored tensor, its shape, dtype and a hash of its first row; without stored tensors,
        the seed.

        Raises:
            ModelError: the files do not hold exactly the model's tensors.
        """
        config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
        facts = {"the config": _hash(json.dumps(config, sort_keys=True, default=str).encode())}
        files = _files(self.folder)
        if not files:
            return facts | {"the weights": f"drawn from seed {self.seed}"}
        stored = _peek(files)
        self._refuse_other_names(model, stored)
        return facts | {name: str(tensor) for name, tensor in stored.items()}

    def read_into(self, model: PreTrainedModel, device: torch.device) -> None:
        """Move the model, sharded or not, to ``device`` and fill it with its weights. Every rank must call it.

        Each rank reads or draws only what it keeps.
        """
        if not _files(self.folder):
            self.draw_into(model, device)
        else:
            self._read_into(model, device)

    def _read_into(self, model: Any, device: torch.device) -> None:
        model.to_empty(device=device)
        model.tie_weights()
        held = set(_peek(_files(self.folder)))
        state = model.state_dict()
        wanted = {next(name for name in names if name in held): state[names[0]] for names in self.names}
        try:
            load_tensors(wanted, storage_reader=HuggingFaceStorageReader(str(self.folder)))
        except CheckpointException as error:
            raise ModelError(f"the weights in '{self.folder}' cannot be read: {cause(error)}; copy the folder again") from error
        # What the files held is marked as Transformers' own loading marks it; the rest, its class knows how to compute.
        lacking = {name for name, _ in model.named_buffers()} - state.keys()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _compat.mark_initialized(tensor, name not in lacking)
        model.initialize_weights()

    def draw_into(self, model: PreTrainedModel, device: torch.device) -> None:
        """Move the model to ``device`` and fill it with random weights, drawn from ``seed`` by its class' own initialization.

        One block, or module outside the blocks, is drawn whole at a time, and each rank keeps its shard of it.
        """
        model.to_empty(device=device)
        model.tie_weights()
        model_dtype = next(model.parameters()).dtype
        twin = build_empty(model.config, model_dtype)
        mine = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            for prefix, module, recurse in _parts(twin):
                module.to_empty(device="cpu", recurse=recurse)
                for each in module.modules() if recurse else [module]:
                    _compat.draw_weights(_owner(twin, prefix), each)
                for name, tensor in _own(module, recurse):
                    if (full := f"{prefix}.{name}".lstrip(".")) in mine:  # named once, where it is tied
                        _keep(mine[full], tensor)
                module.to_empty(device="meta", recurse=recurse)

    def _refuse_other_names(self, model: PreTrainedModel, stored: "dict[str, Stored]") -> None:
        way_out = (
            f"load it whole with {type(model).__name__}.from_pretrained, and either parallelize that, or write it with "
            f"save_pretrained(..., save_original_format=False) and load what it wrote"
        )
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for first, *others in self.names:
            there = [name for name in (first, *others) if name in stored]
            if not there:
                raise ModelError(f"'{self.folder}' holds no {first}, which {type(model).__name__} has; {way_out}")
            if len({stored[name] for name in there}) > 1:
                raise ModelError(
                    f"'{self.folder}' holds different {' and '.join(there)}, which its config ties; set "
                    f"tie_word_embeddings to false there"
                )
            if stored[there[0]].shape != shapes[first]:
                raise ModelError(
                    f"'{self.folder}' holds {there[0]} of shape {stored[there[0]].shape}, and {type(model).__name__} has "
                    f"{shapes[first]}; {way_out}"
                )
        ignored = _compat.ignored_on_load(model)
        ignored += [rf"(^|\.){re.escape(name.rpartition('.')[2])}$" for name, _ in model.named_buffers()]
        known = {name for names in self.names for name in names}
        for name in stored.keys() - known:
            if not any(re.search(pattern, name) for pattern in ignored):
                raise ModelError(f"'{self.folder}' holds {name}, which {type(model).__name__} has not; {way_out}")


class Stored(NamedTuple):
    """Shape, dtype and a hash of the first row of a tensor in a file, to compare tensors without reading them whole."""

    shape: tuple[int, ...]
    dtype: str
    first_row: str


def cause(error: BaseException) -> BaseException:
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _files(folder: Path) -> list[Path]:
    """The .safetensors files of a folder, sorted; [] if it has no weights. Raises ModelError if it has only .bin files."""
    found, other = (sorted(folder.glob(f"*{end}")) for end in WEIGHTS)
    if other and not found:
        raise ModelError(
            f"'{folder}' holds {other[0].name}, which cannot be read in parts; load it with from_pretrained and write it with "
            f"save_pretrained, which writes safetensors"
        )
    return found


def _peek(files: list[Path]) -> dict[str, Stored]:
    """A description (shape, dtype, hash of the first row) of every tensor in the files, by name.

    Raises:
        ModelError: a name is in two files, or a file is damaged.
    """
    stored: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    view = opened.get_slice(name)
                    shape = tuple(view.get_shape())
                    first = view[tuple(slice(0, 1) for _ in shape[1:])] if len(shape) > 1 else opened.get_tensor(name)
                    if name in stored:
                        raise ModelError(f"'{file.parent}' holds {name} twice, once in {file.name}; keep one of them")
                    content = first.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                    stored[name] = Stored(shape, view.get_dtype(), _hash(content))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the weights '{file}' cannot be read: {error}; copy the folder again") from error
    return stored


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _parts(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield the parts of a model that are initialized one by one: (name, module, whether the modules inside it belong to it).

    The last is True for each block, and False for each other module that has parameters or buffers of its own.
    """
    whole = blocks(model)
    for name, module in model.named_modules():
        if name in whole:
            yield name, module, True
        elif not any(name.startswith(f"{block}.") for block in whole) and _own(module, False):
            yield name, module, False


def _own(module: nn.Module, recurse: bool) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]


def _owner(model: PreTrainedModel, name: str) -> Any:
    """The innermost PreTrainedModel that contains the module ``name``; its class initializes the module's weights."""
    around = [m for prefix, m in model.named_modules() if not prefix or f"{name}.".startswith(f"{prefix}.")]
    return next(module for module in reversed(around) if isinstance(module, PreTrainedModel))


def _keep(mine: Tensor, whole: Tensor) -> None:
    """Copy ``whole``, which every rank has, into ``mine``; if ``mine`` is a DTensor, only this rank's shard."""
    if isinstance(mine, DTensor):
        whole = distribute_tensor(whole.to(mine.device), mine.device_mesh, mine.placements, src_data_rank=None).to_local()
        mine = mine.to_local()
    mine.copy_(whole)

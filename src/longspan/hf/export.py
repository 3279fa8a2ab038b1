"""Writing a parallel model as a Hugging Face folder: each rank writes what it holds, the first one puts the files together.

    rank 0   its shards, of its layers     --write-->   DRAFT/sharded/*   --put together-->   DRAFT/*.safetensors, config.json
    rank 1   its shards, of its layers     --write-->                                              | moved when they are whole
                                                                                              FOLDER/

A tensor at a time is whole, on the disk. A weight that two pipeline stages share is written once.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from longspan.distributed.consensus import gather, raise_together
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError
from longspan.hf.adapter import PretrainedAdapter
from longspan.hf.names import tensor_names
from longspan.hf.peft import has_adapters
from longspan.hf.weights import cause
from longspan.models.adapter import parallel_state

FILE_BYTES = 5 * 2**30
"""The size of one file of saved weights; a larger tensor has a file of its own."""
DRAFT = ".longspan-draft"
"""Name of the folder that is written first: in the folder that is there, else beside it, before its name."""
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Names of the files with the weights of a saved model."""


def save(model: PreTrainedModel, folder: str | Path, mesh: ParallelMesh) -> None:
    """Write a parallel model, sharded or not, as a Hugging Face folder: config.json and *.safetensors. Every rank calls it.

    ``from_pretrained(folder)`` gives its parameters, equal in every bit. Each rank writes what it holds, and the first one puts
    the pieces together; all ranks must see the same disk. A model that was saved there before is replaced when the new one is
    whole; other files in the folder stay.

    Args:
        model, mesh: what ``parallelize`` returned, and the ranks.
        folder: where it is written.

    Raises:
        ModelError: on every rank alike, where one of them cannot write, or for a model with adapters of peft.
    """
    if has_adapters(model):
        raise ModelError(
            "longspan.hf.save writes a folder for from_pretrained, which does not know the names of weights behind peft's "
            "adapters and would draw them at random; on every rank make whole = {name: tensor.full_tensor() if "
            "isinstance(tensor, DTensor) else tensor for name, tensor in model.state_dict().items()}, and on one call "
            "model.save_pretrained(folder, state_dict=whole)"
        )
    final = Path(folder).resolve()
    draft = final / DRAFT if final.is_dir() else final.with_name(f"{DRAFT}-{final.name}")
    lead = dist.get_rank() == 0
    with _all_or_none(final, draft, mesh):
        if lead:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
    with _all_or_none(final, draft, mesh):
        _write(model, draft, mesh)
    with _all_or_none(final, draft, mesh):
        if lead:
            shutil.rmtree(draft / "sharded")
            _config_of(model).save_pretrained(draft)
            _put_in_place(draft, final)


def _put_in_place(draft: Path, final: Path) -> None:
    """Make ``draft`` the folder ``final``, or move its files there, where they replace those of an earlier model."""
    if not final.exists():
        draft.rename(final)
        return
    new = [path.name for path in draft.iterdir()]
    for name in new:
        shutil.move(draft / name, final / name)
    for pattern in WEIGHTS:
        for old in final.glob(pattern):
            if old.name not in new:
                old.unlink()
    draft.rmdir()


@contextmanager
def _all_or_none(final: Path, draft: Path, mesh: ParallelMesh) -> Iterator[None]:
    """Context manager: a write error of one rank is raised on every rank as one ModelError, and the draft is removed."""

    def convert(found: BaseException) -> ModelError | None:
        if not isinstance(found, OSError | CheckpointException):
            return None
        return ModelError(f"the model cannot be saved to '{final}': {cause(found)}; make room, or name another folder")

    def undo() -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)

    with raise_together(mesh.world_group, convert, undo):
        yield


def _write(model: PreTrainedModel, folder: Path, mesh: ParallelMesh) -> None:
    """Write the tensors of this rank, those of its pipeline stages without the copy of a tied weight, into files of all."""
    state, parallel = model.state_dict(), parallel_state(model)
    copies = {} if parallel is None or parallel.pipeline is None else parallel.pipeline.copy_names
    tensors = {names[0]: state[names[0]] for names in tensor_names(model) if names[0] not in copies}
    sizes: dict[str, int] = {}
    for held in gather({name: tensor.nbytes for name, tensor in tensors.items()}, mesh.world_group):
        sizes |= held
    writer = HuggingFaceStorageWriter(str(folder), _files_of(sizes), save_distributed=True, enable_consolidation=True)
    save_tensors(tensors, storage_writer=writer)


def _files_of(sizes: Mapping[str, int]) -> dict[str, int]:
    """For each tensor, of which ``sizes`` gives the bytes, the number of its file, from 1; a file has up to ``FILE_BYTES``."""
    file, filled, files = 1, 0, {}
    for name, size in sizes.items():
        if filled and filled + size > FILE_BYTES:
            file, filled = file + 1, 0
        files[name], filled = file, filled + size
    return files


def _config_of(model: Any) -> PreTrainedConfig:
    """A copy of the user's config of the model (not of the one that names longspan's attention), with its class and dtype."""
    state = parallel_state(model)
    adapter = None if state is None else state.adapter
    config: PreTrainedConfig = deepcopy(adapter.given_config() if isinstance(adapter, PretrainedAdapter) else model.config)
    kind = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    config.architectures = [kind.__name__]
    config.dtype = next(model.parameters()).dtype
    return config

"""The model of ``--model hf:FOLDER``: a language model of Transformers, loaded and exported. Needs the extra ``hf``.

FOLDER   config.json      ->  class, heads, parameters: counted on the meta device
         *.safetensors    ->  its weights: whole on each rank (zero=0), or read in shards by ``parallelize`` (zero=3)
         tokenizer.json   ->  the run's tokenizer, where it names no other
runs/NAME/export          <-  the trained model as such a folder
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from longspan.distributed.consensus import raise_together
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError
from longspan.hf.export import save
from longspan.hf.names import is_dropout_field, number_of_experts
from longspan.hf.weights import build_empty, class_of, has_weights, load, load_whole, read_config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
OF_THE_FOLDER = ("_name_or_path", "transformers_version", "dtype")
"""Fields of a config that describe the folder, not the model."""


def read(folder: str, layers: int | None = None) -> "FolderSource":
    """The model source of a Hugging Face folder, for ``--model hf:FOLDER``.

    Args:
        folder: its path.
        layers: keep only the first ``layers`` layers; None: all.

    Raises:
        ModelError: the folder holds no causal or masked language model, or it has fewer layers.
    """
    config = read_config(folder)
    kind = class_of(config)
    causal, masked = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_MASKED_LM_MAPPING
    if kind not in (*_classes(causal, config), *_classes(masked, config)):
        raise ModelError(
            f"the model in '{folder}' is a {kind.__name__}, which is no language model; name the folder of a causal or "
            f"masked one"
        )
    if layers is not None:
        _cut(config, folder, layers)
    return FolderSource(config, str(Path(folder).expanduser()))


def config_of(described: dict[str, Any]) -> PreTrainedConfig:
    """The Transformers config from ``described``, what ``FolderSource.described`` wrote into a checkpoint.

    Raises:
        ModelError: Transformers lacks its model type.
    """
    try:
        config: PreTrainedConfig = AutoConfig.for_model(**described)
    except ValueError as error:
        raise ModelError(
            f"the model is a {described['model_type']}, which Transformers {transformers.__version__} does not know; install "
            f"the version that it was trained with"
        ) from error
    return config


@dataclass(frozen=True)
class FolderSource:
    """The ModelSource of a language model in a Hugging Face folder: what the command line asks about a model and builds it by.

    Attributes:
        config: the model's config.
        folder: where its weights and tokenizer are; None if ``build`` is to draw random weights, which those of a checkpoint
            will replace.
    """

    config: PreTrainedConfig
    folder: str | None

    @cached_property
    def outline(self) -> Any:
        """The model on the meta device, without weights: to count parameters."""
        return build_empty(deepcopy(self.config), torch.float32)

    @property
    def summary(self) -> str:
        """The class, layers, heads and parameters as one line for the user."""
        parameters = sum(parameter.numel() for parameter in self.outline.parameters())
        layers = self._text.num_hidden_layers
        return f"{type(self.outline).__name__}, {layers} layers, {self.heads} query heads, {parameters:,} parameters"

    @property
    def heads(self) -> int:
        heads: int = self._text.num_attention_heads
        return heads

    @property
    def vocab(self) -> int:
        vocab: int = self._text.vocab_size
        return vocab

    @property
    def special(self) -> frozenset[int]:
        """The ids of the padding, begin and end tokens in the config."""
        ids = [getattr(self._text, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
        return frozenset(i for kind in ids for i in (kind if isinstance(kind, list) else [kind]) if i is not None)

    @property
    def tokenizer(self) -> str:
        """The folder, if it has a tokenizer; else "bytes"."""
        has = self.folder is not None and any(Path(self.folder, name).is_file() for name in TOKENIZER_FILES)
        return self.folder if has and self.folder is not None else "bytes"

    @property
    def in_place(self) -> bool:
        """Whether it is a masked language model, which predicts each token in its own place."""
        return class_of(self.config) in _classes(transformers.MODEL_FOR_MASKED_LM_MAPPING, self.config)

    @property
    def trained(self) -> bool:
        """Whether the folder has weights."""
        return self.folder is not None and has_weights(self.folder)

    @property
    def reach(self) -> int | None:
        """The largest number of tokens of a row: ``max_position_embeddings``, or with a scaled RoPE the length it is scaled to.

        None if the config has neither, or if its RoPE scales with the row.
        """
        rope, known = (getattr(self._text, name, None) for name in ("rope_parameters", "max_position_embeddings"))
        if not rope or known is None:
            return None
        kinds = list(rope.values()) if all(isinstance(value, dict) for value in rope.values()) else [rope]
        if any(kind.get("rope_type") == "dynamic" for kind in kinds):
            return None  # it scales with the length of the row
        scaled = (int((kind.get("original_max_position_embeddings") or known) * (kind.get("factor") or 1)) for kind in kinds)
        reach: int = max(known, *scaled)
        return reach

    def for_text(self, tokenizer: str, vocab: int) -> "FolderSource":
        """This source, after a look at whether it fits text with ``vocab`` token ids.

        Args:
            tokenizer: the name of the tokenizer, for the error.
            vocab: the number of its token ids.

        Raises:
            ModelError: it is a masked language model, or its vocabulary is smaller.
        """
        kind = class_of(self.config).__name__
        if self.in_place:
            raise ModelError(f"{kind} predicts masked tokens, and this needs the next one; name a causal language model")
        if vocab > self.vocab:
            raise ModelError(
                f"the tokenizer {tokenizer} has {vocab} tokens, more than the {self.vocab} that {kind} knows; name the model's "
                f"own with --tokenizer"
            )
        return self

    def for_training(self, tokens: int, rope_scaling: str) -> "FolderSource":
        """The source for training on rows of ``tokens`` tokens: this one, or a copy whose RoPE is scaled.

        Args:
            tokens: tokens of a row.
            rope_scaling: "none", or the RoPE type by which longer rows are reached.

        Raises:
            ModelError: the config has dropout, or its positions end before ``tokens``.
        """
        kind = class_of(self.config).__name__
        if drops := [name for name, value in vars(self._text).items() if is_dropout_field(name) and value]:
            raise ModelError(
                f"{kind} would drop activations in training (config.{', config.'.join(drops)}), differently on every layout; "
                f"set {'it' if len(drops) == 1 else 'them'} to 0 in its config.json"
            )
        if self.reach is None or tokens <= self.reach:
            return self
        rope = self._text.rope_parameters
        scalable = rope.get("rope_type") == "default"
        if rope_scaling == "none" or not scalable:
            advice = ", or --rope-scaling yarn, which the export has too" if scalable else "; its RoPE is scaled already"
            raise ModelError(
                f"tokens={tokens} is more than the {self.reach} that the RoPE of {kind} reaches "
                f"(max_position_embeddings in its config.json); use --tokens {self.reach} or fewer{advice}"
            )
        config = deepcopy(self.config)
        text: Any = config.get_text_config()
        text.rope_parameters |= {
            "rope_type": rope_scaling,
            "factor": tokens / self.reach,
            "original_max_position_embeddings": self.reach,
        }
        text.max_position_embeddings = tokens
        return FolderSource(config, self.folder)

    def build(self, seed: int, zero: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model, in training mode, in ``dtype``.

        Args:
            seed: of random weights, where the folder has none.
            zero: 0: with its weights, on the CPU; more: on the meta device, for ``parallelize`` to read them in shards.
            dtype: of the parameters.
        """
        config = deepcopy(self.config)
        with _quietly():
            if zero and self.folder is not None:
                return load(self.folder, config=config, dtype=dtype, seed=seed)
            model: Any = load_whole(self.folder, config, torch.float32, seed)
            model.to(dtype)
            if dtype == torch.float64 and number_of_experts(config.get_text_config()):
                model.set_experts_implementation("eager")  # the grouped matmul has no fp64
            built: nn.Module = model
            return built

    def flops_per_token(self, tokens: int) -> float:
        """The floating-point operations per token of one training step on a causal row of ``tokens`` tokens.

        They are 6 for each parameter that a token is multiplied with (matrices, the head, the experts that it is sent to), and
        12 for each dimension of a head and each key that it sees. Windows are not taken into account.
        """
        text = self._text
        experts = number_of_experts(text)
        active = (getattr(text, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
        matrices = 0.0
        for name, parameter in self.outline.named_parameters():
            if parameter.ndim > 1:
                matrices += parameter.numel() * (active if ".experts." in name else 1)
        embedding = self.outline.get_input_embeddings().weight
        if embedding is not getattr(self.outline.get_output_embeddings(), "weight", None):
            matrices -= embedding.numel()
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        attention: float = 12 * text.num_hidden_layers * self.heads * dim * (tokens + 1) / 2
        return 6 * matrices + attention

    def described(self) -> dict[str, Any]:
        """The config as JSON values, to be kept in a checkpoint; ``config_of`` reads it."""
        fields: dict[str, Any] = json.loads(json.dumps(self.config.to_dict(), default=str))
        return {name: value for name, value in fields.items() if name not in OF_THE_FOLDER}

    def export(self, model: nn.Module, folder: Path, tokenizer: str, mesh: ParallelMesh) -> bool:
        """Write the trained model as a Hugging Face folder, with its tokenizer and the source's generation settings.

        Every rank must call it.

        Args:
            model: the parallel model.
            folder: where it is written.
            tokenizer: the folder or file of the tokenizer that it was trained with.
            mesh: the ranks.

        Returns:
            True, because the folder was written (a ModelSource that cannot export returns False).
        """
        assert isinstance(model, transformers.PreTrainedModel)
        with _quietly():
            save(model, folder, mesh)
            with raise_together(mesh.world_group):
                if dist.get_rank() == 0:
                    _copy_beside(folder, tokenizer, self.folder)
        return True

    @property
    def _text(self) -> Any:
        """The config of the language model: a part of the config, where the model has other parts too."""
        return self.config.get_text_config()


def _classes(mapping: Any, config: PreTrainedConfig) -> tuple[Any, ...]:
    """The model classes that ``mapping``, one of Transformers' auto-model tables, has for this config; () if none."""
    found = mapping.get(type(config), ())
    return found if isinstance(found, tuple) else (found,)


def _cut(config: PreTrainedConfig, folder: str, layers: int) -> None:
    """Change ``config`` in place to its first ``layers`` layers; ``folder`` is for the error.

    Raises:
        ModelError: it has fewer layers.
    """
    text: Any = config.get_text_config()
    if layers > text.num_hidden_layers:
        raise ModelError(f"layers={layers} is more than the {text.num_hidden_layers} of '{folder}'; use fewer")
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers and name.endswith("layer_types"):
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers


def _copy_beside(folder: Path, tokenizer: str, source: str | None) -> None:
    """Copy into an exported model's ``folder`` its tokenizer and generation settings.

    Args:
        folder: where the model's config and weights are.
        tokenizer: a folder or a tokenizer.json, else (such as "bytes") nothing is copied.
        source: the Hugging Face folder whose generation_config.json, if it has one, is copied; None for none.

    Raises:
        ModelError: the folder cannot be written.
    """
    try:
        if Path(tokenizer).is_dir():
            transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True).save_pretrained(folder)
        elif Path(tokenizer).is_file():
            shutil.copy(tokenizer, folder / "tokenizer.json")
        if source is not None and Path(source, "generation_config.json").is_file():
            shutil.copy(Path(source, "generation_config.json"), folder)
    except OSError as error:
        raise ModelError(f"the tokenizer cannot be written to '{folder}': {error.strerror}; make room") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Context manager: switch off Transformers' progress bars and log lines, which every rank would print."""
    says: Any = logging
    level, shows = says.get_verbosity(), says.is_progress_bar_enabled()
    says.set_verbosity_error()
    says.disable_progress_bar()
    try:
        yield
    finally:
        says.set_verbosity(level)
        if shows:
            says.enable_progress_bar()

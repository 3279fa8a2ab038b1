"""The model that ``--model`` names: a preset of longspan's decoder, or the folder of a Hugging Face model.

    --model tiny        ->  the shape of a preset; the vocabulary of the text          build  ->  Decoder
    --model hf:FOLDER   ->  the folder's class, weights (or a seed) and tokenizer      build  ->  a Transformers model

The verbs use a ``ModelSource`` and never ask which kind it is. It is made before any weight, so what it refuses is refused
at once. Transformers is imported for ``hf:`` only (hf/source.py).
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError
from longspan.models.decoder import PRESETS, Decoder, DecoderConfig

FOLDER = "hf:"


@runtime_checkable
class ModelSource(Protocol):
    """A model that can be built, and the properties of it that the verbs need."""

    @property
    def summary(self) -> str:
        """Kind, layers, heads and parameters, for the opening line."""
        ...

    @property
    def heads(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def special(self) -> frozenset[int]:
        """Special token ids (padding, begin, end), which random batches leave out."""
        ...

    @property
    def tokenizer(self) -> str:
        """The name of the model's own tokenizer; ``bytes`` where it has none."""
        ...

    @property
    def in_place(self) -> bool:
        """Whether labels stand at the token's own position (masked LM), not one before it (causal LM)."""
        ...

    @property
    def trained(self) -> bool:
        """Whether ``build`` reads weights from a folder, instead of drawing random ones."""
        ...

    @property
    def reach(self) -> int | None:
        """Tokens of the longest row that the model's RoPE was made for; None where it does not say."""
        ...

    def for_text(self, tokenizer: str, vocab: int) -> "ModelSource":
        """The source for text of this vocabulary size. Raises ModelError for a model that does not predict such text."""
        ...

    def for_training(self, tokens: int, rope_scaling: str) -> "ModelSource":
        """The source for rows of ``tokens`` tokens, its RoPE scaled where they need it.

        Raises:
            ModelError: the model drops activations, or its positions do not reach so far.
        """
        ...

    def build(self, seed: int, zero: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model, equal on every rank; with zero=3 it may be without weights until ``parallelize``."""
        ...

    def flops_per_token(self, tokens: int) -> float:
        """Floating-point operations of forward and backward for one token of a causal row of ``tokens`` tokens."""
        ...

    def described(self) -> dict[str, Any]:
        """The fields, readable from JSON, from which ``from_description`` makes this source again."""
        ...

    def export(self, model: nn.Module, folder: Path, tokenizer: str, mesh: ParallelMesh) -> bool:
        """Write the trained model for other libraries. Every rank calls it. Returns False where no such format exists."""
        ...


def is_model_folder(path: Path) -> bool:
    """Whether a folder holds the config of a Hugging Face model, as an export does, and not that of a run."""
    try:
        return "model_type" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def from_name(name: str, layers: int | None = None, heads: int | None = None, kv_heads: int | None = None) -> ModelSource:
    """The source of ``--model NAME``, with ``layers`` and heads replaced where they are given.

    Raises:
        ModelError: the folder holds no language model, or cannot have these layers or heads.
    """
    if name.startswith(FOLDER):
        return _of_folder(name.removeprefix(FOLDER), layers, heads, kv_heads)
    preset = PRESETS[name]
    return DecoderSource(
        replace(
            preset,
            layers=layers or preset.layers,
            heads=heads or preset.heads,
            kv_heads=kv_heads or heads or preset.kv_heads,
        )
    )


def from_description(described: dict[str, Any]) -> ModelSource:
    """The source of a model whose ``described()`` is in a checkpoint, as its weights are."""
    if "model_type" not in described:
        return DecoderSource(DecoderConfig(**described))
    from longspan.hf.source import FolderSource, config_of

    return FolderSource(config_of(described), None)


def _of_folder(folder: str, layers: int | None, heads: int | None, kv_heads: int | None) -> ModelSource:
    if heads or kv_heads:
        raise ModelError(f"the heads of {FOLDER}{folder} are those of its config.json; leave out --heads and --kv-heads")
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"{FOLDER}{folder} needs transformers, which is not installed; pip install '.[hf]' in a checkout"
        ) from error
    from longspan.hf.source import read

    return read(folder, layers)


@dataclass(frozen=True)
class DecoderSource:
    """longspan's own decoder (models/decoder.py)."""

    config: DecoderConfig
    tokenizer = "bytes"
    in_place = False
    special = frozenset[int]()
    trained = False
    reach = None

    @property
    def summary(self) -> str:
        c = self.config
        return (
            f"{c.layers} layers, {c.heads} query and {c.kv_heads} key/value heads of {c.head_dim}, {c.parameters:,} parameters"
        )

    @property
    def heads(self) -> int:
        return self.config.heads

    @property
    def vocab(self) -> int:
        return self.config.vocab

    def for_text(self, tokenizer: str, vocab: int) -> "DecoderSource":
        return DecoderSource(replace(self.config, vocab=vocab))

    def for_training(self, tokens: int, rope_scaling: str) -> "DecoderSource":
        if rope_scaling != "none":
            raise ModelError(
                f"rope_scaling={rope_scaling!r} is for hf: models, which were trained on rows of some length; leave it "
                f"out, because a preset begins with random weights"
            )
        return self

    def build(self, seed: int, zero: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        return Decoder(self.config, seed=seed).to(dtype)

    def flops_per_token(self, tokens: int) -> float:
        return self.config.flops_per_token(tokens)

    def described(self) -> dict[str, Any]:
        return asdict(self.config)

    def export(self, model: nn.Module, folder: Path, tokenizer: str, mesh: ParallelMesh) -> bool:
        return False

"""The model that ``--model`` names: a preset of longspan's decoder, or the folder of a Hugging Face model.

    --model tiny        ->  the shape of a preset; the vocabulary of the text          build  ->  Decoder
    --model hf:FOLDER   ->  the folder's class, weights (or a seed) and tokenizer      build  ->  a Transformers model

The verbs use a ``ModelSource`` and are independent of its kind. It is made before any weight is, so its refusals come first.
Transformers is imported for ``hf:`` only (hf/source.py).
"""

import json
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from longspan.batch.context import Part
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import PRESETS, DecoderConfig

FOLDER = "hf:"


@runtime_checkable
class ModelSource(Protocol):
    """A model that can be built, and what the commands train, evaluate and check must know of it before.

    ``from_name`` makes one from ``--model``: a ``DecoderSource``, or a ``FolderSource`` of hf/source.py.
    """

    @property
    def summary(self) -> str:
        """One line for people: layers, heads and parameters, and the ``model_type`` of a Hugging Face model."""
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
        """The model's own tokenizer, as ``tokenizers.load`` takes it; ``bytes`` if it has none."""
        ...

    @property
    def in_place(self) -> bool:
        """True if the logits at position t predict ``labels[t]`` (masked LM), False if the next label (causal LM)."""
        ...

    @property
    def trained(self) -> bool:
        """Whether ``build`` reads weights from a folder, instead of drawing random ones."""
        ...

    @property
    def reach(self) -> int | None:
        """The number of tokens of the longest row for which the model's RoPE is defined; None if its config sets no limit."""
        ...

    def for_text(self, tokenizer: str, vocab: int) -> "ModelSource":
        """The source for text with ``vocab`` token ids: this one, or for a preset a copy with that vocabulary.

        Args:
            tokenizer: the name of the tokenizer, for the error.
            vocab: the number of its token ids.

        Raises:
            ModelError: the vocabulary of a Hugging Face model is smaller, or the model does not predict the next token.
        """
        ...

    def for_training(self, tokens: int, rope_scaling: str) -> "ModelSource":
        """This source, or a copy whose RoPE is scaled by ``rope_scaling`` if ``tokens`` is more than ``reach``.

        Args:
            tokens: tokens of one row.
            rope_scaling: ``none``, ``linear`` or ``yarn``.

        Raises:
            ModelError: the model has dropout, or ``tokens`` is more than ``reach`` and its RoPE cannot be scaled so.
        """
        ...

    def build(self, seed: int, zero: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Build the model; equal on every rank for equal arguments.

        Args:
            seed: of the random weights; not used for weights that are read from a folder.
            zero: the ZeRO stage; above 0, parameters may be on the meta device until ``parallelize`` loads them.
            dtype: of the parameters.
        """
        ...

    def flops_per_token(self, tokens: int) -> float:
        """Floating-point operations of forward and backward for one token of a causal row of ``tokens`` tokens."""
        ...

    def described(self) -> dict[str, Any]:
        """A JSON-compatible dict from which ``from_description`` makes an equal source."""
        ...

    def export(self, model: nn.Module, folder: Path, tokenizer: str, mesh: ParallelMesh) -> bool:
        """Write the trained model into ``folder`` as a Hugging Face folder. Every rank must call it.

        Args:
            model: the parallel model.
            folder: where it is written.
            tokenizer: the file or folder of the tokenizer that it was trained with, which is written beside it.
            mesh: the ranks.

        Returns:
            True if it was written; False for the decoder, which has no such format.
        """
        ...


def is_model_folder(path: Path) -> bool:
    """Whether ``path`` holds a config.json with a ``model_type``: a Hugging Face model or an export, not a run's folder."""
    try:
        return "model_type" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def from_name(name: str, layers: int | None = None, heads: int | None = None, kv_heads: int | None = None) -> ModelSource:
    """The source of ``--model NAME``.

    Args:
        name: a preset, or ``hf:FOLDER``.
        layers: replaces the number of layers; a Hugging Face model keeps its first ones.
        heads: replaces the number of query heads, of a preset only.
        kv_heads: replaces the number of key/value heads, of a preset only; default: ``heads`` if given.

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
    """The source of the model in a checkpoint, from what its ``described()`` wrote there. A Hugging Face model has no
    weights yet."""
    if "model_type" not in described:
        return DecoderSource(DecoderConfig(**described))
    from longspan.hf.source import FolderSource, config_of

    return FolderSource(config_of(described), None)


def _of_folder(folder: str, layers: int | None, heads: int | None, kv_heads: int | None) -> ModelSource:
    """The source of ``--model hf:FOLDER``.

    Args:
        folder: its path.
        layers: keep only the first ``layers`` layers; None: all.
        heads, kv_heads: must be None.

    Raises:
        ModelError: ``heads`` or ``kv_heads`` is given, transformers is not installed, or the folder holds no language model.
    """
    if heads or kv_heads:
        raise ModelError(f"the heads of {FOLDER}{folder} are those of its config.json; leave out --heads and --kv-heads")
    if find_spec("transformers") is None:
        raise ModelError(f"{FOLDER}{folder} needs transformers, which is not installed; pip install '.[hf]' in a checkout")
    from longspan.hf.source import read

    return read(folder, layers)


@dataclass(frozen=True)
class DecoderSource:
    """The ModelSource of longspan's own decoder (models/decoder.py), with random weights.

    Attributes:
        config: its sizes and options.
    """

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


def without_balance_loss(model: nn.Module, part: Part) -> Part:
    """``part`` with the keyword by which a Hugging Face model leaves out the balance loss of its experts, if it has one.

    That loss is one of each micro-batch and no mean over tokens, so a held-out loss would depend on how rows are divided.
    """
    asked = getattr(getattr(model, "config", None), "output_router_logits", False)
    return {**part, "output_router_logits": False} if asked else part

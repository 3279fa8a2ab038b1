"""What a run computes with, from one word: a preset of our decoder, or the folder of a Hugging Face model.

    --model tiny        ->  the shape of a preset; its vocabulary is the text's       build  ->  Decoder
    --model hf:FOLDER   ->  the folder's class, weights (or a seed) and tokenizer     build  ->  a Transformers model

The verbs ask a recipe, and never what kind of model it makes. A recipe is made before any weight is: it refuses in a moment.
Transformers is imported for ``hf:`` alone (models/folder.py).
"""

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
class Recipe(Protocol):
    """A model that can be built, and what the verbs want to know of it."""

    @property
    def summary(self) -> str:
        """Kind, layers, heads and parameters, for people."""
        ...

    @property
    def heads(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def special(self) -> frozenset[int]:
        """Tokens that mean something to the model itself."""
        ...

    @property
    def tokenizer(self) -> str:
        """The name of the tokenizer that the model came with; ``bytes`` where it came with none."""
        ...

    @property
    def in_place(self) -> bool:
        """Whether a token is predicted in its own place (masked LM), not in that of the one before."""
        ...

    def for_text(self, tokenizer: str, vocab: int) -> "Recipe":
        """The same for text of this vocabulary. Raises ModelError for a model that cannot be trained on it."""
        ...

    def build(self, seed: int, zero: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model, the same on every rank; with zero=3 it may get its weights in ``parallelize`` only."""
        ...

    def flops_per_token(self, tokens: int) -> float:
        """Floating-point operations that a token of a causal row of ``tokens`` costs in training, forward and backward."""
        ...

    def described(self) -> dict[str, Any]:
        """All that ``from_description`` needs to make this recipe again, as JSON gives it back."""
        ...

    def export(self, model: nn.Module, folder: Path, tokenizer: str, mesh: ParallelMesh) -> bool:
        """Write a trained model as others read it; False where a checkpoint is all there is. Every rank calls it."""
        ...


def named(name: str, layers: int | None = None, heads: int | None = None, kv_heads: int | None = None) -> Recipe:
    """The recipe of ``--model NAME``, with other layers and heads where they are given. Raises ModelError for no model."""
    if name.startswith(FOLDER):
        return _of_folder(name.removeprefix(FOLDER), layers, heads, kv_heads)
    preset = PRESETS[name]
    return DecoderRecipe(
        replace(
            preset,
            layers=layers or preset.layers,
            heads=heads or preset.heads,
            kv_heads=kv_heads or heads or preset.kv_heads,
        )
    )


def from_description(described: dict[str, Any]) -> Recipe:
    """The recipe that said this of itself; its weights are in a checkpoint."""
    if "model_type" not in described:
        return DecoderRecipe(DecoderConfig(**described))
    from longspan.hf.source import FolderRecipe, config_of

    return FolderRecipe(config_of(described), None)


def _of_folder(folder: str, layers: int | None, heads: int | None, kv_heads: int | None) -> Recipe:
    if heads or kv_heads:
        raise ModelError(f"the heads of {FOLDER}{folder} are those of its config.json; leave out --heads and --kv-heads")
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(f"{FOLDER}{folder} needs transformers, which is not here; pip install 'longspan[hf]'") from error
    from longspan.hf.source import read

    return read(folder, layers)


@dataclass(frozen=True)
class DecoderRecipe:
    """Our own decoder."""

    config: DecoderConfig
    tokenizer = "bytes"
    in_place = False
    special = frozenset[int]()

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

    def for_text(self, tokenizer: str, vocab: int) -> "DecoderRecipe":
        return DecoderRecipe(replace(self.config, vocab=vocab))

    def build(self, seed: int, zero: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        return Decoder(self.config, seed=seed).to(dtype)

    def flops_per_token(self, tokens: int) -> float:
        return self.config.flops_per_token(tokens)

    def described(self) -> dict[str, Any]:
        return asdict(self.config)

    def export(self, model: nn.Module, folder: Path, tokenizer: str, mesh: ParallelMesh) -> bool:
        return False

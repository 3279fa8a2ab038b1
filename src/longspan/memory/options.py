"""MemoryOptions, the settings that reduce the memory of a training step, and AutoMemory, a budget from which they are chosen.

    MemoryOptions(recompute="selective", tile_tokens=4096)        set one by one
    AutoMemory(budget_gib=70, tokens=1_000_000)                   chosen by the closed form of planner/memory.py (see auto.py)

The command line's flags, ``parallelize(memory=)`` and ``LongTrainer(memory=)`` are these fields. No option changes a result:
loss and gradients stay those of one device.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from longspan.errors import ModelError

Recompute = Literal["none", "full", "selective"]
"""What a block computes again in its backward: nothing, everything, or everything except attention and its all-to-alls."""


@dataclass(frozen=True)
class MemoryOptions:
    """Settings that reduce the activation memory of a training step; none changes a result. Pass it as
    ``parallelize(memory=)``.

    Raises:
        ModelError: an unknown ``recompute``, or ``tile_tokens`` or ``head_chunks`` below 1.
    """

    recompute: Recompute = "none"
    """Activation checkpointing of every block: "none", "full", or "selective" (all except attention; see checkpointing.py)."""
    tile_tokens: int | None = None
    """Tokens that a feed-forward or a norm processes at a time, forward and backward (None: all of them)."""
    head_chunks: int = 1
    """Number of chunks into which a rank's heads are cut; attention exchanges and computes one chunk after another."""
    offload_activations: bool = False
    """Keep what all blocks except the last save for their backward in host memory."""
    chunked_loss: bool = False
    """Compute the loss of a Hugging Face model without forming all logits. (The Decoder never forms them.)"""

    def __post_init__(self) -> None:
        if self.recompute not in get_args(Recompute):
            legal = ", ".join(map(repr, get_args(Recompute)))
            raise ModelError(f"recompute={self.recompute!r} is unknown; legal are {legal}")
        if self.tile_tokens is not None and self.tile_tokens < 1:
            raise ModelError(f"tile_tokens={self.tile_tokens} is not possible; use at least 1, or None for no tiles")
        if self.head_chunks < 1:
            raise ModelError(f"head_chunks={self.head_chunks} is not possible; use 1 for all heads at once, or more")


@dataclass(frozen=True)
class AutoMemory:
    """A memory budget, in place of ``memory=`` of ``parallelize``, which then chooses ``zero`` and ``MemoryOptions``: the
    fastest that fit.

    ``parallelize`` raises ModelError if nothing fits.

    Raises:
        ModelError: the budget or the length is not positive.
    """

    budget_gib: float
    """GiB that one rank has for parameters, optimizer states, gradients and activations."""
    tokens: int
    """Tokens of the longest row, over all ranks."""

    def __post_init__(self) -> None:
        if not self.budget_gib > 0:
            raise ModelError(f"AutoMemory(budget_gib={self.budget_gib}) must be more than 0: GiB of one rank")
        if self.tokens < 1:
            raise ModelError(f"AutoMemory(tokens={self.tokens}) must be at least 1: tokens of the longest row")

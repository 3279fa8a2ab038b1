"""A way to train on a cluster: degrees of the five axes, ZeRO stage, memory options, micro-batch. And what software does.

    Strategy   what a user chooses        pipeline x data x ring x ulysses x tensor, zero, recompute, offload, tiles, ...
    Recipe     what the software does     dtype, attention kernel, bytes kept for a parameter, what is fused
    Workload   what a step computes       tokens of a row, rows of a step

``check`` refuses a strategy that is not legal and names the legal degrees. Ranks are laid out with pipeline outermost and
tensor innermost, so tensor ranks are neighbours in a node.
"""

from dataclasses import dataclass
from typing import Literal

from longspan.errors import LayoutError
from longspan.planner.model import ModelShape

AXES = ("pipeline", "data", "ring", "ulysses", "tensor")
"""The axes from the outermost to the innermost."""
MOST_TOKENS, MOST_ROWS = 1 << 40, 1 << 20
"""The longest row and the largest step that are priced."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one optimizer step computes: ``rows`` sequences of ``tokens`` tokens."""

    tokens: int
    rows: int = 1

    def __post_init__(self) -> None:
        for name, most in (("tokens", MOST_TOKENS), ("rows", MOST_ROWS)):
            if not 1 <= getattr(self, name) <= most:
                raise LayoutError(f"{name}={getattr(self, name):,} must be at least 1 and at most {most:,}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the training software does, as far as time and memory depend on it.

    Attributes:
        dtype: dtype of matrix products; activations are bf16 with fp8 too.
        attention: "flash" (FlashAttention-2, PyTorch's), "fused" (FlashAttention-3 or the vendor's; falls back to flash), or
            "unfused" (softmax over stored scores, as before FlashAttention).
        compiled: whether element-wise operators are fused by a compiler.
        parameter_bytes, gradient_bytes, optimizer_bytes: bytes kept for a parameter; what ZeRO stages shard.
        gathered_bytes: bytes of a parameter where it is gathered to compute; ``reduced_bytes``: of a gradient on the wire.
        bucket_bytes: bytes of a parameter in buckets that reduce gradients beside the accumulated ones, whatever the ZeRO
            stage.
        logit_bytes: bytes of a logit at the peak of a loss that is not chunked.
        chunked_products: matrix products of the head with a chunked loss: the logits, two gradients, and the logits once more
            where the backward computes them again (longspan).
        sharded_norms: whether norms and residuals are sharded over the tensor axis (Megatron sequence parallelism).
        selective: what ``recompute="selective"`` keeps: "block" (a block's input and attention's output, longspan),
            "attention" (everything but the scores of unfused attention, Megatron), "operators" (half of the matrix products,
            torchtitan).
        overlapped_tensor: whether the tensor axis' collectives run beside matrix products.
        balanced_stages: whether a pipeline's layers are split by cost, the head counted (longspan, nanotron), or evenly.
        saves_gathered: whether a tensor region saves its gathered input, instead of gathering it again (Megatron).
    """

    dtype: Literal["fp32", "bf16", "fp8"] = "bf16"
    attention: Literal["flash", "fused", "unfused"] = "flash"
    compiled: bool = False
    parameter_bytes: int = 4
    gradient_bytes: int = 4
    optimizer_bytes: int = 8
    gathered_bytes: int = 2
    reduced_bytes: int = 4
    bucket_bytes: int = 0
    logit_bytes: int = 14
    chunked_products: int = 4
    sharded_norms: bool = True
    selective: Literal["block", "attention", "operators"] = "block"
    overlapped_tensor: bool = False
    balanced_stages: bool = True
    saves_gathered: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the activations."""
        return 4 if self.dtype == "fp32" else 2


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Degrees, ZeRO stage and memory options; the names are those of ``ParallelMesh``, ``parallelize`` and ``MemoryOptions``.

    Attributes:
        pipeline, data, ring, ulysses, tensor: degrees of the axes.
        zero: 0 nothing is sharded over data x ring x ulysses, 1 optimizer states, 2 gradients too, 3 parameters too.
        recompute: what a block computes again in the backward.
        micro_batch: rows of one micro-batch of a replica.
        stages_per_rank: pipeline stages of one rank (interleaving).
        tile_tokens: tokens that a feed-forward works on at a time; 0 is all.
        head_chunks: chunks of a rank's heads that are exchanged one after another.
        chunked_loss: whether the loss is computed without all logits in memory.
        offload_activations, offload_optimizer, offload_parameters: what is kept in host memory.
    """

    pipeline: int = 1
    data: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1
    zero: int = 0
    recompute: Literal["none", "selective", "full"] = "none"
    micro_batch: int = 1
    stages_per_rank: int = 1
    tile_tokens: int = 0
    head_chunks: int = 1
    chunked_loss: bool = True
    offload_activations: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def ranks(self) -> int:
        """The number of ranks of the whole mesh: the product of the degrees."""
        return self.pipeline * self.data * self.ring * self.ulysses * self.tensor

    @property
    def full(self) -> int:
        """1 with full recomputation, else 0."""
        return int(self.recompute == "full")

    @property
    def selective(self) -> int:
        """1 with selective recomputation, else 0."""
        return int(self.recompute == "selective")

    def __str__(self) -> str:
        axes = " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "one device"
        options = [f"zero={self.zero}"] if self.zero else []
        options += [f"recompute={self.recompute}"] if self.recompute != "none" else []
        options += [f"{n}={v}" for n, v in (("tile_tokens", self.tile_tokens), ("head_chunks", self.head_chunks)) if v > 1]
        options += ["offload_activations"] if self.offload_activations else []
        # parallelize(offload_parameters=) moves the optimizer too, and nothing moves the optimizer alone
        options += ["offload_parameters" if self.offload_parameters else "offload_optimizer"] if self.offload_optimizer else []
        options += [f"micro_batch={self.micro_batch}"] if self.micro_batch > 1 else []
        return ", ".join([axes, *options])


def micro_batches(workload: Workload, strategy: Strategy) -> int:
    """The number of micro-batches of one data replica in a step: rows / (data x micro_batch)."""
    return workload.rows // (strategy.data * strategy.micro_batch)


def check(shape: ModelShape, workload: Workload, strategy: Strategy, gpus: int | None = None) -> None:
    """Raise LayoutError if a strategy is not legal for a model and a step; otherwise return.

    Args:
        shape: the model.
        workload: the step.
        strategy: the strategy.
        gpus: ranks that the degrees must fill; None: any number.

    Raises:
        LayoutError: what was asked, why not, and what is legal.
    """
    for axis in (*AXES, "micro_batch", "stages_per_rank", "head_chunks"):
        if getattr(strategy, axis) < 1:
            raise LayoutError(f"{axis}={getattr(strategy, axis)} must be at least 1")
    if gpus is not None and strategy.ranks != gpus:
        product = " x ".join(f"{axis} {getattr(strategy, axis)}" for axis in AXES)
        raise LayoutError(f"{product} are {strategy.ranks} ranks, but there are {gpus}; degrees must multiply to {gpus}")
    if strategy.zero not in (0, 1, 2, 3):
        raise LayoutError(f"zero={strategy.zero} is unknown; legal are 0, 1, 2 and 3")
    for axis in shape.whole:
        if getattr(strategy, axis) > 1:
            instead = "ulysses or ring" if axis == "tensor" else "data, ulysses or ring"
            raise LayoutError(
                f"{axis}={getattr(strategy, axis)} is refused for the class of {shape.name}, which has no plan for it that "
                f"longspan honours (docs/plans.md has every class); use {axis}=1 with {instead}"
            )
    if strategy.tile_tokens and strategy.tensor > 1:
        raise LayoutError(
            f"tile_tokens={strategy.tile_tokens} does not work with tensor={strategy.tensor}, whose ranks exchange all tokens "
            f"of a feed-forward at once; leave it out, or use tensor=1"
        )
    _heads(shape, strategy)
    if strategy.pipeline * strategy.stages_per_rank > shape.layers:
        raise LayoutError(
            f"pipeline={strategy.pipeline} x {strategy.stages_per_rank} stages exceeds the {shape.layers} layers of "
            f"{shape.name}; a stage needs a layer: use at most {shape.layers} stages"
        )
    parts = strategy.ring * strategy.ulysses * strategy.tensor
    if workload.tokens < parts:
        raise LayoutError(
            f"{workload.tokens} tokens are fewer than the {parts} ranks of a sequence; use fewer ranks a sequence"
        )
    if workload.rows % (strategy.data * strategy.micro_batch):
        raise LayoutError(
            f"{workload.rows} rows cannot be divided over data={strategy.data} replicas in micro-batches of "
            f"{strategy.micro_batch}; rows must be a multiple of data x micro_batch: {legal_data(workload, strategy)}"
        )
    if shape.positions is not None and workload.tokens > shape.positions:
        raise LayoutError(
            f"{workload.tokens:,} tokens are beyond the {shape.positions:,} positions of {shape.name}; use at most "
            f"{shape.positions:,} tokens, or a config whose positions reach further (RoPE scaling)"
        )


def _heads(shape: ModelShape, strategy: Strategy) -> None:
    """Raise LayoutError, with the legal values, if tensor, ulysses or head_chunks do not fit the model's heads."""
    legal = [d for d in range(1, shape.heads + 1) if legal_tensor(shape, d)]
    if strategy.tensor not in legal:
        raise LayoutError(
            f"tensor={strategy.tensor} does not divide the {shape.heads} query heads and the feed-forwards of "
            f"{shape.name}, or neither divides nor is divided by its {shape.kv_heads} key/value heads; "
            f"legal are {', '.join(map(str, legal))}"
        )
    mine = shape.heads // strategy.tensor
    if strategy.ulysses > mine:
        best = max(d for d in range(1, mine + 1) if strategy.ulysses % d == 0)
        raise LayoutError(
            f"ulysses={strategy.ulysses} exceeds the {mine} query heads of a tensor rank of {shape.name}; "
            f"use ulysses up to {mine}, and ring for more ranks: ulysses={best} ring={strategy.ring * strategy.ulysses // best}"
        )
    if strategy.head_chunks > mine // strategy.ulysses:
        raise LayoutError(
            f"head_chunks={strategy.head_chunks} cannot cut the {mine // strategy.ulysses} query heads of a rank; "
            f"use fewer chunks"
        )


def legal_tensor(shape: ModelShape, degree: int) -> bool:
    """Whether ``degree`` tensor ranks can split the model: it divides query heads and feed-forwards, and fits the key/value
    heads.

    It fits them if it divides their number, or is a multiple of it.
    """
    if "tensor" in shape.whole:
        return degree == 1
    widths = [width for kind in shape.kinds for width in (kind.ffn, kind.expert_ffn) if width]
    kv = shape.kv_heads % degree == 0 or degree % shape.kv_heads == 0
    return shape.heads % degree == 0 and kv and all(width % degree == 0 for width in widths)


def legal_data(workload: Workload, strategy: Strategy) -> str:
    """A text for an error: which data degrees divide the rows of a step with the strategy's micro-batch."""
    degrees = [d for d in range(1, workload.rows + 1) if workload.rows % (d * strategy.micro_batch) == 0]
    shown = ", ".join(map(str, degrees[:12])) + (", ..." if len(degrees) > 12 else "")
    return f"legal data degrees are {shown}" if degrees else f"micro_batch={strategy.micro_batch} does not divide the rows"

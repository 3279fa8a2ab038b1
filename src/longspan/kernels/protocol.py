"""What a kernel is: local attention over bands, forward and backward. Knows nothing of ranks, rings or exchanges.

    forward    q, k, v, bands           ->  out, lse            s   = scale * q·k, capped, plus bias, at the keys the bands show
                                                                lse = log(sum(exp(s)))       out = sum(exp(s - lse) * v)
    backward   dout, q, k, v, out, lse  ->  dq, dk, dv          p   = exp(s - lse)           ds  = p * (dout·v - dout·out)

The backward reads the weights of a key from ``lse`` and never sums over the other keys: given the out and lse of the
*whole* row it is exact for any part of the keys, and the parts add up. Rings, chunks of keys and sinks rest on this.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longspan.masks.bands import Band

Partial = tuple[Float[Tensor, "queries heads v_dim"], Float[Tensor, "heads queries"]]
Gradients = tuple[
    Float[Tensor, "queries heads qk_dim"],
    Float[Tensor, "keys kv_heads qk_dim"],
    Float[Tensor, "keys kv_heads v_dim"],
    list[Tensor],
]


@dataclass(frozen=True)
class Need:
    """What an attention asks of its kernel."""

    device_type: str
    dtype: torch.dtype
    qk_dim: int
    v_dim: int
    softcap: bool = False
    bias: bool = False


@runtime_checkable
class BoundBias(Protocol):
    """What is added to the scores, asked one tile at a time, differentiable in its own parameters."""

    @property
    def parameters(self) -> tuple[Tensor, ...]: ...

    def __call__(self, q_index: Int[Tensor, " q"], k_index: Int[Tensor, " k"]) -> Float[Tensor, "heads q k"]:
        """The bias of these queries (local indices) at these keys (local indices)."""
        ...


@runtime_checkable
class Kernel(Protocol):
    """Local attention. q, k, v may be strided views whose last dim is contiguous; heads is a multiple of kv_heads.

    Results are fp64 for fp64 inputs and fp32 otherwise. A query that no band reaches has out = 0, lse = -inf and no gradient.
    ``name`` is what users type.
    """

    @property
    def name(self) -> str: ...

    def forward(
        self,
        q: Float[Tensor, "queries heads qk_dim"],
        k: Float[Tensor, "keys kv_heads qk_dim"],
        v: Float[Tensor, "keys kv_heads v_dim"],
        bands: Sequence[Band],
        scale: float,
        *,
        softcap: float | None = None,
        bias: BoundBias | None = None,
    ) -> Partial: ...

    def backward(
        self,
        dout: Float[Tensor, "queries heads v_dim"],
        q: Float[Tensor, "queries heads qk_dim"],
        k: Float[Tensor, "keys kv_heads qk_dim"],
        v: Float[Tensor, "keys kv_heads v_dim"],
        out: Float[Tensor, "queries heads v_dim"],
        lse: Float[Tensor, "heads queries"],
        bands: Sequence[Band],
        scale: float,
        *,
        softcap: float | None = None,
        bias: BoundBias | None = None,
    ) -> Gradients:
        """dq, dk, dv and the gradients of ``bias.parameters`` (an empty list without a bias)."""
        ...


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial results, log-sum-exps and summed gradients: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def finite_lse(lse: Tensor) -> Tensor:
    """``lse`` to subtract from scores or from another lse: 0 for a row that sees nothing, whose weight is exp(-inf - 0) = 0."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def merge_weights(lse: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-sum-exp over the keys of both parts, weight of the first part's output, weight of the second's), all like ``lse``.

    A row that neither part reaches has lse = -inf and weights 0. Source: FlashAttention, arXiv:2205.14135, section 3.1.
    """
    both = torch.logaddexp(lse, part_lse)
    reached = finite_lse(both)
    return both, (lse - reached).exp_(), (part_lse - reached).exp_()

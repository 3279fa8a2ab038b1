"""The kernel interface: attention on one rank over the bands of a mask, forward and backward. Knows nothing of ranks.

    forward    q, k, v, bands           ->  out, lse         s   = softcap(scale * q·k) + bias, at the keys that the bands show
                                                             lse = log(sum(exp(s)))       out = sum(exp(s - lse) * v)
    backward   dout, q, k, v, out, lse  ->  dq, dk, dv       p   = exp(s - lse)           ds  = p * (dout·v - dout·out)

The backward computes the probabilities from ``lse`` and never sums over keys. Given the ``out`` and ``lse`` of all keys of a
query, it is therefore exact for any subset of the keys, and the gradients of the subsets add up. Ring attention, key blocks and
sink logits depend on this property.
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
    """The requirements of an attention that decide whether a kernel supports it: device type, dtype, head dims, extras."""

    device_type: str
    dtype: torch.dtype
    qk_dim: int
    v_dim: int
    softcap: bool = False
    bias: bool = False


@runtime_checkable
class BoundBias(Protocol):
    """A term added to the scores, computed for one tile of queries and keys at a time, differentiable in its parameters."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors in which the bias is differentiable."""
        ...

    def __call__(self, q_index: Int[Tensor, " q"], k_index: Int[Tensor, " k"]) -> Float[Tensor, "heads q k"]:
        """The bias of the queries ``q_index`` at the keys ``k_index``, both as indices into this rank's rows."""
        ...


@runtime_checkable
class Kernel(Protocol):
    """Attention on one rank, as a forward and a backward without autograd.

    q, k and v may be strided views whose last dim is contiguous; ``heads`` is a multiple of ``kv_heads``. Results are fp64 for
    fp64 inputs and fp32 otherwise. A query that no band reaches has out = 0, lse = -inf and no gradient.
    """

    @property
    def name(self) -> str:
        """The value of ``kernel=`` that selects it; used in error messages."""
        ...

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
    ) -> Partial:
        """Attention of ``q`` over the keys that ``bands`` show.

        Args:
            q, k, v: queries, keys and values of this rank; the rows of a batch stand one after another.
            bands: disjoint canonical bands (masks/bands.py) in indices of the rows of q and k.
            scale: the factor of the scores.
            softcap: c replaces a score s by c·tanh(s/c).
            bias: added to the scores after the softcap.

        Returns:
            out [queries, heads, v_dim] and the log-sum-exp of the scores, lse [heads, queries].
        """
        ...

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
        """The gradients of attention for the keys in ``k``, which may be a subset of those that ``out`` and ``lse`` cover.

        Args:
            dout: the gradient of ``out``.
            out, lse: output and log-sum-exp over all keys of each query.
            q, k, v, bands, scale, softcap, bias: as in ``forward``.

        Returns:
            dq, dk, dv and the gradients of ``bias.parameters`` (an empty list without a bias).
        """
        ...


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial results, log-sum-exps and summed gradients: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def finite_lse(lse: Tensor) -> Tensor:
    """``lse`` with -inf (a query that sees no key) replaced by 0, so that exp(score - lse) is exp(-inf) = 0 and not NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def merge_weights(lse: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the softmax of two disjoint sets of keys: out = weight * out_1 + part_weight * out_2.

    Args:
        lse: log-sum-exp over the first set of keys.
        part_lse: log-sum-exp over the second set, of the same shape.

    Returns:
        The log-sum-exp over both sets, the weight of the first set's output and that of the second's, all of the shape of
        ``lse``. A query that sees no key in either set has lse = -inf and weights 0.

    Source: FlashAttention, arXiv:2205.14135, section 3.1.
    """
    both = torch.logaddexp(lse, part_lse)
    reached = finite_lse(both)
    return both, (lse - reached).exp_(), (part_lse - reached).exp_()

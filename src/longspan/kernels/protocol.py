"""The kernel interface: attention on one rank over the bands of a mask, forward and backward. Independent of ranks.

    forward    q, k, v, bands           ->  out, lse         s   = softcap(scale * q·k) + bias, at the keys that the bands show
                                                             lse = log(sum(exp(s)))       out = sum(exp(s - lse) * v)
    backward   dout, q, k, v, out, lse  ->  dq, dk, dv       p   = exp(s - lse)           ds  = p * (dout·v - dout·out)

lse is the log-sum-exp of a query's scores s; dx is the gradient of x.

The backward computes the probabilities p from ``lse`` and never sums over keys. Given the ``out`` and ``lse`` of all keys of a
query, it is therefore exact for any subset of the keys, and the gradients of the subsets add up. Ring attention, key blocks
and sink logits depend on this property.
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
    """What one attention requires of a kernel; ``choose`` asks each kernel whether it lacks one of these.

    Attributes:
        device_type: "cpu", "cuda".
        dtype: the dtype of q, k and v.
        qk_dim, v_dim: the head dims of queries and keys, and of values.
        softcap, bias: whether the attention has one.
        capability: the compute capability of the GPU; None where none is seen.
    """

    device_type: str
    dtype: torch.dtype
    qk_dim: int
    v_dim: int
    softcap: bool = False
    bias: bool = False
    capability: tuple[int, int] | None = None


@runtime_checkable
class BoundBias(Protocol):
    """A term added to the attention scores, computed for one tile of queries and keys at a time: what a kernel gets as
    ``bias``.

    It belongs to certain heads and rows of one rank, and is called with indices of these rows. (The ``Bias`` that a user passes
    is called with positions in the whole sequence.) It is differentiable in ``parameters``.
    """

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors with respect to which the bias is differentiable; empty if there are none."""
        ...

    def __call__(self, q_index: Int[Tensor, " q"], k_index: Int[Tensor, " k"]) -> Float[Tensor, "heads q k"]:
        """The bias between some queries and some keys.

        Args:
            q_index: the queries, as indices into the rows of q that the kernel was given.
            k_index: the keys, as indices into the rows of k.

        Returns:
            [heads, queries, keys], added to the scores of these queries and keys.
        """
        ...


@runtime_checkable
class Kernel(Protocol):
    """Attention on one rank, as a forward and a backward without autograd; pass your own as ``attend(kernel=)``.

    q, k, v, out and dout may be strided views whose last dim is contiguous; ``heads`` is a multiple of ``kv_heads``. Results
    are fp64 for fp64 inputs, and otherwise fp32, or the dtype of q where one fused operator formed them whole; the log-sum-exp
    is never less than fp32. A query that sees no key in any band has out = 0, lse = -inf and no gradient.
    """

    @property
    def name(self) -> str:
        """The value of the argument ``kernel=`` that selects this kernel; also its name in error messages."""
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
            softcap: c replaces a score s by c·tanh(s/c); None: no softcap.
            bias: added to the scores after the softcap; None: no bias.

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
            q, k, v, bands, scale, softcap, bias: the arguments of ``forward``.
            out, lse: output and log-sum-exp over all keys of each query.

        Returns:
            dq, dk, dv and the gradients of ``bias.parameters`` (an empty list without a bias).
        """
        ...


class BuiltInKernel(Kernel, Protocol):
    """A kernel of ``kernels.table.KERNELS``: it says what it does not support, so that "auto" can choose another one."""

    def lacks(self, need: Need) -> str | None:
        """The reason, as a sentence, why this kernel does not support the attention ``need``; None if it does."""
        ...


def contiguous_last_dim(x: Tensor) -> Tensor:
    """``x`` itself if its last dim is contiguous, else a contiguous copy.

    PyTorch's fused operators assume a contiguous last dim without a check; an expanded gradient may lack it.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for partial results, log-sum-exps and summed gradients of tensors of ``dtype``: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def finite_lse(lse: Tensor) -> Tensor:
    """A copy of ``lse`` with -inf (the log-sum-exp of a query that sees no key) replaced by 0.

    The scores of such a query are all -inf, so exp(score - lse) is then exp(-inf) = 0 and not NaN.
    """
    return lse.masked_fill(lse == -torch.inf, 0.0)


def merge_weights(lse: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights that merge attention over two disjoint sets of keys: out = weight * out_1 + part_weight * out_2.

    Args:
        lse: the log-sum-exp of each query's scores over the first set of keys, [heads, queries] or any other shape.
        part_lse: the log-sum-exp over the second set, of the same shape.

    Returns:
        (lse over both sets, weight, part_weight), all of the shape of ``lse``: ``weight`` is the factor of the first set's
        output and ``part_weight`` that of the second's. A query that sees no key in either set has lse = -inf and weights 0.

    Source: FlashAttention, arXiv:2205.14135, section 3.1.
    """
    both = torch.logaddexp(lse, part_lse)
    reached = finite_lse(both)
    return both, (lse - reached).exp_(), (part_lse - reached).exp_()


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge attention over further keys into (``out``, ``lse``), in place.

    Args:
        out: the output so far, [..., dim]; overwritten.
        lse: the log-sum-exp so far, [...]: of each row of ``out``; overwritten.
        part, part_lse: output and log-sum-exp of the same queries over keys that are not in ``out``, of the same shapes.
    """
    both, weight, part_weight = merge_weights(lse, part_lse)
    out.mul_(weight.unsqueeze(-1)).addcmul_(part, part_weight.unsqueeze(-1))
    lse.copy_(both)


def bias_gradients(bias: BoundBias | None) -> list[Tensor]:
    """Zeros for the gradient of each parameter of ``bias``, in the dtype in which they are summed; [] without a bias."""
    return [] if bias is None else [torch.zeros_like(p, dtype=accumulation_dtype(p.dtype)) for p in bias.parameters]


def add_bias_gradients(totals: list[Tensor], parameters: Sequence[Tensor], added: Tensor, dscores: Tensor) -> None:
    """Add one tile's gradients of the bias parameters to ``totals``, in place.

    Args:
        totals: one tensor for each of ``parameters``; those that require no gradient are left unchanged.
        parameters: the parameters of the bias.
        added: the bias of the tile [heads, queries, keys], with its autograd graph.
        dscores: the gradient of the tile's scores after the bias, of the same shape.
    """
    trained = [i for i, parameter in enumerate(parameters) if parameter.requires_grad]
    if not added.requires_grad:
        return
    found = torch.autograd.grad(added, [parameters[i] for i in trained], dscores.to(added.dtype), allow_unused=True)
    for i, gradient in zip(trained, found):
        if gradient is not None:
            totals[i] += gradient

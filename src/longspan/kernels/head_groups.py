"""Grouped-query attention for heads whose group sizes differ: one kernel call for each regular group of heads.

    query heads of rank 1    4 5 6 | 7           28 query heads, 4 key/value heads, 8 ranks: two regular groups,
    key/value heads              0 | 1           so the kernel runs twice, each time with equally many query
                                                 heads per key/value head

Independent of ranks: its inputs are rows of tokens and the bands between queries and keys.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longspan._compat import autograd_below_autograd
from longspan.kernels.protocol import BoundBias, Gradients, Kernel, Partial, accumulation_dtype
from longspan.masks.bands import Band

Groups = tuple[tuple[slice, slice], ...]
"""(query heads, key/value heads) of each regular group, as slices; in a group every key/value head has equally many query
heads."""
BiasOfHeads = Callable[[slice], BoundBias]
"""A function from a slice of the query heads to the bias of these heads."""


class GroupedKernel(NamedTuple):
    """A kernel that is called once for each regular group of heads: what ring.py calls for a head chunk.

    A kernel takes q with heads that are a multiple of those of k and v; a rank's heads need not be. A group is a part of them
    that is regular: each of its key/value heads is read by equally many of its query heads.

    Attributes:
        kernel: the kernel.
        groups: (query heads, key/value heads) of each group, as slices.
        scale: the factor of the scores.
        softcap: c replaces a score s by c·tanh(s/c); None: no softcap.
    """

    kernel: Kernel
    groups: Groups
    scale: float
    softcap: float | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, bands: Sequence[Band], bias: BiasOfHeads | None = None) -> Partial:
        """Attention by one ``Kernel.forward`` call per group, with the results of all groups concatenated along the heads.

        Args:
            q, k, v: [queries, heads, dim] and [keys, kv_heads, dim].
            bands: which of these keys each query sees.
            bias: a function from a slice of the query heads to their bias; None without a bias.

        Returns:
            (out [queries, heads, v_dim], log-sum-exp of the scores [heads, queries]).
        """
        parts = [
            self.kernel.forward(
                q[:, heads], k[:, kv], v[:, kv], bands, self.scale,
                softcap=self.softcap, bias=None if bias is None else bias(heads),
            )
            for heads, kv in self.groups
        ]  # fmt: skip
        return join([out for out, _ in parts], 1), join([lse for _, lse in parts], 0)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *, bands: Sequence[Band], bias: BiasOfHeads | None = None,
    ) -> Gradients:  # fmt: skip
        """The gradients of attention by one ``Kernel.backward`` call per group, put together over the groups.

        Args:
            dout: the gradient of ``out``.
            q, k, v: [queries, heads, dim] and [keys, kv_heads, dim].
            out, lse: output and log-sum-exp over all keys of each query; ``k`` and ``v`` may be a subset of those keys.
            bands: which of these keys each query sees.
            bias: a function from a slice of the query heads to their bias; None without a bias.

        Returns:
            (dq, dk, dv, list of the gradients of the bias parameters). A key/value head that is in two groups gets the sum of
            both.
        """
        with autograd_below_autograd():
            parts = [
                self.kernel.backward(
                    dout[:, heads], q[:, heads], k[:, kv], v[:, kv], out[:, heads], lse[heads], bands, self.scale,
                    softcap=self.softcap, bias=None if bias is None else bias(heads),
                )
                for heads, kv in self.groups
            ]  # fmt: skip
        dq = join([part[0] for part in parts], 1)
        if len(parts) == 1:
            return dq, *parts[0][1:]
        dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in (k, v))
        for (_, kv), (_, dk_part, dv_part, _) in zip(self.groups, parts):
            dk[:, kv] += dk_part  # a key/value head at the border of two groups is in both
            dv[:, kv] += dv_part
        return dq, dk, dv, [torch.stack(grads).sum(0) for grads in zip(*(part[3] for part in parts))]


def join(parts: list[Tensor], dim: int) -> Tensor:
    """The tensors concatenated along ``dim``; a single one is returned without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

"""A kernel bound to one attention of one rank: its scale, softcap and bias, and heads that need not share keys regularly.

    query heads of rank 1    4 5 6 | 7           28 query heads, 4 key/value heads, 8 ranks: two regular groups,
    key/value heads              0 | 1           so the kernel runs twice and each time every key/value head
                                                 serves equally many query heads

Knows nothing of ranks: it sees rows of tokens and the bands that say who looks at whom.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.distributed.layout import Runs
from longspan.kernels.protocol import BoundBias, Kernel
from longspan.masks.bands import Band

Groups = tuple[tuple[slice, slice], ...]
BindBias = Callable[[slice, Runs, tuple[Tensor, ...]], BoundBias]
"""The bias of some of the heads for some rows of keys, with its parameters."""


@dataclass(frozen=True)
class Local:
    """Attention of some rows of queries to some rows of keys. q [queries, heads, qk_dim], k and v [keys, kv heads, dim]."""

    kernel: Kernel
    groups: Groups
    scale: float
    softcap: float | None = None
    bias: BindBias | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bands: Sequence[Band], key_rows: Runs, parameters: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """(out [queries, heads, v_dim], lse [heads, queries]) of the keys given, as ``Kernel.forward``."""
        parts = [
            self.kernel.forward(
                q[:, heads], k[:, kv], v[:, kv], bands, self.scale,
                softcap=self.softcap, bias=self._bind(heads, key_rows, parameters),
            )
            for heads, kv in self.groups
        ]  # fmt: skip
        return _join([out for out, _ in parts], 1), _join([lse for _, lse in parts], 0)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        bands: Sequence[Band], key_rows: Runs, parameters: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
        """(dq, dk, dv, gradients of the bias' parameters), as ``Kernel.backward``: out and lse are of the whole row of keys."""
        with _autograd_below_autograd():
            parts = [
                self.kernel.backward(
                    dout[:, heads], q[:, heads], k[:, kv], v[:, kv], out[:, heads], lse[heads], bands, self.scale,
                    softcap=self.softcap, bias=self._bind(heads, key_rows, parameters),
                )
                for heads, kv in self.groups
            ]  # fmt: skip
        dq = _join([part[0] for part in parts], 1)
        if len(parts) == 1:
            return dq, *parts[0][1:]
        dk, dv = (torch.zeros_like(x, dtype=dq.dtype) for x in (k, v))
        for (_, kv), (_, dk_part, dv_part, _) in zip(self.groups, parts):
            dk[:, kv] += dk_part  # a key/value head at the border of two groups stands in both
            dv[:, kv] += dv_part
        return dq, dk, dv, [torch.stack(grads).sum(0) for grads in zip(*(part[3] for part in parts))]

    def _bind(self, heads: slice, key_rows: Runs, parameters: tuple[Tensor, ...]) -> BoundBias | None:
        return None if self.bias is None else self.bias(heads, key_rows, parameters)


def _autograd_below_autograd() -> AbstractContextManager[None]:
    """Let a kernel ask autograd for the gradients of a bias, in an operator, where the dispatcher has switched it off."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        exclude = exclude.remove(key)
    guard: AbstractContextManager[None] = torch._C._ForceDispatchKeyGuard(include, exclude)
    return guard


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

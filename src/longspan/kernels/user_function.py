"""A kernel made of a user's attention function. The backward calls the function a second time to get its gradients.

    forward    function(q, k, v, bands=..., scale=...)
    backward   torch.func.vjp of the same call

The function returns no log-sum-exp, so partial results cannot be merged: attention raises an error if it is used with a ring
or with sink logits. A ``Kernel`` object, which has a forward with log-sum-exp and a backward, works with both.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.kernels.protocol import BoundBias
from longspan.masks.bands import Band

KernelFunction = Callable[..., Tensor]
"""``function(q, k, v, *, bands, scale) -> out``, differentiable: attention of the rows of q over the rows of k.

q is [queries, heads, dim], k and v are [keys, kv_heads, dim], out is [queries, heads, v_dim]; ``bands`` (masks/bands.py) says
which keys each query sees, ``scale`` is the factor of the scores.
"""


class FunctionKernel:
    """A ``Kernel`` made of the user's attention function; its backward differentiates the function with ``torch.func.vjp``.

    The log-sum-exp that its forward returns is zeros and must not be used. It is called without softcap and bias.

    Args:
        function: called as ``function(q, k, v, bands=..., scale=...)``, returns the output [queries, heads, v_dim].
    """

    def __init__(self, function: KernelFunction) -> None:
        self.function = function
        self.name = getattr(function, "__name__", repr(function))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bands: Sequence[Band], scale: float,
        *, softcap: float | None = None, bias: BoundBias | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        with torch.no_grad():
            out = self.function(q, k, v, bands=bands, scale=scale)
        return out, out.new_zeros(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bands: Sequence[Band], scale: float,
        *, softcap: float | None = None, bias: BoundBias | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
        pull: Any = torch.func.vjp(lambda *inputs: self.function(*inputs, bands=bands, scale=scale), q, k, v)[1]
        dq, dk, dv = pull(dout.to(out.dtype))
        return dq, dk, dv, []

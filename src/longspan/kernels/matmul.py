"""Products of bf16 and fp16 matrices, in fp32 where the CPU multiplies no such halves. Knows nothing of models or ranks.

    x [rows, in] bf16    a block of rows --> fp32, times the weight in fp32, rounded once --> y [rows, out] bf16

A CPU without AVX-512 multiplies halves at a tenth to a fiftieth of the speed of fp32 in PyTorch 2.13, which knows of some only
(``torch.backends.mkldnn``). A product in fp32 is never less exact; a block of rows at a time, it takes the memory of the weight
in fp32.

R rows   I in   O out
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK_ROWS = 512
"""Few enough that a block stays in the cache between its product and the rounding."""


def _slow_on_cpu() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available():
        return frozenset({torch.bfloat16, torch.float16})
    mkldnn = torch.ops.mkldnn
    fast = {torch.bfloat16: mkldnn._is_mkldnn_bf16_supported(), torch.float16: mkldnn._is_mkldnn_fp16_supported()}
    return frozenset(dtype for dtype in fast if not fast[dtype])


SLOW_ON_CPU = _slow_on_cpu()
"""The dtypes that this machine's CPU does not multiply."""


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which to multiply what is in ``dtype``: in that, or in fp32 where the CPU has no products of it."""
    return torch.float32 if device.type == "cpu" and dtype in SLOW_ON_CPU else dtype


def linear(x: Float[Tensor, "*rows in_"], weight: Float[Tensor, "out in_"]) -> Float[Tensor, "*rows out"]:
    """``F.linear(x, weight)``, its gradients included: in fp32, rounded once, where the CPU has no products of both's dtype.

    Under autocast both are rounded to its dtype first, as ``F.linear`` does.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (x.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(kind)
        if product_dtype(dtype, x.device) == dtype:
            return F.linear(x, weight)
        with torch.autocast(kind, enabled=False):
            return linear(x.to(dtype), weight.to(dtype))
    if x.dtype != weight.dtype or product_dtype(x.dtype, x.device) == x.dtype:
        return F.linear(x, weight)
    y: Tensor = _Widened.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


class Linear(nn.Linear):
    """``nn.Linear`` without a bias, by ``linear``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return _times(x, weight_OI.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        return _times(dy, weight_OI) if of_x else None, _sum_of_products(dy, x) if of_weight else None


def _times(x: Tensor, weight_IO: Tensor) -> Tensor:
    y, wide_IO = x.new_empty(*x.shape[:-1], weight_IO.shape[1]), weight_IO.float()
    for x_RI, y_RO in zip(_blocks(x), _blocks(y)):
        y_RO.copy_(x_RI.float() @ wide_IO)
    return y


def _sum_of_products(dy: Tensor, x: Tensor) -> Tensor:
    total_OI = x.new_zeros(dy.shape[-1], x.shape[-1], dtype=torch.float32)
    for dy_RO, x_RI in zip(_blocks(dy), _blocks(x)):
        total_OI.addmm_(dy_RO.float().T, x_RI.float())
    return total_OI.to(x.dtype)


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    blocks: tuple[Tensor, ...] = x.reshape(-1, x.shape[-1]).split(BLOCK_ROWS)
    return blocks

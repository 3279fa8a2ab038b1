"""Matrix multiplication (GEMM) in bf16 and fp16 that computes in fp32 on CPUs without native half-precision GEMM.

    x [rows, in] bf16    block of rows -> fp32, multiplied by the fp32 weight, rounded once -> y [rows, out] bf16

On a CPU without AVX-512, PyTorch 2.13 multiplies bf16 and fp16 matrices at a tenth to a fiftieth of the speed of fp32;
``torch.backends.mkldnn`` reports which dtypes are fast. fp32 is never less exact. Working on one block of rows at a time, the
extra memory is one fp32 copy of the weight. Independent of models and ranks.

The suffix of a tensor's name gives its dims: R rows, I in, O out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longspan import _compat

BLOCK_ROWS = 512
"""The number of rows that are multiplied at a time: few enough that the fp32 result is still in the CPU's cache when it is
rounded."""


def _slow_on_cpu() -> frozenset[torch.dtype]:
    """The half-precision dtypes (bf16, fp16) for which this machine's CPU has no native GEMM."""
    return frozenset(dtype for dtype in (torch.bfloat16, torch.float16) if not _compat.has_cpu_gemm(dtype))


SLOW_ON_CPU = _slow_on_cpu()
"""The dtypes for which this machine's CPU has no native GEMM."""


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which to multiply matrices of ``dtype`` on ``device``.

    Returns:
        fp32 for bf16 and fp16 on a CPU without native GEMM in that dtype; otherwise ``dtype`` itself.
    """
    return torch.float32 if device.type == "cpu" and dtype in SLOW_ON_CPU else dtype


def linear(x: Float[Tensor, "*rows in_"], weight: Float[Tensor, "out in_"]) -> Float[Tensor, "*rows out"]:
    """``F.linear(x, weight)`` without a bias, differentiable, in fp32 on a CPU without native GEMM in the inputs' dtype.

    Args:
        x: [..., in].
        weight: [out, in].

    Returns:
        [..., out] in the dtype of ``x``. Under autocast both inputs are cast to the autocast dtype first, as ``F.linear`` does
        (fp64 is not).
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
    """``nn.Linear`` without a bias, for the Decoder: on CPUs without native bf16 GEMM its products are formed in fp32.

    Args:
        in_features, out_features: its sizes, as of ``nn.Linear``.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


class _Widened(torch.autograd.Function):
    """Autograd function of ``x @ weight.T``: result and gradients are computed in fp32, then rounded to the inputs' dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return _multiply(x, weight_OI.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        needs_dx, needs_dweight = ctx.needs_input_grad
        return _multiply(dy, weight_OI) if needs_dx else None, _weight_gradient(dy, x) if needs_dweight else None


def _multiply(x: Tensor, weight_IO: Tensor) -> Tensor:
    """``x @ weight_IO`` ([..., in] times [in, out]), computed in fp32 one block of rows at a time, in the dtype of ``x``."""
    y, wide_IO = x.new_empty(*x.shape[:-1], weight_IO.shape[1]), weight_IO.float()
    for x_RI, y_RO in zip(_blocks(x), _blocks(y)):
        y_RO.copy_(x_RI.float() @ wide_IO)
    return y


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient [out, in] of a weight, ``dy.T @ x`` with all leading dims as rows, from ``dy`` [..., out] and ``x`` [...,
    in].

    It is summed over blocks of rows in fp32, then cast to the dtype of ``x``.
    """
    total_OI = x.new_zeros(dy.shape[-1], x.shape[-1], dtype=torch.float32)
    for dy_RO, x_RI in zip(_blocks(dy), _blocks(x)):
        total_OI.addmm_(dy_RO.float().T, x_RI.float())
    return total_OI.to(x.dtype)


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    """``x`` [..., dim] as [rows, dim], in blocks of ``BLOCK_ROWS`` rows."""
    blocks: tuple[Tensor, ...] = x.reshape(-1, x.shape[-1]).split(BLOCK_ROWS)
    return blocks

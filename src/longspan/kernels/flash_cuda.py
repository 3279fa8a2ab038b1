"""PyTorch's flash attention operators on CUDA, applied to one stack of tiles. Never run on a GPU, only with fake tensors.

    LOWER      is_causal (aligned bottom right, which is top left in a square)
    UPPER      window (0, unlimited)                    BAND  window (keys - rows, 0), aligned bottom right
    documents  one variable-length call for all of them: cum_seq_q, cum_seq_k

The same functions as flash_cpu.py. The operators take [tiles, tokens, heads, dim]. For a dense call the cumulative lengths are
None: the operators take an empty tensor for a variable-length call.
"""

from itertools import accumulate

import torch
from torch import Tensor

from longspan import _compat
from longspan.kernels.tiles import Shape, Stack, corners

_forward_cuda = _compat.flash_forward("cuda")
_backward_cuda = _compat.flash_backward("cuda")

arrange = corners
"""Function from stacks to stacks, applied before the calls: joins packed documents into one variable-length call."""

Lengths = tuple[Tensor | None, Tensor | None, int, int]  # cum_seq_q, cum_seq_k, max_q, max_k


def lacks(dtype: torch.dtype, dim: int) -> str | None:
    """The reason, as a sentence, why the operators do not support this dtype and head dim; None if they do."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash attention on cuda takes fp16 and bf16, not {dtype}"
    if dim % 8 or dim > 256:
        return f"flash attention on cuda takes head dims that are multiples of 8 up to 256, not {dim}"
    return None


def forward(stack: Stack, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    left, right = _window(stack)
    out, lse, *_ = _forward_cuda(
        *(_operand(stack, x) for x in (q, k, v)), *_lengths(stack, q.device), 0.0, stack.shape is Shape.LOWER, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return _tile(stack, out), lse[None] if stack.documents else lse


def backward(
    stack: Stack, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = _window(stack)
    dq, dk, dv = _backward_cuda(
        *(_operand(stack, x) for x in (dout, q, k, v, out)), (lse[0] if stack.documents else lse).contiguous(),
        *_lengths(stack, q.device), 0.0, stack.shape is Shape.LOWER, None, None,  # without dropout there is no random state
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return _tile(stack, dq), _tile(stack, dk), _tile(stack, dv)


def _window(stack: Stack) -> tuple[int | None, int | None]:
    if stack.shape is Shape.UPPER:
        return 0, None
    return (stack.keys - stack.rows, 0) if stack.shape is Shape.BAND else (None, None)


def _lengths(stack: Stack, device: torch.device) -> Lengths:
    if not stack.documents:
        return None, None, stack.rows, stack.keys
    rows, keys = zip(*stack.documents)
    cum_seq_q, cum_seq_k = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (rows, keys)
    )
    return cum_seq_q, cum_seq_k, max(rows), max(keys)


def _operand(stack: Stack, x_THSD: Tensor) -> Tensor:
    x_TSHD = x_THSD.transpose(1, 2)
    return x_TSHD[0] if stack.documents else x_TSHD


def _tile(stack: Stack, x: Tensor) -> Tensor:
    return (x[None] if stack.documents else x).transpose(1, 2)

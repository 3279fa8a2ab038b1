"""PyTorch's fused flash operators on one stack of tiles. Knows nothing of bands, of merging, or of where the tiles lie.

    RECTANGLE  no mask          LOWER  is_causal          UPPER  LOWER read backwards          BAND  one small constant mask

[tiles, heads, rows, dim] in and out, in the dtype of the inputs; lse is [tiles, heads, rows] in fp32 (fp64 for fp64). Tiles may
be overlapping views. ``out`` and ``lse`` of the backward may be those of more keys than the tile has.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from longspan.kernels import flash_cuda as cuda
from longspan.kernels.matmul import product_dtype
from longspan.kernels.tiles import Shape, Stack

FlashPartial = tuple[Float[Tensor, "tiles heads rows dim"], Float[Tensor, "tiles heads rows"]]
FlashGradients = tuple[
    Float[Tensor, "tiles heads rows dim"], Float[Tensor, "tiles kv_heads keys dim"], Float[Tensor, "tiles kv_heads keys dim"]
]

_forward_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def on_cuda(x: Tensor) -> bool:
    return x.is_cuda


def lacks(device_type: str, dtype: torch.dtype, dim: int) -> str | None:
    """Why the operators of this device cannot do it, or None."""
    if device_type == "cuda":
        return cuda.lacks(dtype, dim)
    return None if device_type == "cpu" else f"PyTorch's flash operators are for cpu and cuda, not {device_type}"


def forward(
    stack: Stack,
    q: Float[Tensor, "tiles heads rows dim"],
    k: Float[Tensor, "tiles kv_heads keys dim"],
    v: Float[Tensor, "tiles kv_heads keys dim"],
    scale: float,
) -> FlashPartial:
    """Every query of a tile sees a key: the operator's lse of a fully masked row (0.0, not -inf) cannot occur."""
    q, k, v = (_readable(x) for x in (q, k, v))
    if on_cuda(q):
        return cuda.forward(stack, q, k, v, scale)
    if stack.shape is Shape.UPPER:
        q, k, v = (x.flip(2) for x in (q, k, v))
    out, lse = _forward_cpu(q, k, v, 0.0, _is_causal(stack), attn_mask=_mask(stack, q.dtype), scale=scale)
    return (out.flip(2), lse.flip(2)) if stack.shape is Shape.UPPER else (out, lse)


def backward(
    stack: Stack,
    dout: Float[Tensor, "tiles heads rows dim"],
    q: Float[Tensor, "tiles heads rows dim"],
    k: Float[Tensor, "tiles kv_heads keys dim"],
    v: Float[Tensor, "tiles kv_heads keys dim"],
    out: Float[Tensor, "tiles heads rows dim"],
    lse: Float[Tensor, "tiles heads rows"],
    scale: float,
) -> FlashGradients:
    """dq, dk, dv of each tile, in fp32 where a CPU must; tiles that share keys each give their own part."""
    dout, q, k, v, out = (_readable(x) for x in (dout, q, k, v, out))
    if on_cuda(q):
        return cuda.backward(stack, dout, q, k, v, out, lse, scale)
    if stack.shape is Shape.UPPER:
        dout, q, k, v, out, lse = (x.flip(2) for x in (dout, q, k, v, out, lse))
    dout, q, k, v, out = (x.to(product_dtype(x.dtype, x.device)) for x in (dout, q, k, v, out))
    causal, mask = _is_causal(stack), _mask(stack, q.dtype)
    dq, dk, dv = _backward_cpu(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return (dq.flip(2), dk.flip(2), dv.flip(2)) if stack.shape is Shape.UPPER else (dq, dk, dv)


def _readable(x: Tensor) -> Tensor:
    """The operators read the elements of a head side by side, whatever the stride says; a gradient may be expanded."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _is_causal(stack: Stack) -> bool:
    """LOWER, and UPPER once it is read backwards."""
    return stack.shape in (Shape.LOWER, Shape.UPPER)


def _mask(stack: Stack, dtype: torch.dtype) -> Tensor | None:
    """For a BAND: query i sees keys i to i + keys - rows. The operator wants a float mask of q's dtype, and broadcasts it."""
    if stack.shape is not Shape.BAND:
        return None
    away = torch.arange(stack.keys) - torch.arange(stack.rows)[:, None]
    return torch.zeros(away.shape, dtype=dtype).masked_fill_((away < 0) | (away > stack.keys - stack.rows), -torch.inf)

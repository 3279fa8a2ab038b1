"""PyTorch's fused flash attention operators on the CPU, applied to one stack of tiles. Independent of bands and of merging.

    RECTANGLE  no mask        LOWER  is_causal        UPPER  LOWER with tokens reversed        BAND  one small constant mask

Inputs and outputs are [tiles, heads, rows, dim] in one dtype; lse, the log-sum-exp of each query's scores, is [tiles, heads,
rows] in fp32 (fp64 for fp64). Tiles may be overlapping views whose last dim is contiguous. ``out`` and ``lse`` that the
backward is given may cover more keys than the tile has.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from longspan import _compat
from longspan.kernels.matmul import product_dtype
from longspan.kernels.tiles import Shape, Stack

FlashPartial = tuple[Float[Tensor, "tiles heads rows dim"], Float[Tensor, "tiles heads rows"]]
FlashGradients = tuple[
    Float[Tensor, "tiles heads rows dim"], Float[Tensor, "tiles kv_heads keys dim"], Float[Tensor, "tiles kv_heads keys dim"]
]

_forward_cpu, _backward_cpu = _compat.attention_operators("flash cpu")


def lacks(dtype: torch.dtype, dim: int, capability: tuple[int, int] | None) -> str | None:
    """The reason why the operators do not support this dtype and head dim: always None, the CPU operators support all."""
    return None


def forward(
    stack: Stack,
    q: Float[Tensor, "tiles heads rows dim"],
    k: Float[Tensor, "tiles kv_heads keys dim"],
    v: Float[Tensor, "tiles kv_heads keys dim"],
    scale: float,
) -> FlashPartial:
    """Attention of each tile of a stack, by one operator call.

    Args:
        stack: the tiles; its shape says which keys the queries of a tile see.
        q, k, v: the queries, keys and values of each tile.
        scale: the factor of the scores.

    Returns:
        (out [tiles, heads, rows, dim], log-sum-exp of the scores [tiles, heads, rows]). The operator would give a query without
        keys 0.0 instead of -inf; every query of a tile sees a key.
    """
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
    """The gradients (dq, dk, dv) of each tile of a stack, by one operator call.

    Args:
        stack: the tiles; its shape says which keys the queries of a tile see.
        dout: the gradient of the output.
        q, k, v: the queries, keys and values of each tile.
        out, lse: output and log-sum-exp of these queries over all their keys, which may be more than the tile's.
        scale: the factor of the scores.

    Returns:
        dq [tiles, heads, rows, dim], dk and dv [tiles, kv_heads, keys, dim] in the dtype of the inputs, or in fp32 on a CPU
        without native GEMM in that dtype. Tiles with overlapping keys return one gradient each; the caller adds them.
    """
    if stack.shape is Shape.UPPER:
        dout, q, k, v, out, lse = (x.flip(2) for x in (dout, q, k, v, out, lse))
    dout, q, k, v, out = (x.to(product_dtype(x.dtype, x.device)) for x in (dout, q, k, v, out))
    causal, mask = _is_causal(stack), _mask(stack, q.dtype)
    dq, dk, dv = _backward_cpu(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return (dq.flip(2), dk.flip(2), dv.flip(2)) if stack.shape is Shape.UPPER else (dq, dk, dv)


def _is_causal(stack: Stack) -> bool:
    """Whether the operator is called with ``is_causal``: for LOWER tiles, and for UPPER, whose tokens are reversed for the
    call."""
    return stack.shape in (Shape.LOWER, Shape.UPPER)


def _mask(stack: Stack, dtype: torch.dtype) -> Tensor | None:
    """The additive mask [rows, keys] of BAND tiles in ``dtype``: 0 where query i sees keys i to i + keys - rows, else -inf.

    None for tiles of every other shape.
    """
    if stack.shape is not Shape.BAND:
        return None
    away = torch.arange(stack.keys) - torch.arange(stack.rows)[:, None]
    return torch.zeros(away.shape, dtype=dtype).masked_fill_((away < 0) | (away > stack.keys - stack.rows), -torch.inf)

"""PyTorch's fused flash operators on one stack of tiles. Knows nothing of bands, of merging, or of where the tiles lie.

    RECTANGLE  no mask          LOWER  is_causal          UPPER  LOWER read backwards          BAND  one small constant mask

[tiles, heads, rows, dim] in and out, in the dtype of the inputs; lse is [tiles, heads, rows] in fp32 (fp64 for fp64). Tiles may
be overlapping views. ``out`` and ``lse`` of the backward may be those of more keys than the tile has.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from longspan.kernels.tiles import Shape

FlashPartial = tuple[Float[Tensor, "tiles heads rows dim"], Float[Tensor, "tiles heads rows"]]
FlashGradients = tuple[
    Float[Tensor, "tiles heads rows dim"], Float[Tensor, "tiles kv_heads keys dim"], Float[Tensor, "tiles kv_heads keys dim"]
]

_forward_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def lacks(device_type: str, dtype: torch.dtype, dim: int) -> str | None:
    """Why the operators of this device cannot do it, or None."""
    if device_type != "cpu":
        return f"no fused attention is known here for {device_type}"
    return None


def forward(
    shape: Shape,
    q: Float[Tensor, "tiles heads rows dim"],
    k: Float[Tensor, "tiles kv_heads keys dim"],
    v: Float[Tensor, "tiles kv_heads keys dim"],
    scale: float,
) -> FlashPartial:
    """Every query of a tile sees a key: the operator's lse of a fully masked row (0.0, not -inf) cannot occur."""
    if shape is Shape.UPPER:
        out, lse = forward(Shape.LOWER, q.flip(2), k.flip(2), v.flip(2), scale)
        return out.flip(2), lse.flip(2)
    return _forward_cpu(q, k, v, 0.0, shape is Shape.LOWER, attn_mask=_mask(shape, q, k), scale=scale)  # type: ignore[no-any-return]


def backward(
    shape: Shape,
    dout: Float[Tensor, "tiles heads rows dim"],
    q: Float[Tensor, "tiles heads rows dim"],
    k: Float[Tensor, "tiles kv_heads keys dim"],
    v: Float[Tensor, "tiles kv_heads keys dim"],
    out: Float[Tensor, "tiles heads rows dim"],
    lse: Float[Tensor, "tiles heads rows"],
    scale: float,
) -> FlashGradients:
    if shape is Shape.UPPER:
        dout, q, k, v, out, lse = (x.flip(2) for x in (dout, q, k, v, out, lse))
        dq, dk, dv = backward(Shape.LOWER, dout, q, k, v, out, lse, scale)
        return dq.flip(2), dk.flip(2), dv.flip(2)
    causal = shape is Shape.LOWER
    return _backward_cpu(dout, q, k, v, out, lse, 0.0, causal, attn_mask=_mask(shape, q, k), scale=scale)  # type: ignore[no-any-return]


def _mask(shape: Shape, q: Tensor, k: Tensor) -> Tensor | None:
    """For a BAND: query i sees keys i to i + keys - rows. The operator wants a float mask of q's dtype, and broadcasts it."""
    if shape is not Shape.BAND:
        return None
    rows, keys = q.shape[2], k.shape[2]
    away = torch.arange(keys, device=q.device) - torch.arange(rows, device=q.device)[:, None]
    return torch.zeros_like(away, dtype=q.dtype).masked_fill_((away < 0) | (away > keys - rows), -torch.inf)

"""Rotary position embeddings (RoPE): the tables of cos and sin, and their application to queries and keys.

    (x[i], x[i + D/2])  --rotated by position * theta^(-2i/D)-->        i = 0 ... D/2 - 1

The product of a rotated query and a rotated key depends only on the difference of their positions, so each rank rotates its
own tokens by their positions in the whole row. Independent of models. Source: arXiv:2104.09864.

    B rows   S my tokens   H heads   D head dim
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROTATED_TOKENS, ROTATED_TOKENS_ON_GPU = 2_048, 65_536
"""How many tokens of a row are rotated at a time, so that the fp32 temporaries are small compared with the row.

On a GPU a tile is several launches of kernels, which must be long compared with a launch.
"""


def rope(
    position_ids: Int[Tensor, "rows my_tokens"], head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "rows my_tokens 1 half"], Float[Tensor, "rows my_tokens 1 half"]]:
    """The cosine and sine of the RoPE angle of each position and each pair of dims (arXiv:2104.09864).

    The angles are computed in fp64: at position 1,000,000 an fp32 product is off by 0.06 rad.

    Args:
        position_ids: positions in the whole row.
        head_dim: the number of dims of a head, even.
        theta: base of the frequencies.
        dtype: the dtype of the model.

    Returns:
        (cos, sin) in fp32, or fp64 for an fp64 model.
    """
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float64) / head_dim
    angles = position_ids[..., None, None].double() * theta**-exponent
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.cos().to(wide), angles.sin().to(wide)


def rotate(
    x_BSHD: Float[Tensor, "rows my_tokens heads head_dim"],
    cos: Float[Tensor, "rows my_tokens 1 half"],
    sin: Float[Tensor, "rows my_tokens 1 half"],
) -> Float[Tensor, "rows my_tokens heads head_dim"]:
    """Queries or keys with RoPE applied: each pair of dims (i, i + head_dim/2) is rotated by the angle in the tables.

    Args:
        x_BSHD: queries or keys; not changed.
        cos, sin: the tables that ``rope`` returns. The computation is in their dtype.

    Returns:
        A new tensor of the shape and dtype of ``x_BSHD``.
    """
    rotated: Tensor = _Rotate.apply(x_BSHD, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotate(torch.autograd.Function):
    """Autograd function of ``rotate``: it saves only the tables, and its backward rotates the gradient by the opposite
    angle."""

    @staticmethod
    def forward(ctx: Any, x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x_BSHD, cos, sin)

    @staticmethod
    def backward(ctx: Any, dx_BSHD: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(dx_BSHD, cos, -sin), None, None


def _rotated(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x_BSHD`` rotated by the tables, in their dtype, as a new tensor in the dtype of ``x_BSHD``."""
    rotated = torch.empty(x_BSHD.shape, dtype=x_BSHD.dtype, device=x_BSHD.device)
    size = ROTATED_TOKENS if x_BSHD.device.type == "cpu" else ROTATED_TOKENS_ON_GPU
    tiles = (x.split(size, 1) for x in (x_BSHD, rotated, cos, sin))
    for x, out, tile_cos, tile_sin in zip(*tiles):
        (first, second), half = x.to(cos.dtype).chunk(2, dim=-1), x.shape[-1] // 2
        out[..., :half] = first * tile_cos - second * tile_sin
        out[..., half:] = second * tile_cos + first * tile_sin
    return rotated

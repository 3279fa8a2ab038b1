r"""Kernel "online": blocked attention with online softmax in plain PyTorch, for options that fused operators lack.

      keys ->  |  1024   |  1024   |      The queries and keys are cut into the blocks of a grid. A tile is the smallest
     queries   |\--------+---------|      rectangle around the bands' part of one block. A block that no band intersects
     a few     |#\       |         |      has no tile; a tile that one band fills needs no mask. Each tile gives a partial
     hundred   |##\      |         |      softmax, merged into its queries by log-sum-exp. The backward recomputes each
                                          tile from the log-sum-exp over all keys.

Supports softcap, a bias that is computed one tile at a time and is differentiable in its parameters, and any value head dim.
All sums are in fp32 (fp64 for fp64). Memory beyond inputs and results is that of one tile. Independent of ranks.

The suffix of a tensor's name gives its dims: N tokens, S queries of a tile, T its keys, H heads, K kv heads, G * S the rows of
all query heads of one kv head, D head dim.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from longspan.kernels.protocol import (
    BoundBias,
    Gradients,
    Need,
    Partial,
    accumulation_dtype,
    add_bias_gradients,
    bias_gradients,
    finite_lse,
    merge_into,
)
from longspan.masks.bands import Band, rectangle, shift, trim

BLOCK_KEYS = 1024
"""The number of keys of one block of the grid into which queries and keys are cut."""
TILE_SCORES = 2**22
"""The most scores (heads x queries x keys) of one tile; it determines the number of queries of a block."""


class Tile(NamedTuple):
    """A rectangle of queries and keys whose scores are computed together; ``tiles`` yields it.

    Attributes:
        queries, keys: slices of the rows of q and of k.
        bands: the parts of the mask's bands inside the rectangle, in indices relative to its first query and first key.
    """

    queries: slice
    keys: slice
    bands: tuple[Band, ...]


class Online:
    """Kernel "online": softmax(softcap(scale * q @ k.T) + bias) @ v over the visible keys, one tile at a time."""

    name = "online"

    def lacks(self, need: Need) -> str | None:
        """Always None, because this kernel supports every attention. (Other kernels return the reason why they do not.)"""
        return None

    def forward(
        self,
        q: Float[Tensor, "queries heads qk_dim"],
        k: Float[Tensor, "keys kv_heads qk_dim"],
        v: Float[Tensor, "keys kv_heads v_dim"],
        bands: Sequence[Band],
        scale: float,
        *,
        softcap: float | None = None,
        bias: BoundBias | None = None,
    ) -> Partial:
        heads = q.shape[1]
        out_HND = q.new_zeros((heads, q.shape[0], v.shape[2]), dtype=accumulation_dtype(q.dtype))
        lse_HN = out_HND.new_full(out_HND.shape[:2], -torch.inf)
        for tile in tiles(bands, heads):
            scores = _Scores(q, k, tile, scale, softcap, None if bias is None else _bias_values(bias, tile, q.device))
            part_lse = scores.masked.logsumexp(2)
            weights = (scores.masked - finite_lse(part_lse).unsqueeze(2)).exp_()
            part = _by_kv_head(weights, k.shape[1]) @ _heads_first(v[tile.keys], weights.dtype)
            merge_into(out_HND[:, tile.queries], lse_HN[:, tile.queries], part.view(heads, -1, v.shape[2]), part_lse)
        return out_HND.transpose(0, 1), lse_HN

    def backward(
        self,
        dout: Float[Tensor, "queries heads v_dim"],
        q: Float[Tensor, "queries heads qk_dim"],
        k: Float[Tensor, "keys kv_heads qk_dim"],
        v: Float[Tensor, "keys kv_heads v_dim"],
        out: Float[Tensor, "queries heads v_dim"],
        lse: Float[Tensor, "heads queries"],
        bands: Sequence[Band],
        scale: float,
        *,
        softcap: float | None = None,
        bias: BoundBias | None = None,
    ) -> Gradients:
        dtype, heads, kv_heads = accumulation_dtype(q.dtype), q.shape[1], k.shape[1]
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        dbias = bias_gradients(bias)
        for tile in tiles(bands, heads):
            with torch.enable_grad():
                added = None if bias is None else bias(*_indices(tile, q.device))
            scores = _Scores(q, k, tile, scale, softcap, None if added is None else added.detach())
            weights = scores.masked.sub_(finite_lse(lse[:, tile.queries]).unsqueeze(2)).exp_()
            dout_HSD, out_HSD = (_heads_first(x[tile.queries], dtype) for x in (dout, out))
            dout_KGD = _by_kv_head(dout_HSD, kv_heads)
            dweights = (dout_KGD @ _heads_first(v[tile.keys], dtype).mT).view_as(weights)
            dscores = weights * dweights.sub_((dout_HSD * out_HSD).sum(2, keepdim=True))
            if bias is not None and added is not None:
                add_bias_gradients(dbias, bias.parameters, added, dscores)
            dscores_KGT = _by_kv_head(dscores.mul_(scores.slope).mul_(scale), kv_heads)
            dq_HSD = (dscores_KGT @ _heads_first(k[tile.keys], dtype)).view(heads, -1, q.shape[2])
            dq[tile.queries] += dq_HSD.transpose(0, 1)
            dk[tile.keys] += (dscores_KGT.mT @ scores.q_KGD).transpose(0, 1)
            dv[tile.keys] += (_by_kv_head(weights, kv_heads).mT @ dout_KGD).transpose(0, 1)
        return dq, dk, dv, dbias


def tiles(bands: Sequence[Band], heads: int) -> Iterator[Tile]:
    """Yield the tiles that together cover every (query, key) pair of the bands exactly once.

    Queries and keys are cut into a grid of blocks; each block that a band intersects gives one tile, the smallest rectangle
    around the bands' part of it.

    Args:
        bands: disjoint canonical bands (masks/bands.py).
        heads: the number of query heads; the more heads, the fewer queries a block has, so that a tile has at most about
            ``TILE_SCORES`` scores.
    """
    rows, keys = min(512, max(32, TILE_SCORES // (BLOCK_KEYS * heads))), BLOCK_KEYS
    grid: dict[tuple[int, int], list[Band]] = defaultdict(list)
    for band in bands:
        for i in range(band.q_start // rows, (band.q_stop - 1) // rows + 1):
            # in these rows the band reaches only keys near its diagonal: trim it before cutting it by columns
            strip = trim(max(band.q_start, i * rows), min(band.q_stop, (i + 1) * rows), *band[2:])
            assert strip is not None, "every query of a canonical band sees a key"
            for j in range(strip.k_start // keys, (strip.k_stop - 1) // keys + 1):
                piece = trim(*strip[:2], max(strip.k_start, j * keys), min(strip.k_stop, (j + 1) * keys), *strip[4:])
                if piece is not None:
                    grid[i, j].append(piece)
    for pieces in grid.values():
        q_start, q_stop = min(p.q_start for p in pieces), max(p.q_stop for p in pieces)
        k_start, k_stop = min(p.k_start for p in pieces), max(p.k_stop for p in pieces)
        yield Tile(slice(q_start, q_stop), slice(k_start, k_stop), tuple(shift(p, -q_start, -k_start) for p in pieces))


class _Scores:
    """The attention scores of one tile, computed when it is made.

    Args:
        q, k: queries and keys, of which ``tile`` says the rows.
        scale, softcap, bias: factor of the scores; c of c·tanh(s/c), or None; the tile's bias [heads, queries, keys], or None.

    Attributes:
        masked: the scores [heads, queries, keys] after softcap and bias, -inf at hidden keys.
        slope: the derivative of the softcap at each score, of the same shape; 1.0 without a softcap.
        q_KGD: the queries in the accumulation dtype, [kv_heads, query heads of a kv head * queries, dim].
    """

    def __init__(self, q: Tensor, k: Tensor, tile: Tile, scale: float, softcap: float | None, bias: Tensor | None) -> None:
        dtype, heads = accumulation_dtype(q.dtype), q.shape[1]
        self.q_KGD = _by_kv_head(_heads_first(q[tile.queries], dtype), k.shape[1])
        k_KTD = _heads_first(k[tile.keys], dtype)
        scores = (self.q_KGD @ k_KTD.mT).mul_(scale).view(heads, -1, k_KTD.shape[1])
        self.slope: Tensor | float = 1.0
        if softcap is not None:
            tanh = scores.div_(softcap).tanh_()
            self.slope = 1 - tanh * tanh
            scores = tanh.mul_(softcap)
        if bias is not None:
            scores.add_(bias)
        hidden = _hidden(tile, q.device)
        self.masked = scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _hidden(tile: Tile, device: torch.device) -> Tensor | None:
    """The boolean mask [queries, keys] of a tile on ``device``, True where the query does not see the key.

    None if every query sees every key.
    """
    queries, keys = tile.queries.stop - tile.queries.start, tile.keys.stop - tile.keys.start
    if tile.bands == (rectangle(0, queries, 0, keys),):
        return None
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=device)
    for band in tile.bands:
        rows = torch.arange(band.q_start, band.q_stop, device=device)[:, None]
        away = torch.arange(band.k_start, band.k_stop, device=device) - rows
        hidden[band.q_start : band.q_stop, band.k_start : band.k_stop] &= (away < band.lo) | (away > band.hi)
    return hidden


def _heads_first(x_SHD: Tensor, dtype: torch.dtype) -> Tensor:
    """``x_SHD`` [tokens, heads, dim] as a contiguous [heads, tokens, dim] in ``dtype``."""
    return x_SHD.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format)


def _by_kv_head(x_HSD: Tensor, kv_heads: int) -> Tensor:
    """[heads, rows, dim] as [kv_heads, heads / kv_heads * rows, dim]: under each kv head the rows of its query heads."""
    return x_HSD.reshape(kv_heads, -1, x_HSD.shape[2])


def _indices(tile: Tile, device: torch.device) -> tuple[Tensor, Tensor]:
    """The indices of the tile's queries and of its keys, among the rows of q and of k, as two tensors on ``device``."""
    q_index, k_index = (torch.arange(x.start, x.stop, device=device) for x in (tile.queries, tile.keys))
    return q_index, k_index


def _bias_values(bias: BoundBias, tile: Tile, device: torch.device) -> Tensor:
    """The bias of a tile, [heads, queries, keys], without a graph."""
    with torch.no_grad():
        return bias(*_indices(tile, device))

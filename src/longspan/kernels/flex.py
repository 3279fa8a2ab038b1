"""Kernel "flex": FlexAttention with a block mask built from the bands, compiled for CUDA. It has never run on a GPU.

    bands  ->  the key intervals of each query  ->  BlockMask  ->  flex_attention, compiled

          query   interval 0   interval 1          A query has one interval for each band that contains it, most often one or
            0      [0, 1)        -                 two; the intervals take memory of tokens x that number.
            1      [0, 2)      [7, 9)

flex_attention's own backward (autograd) covers only the keys of its call, but the gradients that this kernel is given are
those of the output merged over all keys. Its backward therefore first computes the gradients of the partial result: with w =
exp(lse_part - lse), dout_part = w * dout and dlse_part = w * (dout · (out_part - out)).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longspan import _compat
from longspan.errors import KernelError
from longspan.kernels.protocol import BoundBias, Gradients, Need, Partial, accumulation_dtype
from longspan.masks.bands import Band

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import AuxOutput, BlockMask


LEAST_DIM = 16
"""The smallest head dim that inductor's kernel for CUDA takes."""


class Flex:
    """Kernel "flex": ``flex_attention`` for any bands, with softcap, and with a value head dim that may differ from q's."""

    name = "flex"

    def lacks(self, need: Need) -> str | None:
        """The reason, as a sentence, why this kernel does not support the attention ``need``; None if it does."""
        if need.device_type != "cuda":
            return f"flex_attention has no backward on {need.device_type}, only on cuda"
        if need.dtype == torch.float64:
            return "flex_attention is compiled for fp32, bf16 and fp16, not for fp64"
        if min(need.qk_dim, need.v_dim) < LEAST_DIM:
            return f"flex_attention is compiled for head dims of at least {LEAST_DIM}, not {min(need.qk_dim, need.v_dim)}"
        if need.bias:
            return "flex_attention takes a bias score by score, not tile by tile"
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
        self._refuse(q, v, softcap, bias)
        dtype = accumulation_dtype(q.dtype)
        if not bands:
            out = q.new_zeros((*q.shape[:2], v.shape[2]), dtype=dtype)
            return out, out.new_full((q.shape[1], q.shape[0]), -torch.inf)
        out, lse = _attend(q, k, v, bands, scale, softcap)
        return out.to(dtype), lse.to(dtype)

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
        self._refuse(q, v, softcap, bias)
        dtype = accumulation_dtype(q.dtype)
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        if not bands:
            dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
            return dq, dk, dv, []
        with torch.enable_grad():
            part, part_lse = _attend(inputs[0], inputs[1], inputs[2], bands, scale, softcap)
        dpart, dpart_lse = merge_gradients(dout, out, lse, part.detach(), part_lse.detach())
        grads = torch.autograd.grad([part, part_lse], inputs, [dpart.to(part.dtype), dpart_lse.to(part_lse.dtype)])
        dq, dk, dv = (x.to(dtype) for x in grads)
        return dq, dk, dv, []

    def _refuse(self, q: Tensor, v: Tensor, softcap: float | None, bias: BoundBias | None) -> None:
        """Raise KernelError if this kernel lacks something that a call with these arguments needs; None: no softcap, no
        bias."""
        need = Need(q.device.type, q.dtype, q.shape[2], v.shape[2], softcap=softcap is not None, bias=bias is not None)
        if (reason := self.lacks(need)) is not None:
            raise KernelError(f"kernel='flex' cannot do this: {reason}; use kernel='auto'")


def merge_gradients(
    dout: Float[Tensor, "queries heads v_dim"],
    out: Float[Tensor, "queries heads v_dim"],
    lse: Float[Tensor, "heads queries"],
    part: Float[Tensor, "queries heads v_dim"],
    part_lse: Float[Tensor, "heads queries"],
) -> Partial:
    """The backward of merging one partial result of attention, over some of the keys, into the output over all keys.

    Args:
        dout: the gradient of the merged output.
        out, lse: the merged output and log-sum-exp, over all keys.
        part, part_lse: the partial output and log-sum-exp, over some of the keys.

    Returns:
        The gradients of ``part`` [queries, heads, v_dim] and of ``part_lse`` [heads, queries]; 0 for a query that sees none of
        these keys.
    """
    weight = torch.where(part_lse == -torch.inf, 0.0, part_lse - lse).exp().masked_fill(part_lse == -torch.inf, 0)
    dpart = dout * weight.T.unsqueeze(2)
    return dpart, (dpart * (part - out)).sum(2).T


Intervals = tuple[Int[Tensor, "intervals queries"], Int[Tensor, "intervals queries"]]


def intervals(bands: Sequence[Band], queries: int, device: torch.device) -> Intervals:
    """The keys that each query sees, as intervals: query q sees the keys [first[i, q], stop[i, q]) for every i.

    There are as many intervals per query as the bands need: bands with a query in common have a different i. Where a query has
    fewer, the interval is [0, 0).

    Args:
        bands: disjoint bands.
        queries: the number of queries.
        device: where the result is put.

    Returns:
        (first, stop), both int32 [intervals, queries].
    """
    layers: list[tuple[int, list[Band]]] = []  # (first query after the layer's last band, its bands), filled first-fit
    for band in sorted(bands):
        free = next((i for i, (stop, _) in enumerate(layers) if stop <= band.q_start), len(layers))
        layers[free:] = [(band.q_stop, [*layers[free][1], band] if free < len(layers) else [band]), *layers[free + 1 :]]
    count = 1 << max(0, len(layers) - 1).bit_length()  # few different counts, each of which is compiled once
    first, stop = torch.zeros(2, count, queries, dtype=torch.int32, device="cpu")
    for i, (_, held) in enumerate(layers):
        for band in held:
            rows = torch.arange(band.q_start, band.q_stop, dtype=torch.int32, device="cpu")
            first[i, band.q_start : band.q_stop] = (rows + band.lo).clamp(min=band.k_start)
            stop[i, band.q_start : band.q_stop] = (rows + band.hi + 1).clamp(max=band.k_stop)
    return first.to(device), stop.to(device)


def mask_mod(bands: Sequence[Band], queries: int, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The bands as a ``mask_mod`` function of flex_attention: (batch, head, query, key) -> whether the query sees the key.

    It ignores batch and head.

    Args:
        bands: disjoint bands.
        queries: the number of queries.
        device: where its index tensors are.
    """
    first, stop = intervals(bands, queries, device)
    return lambda batch, head, q_index, k_index: _within(first, stop, q_index, k_index)


def _within(first: Tensor, stop: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
    """Whether query ``q_index`` sees key ``k_index``: the key is in one of the query's intervals [first, stop)."""
    seen = (k_index >= first[0, q_index]) & (k_index < stop[0, q_index])
    for i in range(1, first.shape[0]):
        seen = seen | ((k_index >= first[i, q_index]) & (k_index < stop[i, q_index]))
    return seen


BLOCK = 128
"""The queries and the keys of a block of the BlockMask, at least."""
MOST_BLOCKS = 4096
"""The most blocks of queries or keys of a mask: a BlockMask has an entry for each pair. Longer rows get larger blocks."""


def blocks(bands: Sequence[Band], queries: int, keys: int, size: int) -> tuple[Tensor, Tensor]:
    """The blocks of ``size`` queries x ``size`` keys that the bands reach: (those that need a mask, those seen whole).

    Computed on integers: no mask of queries x keys is formed.

    Args:
        bands: disjoint bands.
        queries, keys: the numbers of both.
        size: queries, and keys, of a block.

    Returns:
        Two bool tensors [blocks of queries, blocks of keys] on the CPU; no block is in both.
    """
    shape = (-(-queries // size), -(-keys // size))
    reached, whole = (torch.zeros(shape, dtype=torch.bool, device="cpu") for _ in range(2))
    for band in bands:
        for i in range(band.q_start // size, (band.q_stop - 1) // size + 1):
            first, last = max(band.q_start, i * size), min(band.q_stop, (i + 1) * size) - 1  # its queries in this block
            start, stop = max(band.k_start, first + band.lo), min(band.k_stop, last + band.hi + 1)
            reached[i, start // size : -(-stop // size)] = True
            if first == i * size and last == min(queries, (i + 1) * size) - 1:
                start, stop = max(band.k_start, last + band.lo), min(band.k_stop, first + band.hi + 1)  # of every query
                whole[i, -(-start // size) : max(0, stop) // size] = True
    return reached & ~whole, whole


@lru_cache(maxsize=8)
def _block_mask(bands: tuple[Band, ...], queries: int, keys: int, device: torch.device) -> "BlockMask":
    """The BlockMask of the bands for ``queries`` x ``keys``, cached.

    Masks of equal size differ in tensors only, so that flex_attention is not compiled again for another mask.
    """
    from torch.nn.attention.flex_attention import BlockMask

    size = BLOCK
    while -(-max(queries, keys) // size) > MOST_BLOCKS:
        size *= 2
    partial, whole = (_ordered(dense.to(device)) for dense in blocks(bands, queries, keys, size))
    mask = mask_mod(bands, queries, device)
    return BlockMask.from_kv_blocks(*partial, *whole, BLOCK_SIZE=size, mask_mod=mask, seq_lengths=(queries, keys))


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """A bool tensor [blocks of queries, blocks of keys] in the two tensors by which a BlockMask is made.

    Returns:
        The number of True in each row [1, 1, blocks], and the columns of each row, those of True first, [1, 1, blocks, blocks].
    """
    columns = dense.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return dense.sum(1, dtype=torch.int32)[None, None], columns.int()[None, None]


@lru_cache(maxsize=1)
def _compiled() -> "Callable[..., tuple[Tensor, AuxOutput]]":
    """``flex_attention`` under torch.compile, made at the first call."""
    # imported late: it takes seconds, and only this kernel needs it
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bands: Sequence[Band], scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Compiled flex_attention of q, k, v [tokens, heads, dim] with the mask of ``bands``; ``softcap`` None: none.

    Returns:
        (out [queries, heads, v_dim], log-sum-exp [heads, queries]).
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, aux = _compiled()(
        q, k, v,
        score_mod=None if softcap is None else lambda score, batch, head, q, k: softcap * torch.tanh(score / softcap),
        block_mask=_block_mask(tuple(bands), q.shape[2], k.shape[2], q.device),
        scale=scale,
        enable_gqa=True,
        return_aux=_compat.flex_lse_request(),
    )  # fmt: skip
    assert aux.lse is not None, "asked for"
    return out[0].transpose(0, 1), aux.lse[0]

"""Kernel "sdpa": PyTorch's fused flash attention operators applied to the tiles that cover the bands of a mask.

    bands --plan--> stacks of tiles --flash--> partial results --write--> queries without an earlier result
                                                               --merge--> queries that have a result already

Time is proportional to the number of visible (query, key) pairs, memory to the number of tokens: a large stack is computed in
chunks, and only the overlapping keys and values of one chunk are copied. Partial results are merged, and gradients summed, in
fp32 (fp64 for fp64 inputs). tiles.py makes the tiles and flash_cpu.py calls the operators of the CPU. On CUDA, where the
operators have windows and variable lengths, a band is one call (flash_cuda.py).

The suffix of a tensor's name gives its dims: N all tokens, H heads, D head dim, T tiles of a stack, S tokens of a tile.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from longspan.errors import KernelError
from longspan.kernels import flash_cpu, flash_cuda
from longspan.kernels.protocol import (
    BoundBias,
    Gradients,
    Need,
    Partial,
    accumulation_dtype,
    contiguous_last_dim,
    merge_into,
)
from longspan.kernels.tiles import Stack, columns, plan
from longspan.masks.bands import Band

OPERATORS = {"cpu": flash_cpu, "cuda": flash_cuda}
"""By device type, the module that calls PyTorch's flash operators there and says by ``lacks`` what they do not support."""
CHUNK = 2**21
"""The most elements of q, k and v together that one call of an operator gets; a single larger tile is still one call."""


class SDPA:
    """Kernel "sdpa": ``F.scaled_dot_product_attention`` for any bands, with log-sum-exp, by PyTorch's flash operators.

    Memory is linear in the number of tokens. It has neither softcap nor bias, and needs equal head dims of keys and values.
    """

    name = "sdpa"

    def lacks(self, need: Need) -> str | None:
        """The reason, as a sentence, why this kernel does not support the attention ``need``; None if it does."""
        if need.softcap or need.bias:
            return f"PyTorch's fused attention has no {'softcap' if need.softcap else 'bias'}"
        if need.qk_dim != need.v_dim:
            return f"PyTorch's fused attention wants equal query/key and value dims, not {need.qk_dim} and {need.v_dim}"
        if need.device_type not in OPERATORS:
            return f"PyTorch's flash operators are for {' and '.join(OPERATORS)}, not {need.device_type}"
        reason: str | None = OPERATORS[need.device_type].lacks(need.dtype, need.qk_dim, need.capability)
        return reason

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
        _refuse(softcap, bias)
        dtype = accumulation_dtype(q.dtype)
        q, k, v = (contiguous_last_dim(x) for x in (q, k, v))
        if OPERATORS[q.device.type] is flash_cuda:
            return flash_cuda.forward(q, k, v, bands, scale)
        stacks = _stacks(tuple(bands))
        if _is_one_call(stacks, q):
            part, part_lse = flash_cpu.forward(stacks[0], *_tiles_of(stacks[0], q, k, v), scale)
            return part[0].transpose(0, 1).to(dtype), part_lse[0]
        out = q.new_zeros(q.shape, dtype=dtype)
        lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=dtype)
        for stack in _chunked(stacks, q, k):
            part, part_lse = flash_cpu.forward(stack, *_tiles_of(stack, q, k, v), scale)
            out_tiles, lse_tiles = _queries(stack, out), _queries(stack, lse.T.unsqueeze(2)).squeeze(3)
            if stack.fresh:
                out_tiles.copy_(part)
                lse_tiles.copy_(part_lse)
            else:
                merge_into(out_tiles, lse_tiles, part, part_lse)
        return out, lse

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
        _refuse(softcap, bias)
        dtype = accumulation_dtype(q.dtype)
        dout, q, k, v, out = (contiguous_last_dim(x) for x in (dout, q, k, v, out))
        if OPERATORS[q.device.type] is flash_cuda:
            return *flash_cuda.backward(dout, q, k, v, out, lse, bands, scale), []
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        for stack in _chunked(_stacks(tuple(bands)), q, k):
            dout_tiles, out_tiles = (_queries(stack, x).to(q.dtype) for x in (dout, out))
            lse_tiles = _queries(stack, lse.T.unsqueeze(2)).squeeze(3)
            q_tiles, k_tiles, v_tiles = _tiles_of(stack, q, k, v)
            parts = flash_cpu.backward(stack, dout_tiles, q_tiles, k_tiles, v_tiles, out_tiles, lse_tiles, scale)
            _queries(stack, dq).add_(parts[0])
            _add_keys(stack, dk, parts[1])
            _add_keys(stack, dv, parts[2])
        return dq, dk, dv, []


@lru_cache(maxsize=64)
def _stacks(bands: tuple[Band, ...]) -> tuple[Stack, ...]:
    """The tiles of a mask on a CPU, as stacks of equal tiles; cached, so made once for all layers and passes."""
    return columns(plan(bands))


def _refuse(softcap: float | None, bias: BoundBias | None) -> None:
    """Raise KernelError if the attention has a softcap or a bias, which are None where it has none."""
    if softcap is not None or bias is not None:
        raise KernelError("kernel='sdpa' has neither softcap nor bias; use kernel='online' or 'auto'")


def _is_one_call(stacks: Sequence[Stack], q: Tensor) -> bool:
    """Whether one tile has all the queries of ``q``, so that the operator's result is the result."""
    return len(stacks) == 1 and stacks[0].count == 1 and stacks[0].rows == q.shape[0]


def _chunked(stacks: Sequence[Stack], q: Tensor, k: Tensor) -> list[Stack]:
    """The same stacks, those with many tiles cut into several of at most about ``CHUNK`` elements of q, k and v."""
    (_, heads, dim), kv_heads = q.shape, k.shape[1]
    chunks: list[Stack] = []
    for stack in stacks:
        tile = (stack.rows * heads + 2 * stack.keys * kv_heads) * dim
        chunks.extend(stack.chunks(max(1, CHUNK // tile)))
    return chunks


def _tiles(x_NHD: Tensor, start: int, size: int, count: int, step: int) -> Tensor:
    """A view [count, heads, size, dim] of ``count`` ranges of ``size`` tokens of ``x_NHD`` [tokens, heads, dim].

    Range i begins at token start + i * step; ranges may overlap, and then share memory.
    """
    token, head, element = x_NHD.stride()
    shape = (count, x_NHD.shape[1], size, x_NHD.shape[2])
    return x_NHD.as_strided(shape, (step * token, head, token, element), x_NHD.storage_offset() + start * token)


def _queries(stack: Stack, x_NHD: Tensor) -> Tensor:
    """The queries of each tile of ``stack`` as a view [tiles, heads, rows, dim] of ``x_NHD`` [tokens, heads, dim]."""
    return _tiles(x_NHD, stack.q_start, stack.rows, stack.count, stack.q_step)


def _keys(stack: Stack, x_NHD: Tensor) -> Tensor:
    """The keys of each tile of ``stack`` as a view [tiles, kv_heads, keys, dim] of ``x_NHD`` [tokens, kv_heads, dim]."""
    return _tiles(x_NHD, stack.k_start, stack.keys, stack.count, stack.k_step)


def _tiles_of(stack: Stack, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The queries, keys and values of each tile of ``stack``, as views [tiles, heads, tokens of a tile, dim]."""
    return _queries(stack, q), _keys(stack, k), _keys(stack, v)


def _add_keys(stack: Stack, total_NHD: Tensor, part_THSD: Tensor) -> None:
    """Add each tile's gradient of its keys (or values) to the rows of these keys in ``total_NHD``, in place.

    Where tiles overlap, their keys are added in pieces as long as the distance between the first keys of two tiles: such pieces
    do not overlap, and an in-place add to a view that overlaps itself would lose terms.

    Args:
        stack: the tiles.
        total_NHD: the gradient of all keys, [tokens, kv_heads, dim].
        part_THSD: the gradient of each tile, [tiles, kv_heads, keys of a tile, dim].
    """
    if stack.count == 1 or stack.k_step >= stack.keys:
        _keys(stack, total_NHD).add_(part_THSD)
    elif stack.k_step == 0:
        total_NHD[stack.k_start : stack.k_start + stack.keys].add_(part_THSD.sum(0, dtype=total_NHD.dtype).transpose(0, 1))
    else:
        for at in range(0, stack.keys, stack.k_step):
            piece = part_THSD[:, :, at : at + stack.k_step]
            _tiles(total_NHD, stack.k_start + at, piece.shape[2], stack.count, stack.k_step).add_(piece)

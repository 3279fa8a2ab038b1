r"""Kernel "efficient": PyTorch's memory-efficient attention operator on CUDA, for fp32 and for a bias. Never run on a GPU.

    a band   ----->  one call           no mask, causal (aligned at the bottom right), or causal with a window on the left
       |
       \-- a band that these three cannot show, and every band beside a bias: blocks of its queries, each one call with a
           dense term that is added to the scores (-inf at hidden keys), of at most ``MOST_SCORES`` elements

The operator takes as many key/value heads as query heads. It gets the key/value heads as its batch dim and in each the queries
of one of them, whose keys are a view with stride 0: nothing is copied. It has no grouped heads of its own, so the gradients of
keys are formed for each query head and summed. Its log-sum-exp is stored in rows of a multiple of 32. With a bias, inputs are
computed in fp32, because the operator takes the term in their dtype.

The suffix of a tensor's name gives its dims: S queries, T keys, H heads, K kv heads, G query heads of a kv head, D head dim.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from longspan import _compat
from longspan.errors import KernelError
from longspan.kernels.capability import lacks_ampere
from longspan.kernels.flash_calls import head_groups
from longspan.kernels.head_groups import join
from longspan.kernels.protocol import (
    BoundBias,
    Gradients,
    Need,
    Partial,
    accumulation_dtype,
    add_bias_gradients,
    bias_gradients,
    contiguous_last_dim,
    merge_into,
)
from longspan.masks.bands import Band, shift, trim

_forward_cuda, _backward_cuda = _compat.attention_operators("efficient")

NO_MASK, CAUSAL = 0, 2
"""The operator's numbers of its masks: none, and causal with the last query aligned with the last key."""
MOST_SCORES = 2**28
"""The most elements of the term that is added to the scores of one call: 1 GiB in fp32."""
MOST_ELEMENTS = 2**31
"""The operator refuses strides that 32 bits do not hold."""
LSE_ROW, BIAS_ROW = 32, 16
"""The operator wants rows of the log-sum-exp, and of the added term, to be stored in multiples of so many elements."""


class Efficient:
    """Kernel "efficient": the operator that ``F.scaled_dot_product_attention`` uses on CUDA for fp32 and for dense masks."""

    name = "efficient"

    def lacks(self, need: Need) -> str | None:
        """The reason, as a sentence, why this kernel does not support the attention ``need``; None if it does."""
        if need.device_type != "cuda":
            return f"PyTorch's memory-efficient attention is for cuda, not {need.device_type}"
        if need.softcap:
            return "PyTorch's memory-efficient attention has no softcap"
        if need.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"PyTorch's memory-efficient attention takes fp32, bf16 and fp16, not {need.dtype}"
        aligned = 16 // need.dtype.itemsize
        if need.qk_dim % aligned or need.v_dim % aligned:
            dims = " and ".join(map(str, dict.fromkeys((need.qk_dim, need.v_dim))))
            return f"PyTorch's memory-efficient attention takes head dims that are multiples of {aligned}, not {dims}"
        if need.dtype == torch.bfloat16:
            return lacks_ampere("PyTorch's memory-efficient attention in bf16", need.capability)
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
        _refuse(softcap)
        q, k, v = _operands((q, k, v), bias)
        pieces = list(_pieces(bands, q.shape[1], is_biased=bias is not None))
        if len(pieces) == 1 and pieces[0].rows == q.shape[0]:
            return _piece_forward(pieces[0], q, k, v, scale, bias)
        out = q.new_zeros((*q.shape[:2], v.shape[2]), dtype=accumulation_dtype(q.dtype))
        lse = out.new_full((q.shape[1], q.shape[0]), -torch.inf)
        for piece in pieces:
            rows = slice(piece.band.q_start, piece.band.q_stop)
            part, part_lse = _piece_forward(piece, q, k, v, scale, bias)
            merge_into(out[rows], lse[:, rows].T, part, part_lse.T)
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
        _refuse(softcap)
        q, k, v = _operands((q, k, v), bias)
        dout, out = (x.to(q.dtype) for x in (dout, out))
        pieces = list(_pieces(bands, q.shape[1], is_biased=bias is not None))
        if bias is None and len(pieces) == 1 and (pieces[0].rows, pieces[0].keys) == (len(q), len(k)):
            dq, dk, dv, _ = _piece_backward(pieces[0], (dout, q, k, v, out, lse), scale, None)
            return dq, dk, dv, []
        dq, dk, dv = (torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device) for x in (q, k, v))
        dbias = bias_gradients(bias)
        for piece in pieces:
            rows, keys = slice(piece.band.q_start, piece.band.q_stop), slice(piece.band.k_start, piece.band.k_stop)
            with torch.enable_grad():
                added = None if bias is None else _values(piece, bias, q.device)
            inputs = dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows]
            parts = _piece_backward(piece, inputs, scale, None if added is None else added.detach())
            dq[rows] += parts[0]
            dk[keys] += parts[1]
            dv[keys] += parts[2]
            if bias is not None and added is not None:
                add_bias_gradients(dbias, bias.parameters, added, parts[3])
        return dq, dk, dv, dbias


class Piece(NamedTuple):
    """One call of the operator: a canonical band, and how the operator is asked to show it.

    Attributes:
        band: its queries and keys.
        mask: ``NO_MASK`` or ``CAUSAL``.
        window: with ``CAUSAL``, the number of keys that a query sees, itself included; None: all before it.
        is_dense: whether hidden keys are -inf in a term that is added to the scores.
    """

    band: Band
    mask: int = NO_MASK
    window: int | None = None
    is_dense: bool = False

    @property
    def rows(self) -> int:
        """The number of queries."""
        return self.band.q_stop - self.band.q_start

    @property
    def keys(self) -> int:
        """The number of keys."""
        return self.band.k_stop - self.band.k_start


def _pieces(bands: Sequence[Band], heads: int, *, is_biased: bool) -> Iterator[Piece]:
    """Yield calls that together show every (query, key) pair of the bands once.

    Args:
        bands: disjoint canonical bands.
        heads: all query heads, which the added term has.
        is_biased: whether every call has an added term.
    """
    for band in bands:
        if is_biased:
            yield from _dense(band, heads)
            continue
        hides_after = band.hi < band.k_stop - 1 - band.q_start
        reach = band.k_stop - band.hi if hides_after else band.q_start  # of the queries from here on, it hides no key
        causal, rest = (trim(start, stop, *band[2:]) for start, stop in ((band.q_start, reach), (reach, band.q_stop)))
        for piece in (causal, rest):
            if piece is None:
                continue
            behind = piece.k_stop - piece.q_stop - piece.lo  # keys that the last query sees before the one aligned with it
            hides = behind < piece.k_stop - piece.k_start - 1
            if piece.hi == piece.k_stop - piece.q_stop:
                yield Piece(piece, CAUSAL, behind + 1 if hides else None)
            elif not hides:
                yield Piece(piece)
            else:
                yield from _dense(piece, 1)


def _dense(band: Band, heads: int) -> Iterator[Piece]:
    """Yield the band in blocks of queries, each with an added term of about ``MOST_SCORES`` elements at most.

    ``heads``: how many heads the term has.
    """
    rows, keys, width = band.q_stop - band.q_start, band.k_stop - band.k_start, band.hi - band.lo
    while rows > 1 and heads * rows * min(keys, rows + width) > MOST_SCORES:
        rows = -(-rows // 2)
    for start in range(band.q_start, band.q_stop, rows):
        block = trim(start, min(start + rows, band.q_stop), *band[2:])
        assert block is not None, "every query of a canonical band sees a key"
        yield Piece(block, is_dense=True)


def _refuse(softcap: float | None) -> None:
    """Raise KernelError if the attention has a softcap; None: it has none."""
    if softcap is not None:
        raise KernelError("kernel='efficient' has no softcap; use kernel='flex', 'online' or 'auto'")


def _operands(tensors: tuple[Tensor, Tensor, Tensor], bias: BoundBias | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with a contiguous last dim, in fp32 beside a bias (None: there is none)."""
    q, k, v = (x if bias is None else x.float() for x in tensors)
    q, k, v = (contiguous_last_dim(x) for x in (q, k, v))
    return q, k, v


def _piece_forward(piece: Piece, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: BoundBias | None) -> Partial:
    """The results (out [S, H, D], log-sum-exp [H, S]) of one call; q, k, v are the whole tensors, ``bias`` None: none."""
    rows, keys = slice(piece.band.q_start, piece.band.q_stop), slice(piece.band.k_start, piece.band.k_stop)
    with torch.no_grad():
        term = _term(piece, None if bias is None else _values(piece, bias, q.device), q)
    outs, lses = [], []
    for heads, kv in _groups(piece, q, k, v):
        own = _batched(q[rows, heads], k[keys, kv], v[keys, kv])
        added = None if term is None else _by_kv_head(term[heads], own[0].shape[0])
        out_KSGD, lse_KGS, *_ = _forward_cuda(
            *own, added, None, None, None, None, 0.0, piece.mask, True, scale=scale, window_size=piece.window
        )
        outs.append(_tokens_first(out_KSGD))
        lses.append(lse_KGS[:, :, : piece.rows].flatten(0, 1))
    return join(outs, 1), join(lses, 0)


def _piece_backward(piece: Piece, inputs: Sequence[Tensor], scale: float, values: Tensor | None) -> tuple[Tensor, ...]:
    """The gradients of one call for its own queries and keys: dq, dk, dv, and that of the bias [H, S, T].

    Args:
        piece: the call.
        inputs: dout, q, k, v, out and lse, at the queries and keys of the call.
        scale: the factor of the scores.
        values: the bias [H, S, T]; None without one, and then its gradient is empty.
    """
    dout, q, k, v, out, lse = inputs
    term = _term(piece, values, q)
    groups, dtype, parts = _groups(piece, q, k, v), accumulation_dtype(q.dtype), []
    for heads, kv in groups:
        own_q, own_k, own_v = _batched(q[:, heads], k[:, kv], v[:, kv])
        kv_heads = own_q.shape[0]
        own_dout, own_out = (_queries(x[:, heads], kv_heads) for x in (dout, out))
        added = None if term is None else _by_kv_head(term[heads], kv_heads)
        dq_KSGD, dk_KTGD, dv_KTGD, dterm = _backward_cuda(
            own_dout, own_q, own_k, own_v, added, own_out, None, None, piece.rows, piece.keys,
            _stored(_by_kv_head(lse[heads], kv_heads)), 0.0, None, None, piece.mask, values is not None,
            scale=scale, window_size=piece.window,
        )  # fmt: skip
        dkv = (x_KTGD.sum(2, dtype=dtype).transpose(0, 1) for x_KTGD in (dk_KTGD, dv_KTGD))
        parts.append((_tokens_first(dq_KSGD), *dkv, dterm.flatten(0, 1) if values is not None else q.new_empty(0)))
    if len(parts) == 1:
        return parts[0]
    dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (k, v))
    for (_, kv), (_, dk_part, dv_part, _) in zip(groups, parts):
        dk[:, kv] += dk_part  # query heads of one key/value head may be in several calls
        dv[:, kv] += dv_part
    return torch.cat([part[0] for part in parts], 1), dk, dv, torch.cat([part[3] for part in parts])


def _groups(piece: Piece, q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[slice, slice], ...]:
    """(query heads, key/value heads) of each call for the piece, of so few that every stride fits into 32 bits."""
    group = q.shape[1] // k.shape[1]
    return head_groups(q.shape[1], k.shape[1], piece.rows, piece.keys * group, max(q.shape[2], v.shape[2]), MOST_ELEMENTS)


def _batched(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [S, H, D] as [K, S, G, D], k and v [T, K, D] as [K, T, G, D] with stride 0 in G, all of them views."""
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    own_k, own_v = (x.transpose(0, 1).unsqueeze(2).expand(-1, -1, group, -1) for x in (k, v))
    return _queries(q, kv_heads), own_k, own_v


def _queries(x_SHD: Tensor, kv_heads: int) -> Tensor:
    """A view [K, S, G, D] of ``x_SHD``, with ``kv_heads`` for K."""
    view: Tensor = x_SHD.unflatten(1, (kv_heads, -1)).permute(1, 0, 2, 3)
    return view


def _tokens_first(x_KSGD: Tensor) -> Tensor:
    """``x_KSGD`` as [S, H, D]."""
    return x_KSGD.permute(1, 0, 2, 3).flatten(1, 2)


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """``x`` [H, ...] as [K, G, ...], with ``kv_heads`` for K."""
    view: Tensor = x.unflatten(0, (kv_heads, -1))
    return view


def _stored(lse_KGS: Tensor) -> Tensor:
    """The log-sum-exp in fp32 as the operator's forward stores it: rows of a multiple of 32, +inf after the last query."""
    padding = -lse_KGS.shape[2] % LSE_ROW
    return torch.nn.functional.pad(lse_KGS.float(), (0, padding), value=torch.inf).contiguous()


def _values(piece: Piece, bias: BoundBias, device: torch.device) -> Tensor:
    """The bias of the queries and keys of a call, [H, S, T]."""
    q_start, q_stop, k_start, k_stop = piece.band[:4]
    return bias(torch.arange(q_start, q_stop, device=device), torch.arange(k_start, k_stop, device=device))


def _term(piece: Piece, values: Tensor | None, like: Tensor) -> Tensor | None:
    """What a call adds to its scores, [H, S, T] in the dtype of ``like`` [S, H, D]: the bias, and -inf at hidden keys.

    Its rows are stored as the operator wants them. None for a call that adds nothing; ``values`` None: no bias.
    """
    if not piece.is_dense:
        return None
    heads = 1 if values is None else like.shape[1]
    stored = like.new_zeros((heads, piece.rows, -(-piece.keys // BIAS_ROW) * BIAS_ROW))
    term = stored[:, :, : piece.keys]
    if values is not None:
        term.copy_(values)
    band = shift(piece.band, -piece.band.q_start, -piece.band.k_start)
    rows = torch.arange(piece.rows, device=like.device)[:, None]
    away = torch.arange(piece.keys, device=like.device) - rows
    term.masked_fill_((away < band.lo) | (away > band.hi), -torch.inf)
    return term.expand(like.shape[1], -1, -1)

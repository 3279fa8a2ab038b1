"""PyTorch's flash attention operators on CUDA, over the bands of a mask. Never run on a GPU, only with fake tensors.

    bands --plan--> calls    one band         dense call with a window            [1, rows, heads, dim]
                             a chain of bands variable-length call with a window  [rows of all documents, heads, dim]

Which keys a call shows is decided on integers, once for each mask (flash_calls.py); the cumulative lengths of its documents are
put on the device once for each mask, without waiting for the device. Where each query is in one call, results keep the dtype of
the operator; else they are merged, and gradients summed, in fp32. For a dense call the cumulative lengths are None: the
operators take an empty tensor for a variable-length call. FlashAttention 3, where a program has activated it in PyTorch,
replaces these operators.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from longspan import _compat
from longspan.kernels.capability import lacks_ampere
from longspan.kernels.flash_calls import Call, head_groups, plan
from longspan.kernels.head_groups import join
from longspan.kernels.protocol import Partial, accumulation_dtype, merge_into
from longspan.masks.bands import Band

_forward_cuda, _backward_cuda = _compat.attention_operators("flash cuda")

MOST_ELEMENTS = 2**31
"""A call with as many elements of one tensor would overflow the operator's 32-bit indices."""


def lacks(dtype: torch.dtype, dim: int, capability: tuple[int, int] | None) -> str | None:
    """The reason, as a sentence, why the operators do not support this dtype and head dim on a GPU of this compute capability
    (None: unknown); None if they do."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash attention on cuda takes fp16 and bf16, not {dtype}"
    if dim % 8 or dim > 256:
        return f"flash attention on cuda takes head dims that are multiples of 8 up to 256, not {dim}"
    return lacks_ampere("flash attention on cuda", capability)


class Operators(NamedTuple):
    """The two functions that compute one call: ``FLASH``, or those of another kernel that takes some of the calls.

    Attributes:
        forward: (call, q, k, v, scale) -> (out, log-sum-exp), for the queries, keys and heads of the call alone.
        backward: (call, dout, q, k, v, out, lse, scale) -> (dq, dk, dv) of the same.
    """

    forward: Callable[..., Partial]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def forward(
    q: Tensor, k: Tensor, v: Tensor, bands: Sequence[Band], scale: float, operators: Operators | None = None
) -> Partial:
    """Attention over the keys that ``bands`` show, by one operator call for each chain of bands.

    A chain is a run of bands, such as packed documents, that one call with windows or cumulative lengths computes.

    Args:
        q, k, v: [queries, heads, dim] and [keys, kv_heads, dim].
        bands: disjoint canonical bands (masks/bands.py) in indices of the rows of q and k.
        scale: the factor of the scores.
        operators: what computes a call; None: ``FLASH``.

    Returns:
        (out [queries, heads, dim], log-sum-exp [heads, queries] in fp32); 0 and -inf for a query without keys. ``out``
        has the dtype of ``q`` if no query is in two calls, else fp32.
    """
    planned, compute = plan(tuple(bands)), (operators or FLASH).forward
    if len(planned.calls) == 1 and planned.calls[0].rows == len(q):
        return _call_forward(planned.calls[0], q, k, v, scale, compute)
    out = torch.zeros(q.shape, dtype=q.dtype if planned.disjoint_queries else accumulation_dtype(q.dtype), device=q.device)
    lse = out.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=accumulation_dtype(q.dtype))
    for call in planned.calls:
        rows = slice(call.q_start, call.q_start + call.rows)
        part, part_lse = _call_forward(call, q, k, v, scale, compute)
        if call.fresh:
            out[rows], lse[:, rows] = part, part_lse
        else:
            merge_into(out[rows], lse[:, rows].T, part, part_lse.T)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bands: Sequence[Band],
    scale: float,
    operators: Operators | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (dq, dk, dv) of attention for the keys in ``k``, which may be some of those that ``out`` and ``lse`` cover.

    dq is then the share of these keys, and the caller adds up the shares. Chains of bands are one operator call each, as in
    ``forward``: dq has the dtype of ``q`` if no query is in two calls, dk and dv that of ``k`` if no key is; else they are
    fp32. Rows without a pair in ``bands`` have zeros.

    Args:
        dout: the gradient of ``out``, [queries, heads, dim].
        q, k, v: [queries, heads, dim] and [keys, kv_heads, dim].
        out, lse: output and log-sum-exp [heads, queries] over all keys of each query.
        bands: disjoint canonical bands in indices of the rows of q and k.
        scale: the factor of the scores.
        operators: what computes a call; None: ``FLASH``.
    """
    planned, compute = plan(tuple(bands)), (operators or FLASH).backward
    dout, out = dout.to(q.dtype), out.to(q.dtype)
    if len(planned.calls) == 1 and (planned.calls[0].rows, planned.calls[0].keys) == (len(q), len(k)):
        return _call_backward(planned.calls[0], dout, q, k, v, out, lse, scale, compute)
    dq = torch.zeros(q.shape, dtype=q.dtype if planned.disjoint_queries else accumulation_dtype(q.dtype), device=q.device)
    dk, dv = (
        torch.zeros(x.shape, dtype=x.dtype if planned.disjoint_keys else accumulation_dtype(x.dtype), device=x.device)
        for x in (k, v)
    )
    for call in planned.calls:
        rows, keys = slice(call.q_start, call.q_start + call.rows), slice(call.k_start, call.k_start + call.keys)
        parts = _call_backward(call, dout, q, k, v, out, lse, scale, compute)
        for total, run, part in zip((dq, dk, dv), (rows, keys, keys), parts):
            total[run] += part
    return dq, dk, dv


def _call_forward(call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float, compute: Callable[..., Partial]) -> Partial:
    """The results (out, log-sum-exp) of one call for its own queries and keys, by ``compute``; the other arguments are those of
    ``forward``."""
    q, k, v = q[call.q_start :][: call.rows], k[call.k_start :][: call.keys], v[call.k_start :][: call.keys]
    groups = head_groups(q.shape[1], k.shape[1], call.rows, call.keys, q.shape[2], MOST_ELEMENTS)
    parts = [compute(call, q[:, heads], k[:, kv], v[:, kv], scale) for heads, kv in groups]
    return join([out for out, _ in parts], 1), join([lse for _, lse in parts], 0)


def _call_backward(
    call: Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    compute: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients (dq, dk, dv) of one call for its own queries and keys, by ``compute``; the other arguments are those of
    ``backward``."""
    rows, keys = slice(call.q_start, call.q_start + call.rows), slice(call.k_start, call.k_start + call.keys)
    groups = head_groups(q.shape[1], k.shape[1], call.rows, call.keys, q.shape[2], MOST_ELEMENTS)
    parts = [
        compute(
            call, dout[rows, heads], q[rows, heads], k[keys, kv], v[keys, kv], out[rows, heads], lse[heads, rows], scale
        )
        for heads, kv in groups
    ]  # fmt: skip
    if len(parts) == 1:
        return parts[0]
    dk, dv = (torch.zeros_like(x[keys], dtype=accumulation_dtype(x.dtype)) for x in (k, v))
    for (_, kv), (_, dk_part, dv_part) in zip(groups, parts):
        dk[:, kv] += dk_part
        dv[:, kv] += dv_part
    return join([part[0] for part in parts], 1), dk, dv


def _flash_forward(call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    """``Operators.forward`` by PyTorch's flash operator."""
    out, lse, *_ = _forward_cuda(
        *(_operand(call, x) for x in (q, k, v)), *_lengths(call, q.device), 0.0, _is_causal(call), False,
        scale=scale, **_window(call),
    )  # fmt: skip
    return (out, lse) if len(call.lengths) > 1 else (out[0], lse[0])


def _flash_backward(
    call: Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``Operators.backward`` by PyTorch's flash operator."""
    own_lse = (lse if len(call.lengths) > 1 else lse[None]).contiguous()
    dq, dk, dv = _backward_cuda(
        *(_operand(call, x) for x in (dout, q, k, v, out)), own_lse, *_lengths(call, q.device), 0.0, _is_causal(call),
        None, None, scale=scale, **_window(call),  # without dropout there is no random state
    )  # fmt: skip
    return (dq, dk, dv) if len(call.lengths) > 1 else (dq[0], dk[0], dv[0])


FLASH = Operators(_flash_forward, _flash_backward)
"""PyTorch's flash operators, which compute every call."""


def _operand(call: Call, x_SHD: Tensor) -> Tensor:
    """``x_SHD`` [tokens, heads, dim] as the operator takes it: a dense call (one document) has a batch dim of 1 in front."""
    return x_SHD if len(call.lengths) > 1 else x_SHD[None]


def _is_causal(call: Call) -> bool:
    """Whether the windows of the call are a causal mask: unlimited on the left, nothing on the right."""
    return call.left.limit is None and call.right.limit == 0


def _window(call: Call) -> dict[str, int | None]:
    """The windows as keywords of the operator, in keys; None is unlimited. Both are None for a causal call, which has a
    flag."""
    if _is_causal(call):
        return {"window_size_left": None, "window_size_right": None}
    return {"window_size_left": call.left.limit, "window_size_right": call.right.limit}


def _lengths(call: Call, device: torch.device) -> tuple[Tensor | None, Tensor | None, int, int]:
    """The operator's arguments (cum_seq_q, cum_seq_k, max_q, max_k) for the documents of a call.

    A dense call has None for the cumulative lengths.
    """
    rows, keys = zip(*call.lengths)
    if len(rows) == 1:
        return None, None, rows[0], keys[0]
    return *_cumulative(call.lengths, device), max(rows), max(keys)


@lru_cache(maxsize=64)
def _cumulative(lengths: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The cumulative numbers of queries and of keys, each int32 [documents + 1] on ``device``, from (queries, keys) of each
    document.

    They are copied once from pinned memory, without a wait of the host.
    """
    sums = torch.tensor([[0, *accumulate(sizes)] for sizes in zip(*lengths)], dtype=torch.int32, device="cpu")
    q_sums, k_sums = (sums.pin_memory() if device.type != "cpu" else sums).to(device, non_blocking=True)
    return q_sums, k_sums

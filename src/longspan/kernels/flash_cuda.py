"""PyTorch's flash attention operators on CUDA, over the bands of a mask. Never run on a GPU, only with fake tensors.

    bands --plan--> calls    one band         dense call with a window            [1, rows, heads, dim]
                             a chain of bands variable-length call with a window  [rows of all documents, heads, dim]

Which keys a call shows is decided on integers, once for each mask (flash_calls.py); the cumulative lengths of its documents are
put on the device once for each mask, without waiting for the device. Where each query is in one call, results keep the dtype of
the operator; else they are merged, and gradients summed, in fp32. For a dense call the cumulative lengths are None: the
operators take an empty tensor for a variable-length call. FlashAttention 3, where a program has activated it in PyTorch,
replaces these operators.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from longspan import _compat
from longspan.kernels.flash_calls import Call, head_groups, plan
from longspan.kernels.protocol import Partial, accumulation_dtype, merge_weights
from longspan.masks.bands import Band

_forward_cuda = _compat.flash_forward("cuda")
_backward_cuda = _compat.flash_backward("cuda")

MOST_ELEMENTS = 2**31
"""A call with as many elements of one tensor would overflow the operator's 32-bit indices."""
AMPERE = (8, 0)
"""The oldest compute capability that the operators have kernels for."""


def lacks(dtype: torch.dtype, dim: int) -> str | None:
    """The reason, as a sentence, why the operators do not support this dtype and head dim on this GPU; None if they do."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash attention on cuda takes fp16 and bf16, not {dtype}"
    if dim % 8 or dim > 256:
        return f"flash attention on cuda takes head dims that are multiples of 8 up to 256, not {dim}"
    capability = _capability()
    if capability is not None and capability < AMPERE:
        return (
            f"flash attention on cuda needs compute capability 8.0 (Ampere), and this GPU has {'.'.join(map(str, capability))}"
        )
    return None


@lru_cache(maxsize=1)
def _capability() -> tuple[int, int] | None:
    """The compute capability of this process's GPU; None where it sees none, or a GPU of another maker than NVIDIA."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() and torch.version.hip is None else None


def forward(q: Tensor, k: Tensor, v: Tensor, bands: Sequence[Band], scale: float) -> Partial:
    """Attention over the keys that ``bands`` show, by one operator call for each chain of bands.

    A chain is a run of bands, such as packed documents, that one call with windows or cumulative lengths computes.

    Args:
        q, k, v: [queries, heads, dim] and [keys, kv_heads, dim].
        bands: disjoint canonical bands (masks/bands.py) in indices of the rows of q and k.
        scale: the factor of the scores.

    Returns:
        (out [queries, heads, dim], log-sum-exp [heads, queries] in fp32); 0 and -inf for a query without keys. ``out``
        has the dtype of ``q`` if no query is in two calls, else fp32.
    """
    planned = plan(tuple(bands))
    if len(planned.calls) == 1 and planned.calls[0].rows == len(q):
        return _call_forward(planned.calls[0], q, k, v, scale)
    out = torch.zeros(q.shape, dtype=q.dtype if planned.disjoint_queries else accumulation_dtype(q.dtype), device=q.device)
    lse = out.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=accumulation_dtype(q.dtype))
    for call in planned.calls:
        rows = slice(call.q_start, call.q_start + call.rows)
        part, part_lse = _call_forward(call, q, k, v, scale)
        if call.fresh:
            out[rows], lse[:, rows] = part, part_lse
        else:
            both, weight, part_weight = merge_weights(lse[:, rows], part_lse)
            out[rows].mul_(weight.T.unsqueeze(2)).add_(part * part_weight.T.unsqueeze(2))
            lse[:, rows] = both
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bands: Sequence[Band], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (dq, dk, dv) of attention for the keys in ``k``, which may be some of those that ``out`` and ``lse`` cover.

    dq has the dtype of ``q`` if each query is in one call, dk and dv that of ``k`` if each key is; else they are fp32.

    Args:
        dout: the gradient of ``out``, [queries, heads, dim].
        q, k, v: [queries, heads, dim] and [keys, kv_heads, dim].
        out, lse: output and log-sum-exp [heads, queries] over all keys of each query.
        bands: disjoint canonical bands in indices of the rows of q and k.
        scale: the factor of the scores.
    """
    planned = plan(tuple(bands))
    dout, out = dout.to(q.dtype), out.to(q.dtype)
    if len(planned.calls) == 1 and (planned.calls[0].rows, planned.calls[0].keys) == (len(q), len(k)):
        return _call_backward(planned.calls[0], dout, q, k, v, out, lse, scale)
    dq = torch.zeros(q.shape, dtype=q.dtype if planned.disjoint_queries else accumulation_dtype(q.dtype), device=q.device)
    dk, dv = (
        torch.zeros(x.shape, dtype=x.dtype if planned.disjoint_keys else accumulation_dtype(x.dtype), device=x.device)
        for x in (k, v)
    )
    for call in planned.calls:
        rows, keys = slice(call.q_start, call.q_start + call.rows), slice(call.k_start, call.k_start + call.keys)
        parts = _call_backward(call, dout, q, k, v, out, lse, scale)
        for total, run, part in zip((dq, dk, dv), (rows, keys, keys), parts):
            total[run] += part
    return dq, dk, dv


def _call_forward(call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    """The results (out, log-sum-exp) of one call for its own queries and keys; the arguments are the whole tensors of
    ``forward``."""
    q, k, v = q[call.q_start :][: call.rows], k[call.k_start :][: call.keys], v[call.k_start :][: call.keys]
    parts = []
    for heads, kv in head_groups(q.shape[1], k.shape[1], call.rows, call.keys, q.shape[2], MOST_ELEMENTS):
        out, lse, *_ = _forward_cuda(
            *(_operand(call, x) for x in (q[:, heads], k[:, kv], v[:, kv])), *_lengths(call, q.device), 0.0, _is_causal(call),
            False, scale=scale, **_window(call),
        )  # fmt: skip
        parts.append((out, lse) if len(call.lengths) > 1 else (out[0], lse[0]))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts])


def _call_backward(
    call: Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (dq, dk, dv) of one call for its own queries and keys; the arguments are the whole tensors of
    ``backward``."""
    rows, keys = slice(call.q_start, call.q_start + call.rows), slice(call.k_start, call.k_start + call.keys)
    groups = head_groups(q.shape[1], k.shape[1], call.rows, call.keys, q.shape[2], MOST_ELEMENTS)
    parts = []
    for heads, kv in groups:
        queries, columns = [x[rows, heads] for x in (dout, q, out)], [x[keys, kv] for x in (k, v)]
        own_dout, own_q, own_k, own_v, own_out = (_operand(call, x) for x in (*queries[:2], *columns, queries[2]))
        own_lse = (lse[heads, rows] if len(call.lengths) > 1 else lse[None, heads, rows]).contiguous()
        grads = _backward_cuda(
            own_dout, own_q, own_k, own_v, own_out, own_lse, *_lengths(call, q.device), 0.0, _is_causal(call),
            None, None, scale=scale, **_window(call),  # without dropout there is no random state
        )  # fmt: skip
        parts.append([x if len(call.lengths) > 1 else x[0] for x in grads])
    if len(parts) == 1:
        dq, dk, dv = parts[0]
        return dq, dk, dv
    dk, dv = (torch.zeros_like(x[keys], dtype=accumulation_dtype(x.dtype)) for x in (k, v))
    for (_, kv), (_, dk_part, dv_part) in zip(groups, parts):
        dk[:, kv] += dk_part
        dv[:, kv] += dv_part
    return torch.cat([part[0] for part in parts], 1), dk, dv


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

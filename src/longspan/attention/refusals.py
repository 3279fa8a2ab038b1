"""Arguments of ``attend`` that no attention can be computed with, refused before anything is planned or sent.

Each function raises for one kind of argument and otherwise returns None. What depends on the mesh is refused by its plan.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from longspan.attention.plan import Bias
from longspan.errors import KernelError, LayoutError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Those of q, k and v."""


def refuse_what_is_no_tensor(**values: Any) -> None:
    """Raise KernelError for a value, by its name, that is no dense tensor with values."""
    for name, x in values.items():
        if not isinstance(x, Tensor):
            raise KernelError(f"{name} is {type(x).__name__} and must be a tensor")
        if x.is_meta:
            raise KernelError(f"{name} is on meta and must be a tensor with values; a model is moved with to_empty(device=...)")
        if x.is_nested or x.layout != torch.strided:
            kind = "nested" if x.is_nested else x.layout
            raise KernelError(f"{name} is {kind} and must be a dense tensor; pad rows of unequal length, or pack them into one")


def refuse_tensors(q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None) -> None:
    """Raise KernelError for mixed devices and for dtypes that are mixed or none of ``DTYPES``, and LayoutError for shapes of q,
    k, v or sink logits that do not fit.

    ``sink_logits`` None: there are none. They may have another dtype than q.
    """
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        kinds = ", ".join(f"{name} is {x.dtype} on {x.device}" for name, x in {"q": q, "k": k, "v": v}.items())
        raise KernelError(f"{kinds}: kernels need one dtype and one device; cast them, or use autocast")
    if q.dtype not in DTYPES:
        raise KernelError(f"q, k and v are {q.dtype}; kernels compute with {', '.join(map(str, DTYPES))}; cast them")
    if any(x.ndim != 4 or not x.shape[3] for x in (q, k, v)):
        raise LayoutError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} are not [batch, tokens, heads, dim], dim at least 1; "
            f"a single row has batch 1"
        )
    if q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise LayoutError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit; they are [batch, tokens, heads, dim]: "
            f"q and k share batch and dim, k and v share batch, tokens and heads"
        )
    if sink_logits is None:
        return
    if sink_logits.device != q.device or not sink_logits.is_floating_point():
        raise KernelError(
            f"sink_logits are {sink_logits.dtype} on {sink_logits.device} and q is on {q.device}; pass floating point, on the "
            f"device of q"
        )
    if sink_logits.shape != q.shape[2:3]:
        raise LayoutError(
            f"sink_logits of shape {list(sink_logits.shape)} do not fit {q.shape[2]} query heads; pass one logit a head"
        )


def refuse_integers(**values: Any) -> None:
    """Raise LayoutError for a number of tokens or chunks, by its name, that is not an int."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt):
            raise LayoutError(f"{name}={value!r} must be an int")


def refuse_lengths(queries: int, keys: int, tokens: int, key_tokens: int) -> None:
    """Raise LayoutError if one device, which holds whole rows, has another number of queries or keys than a row has tokens."""
    if (queries, keys) != (tokens, key_tokens):
        raise LayoutError(
            f"tokens={tokens} and key_tokens={key_tokens} are not those of q, {queries}, and k, {keys}: without a mesh they "
            f"are whole rows; leave out tokens= and key_tokens=, or pass the mesh that splits them"
        )


def refuse_factors(**values: Any) -> None:
    """Raise KernelError for a scale or softcap, by its name, that is not a number above 0 and finite; None is the default."""
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, Real):
            raise KernelError(
                f"{name}={type(value).__name__} must be a number: a tensor would get no gradient; multiply q by it instead"
            )
        if not 0 < float(value) < math.inf:
            raise KernelError(
                f"{name}={value} must be above 0 and finite, or None: fused kernels multiply what a mask hides, -inf, by it; "
                f"negate q for a negative scale"
            )


def refuse_bias(bias: Bias | None) -> None:
    """Raise KernelError for what is no ``Bias``; None is none."""
    if bias is not None and not (callable(bias) and isinstance(getattr(bias, "parameters", None), Sequence)):
        raise KernelError(
            f"bias={type(bias).__name__} is no Bias, which is called for a tile of the scores and has its parameters as a "
            f"tuple; a tensor of all scores would have tokens x tokens elements"
        )

"""A test double of PyTorch's flash operators of CUDA: their argument checks, their masks, the layouts of their results.

Dense or of variable length is decided by whether cumulative lengths are given, as the operators do. Numbers are those of the
reference kernel. It restates a reading of the operators' source; the real ones have never been run.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import _compat
from longspan.kernels import flash_cuda, sdpa
from longspan.kernels.reference import Reference
from longspan.masks.bands import Band, trim


def shown(rows: int, keys: int, most_keys: int, is_causal: bool, left: int | None, right: int | None) -> tuple[Band, ...]:
    """What the operator shows of one document: windows are aligned at the bottom right.

    A window of as many keys as the longest document is unlimited; beside a limited one, an unlimited window is of so many keys.
    """
    right = 0 if is_causal else right
    left, right = (None if window is None or window < 0 or window >= most_keys else window for window in (left, right))
    if left is None and right is None:
        band = trim(0, rows, 0, keys, -rows, keys)
    else:
        left, right = (most_keys if window is None else window for window in (left, right))
        band = trim(0, rows, 0, keys, keys - rows - left, keys - rows + right)
    return () if band is None else (band,)


class FlashOperators:
    """``forward`` and ``backward`` stand for the two operators; ``calls`` counts them, by name."""

    def __init__(self) -> None:
        self.calls = {"forward": 0, "backward": 0}

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let kernel "sdpa" call these on CPU tensors, as it calls the operators on CUDA."""
        monkeypatch.setattr(flash_cuda, "_forward_cuda", self.forward)
        monkeypatch.setattr(flash_cuda, "_backward_cuda", self.backward)
        monkeypatch.setitem(sdpa.OPERATORS, "cpu", flash_cuda)

    def forward(self, *args: Any, **keywords: Any) -> tuple[Any, ...]:
        self.calls["forward"] += 1
        accepts(_compat.attention_operators("flash cuda")[0], args, keywords)
        q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, _ = args
        _check(q, k, v, cum_q, cum_k, max_q, max_k)
        assert dropout_p == 0
        parts = []
        for one_q, one_k, one_v in zip(_documents(q, cum_q), _documents(k, cum_k), _documents(v, cum_k)):
            bands = _bands(one_q, one_k, max_k, is_causal, keywords)
            parts.append(Reference().forward(one_q, one_k, one_v, bands, keywords["scale"]))
        outs, lses = zip(*parts)
        out = torch.stack(outs) if cum_q is None else torch.cat(outs)
        lse = torch.stack(lses) if cum_q is None else torch.cat(lses, 1)
        return out.to(q.dtype), lse, None, None, None

    def backward(self, *args: Any, **keywords: Any) -> tuple[Tensor, ...]:
        self.calls["backward"] += 1
        accepts(_compat.attention_operators("flash cuda")[1], args, keywords)
        dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, rng_state, unused = args
        _check(q, k, v, cum_q, cum_k, max_q, max_k)
        assert (dropout_p, rng_state, unused) == (0, None, None)
        assert dout.dtype == out.dtype == q.dtype
        assert lse.is_contiguous()
        heads = q.shape[-2]
        assert lse.shape == ((len(q), heads, q.shape[1]) if cum_q is None else (heads, len(q)))
        lses = list(lse) if cum_q is None else [lse[:, a:b] for a, b in pairwise(cum_q.tolist())]
        parts = []
        queries = zip(*(_documents(x, cum_q) for x in (dout, q, out)), lses)
        for (d, one_q, o, one_lse), one_k, one_v in zip(queries, _documents(k, cum_k), _documents(v, cum_k)):
            bands = _bands(one_q, one_k, max_k, is_causal, keywords)
            parts.append(Reference().backward(d, one_q, one_k, one_v, o, one_lse, bands, keywords["scale"])[:3])
        grads = (torch.stack(x) if cum_q is None else torch.cat(x) for x in zip(*parts))
        return tuple(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v)))


def _bands(q: Tensor, k: Tensor, max_k: int, is_causal: bool, keywords: dict[str, Any]) -> tuple[Band, ...]:
    return shown(len(q), len(k), max_k, is_causal, keywords["window_size_left"], keywords["window_size_right"])


def _documents(x: Tensor, cum_seq: Tensor | None) -> list[Tensor]:
    return list(x) if cum_seq is None else [x[a:b] for a, b in pairwise(cum_seq.tolist())]


def _check(q: Tensor, k: Tensor, v: Tensor, cum_q: Tensor | None, cum_k: Tensor | None, max_q: int, max_k: int) -> None:
    """The checks of the operators' host code that an argument of ours could fail."""
    assert (cum_q is None) == (cum_k is None)
    assert {x.ndim for x in (q, k, v)} == {4 if cum_q is None else 3}
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert q.shape[-2] % k.shape[-2] == 0
    if cum_q is None or cum_k is None:
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        return
    assert cum_q.dtype == cum_k.dtype == torch.int32
    assert cum_q.is_contiguous()
    assert cum_k.is_contiguous()
    assert 1 < len(cum_q) == len(cum_k) <= 65_536
    assert (int(cum_q[-1]), int(cum_k[-1])) == (len(q), len(k))
    assert (max_q, max_k) == (int(cum_q.diff().max()), int(cum_k.diff().max()))


def accepts(operator: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Match the arguments with the schema of the installed PyTorch's operator."""
    arguments = operator._schema.arguments
    positional = [argument for argument in arguments if not argument.kwarg_only]
    named = {argument.name for argument in arguments if argument.kwarg_only}
    assert len(args) == len(positional)
    assert keywords.keys() <= named
    for argument, value in zip(positional, args):
        kinds = {"Tensor": Tensor, "int": int, "float": float, "bool": bool, "SymInt": int}
        optional = argument.type.kind() == "OptionalType"
        kind = str(argument.type.getElementType() if optional else argument.type)
        # None for a Tensor that is not optional becomes an undefined one, which the operators ask for.
        assert (value is None and (optional or kind == "Tensor")) or isinstance(value, kinds[kind]), argument.name

"""Test doubles of PyTorch's memory-efficient and cuDNN attention operators of CUDA: argument checks, masks, layouts of results.

They restate a reading of the operators' source; the real ones have never been run. Numbers are dense attention in fp64.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import _compat
from longspan.kernels import cudnn, efficient
from tests.helpers.flash_operator import FlashOperators, accepts


def attention(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, term: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) of q, k, v [B, H, S, D] with as many key/value heads as query heads; True in ``hidden``: not seen."""
    weights = _scores(q, k, hidden, term, scale)
    return weights.softmax(-1) @ v.double(), weights.logsumexp(-1)


def gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    hidden: Tensor | None, term: Tensor | None, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dq, dk, dv, dterm) from the output and log-sum-exp over all keys, of which ``k`` may be some."""
    dout, q, k, v, out = (x.double() for x in (dout, q, k, v, out))
    weights = (_scores(q, k, hidden, term, scale) - lse.double()[..., None]).exp()
    dscores = weights * (dout @ v.mT - (dout * out).sum(-1, keepdim=True))
    return dscores @ k * scale, dscores.mT @ q * scale, weights.mT @ dout, dscores


def _scores(q: Tensor, k: Tensor, hidden: Tensor | None, term: Tensor | None, scale: float) -> Tensor:
    scores = q.double() @ k.double().mT * scale
    if term is not None:
        scores = scores + term.double()
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


class EfficientOperators:
    """The memory-efficient operators; ``calls`` lists (mask, window, whether a term is added) of each forward."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int | None, bool]] = []

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let kernel "efficient" call these, on CPU tensors."""
        monkeypatch.setattr(efficient, "_forward_cuda", self.forward)
        monkeypatch.setattr(efficient, "_backward_cuda", self.backward)

    def forward(self, *args: Any, **keywords: Any) -> tuple[Any, ...]:
        accepts(_compat.attention_operators("efficient")[0], args, keywords)
        q, k, v, term, cum_q, cum_k, max_q, max_k, dropout_p, mask, wants_lse = args
        assert (cum_q, cum_k, max_q, max_k, dropout_p, wants_lse) == (None, None, None, None, 0.0, True)
        self._check(q, k, v, term)
        self.calls.append((mask, keywords["window_size"], term is not None))
        hidden = self._hidden(q, k, mask, keywords["window_size"])
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        out, lse = attention(heads_first[0], heads_first[1], heads_first[2], hidden, term, keywords["scale"])
        stored = torch.full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), torch.inf)
        stored[:, :, : lse.shape[2]] = lse
        return out.transpose(1, 2).to(q.dtype).contiguous(), stored, None, None, q.shape[1], k.shape[1]

    def backward(self, *args: Any, **keywords: Any) -> tuple[Any, ...]:
        accepts(_compat.attention_operators("efficient")[1], args, keywords)
        dout, q, k, v, term, out, cum_q, cum_k, max_q, max_k, lse, dropout_p, seed, offset, mask, wants_dterm = args
        assert (cum_q, cum_k, dropout_p, seed, offset) == (None, None, 0.0, None, None)
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        assert dout.dtype == out.dtype == q.dtype
        assert lse.dtype == torch.float32
        assert lse.is_contiguous()
        assert lse.shape[2] % 32 == 0
        assert lse[:, :, max_q:].eq(torch.inf).all()
        self._check(q, k, v, term)
        hidden = self._hidden(q, k, mask, keywords["window_size"])
        dout, own_q, own_k, own_v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        own_lse = lse[:, :, :max_q]
        dq, dk, dv, dterm = gradients(dout, own_q, own_k, own_v, out, own_lse, hidden, term, keywords["scale"])
        found = [x.transpose(1, 2).to(q.dtype).contiguous() for x in (dq, dk, dv)]
        return *found, dterm.to(q.dtype) if wants_dterm else None

    @staticmethod
    def _check(q: Tensor, k: Tensor, v: Tensor, term: Tensor | None) -> None:
        """The checks of the operators' host code that an argument of ours could fail."""
        assert q.shape[0] == k.shape[0] == v.shape[0]
        assert q.shape[2] == k.shape[2] == v.shape[2]  # as many key/value heads as query heads
        assert k.shape[1] == v.shape[1]
        assert q.shape[3] == k.shape[3]
        aligned = 16 // q.element_size()
        for x in (q, k, v):
            assert x.stride(-1) == 1
            assert not any(stride % aligned for stride, size in zip(x.stride()[1:3], x.shape[1:3]) if size > 1)
        if term is not None:
            assert term.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
            assert term.dtype == q.dtype
            assert term.stride(-1) == 1
            assert term.shape[2] == 1 or term.stride(2) % aligned == 0  # as in PyTorch's check_supported

    @staticmethod
    def _hidden(q: Tensor, k: Tensor, mask: int, window: int | None) -> Tensor | None:
        assert mask in (0, 1, 2)
        assert window is None or (window > 0 and mask)
        if not mask:
            return None
        ahead = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None]
        ahead = ahead - (k.shape[1] - q.shape[1] if mask == 2 else 0)
        return (ahead > 0) | (ahead <= -window) if window is not None else ahead > 0


class CudnnOperators:
    """cuDNN's operators, and flash attention's beside them; ``calls`` counts cuDNN's forwards, ``flash.calls`` flash's."""

    def __init__(self) -> None:
        self.calls, self.flash = 0, FlashOperators()

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let kernel "cudnn" call these, on CPU tensors."""
        self.flash.patch(monkeypatch)
        monkeypatch.setattr(cudnn, "_forward_cuda", self.forward)
        monkeypatch.setattr(cudnn, "_backward_cuda", self.backward)

    def forward(self, *args: Any, **keywords: Any) -> tuple[Any, ...]:
        accepts(_compat.attention_operators("cudnn")[0], args, keywords)
        q, k, v, term, wants_lse, dropout_p, is_causal, debug = args
        assert (term, wants_lse, dropout_p, debug) == (None, True, 0.0, False)
        self.calls += 1
        out, lse = attention(q, *self._all_heads(q, k, v), self._hidden(q, k, is_causal), None, keywords["scale"])
        stored = torch.empty_like(q).copy_(out)  # in the order of q in memory
        return stored, lse.to(_wide(q))[..., None], None, None, q.shape[2], k.shape[2], None, None, None

    def backward(self, *args: Any, **keywords: Any) -> tuple[Any, ...]:
        accepts(_compat.attention_operators("cudnn")[1], args, keywords)
        dout, q, k, v, out, lse, seed, offset, term, cum_q, cum_k, max_q, max_k, dropout_p, is_causal = args
        assert (seed, offset, term, cum_q, cum_k, dropout_p) == (None, None, None, None, None, 0.0)
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        assert lse.shape == (*q.shape[:3], 1)
        assert lse.is_contiguous()
        keys, values = self._all_heads(q, k, v)
        hidden = self._hidden(q, k, is_causal)
        dq, dk, dv, _ = gradients(dout, q, keys, values, out, lse[..., 0], hidden, None, keywords["scale"])
        dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
        return tuple(grad.to(q.dtype) for grad in (dq, dk, dv))

    @staticmethod
    def _all_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert min(q.shape[2], k.shape[2]) > 1
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        group = q.shape[1] // k.shape[1]
        return k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    @staticmethod
    def _hidden(q: Tensor, k: Tensor, is_causal: bool) -> Tensor | None:
        if not is_causal:
            return None
        return torch.arange(k.shape[2]) > torch.arange(q.shape[2])[:, None]  # aligned at the top left


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

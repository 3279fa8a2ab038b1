"""Calls of the flash operators of CUDA, against functions with the operators' documented meaning."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.kernels import flash_cuda as cuda
from longspan.kernels import sdpa
from longspan.kernels.reference import Reference
from longspan.kernels.sdpa import SDPA
from longspan.kernels.tiles import Shape, Stack, corners, plan
from longspan.masks.bands import Band
from longspan.masks.constructors import Causal, Chunked, Documents, Full, Mask, SinkTokens, Window
from tests.helpers.kernel_cases import assert_same, bands_of, draw_inputs, run


def _as_flash_on_cuda(rows: int, keys: int, is_causal: bool, left: int | None, right: int | None) -> tuple[Band, ...]:
    """What the operator shows, by its documentation: causal and windows are aligned at the bottom right."""
    shifted = keys - rows
    right = 0 if is_causal else right
    lo, hi = -rows if left is None else shifted - left, keys if right is None else shifted + right
    return (Band(0, rows, 0, keys, lo, hi),)


def _cut(x: Tensor, cum_seq: Tensor | None) -> list[Tensor]:
    return list(x) if cum_seq is None else [x[a:b] for a, b in pairwise(cum_seq.tolist())]


def _flash_forward(
    q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, debug, *, scale, window_size_left, window_size_right
):  # type: ignore[no-untyped-def]  # fmt: skip
    assert dropout_p == 0
    parts = []
    for one_q, one_k, one_v in zip(_cut(q, cum_q), _cut(k, cum_k), _cut(v, cum_k)):
        assert len(one_q) <= max_q
        assert len(one_k) <= max_k
        bands = _as_flash_on_cuda(len(one_q), len(one_k), is_causal, window_size_left, window_size_right)
        parts.append(Reference().forward(one_q, one_k, one_v, bands, scale))
    outs, lses = zip(*parts)
    return (torch.stack(outs), torch.stack(lses)) if cum_q is None else (torch.cat(outs), torch.cat(lses, 1)), None


def _flash_backward(
    dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *, scale,
    window_size_left, window_size_right,
):  # type: ignore[no-untyped-def]  # fmt: skip
    assert rng_state is None
    assert unused is None
    lses = list(lse) if cum_q is None else [lse[:, a:b] for a, b in pairwise(cum_q.tolist())]
    parts = []
    for *queries, one_k, one_v, one_lse in zip(*(_cut(x, cum_q) for x in (dout, q, out)), _cut(k, cum_k), _cut(v, cum_k), lses):
        one_dout, one_q, one_out = queries
        bands = _as_flash_on_cuda(len(one_q), len(one_k), is_causal, window_size_left, window_size_right)
        parts.append(Reference().backward(one_dout, one_q, one_k, one_v, one_out, one_lse, bands, scale)[:3])
    return tuple(torch.stack(x) if cum_q is None else torch.cat(x) for x in zip(*parts))


class _OnCuda:
    """SDPA's walk with the calls that it would make on CUDA."""

    @staticmethod
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        class Aten:
            def _flash_attention_forward(self, *args: Any, **kwargs: Any) -> Any:
                (out, lse), _ = _flash_forward(*args, **kwargs)
                return out, lse, None, None, None

            _flash_attention_backward = staticmethod(_flash_backward)

        monkeypatch.setattr(cuda, "_forward_cuda", Aten()._flash_attention_forward)
        monkeypatch.setattr(cuda, "_backward_cuda", Aten()._flash_attention_backward)
        monkeypatch.setitem(sdpa.OPERATORS, "cpu", cuda)


@pytest.mark.parametrize(
    "mask",
    [
        Causal(), Full(), Window(30, 10), Window(5, None), Chunked(50) & Causal(), Documents((50, 30, 120)) & Causal(),
        Documents((20, 80, 100)), Documents((90, 110)) & Window(10), Causal() & (Window(20) | SinkTokens(4)),
    ],
    ids=repr,
)  # fmt: skip
def test_calls_on_cuda(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    _OnCuda.patch(monkeypatch)
    x = draw_inputs(200, 200, heads=4, kv_heads=2)
    assert_same(run(SDPA(), x, bands_of(mask, x)), run(Reference(), x, bands_of(mask, x)), 1e-10)


def test_packed_documents_are_one_call_on_cuda() -> None:
    bands = (Documents((50, 30, 120)) & Causal()).bands(200, 200)
    lengths = ((50, 50), (30, 30), (120, 120))
    assert corners(plan(bands)) == (Stack(Shape.LOWER, 0, 0, 200, 200, documents=lengths),)

"""Calls of the flash operators of CUDA, against a test double with the operators' argument checks and meaning."""

import pytest
import torch

from longspan.kernels import flash_cuda
from longspan.kernels.reference import Reference
from longspan.kernels.sdpa import SDPA
from longspan.masks.bands import Band
from longspan.masks.constructors import BlockSparse, Causal, Chunked, Documents, Full, Mask, SinkTokens, Window
from tests.helpers.flash_operator import FlashOperators
from tests.helpers.kernel_cases import CORNERS, Inputs, assert_same, bands_of, draw_inputs, run

MASKS: list[tuple[Mask, int]] = [
    (Causal(), 1), (Full(), 1), (Window(30, 10), 1), (Window(5, None), 1), (Chunked(50) & Causal(), 1),
    (Documents((50, 30, 120)) & Causal(), 1), (Documents((20, 80, 100)), 1), (Documents((90, 110)) & Window(10), 1),
    (Causal() & (Window(20) | SinkTokens(4)), 3), (CORNERS, 4), (BlockSparse(50, [[False] * 4] * 4), 0),
]  # fmt: skip


@pytest.mark.parametrize(("mask", "calls"), MASKS, ids=repr)
@pytest.mark.parametrize("most", [2**31, 200 * 3 * 8], ids=["whole", "by heads"])
def test_calls_on_cuda(mask: Mask, calls: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = FlashOperators()
    operators.patch(monkeypatch)
    monkeypatch.setattr(flash_cuda, "MOST_ELEMENTS", most)
    tokens = 150 if mask is CORNERS else 200
    x = draw_inputs(tokens, tokens, heads=4, kv_heads=2)
    assert_same(run(SDPA(), x, bands_of(mask, x)), run(Reference(), x, bands_of(mask, x)), 1e-10)
    if most == 2**31:
        assert operators.calls == {"forward": calls, "backward": calls}
    elif calls == 1:
        assert operators.calls["forward"] > 1


def test_the_backward_of_some_keys_takes_the_output_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ring attention and sink logits rest on, with the keys of a later rank: fewer keys than queries, and more."""
    FlashOperators().patch(monkeypatch)
    x = draw_inputs(120, 90, heads=4, kv_heads=2)
    bands = (Band(0, 120, 0, 50, -119, 49), Band(30, 120, 50, 90, -69, 0))
    out, lse = Reference().forward(x.q, x.k, x.v, bands, 0.3)
    for part in bands:
        found = SDPA().backward(x.dout, x.q, x.k, x.v, out, lse, (part,), 0.3)[:3]
        wanted = Reference().backward(x.dout, x.q, x.k, x.v, out, lse, (part,), 0.3)[:3]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("mask", "whole"), [(Causal(), True), (Causal() & (Window(20) | SinkTokens(4)), False)])
def test_results_keep_the_dtype_where_nothing_is_merged(mask: Mask, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    FlashOperators().patch(monkeypatch)
    x = draw_inputs(200, 200, heads=4, kv_heads=2, dtype=torch.bfloat16)
    bands = bands_of(mask, x)
    found, wanted = run(SDPA(), x, bands), run(Reference(), Inputs(*(t.double() for t in x)), bands)
    assert found["lse"].dtype == torch.float32
    assert {found[name].dtype for name in ("out", "dq", "dk", "dv")} == {torch.bfloat16 if whole else torch.float32}
    assert_same(found, wanted, 0.02)


def test_lengths_are_put_on_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    FlashOperators().patch(monkeypatch)
    flash_cuda._cumulative.cache_clear()
    x = draw_inputs(200, 200)
    for _ in range(3):
        run(SDPA(), x, bands_of(Documents((50, 30, 120)) & Causal(), x))
    assert (flash_cuda._cumulative.cache_info().misses, flash_cuda._cumulative.cache_info().hits) == (1, 5)


@pytest.mark.parametrize(
    ("capability", "text"), [((7, 5), r"needs compute capability 8.0 \(Ampere\), and this GPU has 7.5"), ((8, 0), None)]
)
def test_older_gpus_lack_it(capability: tuple[int, int], text: str | None) -> None:
    found = flash_cuda.lacks(torch.bfloat16, 64, capability)
    assert (found is None) if text is None else text.replace("\\", "") in str(found)

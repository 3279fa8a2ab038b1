"""Calls of the memory-efficient operator of CUDA, against a test double with the operator's argument checks and meaning."""

import pytest
import torch
from hypothesis import example, given

from longspan.errors import KernelError
from longspan.kernels import efficient
from longspan.kernels.efficient import Efficient
from longspan.kernels.online import Online
from longspan.kernels.protocol import Need
from longspan.kernels.reference import Reference
from longspan.masks.bands import Band
from longspan.masks.constructors import BlockSparse, Causal, Documents, Full, Mask, Window
from tests.helpers.dense_operators import EfficientOperators
from tests.helpers.examples import examples
from tests.helpers.kernel_cases import Inputs, Slopes, assert_same, attentions, bands_of, draw_inputs, run

# beartype looks at a random item of each list that it checks
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

NONE, CAUSAL = 0, 2


def both(x: Inputs, bands: tuple[Band, ...], monkeypatch: pytest.MonkeyPatch, **extras: object) -> EfficientOperators:
    """Compare with the reference, in fp32; the calls that were made."""
    operators = EfficientOperators()
    operators.patch(monkeypatch)
    narrow = Inputs(*(t.float() for t in x))
    wanted = run(Online() if extras else Reference(), Inputs(*(t.double() for t in narrow)), bands, **extras)
    assert_same(run(Efficient(), narrow, bands, **extras), wanted, 1e-5)
    return operators


@pytest.mark.parametrize(
    ("mask", "calls"),
    [
        (Causal(), [(CAUSAL, None, False)]),
        (Full(), [(NONE, None, False)]),
        (Window(30), [(CAUSAL, 31, False)]),
        (Window(30, 10), [(CAUSAL, 41, False), (NONE, None, True)]),
        (Window(30, None), [(NONE, None, True)]),
        (Documents((50, 30, 120)) & Causal(), [(CAUSAL, None, False)] * 3),
        (BlockSparse(50, [[False] * 4] * 4), []),
    ],
    ids=repr,
)
def test_a_band_is_a_call(mask: Mask, calls: list[tuple[int, int | None, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw_inputs(200, 200, heads=4, kv_heads=2)
    assert both(x, bands_of(mask, x), monkeypatch).calls == calls


@examples(few=40, many=600)
@given(attention=attentions())
@example(attention=(Window(3, None), draw_inputs(300, 7)))
@example(attention=(Causal(), draw_inputs(50, 300)))
def test_any_bands(attention: tuple[Mask, Inputs]) -> None:
    mask, x = attention
    heads, dim = x.q.shape[1], 4
    x = draw_inputs(x.q.shape[0], x.k.shape[0], heads, x.k.shape[1], dim, v_dim=8)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(efficient, "MOST_SCORES", 5000)
        both(x, bands_of(mask, x), monkeypatch)


@pytest.mark.parametrize("mask", [Causal(), Window(30, 10), Documents((50, 30, 120))], ids=repr)
@pytest.mark.parametrize("most", [2**28, 4 * 200 * 20], ids=["whole", "in blocks"])
def test_a_bias_and_its_gradient(mask: Mask, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficient, "MOST_SCORES", most)
    x = draw_inputs(200, 200, heads=4, kv_heads=2)
    calls = both(x, bands_of(mask, x), monkeypatch, bias=Slopes(4)).calls
    assert all(is_added for _, _, is_added in calls)
    assert (len(calls) == len(bands_of(mask, x))) == (most == 2**28)


def test_a_bias_is_not_rounded_to_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator takes the bias in the dtype of q: a bias of 300 in bf16 would be off by 1."""
    EfficientOperators().patch(monkeypatch)
    x = draw_inputs(200, 200, heads=2, dtype=torch.bfloat16)
    bands = bands_of(Causal(), x)
    found, wanted = run(Efficient(), x, bands, bias=Slopes(2)), run(Online(), x, bands, bias=Slopes(2))
    assert_same(found, wanted, 1e-4)


def test_the_backward_of_some_keys_takes_the_output_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    EfficientOperators().patch(monkeypatch)
    x = Inputs(*(t.float() for t in draw_inputs(120, 90, heads=4, kv_heads=2)))
    bands = (Band(0, 120, 0, 50, -119, 49), Band(30, 120, 50, 90, -69, 0))
    out, lse = Reference().forward(x.q, x.k, x.v, bands, 0.3)
    for part in bands:
        found = Efficient().backward(x.dout, x.q, x.k, x.v, out, lse, (part,), 0.3)[:3]
        wanted = Reference().backward(x.dout, x.q, x.k, x.v, out, lse, (part,), 0.3)[:3]
        torch.testing.assert_close([t.double() for t in found], [t.double() for t in wanted], rtol=1e-5, atol=1e-5)


def test_heads_are_split_below_the_largest_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficient, "MOST_ELEMENTS", 100 * 2 * 8)
    x = draw_inputs(100, 100, heads=4, kv_heads=2)
    assert len(both(x, bands_of(Causal(), x), monkeypatch).calls) == 4


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"device_type": "cpu"}, "is for cuda, not cpu"),
        ({"softcap": True}, "has no softcap"),
        ({"dtype": torch.float64}, "takes fp32, bf16 and fp16, not torch.float64"),
        ({"v_dim": 6}, "multiples of 4, not 8 and 6"),
        ({"dtype": torch.bfloat16, "capability": (7, 5)}, r"in bf16 needs compute capability 8.0 (Ampere)"),
        ({"dtype": torch.float16, "capability": (7, 5)}, None),
        ({"bias": True}, None),
    ],
)
def test_what_it_lacks(changes: dict[str, object], text: str | None) -> None:
    need: dict[str, object] = {"device_type": "cuda", "dtype": torch.float32, "qk_dim": 8, "v_dim": 8}
    found = Efficient().lacks(Need(**(need | changes)))  # type: ignore[arg-type]
    assert found is None if text is None else text in str(found)


def test_a_softcap_is_refused() -> None:
    x = draw_inputs(5, 5)
    with pytest.raises(KernelError, match="kernel='efficient' has no softcap; use kernel='flex'"):
        Efficient().forward(x.q, x.k, x.v, bands_of(Causal(), x), 0.3, softcap=5.0)

"""Calls of cuDNN's attention operators, against a test double with the operators' argument checks and meaning."""

import pytest
import torch

from longspan.errors import KernelError
from longspan.kernels import cudnn
from longspan.kernels.cudnn import Cudnn
from longspan.kernels.protocol import Need
from longspan.kernels.reference import Reference
from longspan.masks.bands import Band
from longspan.masks.constructors import Causal, Documents, Full, Mask, Window
from tests.helpers.dense_operators import CudnnOperators
from tests.helpers.kernel_cases import assert_same, bands_of, draw_inputs, run


@pytest.mark.parametrize(
    ("mask", "cudnn", "flash"),
    [
        (Causal(), 1, 0), (Full(), 1, 0), (Documents((50, 50, 100)) & Causal(), 0, 1), (Documents((50,) * 4) & Causal(), 1, 0),
        (Documents((100, 100)), 1, 0), (Window(30), 0, 1), (Documents([1] * 200), 0, 1),
    ],
    ids=repr,
)  # fmt: skip
def test_cudnn_takes_the_calls_that_it_has(mask: Mask, cudnn: int, flash: int, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = CudnnOperators()
    operators.patch(monkeypatch)
    x = draw_inputs(200, 200, heads=4, kv_heads=2)
    assert_same(run(Cudnn(), x, bands_of(mask, x)), run(Reference(), x, bands_of(mask, x)), 1e-10)
    assert (operators.calls, operators.flash.calls["forward"]) == (cudnn, flash)


def test_a_causal_mask_of_fewer_queries_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its causal mask is aligned at the first key, that of a rank's later queries at the last."""
    operators = CudnnOperators()
    operators.patch(monkeypatch)
    x = draw_inputs(60, 90, heads=4, kv_heads=2)
    bands = (Band(0, 60, 0, 90, -59, 30),)
    assert_same(run(Cudnn(), x, bands), run(Reference(), x, bands), 1e-10)
    assert (operators.calls, operators.flash.calls["forward"]) == (0, 1)


def test_the_backward_of_some_keys_takes_the_output_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    CudnnOperators().patch(monkeypatch)
    x = draw_inputs(120, 90, heads=4, kv_heads=2)
    bands = (Band(0, 120, 0, 50, -119, 49), Band(30, 120, 50, 90, -69, 0))
    out, lse = Reference().forward(x.q, x.k, x.v, bands, 0.3)
    for part in bands:
        found = Cudnn().backward(x.dout, x.q, x.k, x.v, out, lse, (part,), 0.3)[:3]
        wanted = Reference().backward(x.dout, x.q, x.k, x.v, out, lse, (part,), 0.3)[:3]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_a_deterministic_run_is_left_to_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = CudnnOperators()
    operators.patch(monkeypatch)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    x = draw_inputs(50, 50)
    run(Cudnn(), x, bands_of(Causal(), x))
    assert (operators.calls, operators.flash.calls["forward"]) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"device_type": "cpu"}, "is for cuda, not cpu"),
        ({"softcap": True}, "without softcap"),
        ({"bias": True}, "without bias"),
        ({"dtype": torch.float32}, "takes fp16 and bf16, not torch.float32"),
        ({"v_dim": 64}, "equal query/key and value dims, not 128 and 64"),
        ({"qk_dim": 192, "v_dim": 192}, "multiples of 8 up to 128, not 192"),
        ({"capability": (7, 0)}, "needs compute capability 8.0 (Ampere), and this GPU has 7.0"),
        ({}, None),
    ],
)
def test_what_it_lacks(changes: dict[str, object], text: str | None) -> None:
    need: dict[str, object] = {"device_type": "cuda", "dtype": torch.bfloat16, "qk_dim": 128, "v_dim": 128}
    found = Cudnn().lacks(Need(**(need | changes)))  # type: ignore[arg-type]
    assert found is None if text is None else text in str(found)


def test_a_softcap_is_refused() -> None:
    x = draw_inputs(5, 5)
    with pytest.raises(KernelError, match="kernel='cudnn' has neither softcap nor bias"):
        Cudnn().forward(x.q, x.k, x.v, bands_of(Causal(), x), 0.3, softcap=5.0)


def test_a_trial_compares_with_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = CudnnOperators()
    operators.patch(monkeypatch)
    monkeypatch.setattr(cudnn, "_device", lambda: torch.device("cpu"))
    trial = cudnn.agrees_with_flash_attention.__wrapped__
    assert trial()
    assert operators.calls == 1
    whole = cudnn._forward_cuda
    monkeypatch.setattr(cudnn, "_forward_cuda", lambda *args, **named: tuple(x * 1.1 for x in whole(*args, **named)[:2]))
    with pytest.warns(UserWarning, match=r"failed a trial on this GPU, .* takes another: results differ by "):
        assert not trial()


def test_a_trial_without_the_library_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="cuDNN's attention failed a trial on this GPU, so that kernel='auto' takes another: "):
        assert not cudnn.agrees_with_flash_attention.__wrapped__()

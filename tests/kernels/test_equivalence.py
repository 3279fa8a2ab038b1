"""Every kernel gives the numbers of the dense oracle, forward and backward."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from longspan.kernels.online import Online
from longspan.kernels.protocol import Kernel
from longspan.kernels.reference import Reference
from longspan.kernels.sdpa import SDPA
from longspan.masks.bands import localize
from longspan.masks.constructors import Causal, Chunked, Mask, SinkTokens, Window
from tests.helpers.examples import examples
from tests.helpers.kernel_cases import COLUMN, CORNERS, Inputs, assert_same, attentions, bands_of, draw_inputs, run

# beartype looks at a random item of each list that it checks
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


@pytest.mark.parametrize("kernel", [SDPA(), Online()], ids=lambda kernel: kernel.name)
@examples(few=25, many=500)
@given(attention=attentions())
@example(attention=(Window(255), draw_inputs(1100, 1100)))
@example(attention=(Window(1500, 100), draw_inputs(3500, 3300)))
@example(attention=(Window(1023), draw_inputs(2500, 2500)))
@example(attention=(Causal() & (Window(100) | SinkTokens(4)), draw_inputs(800, 800)))
@example(attention=(CORNERS, draw_inputs(150, 150)))
@example(attention=(COLUMN, draw_inputs(150, 150)))
def test_kernel_equals_reference(kernel: Kernel, attention: tuple[Mask, Inputs]) -> None:
    mask, x = attention
    bands = bands_of(mask, x)
    assert_same(run(kernel, x, bands), run(Reference(), x, bands), 1e-10)


FP32 = {
    SDPA(): [Causal(), Window(130, 7), Chunked(90) & Causal(), Window(20) | SinkTokens(3)],
    Online(): [Causal(), Window(20) | SinkTokens(3)],  # it sums one way, whatever the mask
}


@pytest.mark.parametrize(
    ("kernel", "mask"),
    [pytest.param(kernel, mask, id=f"{kernel.name}-{mask!r}") for kernel, masks in FP32.items() for mask in masks],
)
def test_fp32(kernel: Kernel, mask: Mask) -> None:
    x = draw_inputs(1500, 1500, heads=4, kv_heads=2, dim=32, dtype=torch.float32)
    found = run(kernel, x, bands_of(mask, x))
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert_same(found, run(Reference(), Inputs(*(t.double() for t in x)), bands_of(mask, x)), 1e-5)


@pytest.mark.parametrize("kernel", [SDPA(), Online(), Reference()], ids=lambda kernel: kernel.name)
@examples(few=15, many=300)
@given(attention=attentions(), cut=st.floats(0, 1))
def test_parts_of_the_keys_add_up(kernel: Kernel, attention: tuple[Mask, Inputs], cut: float) -> None:
    """Out and lse of each part merge to the whole; each part's backward, given the whole out and lse, is its share."""
    mask, x = attention
    queries, keys = range(x.q.shape[0]), range(x.k.shape[0])
    whole = run(Reference(), x, bands_of(mask, x))
    at = int(cut * len(keys))
    total = {"dq": torch.zeros_like(whole["dq"])}
    outs, lses, pieces = [], [], {"dk": [], "dv": []}
    for part in (keys[:at], keys[at:]):
        bands = localize(bands_of(mask, x), (queries,), (part,))
        k, v = x.k[part.start : part.stop], x.v[part.start : part.stop]
        out, lse = kernel.forward(x.q, k, v, bands, 0.3)
        outs.append(out)
        lses.append(lse)
        dq, dk, dv, _ = kernel.backward(x.dout, x.q, k, v, whole["out"], whole["lse"], bands, 0.3)
        total["dq"] += dq
        pieces["dk"].append(dk)
        pieces["dv"].append(dv)
    total["lse"] = torch.stack(lses).logsumexp(0)
    shares = (torch.stack(lses) - total["lse"]).exp().nan_to_num(0)
    total["out"] = torch.einsum("phq,pqhd->qhd", shares, torch.stack(outs))
    total |= {name: torch.cat(parts) for name, parts in pieces.items()}
    assert_same(total, whole, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [SDPA(), Online(), Reference()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 5), (5, 0), (5, 5)])
def test_nothing_to_see(kernel: Kernel, queries: int, keys: int, dtype: torch.dtype) -> None:
    found = run(kernel, draw_inputs(queries, keys, dtype=dtype), ())
    assert {value.dtype for value in found.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert torch.equal(found.pop("lse"), torch.full((2, queries), -math.inf, dtype=found["out"].dtype))
    assert {name: value.shape for name, value in found.items()} == {
        "out": (queries, 2, 8), "dq": (queries, 2, 8), "dk": (keys, 1, 8), "dv": (keys, 1, 8)
    }  # fmt: skip
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("kernel", [SDPA(), Online()], ids=lambda kernel: kernel.name)
def test_bf16_is_as_good_as_sdpa(kernel: Kernel) -> None:
    """Pooled over 8 seeds, causal: at most 1.2 x the error that PyTorch's own attention in bf16 makes against fp64."""
    errors: dict[str, list[float]] = {"ours": [0.0] * 4, "torch": [0.0] * 4}
    for seed in range(8):
        x = draw_inputs(600, 600, heads=4, kv_heads=2, dim=32, dtype=torch.bfloat16, seed=seed)
        names = ("out", "dq", "dk", "dv")
        exact = run(Reference(), Inputs(*(t.double() for t in x)), Causal().bands(600, 600))
        ours = run(kernel, x, Causal().bands(600, 600))
        leaves = [t.detach().transpose(0, 1)[None].requires_grad_() for t in x[:3]]
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.3, enable_gqa=True)
        grads = torch.autograd.grad(out, leaves, x.dout.transpose(0, 1)[None])
        peer = dict(zip(names, (t[0].transpose(0, 1) for t in (out, *grads))))
        for i, name in enumerate(names):
            errors["ours"][i] += (ours[name].to(torch.bfloat16).double() - exact[name]).square().sum().item()
            errors["torch"][i] += (peer[name].double() - exact[name]).square().sum().item()
    for ours_squared, torch_squared in zip(errors["ours"], errors["torch"]):
        assert math.sqrt(ours_squared) <= 1.2 * math.sqrt(torch_squared)

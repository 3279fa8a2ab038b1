"""FlexAttention, which runs on CUDA only: its mask, its forward uncompiled, its merge of gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

from longspan.kernels import flex
from longspan.kernels.reference import Reference, visible
from longspan.masks.constructors import Causal, Documents, Mask, SinkTokens, Window
from tests.helpers.examples import examples
from tests.helpers.kernel_cases import CPU, Inputs, attentions, bands_of, draw_inputs

# beartype looks at a random item of each list that it checks
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


@examples(few=12, many=250)
@given(attention=attentions())
def test_flex_reads_the_bands(attention: tuple[Mask, Inputs]) -> None:
    mask, x = attention
    queries, keys = x.q.shape[0], x.k.shape[0]
    sees = flex.mask_mod(bands_of(mask, x), queries, CPU)
    asked = sees(torch.tensor(0), torch.tensor(0), torch.arange(queries)[:, None], torch.arange(keys)[None])
    assert torch.equal(asked, visible(bands_of(mask, x), queries, keys, CPU))


@examples(few=20, many=400)
@given(attention=attentions(), size=st.sampled_from([16, 50, 128]))
def test_blocks_hold_every_pair_and_whole_ones_nothing_else(attention: tuple[Mask, Inputs], size: int) -> None:
    mask, x = attention
    queries, keys = x.q.shape[0], x.k.shape[0]
    partial, whole = flex.blocks(bands_of(mask, x), queries, keys, size)
    seen = visible(bands_of(mask, x), queries, keys, CPU)
    assert not (partial & whole).any()
    rows = [block.split(size, 1) for block in seen.split(size)]
    some, every = (torch.tensor([[bool(of(block)) for block in row] for row in rows]) for of in (torch.any, torch.all))
    assert torch.equal(some & ~(partial | whole), torch.zeros_like(some))
    assert torch.equal(whole & ~every, torch.zeros_like(some))


def test_a_causal_mask_needs_a_mask_on_its_diagonal_only() -> None:
    partial, whole = flex.blocks(Causal().bands(640, 640), 640, 640, 128)
    assert torch.equal(partial, torch.eye(5, dtype=torch.bool))
    assert torch.equal(whole, torch.ones(5, 5, dtype=torch.bool).tril(-1))


@pytest.mark.filterwarnings("ignore")
def test_another_mask_is_not_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """After eight compilations dynamo would fall back to eager, which forms all scores of queries x keys."""
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex_attention, backend=graphs)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    x = draw_inputs(300, 300, heads=4, kv_heads=2, dim=16, dtype=torch.float32)
    several = [Documents((cut, 300 - cut)) & Window(cut) for cut in range(10, 110, 10)]
    for mask in (Causal(), Documents((100, 200)) & Causal(), *several):
        found = flex._attend(*x[:3], bands_of(mask, x), 0.3, None)
        wanted = Reference().forward(*x[:3], bands_of(mask, x), 0.3)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 1


@pytest.mark.filterwarnings("ignore")  # torch says at length that uncompiled flex_attention is slow
@pytest.mark.parametrize(
    "mask", [Causal(), Causal() & (Window(20) | SinkTokens(3)), Documents((50, 30, 76)) & Causal()], ids=repr
)
def test_flex_forward_uncompiled(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flex._compiled.cache_clear()
    x = draw_inputs(156, 156, heads=4, kv_heads=2, dim=16, v_dim=24, dtype=torch.float32)
    found = flex._attend(*x[:3], bands_of(mask, x), 0.3, 5.0)
    wanted = Reference().forward(*x[:3], bands_of(mask, x), 0.3, softcap=5.0)
    flex._compiled.cache_clear()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_flex_merges_backwards() -> None:
    """The gradients it hands to autograd are those of merging two parts by log-sum-exp."""
    out_a, out_b, dout = torch.randn(3, 5, 2, 4, dtype=torch.float64)
    lse_a, lse_b = torch.randn(2, 2, 5, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (out_a, lse_a)]
    lse = torch.logaddexp(lse_a, lse_b)
    out = sum(o * (part - lse).exp().T.unsqueeze(2) for o, part in ((out_a, lse_a), (out_b, lse_b)))
    wanted = torch.autograd.grad(out, leaves, dout)
    found = flex.merge_gradients(dout, out.detach(), lse.detach(), out_a.detach(), lse_a.detach())
    torch.testing.assert_close(found, wanted)

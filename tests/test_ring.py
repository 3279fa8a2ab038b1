"""Rings bring what is needed and no more, share the work evenly, and lose no precision against one device."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from longspan import masks
from longspan.attention import attend
from longspan.collectives import CountingTransport
from longspan.layout import Heads, Layout, Traffic, attention_traffic, ring_traffic
from longspan.masks import Causal, Documents, Full, Mask, Window, area, localize
from longspan.ring import plan_hops
from ranks import Ranks
from test_attention import BRIEF, Case, cases, gathered, mesh_of, mine, on_this_rank, oracle, pool, whole_inputs

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
__all__ = ["pool"]


@settings(BRIEF, max_examples=80)
@given(case=cases())
def test_traffic_is_the_closed_form(case: Case, pool: Callable[[int], Ranks]) -> None:
    for counted, expected in pool(case.ulysses * case.ring).run(counted_and_expected, case):
        assert counted == expected, case


def counted_and_expected(case: Case) -> tuple[tuple[Traffic, Traffic], tuple[Traffic, Traffic]]:
    """(forward, backward) of one attention: what passed the Transport, and the formulas of layout.py."""
    mesh = mesh_of(case)
    transport, place = mesh.transport, mesh.place
    assert isinstance(transport, CountingTransport)
    x = {name: value.requires_grad_() for name, value in mine(whole_inputs(case), case, place).items()}
    transport.traffic = Traffic()
    out = attend(
        x["q"], x["k"], x["v"], mask=case.mask, mesh=mesh, tokens=case.tokens, key_tokens=case.key_tokens, softcap=case.softcap
    )
    forward, transport.traffic = transport.traffic, Traffic()
    (out * x["dout"].detach()).sum().backward()

    heads = Heads(case.heads, case.kv_heads, case.ulysses)
    layouts = [Layout(n, case.ring, case.ulysses, case.zigzag) for n in (case.tokens, case.key_tokens)]
    sizes, key_sizes = (layout.sizes(place.ring_rank) for layout in layouts)
    exchange = attention_traffic(
        heads, sizes, key_sizes, place.ulysses_rank, rows=case.batch, qk_dim=case.qk_dim, v_dim=case.v_dim, itemsize=8
    )
    queries, keys = ([layout.batch_runs(rank, case.batch) for rank in range(case.ring)] for layout in layouts)
    bands = masks.rows(case.mask, case.batch, case.tokens, case.key_tokens)
    hops = plan_hops(bands, queries, keys, place.ring_rank)[1:]
    width = len(heads.kv_of(place.ulysses_rank)) * (case.qk_dim + case.v_dim)
    leaving, arriving = ([sum(map(len, getattr(hop, name))) for hop in hops] for name in ("leaving", "arriving"))
    passed = ring_traffic(leaving, arriving, width, itemsize=8, grad_itemsize=8)
    return (forward, transport.traffic), (exchange[0] + passed[0], exchange[1] + passed[1])


@pytest.mark.parametrize("ring", [2, 3, 4, 8])
@pytest.mark.parametrize("extra", [0, 1, 7, 100])
def test_zigzag_shares_a_causal_mask_evenly(ring: int, extra: int) -> None:
    tokens = 128 * ring + extra
    areas = _areas(Causal(), Layout(tokens, ring, zigzag=True))
    assert sum(areas) == tokens * (tokens + 1) // 2
    assert max(areas) <= 1.05 * sum(areas) / ring
    assert max(_areas(Causal(), Layout(tokens, ring))) > 1.4 * sum(areas) / ring  # the contiguous layout is why


def _areas(mask: Mask, layout: Layout) -> list[int]:
    """The scores that each ring rank computes for one head."""
    bands = mask.bands(layout.tokens, layout.tokens)
    return [area(localize(bands, layout.runs(rank), (range(layout.tokens),))) for rank in range(layout.ring)]


def test_windows_and_documents_skip_hops_and_keys() -> None:
    layout = Layout(4096, ring=4)
    held = [layout.runs(rank) for rank in range(4)]

    def sent(mask: Mask, rank: int) -> list[int]:
        hops = plan_hops(mask.bands(4096, 4096), held, held, rank)[1:]
        return [sum(map(len, hop.leaving)) for hop in hops]

    assert sent(Full(), 1) == [1024, 1024, 1024]
    assert sent(Window(255), 1) == [255]  # the last keys to the next rank, and nothing else
    assert sent(Documents((1024,) * 4) & Causal(), 1) == []


LAYOUTS = [(8, 1, False), (1, 8, True), (4, 2, True), (2, 4, False)]


def test_bf16_is_as_exact_as_one_device(pool: Callable[[int], Ranks]) -> None:
    pooled = dict.fromkeys(LAYOUTS, 0.0)
    one_device = 0.0
    for seed in range(8):
        case = Case(1, 1, False, 1, 200, 200, 8, 4, 32, 32, Causal(), dtype=torch.bfloat16, seed=seed)
        want = oracle(case)
        one_device += _error(_one_device(case), want)
        for ulysses, ring, zigzag in LAYOUTS:
            spread = case._replace(ulysses=ulysses, ring=ring, zigzag=zigzag)
            pooled[ulysses, ring, zigzag] += _error(gathered(spread, pool(8).run(on_this_rank, spread)), want)
    for layout, error in pooled.items():
        assert (error / one_device) ** 0.5 <= 1.2, f"{layout}: {(error / one_device) ** 0.5:.3f} x"


def _one_device(case: Case) -> dict[str, torch.Tensor]:
    x = {name: value.requires_grad_() for name, value in whole_inputs(case).items()}
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    (out * x["dout"].detach()).sum().backward()
    return {"out": out.detach()} | {name: x[name].grad for name in "qkv"}  # type: ignore[dict-item]


def _error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Squared, each tensor relative to its own size so that none drowns the others."""
    return sum(float((got[name].double() - want[name]).square().sum() / want[name].square().sum()) for name in want)

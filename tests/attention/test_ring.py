"""Rings bring what is needed and no more, share the work evenly, and lose no precision against one device."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from longspan.attention.ring import plan_hops
from longspan.distributed.layout import Layout
from longspan.masks.bands import area, localize
from longspan.masks.constructors import Causal, Documents, Full, Mask, Window
from tests.helpers.attention_cases import Case, oracle, run, squared_error, whole_inputs
from tests.helpers.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


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


LONG = pytest.mark.long  # hops and exchanges meet in the layout that stays; test_guarantees.py has bf16 by ulysses alone
LAYOUTS = [(4, 2, True), *(pytest.param(*layout, marks=LONG) for layout in [(8, 1, False), (1, 8, True), (2, 4, False)])]


@pytest.mark.parametrize(("ulysses", "ring", "zigzag"), LAYOUTS)
def test_bf16_is_as_exact_as_one_device(ulysses: int, ring: int, zigzag: bool, pool: Callable[[int], Ranks]) -> None:
    pooled, one_device = 0.0, 0.0
    for seed in range(8):
        case = Case(1, 1, False, 1, 200, 200, 8, 4, 32, 32, Causal(), dtype=torch.bfloat16, seed=seed)
        want = oracle(case)
        one_device += squared_error(_one_device(case), want)
        pooled += squared_error(run(case._replace(ulysses=ulysses, ring=ring, zigzag=zigzag), pool), want)
    assert (pooled / one_device) ** 0.5 <= 1.2, f"{(pooled / one_device) ** 0.5:.3f} x"


def _one_device(case: Case) -> dict[str, torch.Tensor]:
    x = {name: value.requires_grad_() for name, value in whole_inputs(case).items()}
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    (out * x["dout"].detach()).sum().backward()
    return {"out": out.detach()} | {name: x[name].grad for name in "qkv"}  # type: ignore[dict-item]

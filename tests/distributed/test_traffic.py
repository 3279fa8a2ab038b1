"""Closed-form communication volume, in integers: the paper's formula, and every element counted one at a time."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.attention.ring import plan_hops
from longspan.distributed.layout import Heads, Layout, consecutive, split
from longspan.distributed.traffic import (
    Traffic,
    attention_traffic,
    causal_keys_sent,
    pipeline_traffic,
    recomputable_attention_traffic,
    ring_traffic,
)
from longspan.masks.constructors import Causal


def test_traffic_is_four_n_h_over_p() -> None:
    ranks, tokens, heads, dim = 8, 1024, 16, 64
    forward, backward = attention_traffic(
        Heads(heads, heads, ranks), split(tokens, ranks), split(tokens, ranks), 0, qk_dim=dim, v_dim=dim, itemsize=1
    )
    others = (ranks - 1) / ranks
    assert forward == backward == Traffic(2, int(4 * tokens * heads * dim / ranks * others))


def test_one_rank_sends_nothing() -> None:
    for formula in (attention_traffic, recomputable_attention_traffic):
        assert formula(Heads(4, 2), (9,), (9,), 0, qk_dim=8, v_dim=8, itemsize=2) == (Traffic(), Traffic())


@pytest.mark.parametrize("rank", range(3))
def test_uneven_tokens_and_heads_are_counted_one_at_a_time(rank: int) -> None:
    """7 tokens and 10 query heads over 2 key/value heads on 3 ranks: who holds what before and after the exchange."""
    heads, tokens, qk_dim, v_dim = Heads(10, 2, 3), 7, 3, 2
    sizes = split(tokens, 3)
    held = consecutive(sizes)

    def sent(heads_of: dict[int, range], width: int) -> tuple[int, int]:
        """(tokens to heads, heads to tokens): elements of this rank that another needs."""
        others = [p for p in range(3) if p != rank]
        there = sum(width for p in others for _ in product(held[rank], heads_of[p]))
        back = sum(width for p in others for _ in product(held[p], heads_of[rank]))
        return there, back

    query = {p: heads.query_of(p) for p in range(3)}
    kv = {p: heads.kv_of(p) for p in range(3)}
    q, k, v, out = sent(query, qk_dim), sent(kv, qk_dim), sent(kv, v_dim), sent(query, v_dim)
    forward, backward = attention_traffic(heads, sizes, sizes, rank, rows=4, qk_dim=qk_dim, v_dim=v_dim, itemsize=2)
    assert forward == Traffic(2, 4 * 2 * (q[0] + k[0] + v[0] + out[1]))
    assert backward == Traffic(2, 4 * 2 * (q[1] + k[1] + v[1] + out[0]))


def test_selective_recomputation_doubles_the_backward_and_not_the_forward() -> None:
    heads, sizes = Heads(8, 8, 2, 2), (5, 5)
    plain, plain_backward = attention_traffic(Heads(8, 8, 2), sizes, sizes, 1, qk_dim=4, v_dim=4, itemsize=4)
    forward, backward = recomputable_attention_traffic(heads, sizes, sizes, 1, qk_dim=4, v_dim=4, itemsize=4)
    assert forward == Traffic(2 * 2, plain.bytes)
    assert backward == Traffic(2 * 2, 2 * plain_backward.bytes)


def test_gradients_of_keys_return_in_their_own_dtype() -> None:
    forward, backward = ring_traffic([5, 3], [2, 7], 10, itemsize=2, grad_itemsize=4)
    assert forward == Traffic(2, 8 * 10 * 2)
    assert backward == Traffic(4, 8 * 10 * 2 + 9 * 10 * 4)


@given(st.integers(1, 6), st.booleans(), st.integers(0, 60))
def test_a_causal_ring_sends_what_the_closed_form_says(ring: int, zigzag: bool, extra: int) -> None:
    layout = Layout(2 * ring + extra, ring, 1, zigzag)
    held = [layout.runs(rank) for rank in range(ring)]
    for rank in range(ring):
        hops = plan_hops(Causal().bands(layout.tokens, layout.tokens), held, held, rank)
        assert sum(len(run) for hop in hops[1:] for run in hop.leaving) == causal_keys_sent(layout, rank)


@pytest.mark.parametrize(("pipeline", "per_rank"), [(2, 1), (3, 1), (2, 2), (3, 4)])
def test_every_edge_between_stages_carries_each_micro_batch_once_each_way(pipeline: int, per_rank: int) -> None:
    each = [pipeline_traffic(pipeline, rank, per_rank, micro_batches=5, elements=7, itemsize=4) for rank in range(pipeline)]
    for way in (0, 1):
        edges = pipeline * per_rank - 1
        assert sum((both[way] for both in each), Traffic()) == Traffic(5 * edges, 5 * edges * 7 * 4)
    assert each[0][1] == Traffic(5 * (per_rank - 1), 5 * (per_rank - 1) * 28)  # nothing comes before stage 0
    assert each[-1][0] == each[0][1]
    assert pipeline_traffic(1, 0, micro_batches=5, elements=7, itemsize=4) == (Traffic(), Traffic())

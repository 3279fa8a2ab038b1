"""Layouts are integers: every token and every head has its owner, shares are even, and refusals say what is legal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.distributed.layout import Heads, Layout, choose_degrees, consecutive, select, split
from longspan.errors import LayoutError

degrees = st.integers(1, 8)


@given(st.integers(0, 200), st.integers(1, 9))
def test_split_is_even_and_complete(count: int, parts: int) -> None:
    shares = split(count, parts)
    assert sum(shares) == count
    assert max(shares) - min(shares) <= 1


@given(st.lists(st.integers(0, 9), max_size=6), st.data())
def test_select_is_slicing_of_the_runs_side_by_side(sizes: list[int], data: st.DataObject) -> None:
    runs = tuple(range(100 * i, 100 * i + size) for i, size in enumerate(sizes))
    flat = [position for run in runs for position in run]
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert [p for run in select(runs, range(start, stop)) for p in run] == flat[start:stop]


@given(degrees, degrees, st.booleans(), st.integers(0, 100))
def test_every_token_has_one_owner_and_shares_differ_by_one(ring: int, ulysses: int, zigzag: bool, extra: int) -> None:
    layout = Layout(ring * ulysses + extra, ring, ulysses, zigzag)
    owned = [[p for run in layout.mine(r, u) for p in run] for r in range(ring) for u in range(ulysses)]
    assert sorted(p for tokens in owned for p in tokens) == list(range(layout.tokens))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1
    assert min(map(len, owned)) >= 1
    for r in range(ring):
        together = [p for run in layout.runs(r) for p in run]
        assert together == [p for u in range(ulysses) for p in owned[r * ulysses + u]]
        assert list(layout.sizes(r)) == [len(owned[r * ulysses + u]) for u in range(ulysses)]


def test_zigzag_gives_a_ring_rank_an_early_and_a_late_piece() -> None:
    assert Layout(16, ring=2, zigzag=True).runs(0) == (range(4), range(12, 16))
    assert Layout(16, ring=2, zigzag=True).runs(1) == (range(4, 8), range(8, 12))


@given(st.integers(1, 8), st.integers(1, 12), st.data())
def test_heads_are_dealt_evenly_with_the_keys_they_read(kv: int, group: int, data: st.DataObject) -> None:
    query = kv * group
    heads = Heads(query, kv, data.draw(st.integers(1, query)))
    ranks = range(heads.ulysses)
    assert [h for r in ranks for h in heads.query_of(r)] == list(range(query))
    for rank in ranks:
        read = {h // group for h in heads.query_of(rank)}
        assert set(heads.kv_of(rank)) == read
        reads = []
        for q, k in heads.groups(rank):
            mine, theirs = heads.query_of(rank)[q], heads.kv_of(rank)[k]
            assert len(mine) % len(theirs) == 0
            reads += [(h, theirs[i // (len(mine) // len(theirs))]) for i, h in enumerate(mine)]
        assert reads == [(h, h // group) for h in heads.query_of(rank)]


def test_fewer_key_heads_than_ranks_are_replicated_no_more_than_needed() -> None:
    heads = Heads(28, 4, 8)
    assert [len(heads.kv_of(rank)) for rank in range(8)] == [1, 2, 1, 2, 1, 2, 1, 1]
    assert heads.groups(1) == ((slice(0, 3), slice(0, 1)), (slice(3, 4), slice(1, 2)))


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda: Layout(3, ring=2, ulysses=2), r"tokens=3 is fewer than the 4 ranks of a sequence \(ring=2 x ulysses=2\)"),
        (lambda: Heads(12, 12, 16), r"ulysses=16 exceeds the 12 query heads; use ulysses=4 ring=4"),
        (lambda: Heads(12, 5, 2), r"12 query heads cannot share 5 key/value heads evenly"),
    ],
)
def test_refusals_say_what_is_legal(ask, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(LayoutError, match=text):
        ask()


def test_consecutive_ranges_lie_side_by_side() -> None:
    assert consecutive((3, 0, 2)) == (range(3), range(3, 3), range(3, 5))


@pytest.mark.parametrize(
    ("ask", "chosen"),
    [
        ((8, 32, 8, 8), (8, 1)),
        ((16, 32, 8, 8), (8, 2)),
        ((8, 28, 4, 8), (4, 2)),
        ((8, 3, 3, 8), (1, 8)),
        ((6, 3, 1, 8), (3, 2)),
        ((7, 40, 8, 8), (7, 1)),
    ],
)
def test_degrees_are_chosen_from_heads_and_nodes(ask: tuple[int, int, int, int], chosen: tuple[int, int]) -> None:
    degrees = choose_degrees(*ask)
    assert (degrees.ulysses, degrees.ring) == chosen
    assert f"ulysses={chosen[0]}" in degrees.why

"""The algebra of bands against sets of pairs (query, key), and cutting to a rank against indexing the dense mask."""

from itertools import accumulate, chain, pairwise, product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longspan.distributed.layout import Layout
from longspan.masks import bands as algebra
from longspan.masks import constructors as masks
from longspan.masks.bands import Band, area, blind_rows, intersect, join, localize, rectangle, shift, subtract, trim
from longspan.masks.constructors import Causal, Documents, Full, Mask, SinkTokens, Span, Window, batch_bands
from tests.helpers.mask_cases import Pairs, around, asked, dense, of_one, pairs, partitions, some_mask

# beartype, which checks signatures in the tests, picks the item that it checks by the random module
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

SPANS = st.tuples(st.integers(-3, 12), st.integers(-3, 12), st.integers(-3, 12), st.integers(-3, 12))
DRAWN_BANDS = st.lists(st.tuples(st.integers(-3, 12), st.integers(-3, 12)), min_size=1, max_size=4).map(around)


@settings(max_examples=100, deadline=None)
@given(asked())
@example((SinkTokens(1) | Span(1, 3), 5, 5))
def test_blind_rows_are_the_queries_that_see_nothing(case: tuple[Mask, int, int]) -> None:
    mask, tokens, key_tokens = case
    runs = blind_rows(mask.bands(tokens, key_tokens), tokens)
    seeing = {q for q, _ in dense(mask, tokens, key_tokens)}
    assert [q for run in runs for q in run] == [q for q in range(tokens) if q not in seeing]
    assert all(before.stop < run.start for before, run in pairwise(runs))


# ---- cutting to a rank


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Mask, int, Layout, Layout]:
    """A mask, a number of rows, and how queries and keys lie on 1 to 8 ranks."""
    ring, zigzag = draw(st.integers(1, 8)), draw(st.booleans())
    tokens = draw(st.integers(ring, 26))
    key_tokens = draw(st.integers(ring, 26)) if draw(st.booleans()) else tokens
    return (
        draw(some_mask(tokens, key_tokens)), draw(st.integers(1, 2)),
        Layout(tokens, ring=ring, zigzag=zigzag), Layout(key_tokens, ring=ring, zigzag=zigzag),
    )  # fmt: skip


def held(layout: Layout, batch: int, rank: int) -> tuple[range, ...]:
    starts = [row * layout.tokens for row in range(batch)]
    return tuple(range(run.start + start, run.stop + start) for start in starts for run in layout.runs(rank))


def indexed(whole: Pairs, q_runs: tuple[range, ...], k_runs: tuple[range, ...]) -> Pairs:
    """The dense mask at the rank's queries and keys, in its own places."""
    queries, keys = list(chain(*q_runs)), list(chain(*k_runs))
    return {(i, j) for i, q in enumerate(queries) for j, k in enumerate(keys) if (q, k) in whole}


@settings(max_examples=200, deadline=None)
@given(cuts())
def test_the_local_mask_is_the_whole_mask_indexed(case: tuple[Mask, int, Layout, Layout]) -> None:
    mask, batch, of_queries, of_keys = case
    bands = batch_bands(mask, batch, of_queries.tokens, of_keys.tokens)
    whole, done = pairs(bands), 0
    for rank, source in product(range(of_queries.ring), range(of_queries.ring)):
        q_runs, k_runs = held(of_queries, batch, rank), held(of_keys, batch, source)
        local = localize(bands, q_runs, k_runs)
        assert pairs(local) == indexed(whole, q_runs, k_runs)
        done += area(local)
    assert done == area(bands)


@st.composite
def shuffled_runs(draw: st.DrawFn, tokens: int) -> tuple[range, ...]:
    """Some of the pieces of a row, in any order: what a ring asks of another rank."""
    stops = list(accumulate(draw(partitions(tokens))))
    pieces = draw(st.permutations([range(start, stop) for start, stop in zip([0, *stops], stops)]))
    return tuple(pieces[: draw(st.integers(0, len(pieces)))])


@settings(max_examples=200, deadline=None)
@given(asked(), st.data())
def test_runs_may_lie_in_any_order(case: tuple[Mask, int, int], data: st.DataObject) -> None:
    mask, tokens, key_tokens = case
    q_runs, k_runs = data.draw(shuffled_runs(tokens)), data.draw(shuffled_runs(key_tokens))
    local = localize(mask.bands(tokens, key_tokens), q_runs, k_runs)
    assert pairs(local) == indexed(dense(mask, tokens, key_tokens), q_runs, k_runs)


@pytest.mark.parametrize("tokens", [16, 37, 128])
@pytest.mark.parametrize("ring", range(1, 9))
def test_pieces_that_are_one_band_again_are_joined(tokens: int, ring: int) -> None:
    zigzag, contiguous = Layout(tokens, ring=ring, zigzag=True), Layout(tokens, ring=ring)
    for rank in range(ring):
        runs, size = zigzag.runs(rank), sum(zigzag.sizes(rank))
        assert localize(Causal().bands(tokens, tokens), runs, runs) == Causal().bands(size, size)
        assert localize(Full().bands(tokens, tokens), runs, runs) == Full().bands(size, size)
        mine = contiguous.runs(rank)
        for source in range(ring):
            keys = contiguous.runs(source)
            expected = Full().bands(len(mine[0]), len(keys[0]))
            assert localize(Full().bands(tokens, tokens), mine, keys) == expected
    fives = tuple(range(start, min(start + 5, tokens)) for start in range(0, tokens, 5))
    for mask in (Causal(), Window(3), Window(0), Window(9, 2), Full()):
        assert localize(mask.bands(tokens, tokens), fives, fives) == mask.bands(tokens, tokens)
    halves = (range(tokens // 2), range(tokens // 2, tokens))
    sinks = (Causal() & (Window(3) | SinkTokens(2))).bands(tokens, tokens)
    assert localize(sinks, halves, halves) == sinks


def test_zigzag_cuts_few_documents() -> None:
    packed, runs = Documents((7, 9, 4, 20, 8, 16)), Layout(64, ring=4, zigzag=True).runs(1)
    assert runs == (range(8, 16), range(48, 56))
    assert localize(packed.bands(64, 64), runs, runs) == (Band(0, 8, 0, 8, -7, 7), Band(8, 16, 8, 16, -7, 7))


# ---- the algebra


@settings(max_examples=300, deadline=None)
@given(SPANS, st.integers(-14, 14), st.integers(-14, 14))
def test_trim_keeps_the_pairs_and_tightens_the_numbers(span: tuple[int, int, int, int], lo: int, hi: int) -> None:
    expected = list(of_one(Band(*span, lo, hi)))
    assert trim(*span, lo, hi) == (around(expected) if expected else None)
    everything = list(of_one(Band(*span, -99, 99)))
    assert rectangle(*span) == (around(everything) if everything else None)


@settings(max_examples=500, deadline=None)
@given(DRAWN_BANDS, DRAWN_BANDS, st.integers(-9, 9), st.integers(-9, 9))
def test_intersect_subtract_shift(a: Band, b: Band, dq: int, dk: int) -> None:
    both = intersect(a, b)
    assert pairs([both] if both else []) == pairs([a]) & pairs([b])
    assert pairs(subtract([a], [b])) == pairs([a]) - pairs([b])
    assert pairs([shift(a, dq, dk)]) == {(q + dq, k + dk) for q, k in of_one(a)}


@settings(max_examples=200, deadline=None)
@given(asked(), st.lists(DRAWN_BANDS, max_size=6))
def test_subtract_and_join_many(case: tuple[Mask, int, int], holes: list[Band]) -> None:
    mask, tokens, key_tokens = case
    bands = mask.bands(tokens, key_tokens)
    left = subtract(bands, holes)
    assert pairs(left) == pairs(bands) - set(chain(*map(of_one, holes)))
    assert pairs(join(left)) == pairs(left)
    assert len(join(left)) <= len(left)


# ---- time


def packed(count: int, stride: int) -> Documents:
    """``count`` documents of uneven lengths that no other ``stride`` repeats, and one that makes them 8 tokens each."""
    lengths = [1 + index * stride % 13 for index in range(count - 1)]
    return Documents((*lengths, 8 * count - sum(lengths)))


def test_the_work_grows_with_the_bands_and_not_with_their_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(a: Band, b: Band) -> Band | None:
        nonlocal calls
        calls += 1
        return intersect(a, b)

    for module in (algebra, masks):
        monkeypatch.setattr(module, "intersect", counted)
    count, tokens = 2_000, 16_000
    first, second = packed(count, 5), packed(count, 7)
    for work in (
        lambda: (first & second).bands(tokens, tokens),
        lambda: (first | second).bands(tokens, tokens),
        lambda: (Causal() | first).bands(tokens, tokens),
        lambda: (first | Causal()).bands(tokens, tokens),
        lambda: localize(batch_bands(first & Causal(), 4, tokens, tokens), *[held(Layout(tokens, 4, zigzag=True), 4, 1)] * 2),
    ):
        calls = 0
        work()
        assert 0 < calls < 8 * count

"""Masks pair by pair: a set of (query, key) is the oracle of every band and every cut; and the masks that hypothesis draws."""

from collections.abc import Iterable
from functools import cache
from itertools import chain, product

from hypothesis import strategies as st

from longspan.masks.bands import Band
from longspan.masks.constructors import (
    And,
    Bands,
    BlockSparse,
    Causal,
    Chunked,
    Documents,
    Full,
    Mask,
    Or,
    PrefixLM,
    SinkTokens,
    Span,
    Window,
)

Pairs = set[tuple[int, int]]


def sees(mask: Mask, q: int, k: int) -> bool:
    """The definition of each mask, one pair at a time."""
    match mask:
        case Full():
            return True
        case Causal():
            return k <= q
        case Window(left, right):
            return (left is None or k >= q - left) and (right is None or k <= q + right)
        case Documents(lengths, key_lengths):
            return document_of_each(lengths)[q] == document_of_each(lengths if key_lengths is None else key_lengths)[k]
        case PrefixLM(n):
            return k <= q or k < n
        case Chunked(n):
            return q // n == k // n
        case SinkTokens(n):
            return k < n
        case Span(start, stop):
            return start <= q < stop and start <= k < stop
        case BlockSparse(block, layout):
            return layout[q // block][k // block]
        case Bands(given):
            return any((q, k) in of_one(band) for band in given)
        case And(left, right):
            return sees(left, q, k) and sees(right, q, k)
        case Or(left, right):
            return sees(left, q, k) or sees(right, q, k)
    raise AssertionError(mask)


@cache
def document_of_each(lengths: tuple[int, ...]) -> list[int]:
    return [number for number, length in enumerate(lengths) for _ in range(length)]


def dense(mask: Mask, tokens: int, key_tokens: int) -> Pairs:
    return {(q, k) for q, k in product(range(tokens), range(key_tokens)) if sees(mask, q, k)}


def pairs(bands: Iterable[Band]) -> Pairs:
    """The pairs of the bands, which must be disjoint, canonical and sorted."""
    bands = list(bands)
    assert bands == sorted(bands)
    every = [list(of_one(band)) for band in bands]
    for band, mine in zip(bands, every):
        assert band == around(mine)
    assert len(set(chain(*every))) == sum(map(len, every))
    return set(chain(*every))


def of_one(band: Band) -> Iterable[tuple[int, int]]:
    rectangle_of_band = product(range(band.q_start, band.q_stop), range(band.k_start, band.k_stop))
    return ((q, k) for q, k in rectangle_of_band if band.lo <= k - q <= band.hi)


def around(some: Iterable[tuple[int, int]]) -> Band:
    """The six numbers that the pairs reach, whatever they are."""
    q, k, diagonal = zip(*((q, k, k - q) for q, k in some))
    return Band(min(q), max(q) + 1, min(k), max(k) + 1, min(diagonal), max(diagonal))


# ---- what hypothesis draws

LENGTHS = st.one_of(st.sampled_from([1, 2, 3, 5, 7, 11, 13, 17, 19, 23]), st.integers(1, 26))
SMALL = st.integers(0, 30)


@st.composite
def partitions(draw: st.DrawFn, tokens: int, parts: int | None = None) -> tuple[int, ...]:
    """Lengths that sum to ``tokens``, empty ones among them."""
    fewest, most = (parts - 1, parts - 1) if parts else (0, 5)
    cuts = sorted(draw(st.lists(st.integers(0, tokens), min_size=fewest, max_size=most)))
    return tuple(stop - start for start, stop in zip([0, *cuts], [*cuts, tokens]))


@st.composite
def documents(draw: st.DrawFn, tokens: int, key_tokens: int) -> Documents:
    lengths = draw(partitions(tokens))
    return Documents(lengths, None if tokens == key_tokens else draw(partitions(key_tokens, len(lengths))))


@st.composite
def block_sparse(draw: st.DrawFn, tokens: int, key_tokens: int) -> BlockSparse:
    block = draw(st.integers(1, 9))
    row = st.lists(st.booleans(), min_size=-(-key_tokens // block), max_size=-(-key_tokens // block))
    return BlockSparse(block, draw(st.lists(row, min_size=-(-tokens // block), max_size=-(-tokens // block))))


@st.composite
def written_bands(draw: st.DrawFn, tokens: int, key_tokens: int) -> Bands:
    """Loose ones, whose rectangle is wider than what they hold, in any order."""
    loose = st.tuples(st.integers(0, tokens), st.integers(0, key_tokens), st.integers(-9, 9), st.integers(-9, 9))
    drawn = sorted(draw(st.lists(loose, max_size=4)))
    stops = [*(q for q, _, _, _ in drawn[1:]), tokens]
    bands = [Band(q, stop, k, key_tokens, lo, hi) for (q, k, lo, hi), stop in zip(drawn, stops)]
    return Bands(draw(st.permutations(bands)))


def some_mask(tokens: int, key_tokens: int) -> st.SearchStrategy[Mask]:
    bounds = st.tuples(st.integers(0, min(tokens, key_tokens)), st.integers(0, min(tokens, key_tokens)))
    reach = st.none() | SMALL
    one = st.one_of(
        st.just(Causal()), st.just(Full()), st.builds(Window, reach, reach), documents(tokens, key_tokens),
        st.builds(PrefixLM, SMALL), st.builds(Chunked, st.integers(1, 30)), st.builds(SinkTokens, SMALL),
        bounds.map(lambda pair: Span(*sorted(pair))), block_sparse(tokens, key_tokens),
        written_bands(tokens, key_tokens),
    )  # fmt: skip
    return st.recursive(one, lambda inner: st.builds(And, inner, inner) | st.builds(Or, inner, inner), max_leaves=4)


@st.composite
def asked(draw: st.DrawFn) -> tuple[Mask, int, int]:
    """A mask and the length it is asked for; half of the time the keys have a length of their own."""
    tokens = draw(LENGTHS)
    key_tokens = draw(LENGTHS) if draw(st.booleans()) else tokens
    return draw(some_mask(tokens, key_tokens)), tokens, key_tokens

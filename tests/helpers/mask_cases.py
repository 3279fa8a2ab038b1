"""Masks as sets of (query, key) pairs, the reference for bands, and hypothesis strategies that draw masks."""

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
    """Whether query ``q`` sees key ``k``: the definition of each mask."""
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
    """The number of the document that each token belongs to."""
    return [number for number, length in enumerate(lengths) for _ in range(length)]


def dense(mask: Mask, tokens: int, key_tokens: int) -> Pairs:
    """All pairs (q, k) in which q sees k, by ``sees``."""
    return {(q, k) for q, k in product(range(tokens), range(key_tokens)) if sees(mask, q, k)}


def pairs(bands: Iterable[Band]) -> Pairs:
    """All pairs of the bands. Asserts that the bands are sorted and disjoint, and each as small as its pairs allow."""
    bands = list(bands)
    assert bands == sorted(bands)
    every = [list(of_one(band)) for band in bands]
    for band, mine in zip(bands, every):
        assert band == around(mine)
    assert len(set(chain(*every))) == sum(map(len, every))
    return set(chain(*every))


def of_one(band: Band) -> Iterable[tuple[int, int]]:
    """The pairs (q, k) of one band."""
    rectangle_of_band = product(range(band.q_start, band.q_stop), range(band.k_start, band.k_stop))
    return ((q, k) for q, k in rectangle_of_band if band.lo <= k - q <= band.hi)


def around(some: Iterable[tuple[int, int]]) -> Band:
    """The smallest band that contains all the pairs."""
    q, k, diagonal = zip(*((q, k, k - q) for q, k in some))
    return Band(min(q), max(q) + 1, min(k), max(k) + 1, min(diagonal), max(diagonal))


# ---- what hypothesis draws

LENGTHS = st.one_of(st.sampled_from([1, 2, 3, 5, 7, 11, 13, 17, 19, 23]), st.integers(1, 26))
SMALL = st.integers(0, 30)


@st.composite
def partitions(draw: st.DrawFn, tokens: int, parts: int | None = None) -> tuple[int, ...]:
    """Draws lengths, some of them 0, that sum to ``tokens``: ``parts`` of them, or 1 to 6."""
    fewest, most = (parts - 1, parts - 1) if parts else (0, 5)
    cuts = sorted(draw(st.lists(st.integers(0, tokens), min_size=fewest, max_size=most)))
    return tuple(stop - start for start, stop in zip([0, *cuts], [*cuts, tokens]))


@st.composite
def documents(draw: st.DrawFn, tokens: int, key_tokens: int) -> Documents:
    """Draws a Documents mask; with other lengths for the keys if their number differs."""
    lengths = draw(partitions(tokens))
    return Documents(lengths, None if tokens == key_tokens else draw(partitions(key_tokens, len(lengths))))


@st.composite
def block_sparse(draw: st.DrawFn, tokens: int, key_tokens: int) -> BlockSparse:
    """Draws a BlockSparse mask with blocks of 1 to 9 tokens."""
    block = draw(st.integers(1, 9))
    row = st.lists(st.booleans(), min_size=-(-key_tokens // block), max_size=-(-key_tokens // block))
    return BlockSparse(block, draw(st.lists(row, min_size=-(-tokens // block), max_size=-(-tokens // block))))


@st.composite
def written_bands(draw: st.DrawFn, tokens: int, key_tokens: int) -> Bands:
    """Draws a Bands mask as a user may write it: in any order, with rectangles larger than the pairs in them."""
    loose = st.tuples(st.integers(0, tokens), st.integers(0, key_tokens), st.integers(-9, 9), st.integers(-9, 9))
    drawn = sorted(draw(st.lists(loose, max_size=4)))
    stops = [*(q for q, _, _, _ in drawn[1:]), tokens]
    bands = [Band(q, stop, k, key_tokens, lo, hi) for (q, k, lo, hi), stop in zip(drawn, stops)]
    return Bands(draw(st.permutations(bands)))


def some_mask(tokens: int, key_tokens: int) -> st.SearchStrategy[Mask]:
    """A strategy for a mask of any kind, or up to four of them joined by & and |."""
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
    """Draws (mask, number of queries, number of keys); in half of the draws the two numbers are drawn independently."""
    tokens = draw(LENGTHS)
    key_tokens = draw(LENGTHS) if draw(st.booleans()) else tokens
    return draw(some_mask(tokens, key_tokens)), tokens, key_tokens

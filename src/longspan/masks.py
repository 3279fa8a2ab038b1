r"""Who may look at whom, as a list of bands. Integers only: no torch, no ranks, no kernels.

           keys ->                      A band is what a rectangle and a diagonal strip have in common: query q of
           k_start       k_stop         [q_start, q_stop) sees key k of [k_start, k_stop) exactly if lo <= k - q <= hi.
    q_start  ####\         .
             #####\  hi    .            Causal, a window, a document, a full rectangle: each is one band. What two bands
             .#####\       .            share is a band, and so is what a rank's queries and keys cut from one. So every
             . \####\      .            question below is answered in integers, without ever visiting a token.
          lo .  \####\     .
             .   \####\    .
    q_stop

A mask is built of constructors, `&` and `|`, knows no length, and gives disjoint bands when asked for one:

    (Documents((3, 5)) & Causal()).bands(8, 8) == (Band(0, 3, 0, 3, -2, 0), Band(3, 8, 3, 8, -4, 0))

Every band that leaves this file is canonical: all six numbers are as tight as its pairs (query, key) allow. Two bands hold
the same pairs exactly if they are equal, and each query of a band sees at least one of its keys.
"""

import reprlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import merge
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

from longspan.errors import MaskError


class Band(NamedTuple):
    """Inside the rectangle [q_start, q_stop) x [k_start, k_stop), query q sees key k exactly if lo <= k - q <= hi."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    lo: int
    hi: int


# ---- the algebra of bands


def trim(q_start: int, q_stop: int, k_start: int, k_stop: int, lo: int, hi: int) -> Band | None:
    """The canonical band of the pairs within these bounds; None if there are none.

    Two of q, k and k - q bound the third; each bound that follows is taken once, and with three quantities that is enough.
    """
    tight = Band(
        max(q_start, k_start - hi), min(q_stop, k_stop - lo),
        max(k_start, q_start + lo), min(k_stop, q_stop + hi),
        max(lo, k_start - q_stop + 1), min(hi, k_stop - 1 - q_start),
    )  # fmt: skip
    return tight if tight.q_start < tight.q_stop and tight.k_start < tight.k_stop and tight.lo <= tight.hi else None


def rectangle(q_start: int, q_stop: int, k_start: int, k_stop: int) -> Band | None:
    """The canonical band in which every query sees every key; None if there are none."""
    if q_start >= q_stop or k_start >= k_stop:
        return None
    return Band(q_start, q_stop, k_start, k_stop, k_start - q_stop + 1, k_stop - 1 - q_start)


def shift(band: Band, dq: int, dk: int) -> Band:
    """The band with every query moved by ``dq`` and every key by ``dk``."""
    q_start, q_stop, k_start, k_stop, lo, hi = band
    return Band(q_start + dq, q_stop + dq, k_start + dk, k_stop + dk, lo + dk - dq, hi + dk - dq)


def intersect(a: Band, b: Band) -> Band | None:
    """The pairs that are in both; None if there are none."""
    return trim(
        max(a.q_start, b.q_start), min(a.q_stop, b.q_stop),
        max(a.k_start, b.k_start), min(a.k_stop, b.k_stop),
        max(a.lo, b.lo), min(a.hi, b.hi),
    )  # fmt: skip


def subtract(bands: Iterable[Band], holes: Iterable[Band]) -> tuple[Band, ...]:
    """The pairs of ``bands`` that are in none of ``holes``, sorted; disjoint if ``bands`` are."""
    bands = sorted(bands)
    cut_by: dict[Band, list[Band]] = {band: [] for band in bands}
    for band, hole in _meetings(bands, sorted(holes)):
        cut_by[band].append(hole)
    return tuple(sorted(piece for band, cuts in cut_by.items() for piece in _without(band, cuts)))


def _without(band: Band, holes: Sequence[Band]) -> Iterator[Band]:
    """What ``holes``, sorted, leave of one band. A piece that ends before a hole begins meets no later hole either."""
    pieces = [band]
    for hole in holes:
        yield from (piece for piece in pieces if piece.q_stop <= hole.q_start)
        pieces = [rest for piece in pieces if piece.q_stop > hole.q_start for rest in _around(piece, hole)]
    yield from pieces


def _around(band: Band, hole: Band) -> Iterator[Band]:
    """The band without the hole: the queries before and behind what they share, beside it the keys left and right, and
    inside its rectangle the diagonals below and above."""
    shared = intersect(band, hole)
    if shared is None:
        yield band
        return
    beside = band._replace(q_start=shared.q_start, q_stop=shared.q_stop)
    inside = beside._replace(k_start=shared.k_start, k_stop=shared.k_stop)
    for piece in (
        band._replace(q_stop=shared.q_start), band._replace(q_start=shared.q_stop),
        beside._replace(k_stop=shared.k_start), beside._replace(k_start=shared.k_stop),
        inside._replace(hi=shared.lo - 1), inside._replace(lo=shared.hi + 1),
    ):  # fmt: skip
        if rest := trim(*piece):
            yield rest


def join(bands: Iterable[Band]) -> tuple[Band, ...]:
    """The same pairs in fewer bands, sorted: neighbours that are one band together become one. ``bands`` are disjoint.

    Neighbours are those in the order of queries, then of keys, then of diagonals: enough to undo a cut, and n log n.
    """
    for order in (itemgetter(0, 2), itemgetter(2, 0), itemgetter(5, 0)):
        joined: list[Band] = []
        for band in sorted(bands, key=order):
            joined.append(band)
            while len(joined) > 1 and (union := _union(joined[-2], joined[-1])):
                joined[-2:] = [union]
        bands = joined
    return tuple(sorted(bands))


def _union(a: Band, b: Band) -> Band | None:
    """Two disjoint bands as one: the smallest band around them, if it has no more pairs than they have."""
    around = Band(
        min(a.q_start, b.q_start), max(a.q_stop, b.q_stop),
        min(a.k_start, b.k_start), max(a.k_stop, b.k_stop),
        min(a.lo, b.lo), max(a.hi, b.hi),
    )  # fmt: skip
    return around if area([around]) == area([a, b]) else None


def area(bands: Iterable[Band]) -> int:
    """How many pairs (query, key) the bands hold: the work of attention, up to a constant. Equals the dense mask's sum.

    A band is its rectangle less the two corners outside the strip: triangles, whole ones because the band is canonical.
    """
    pairs = 0
    for q_start, q_stop, k_start, k_stop, lo, hi in bands:
        below, above = lo - (k_start - q_stop + 1), (k_stop - 1 - q_start) - hi
        pairs += (q_stop - q_start) * (k_stop - k_start) - below * (below + 1) // 2 - above * (above + 1) // 2
    return pairs


def blind_rows(bands: Iterable[Band], tokens: int) -> tuple[range, ...]:
    """The queries of [0, tokens) that see nothing, as runs. Their attention is 0, and a label there cannot be learnt."""
    bands = sorted(bands)
    reached = accumulate((band.q_stop for band in bands), max, initial=0)
    starts = (*(band.q_start for band in bands), tokens)
    return tuple(range(stop, start) for stop, start in zip(reached, starts) if stop < start)


def localize(bands: Iterable[Band], q_runs: tuple[range, ...], k_runs: tuple[range, ...]) -> tuple[Band, ...]:
    """The bands between the queries and the keys that a rank holds, in the rank's own places, sorted.

    The runs are disjoint and lie side by side in the rank's memory, in the order given. Equals
    ``dense[concat(q_runs)][:, concat(k_runs)]`` of the dense mask. Pieces that are one band again in the rank's places
    are joined: what zigzag leaves of Causal on one rank is one causal band.
    """
    queries, keys = _places(q_runs), _places(k_runs)
    cells = (
        (band, Band(q_run.start, q_run.stop, k_run.start, k_run.stop, band.lo, band.hi), dq, dk)
        for band in bands
        for q_run, dq in _over(queries, band.q_start, band.q_stop)
        for k_run, dk in _over(keys, band.k_start, band.k_stop)
    )
    return join(shift(piece, dq, dk) for band, cell, dq, dk in cells if (piece := intersect(band, cell)))


def _places(runs: tuple[range, ...]) -> list[tuple[range, int]]:
    """The runs in the order of the whole, each with its distance to the place where the rank keeps it."""
    at = accumulate(map(len, runs), initial=0)
    return sorted(((run, start - run.start) for run, start in zip(runs, at) if run), key=lambda place: place[0].start)


def _over(places: list[tuple[range, int]], start: int, stop: int) -> list[tuple[range, int]]:
    """The places whose runs share something with [start, stop)."""
    first = bisect_right(places, start, key=lambda place: place[0].stop)
    return places[first : bisect_left(places, stop, key=lambda place: place[0].start)]


def _meetings(left: Iterable[Band], right: Iterable[Band]) -> Iterator[tuple[Band, Band]]:
    """Every (band of left, band of right) that share a query, in one sweep down the queries. Both are sorted."""
    going: dict[bool, list[Band]] = {True: [], False: []}  # what the sweep has entered and, as far as anyone asked, not left
    for band, is_left in merge(((band, True) for band in left), ((band, False) for band in right)):
        others = going[not is_left] = [other for other in going[not is_left] if other.q_stop > band.q_start]
        for other in others:
            yield (band, other) if is_left else (other, band)
        going[is_left].append(band)


# ---- the masks


class Mask:
    """Who may look at whom, for any number of tokens. A frozen value: compared, hashed and pickled by what it says."""

    def bands(self, tokens: int, key_tokens: int) -> tuple[Band, ...]:
        """Disjoint, canonical, sorted bands for so many queries and keys. Raises MaskError for a mask of another length."""
        return _bands(self, tokens, key_tokens)

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        """The bands as they come: disjoint, each trimmed, None where there is nothing."""
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)


@lru_cache(maxsize=64)
def _bands(mask: Mask, tokens: int, key_tokens: int) -> tuple[Band, ...]:
    return tuple(sorted(band for band in mask._draw(tokens, key_tokens) if band))


def rows(mask: Mask | Sequence[Mask], rows: int, tokens: int, key_tokens: int) -> tuple[Band, ...]:
    """The bands of a batch as one long row: row b begins at query b * tokens and key b * key_tokens, and sees only itself.

    One mask holds for every row; a sequence has one mask per row. Raises MaskError if there are more or fewer.
    """
    masks = [mask] * rows if isinstance(mask, Mask) else mask
    if len(masks) != rows:
        raise MaskError(f"{len(masks)} masks for a batch of {rows} rows: pass one mask for all, or {rows}, one per row")
    return tuple(
        shift(band, row * tokens, row * key_tokens)
        for row, row_mask in enumerate(masks)
        for band in row_mask.bands(tokens, key_tokens)
    )


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        yield rectangle(0, tokens, 0, key_tokens)


@dataclass(frozen=True)
class Causal(Mask):
    """Query q sees the keys up to q, counted from the first token whatever the number of keys."""

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        yield trim(0, tokens, 0, key_tokens, -tokens, 0)


@dataclass(frozen=True)
class Window(Mask):
    """Query q sees the keys of [q - left, q + right]; None is no limit. Window(None, 0) is Causal()."""

    left: int | None
    right: int | None = 0

    def __post_init__(self) -> None:
        for name, reach in (("left", self.left), ("right", self.right)):
            if reach is not None:
                _at_least(0, self, name, reach, " or None for no limit")

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        lo = -tokens if self.left is None else -self.left
        hi = key_tokens if self.right is None else self.right
        yield trim(0, tokens, 0, key_tokens, lo, hi)


@dataclass(frozen=True, repr=False)
class Documents(Mask):
    """Packed documents: a token sees its own document, before and behind. ``& Causal()`` makes them causal.

    ``lengths`` sum to the number of tokens; where keys have another number than queries, ``key_lengths`` sum to that.
    """

    lengths: Sequence[int]
    key_lengths: Sequence[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        object.__setattr__(self, "key_lengths", None if self.key_lengths is None else tuple(self.key_lengths))
        for name, sizes in (("lengths", self.lengths), ("key_lengths", self.key_lengths or ())):
            _at_least(0, self, f"the smallest of {name}", min(sizes, default=0))
        if self.key_lengths is not None and len(self.lengths) != len(self.key_lengths):
            raise MaskError(
                f"{self}: {len(self.lengths)} documents of queries and {len(self.key_lengths)} of keys cannot be paired; "
                f"pass as many key_lengths as lengths (0 is legal for one that has none)"
            )

    def __repr__(self) -> str:
        keys = "" if self.key_lengths is None else f", key_lengths={reprlib.repr(self.key_lengths)}"
        return f"Documents({reprlib.repr(self.lengths)}{keys})"

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        key_lengths = self.lengths if self.key_lengths is None else self.key_lengths
        if (sum(self.lengths), sum(key_lengths)) != (tokens, key_tokens):
            raise MaskError(
                f"{self} holds {sum(self.lengths)} queries and {sum(key_lengths)} keys, but is asked for {tokens} and "
                f"{key_tokens}; pass lengths that sum to {tokens} (padding is a document), and key_lengths where keys differ"
            )
        for q_stop, queries, k_stop, keys in zip(accumulate(self.lengths), self.lengths, accumulate(key_lengths), key_lengths):
            yield rectangle(q_stop - queries, q_stop, k_stop - keys, k_stop)


@dataclass(frozen=True)
class Chunked(Mask):
    """A token sees the ``n`` tokens of its own chunk, before and behind; the last chunk may be shorter."""

    n: int

    def __post_init__(self) -> None:
        _at_least(1, self, "n", self.n)

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        for start in range(0, min(tokens, key_tokens), self.n):
            yield rectangle(start, min(start + self.n, tokens), start, min(start + self.n, key_tokens))


@dataclass(frozen=True)
class PrefixLM(Mask):
    """Causal, and everybody sees the first ``n`` keys."""

    n: int

    def __post_init__(self) -> None:
        _at_least(0, self, "n", self.n)

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        prefix = min(self.n, tokens)
        yield rectangle(0, prefix, 0, min(self.n, key_tokens))
        yield trim(prefix, tokens, 0, key_tokens, -tokens, 0)


@dataclass(frozen=True)
class Sinks(Mask):
    """Everybody sees the first ``n`` keys: Causal() & (Window(255) | Sinks(4)) keeps four tokens in sight for ever."""

    n: int

    def __post_init__(self) -> None:
        _at_least(0, self, "n", self.n)

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        yield rectangle(0, tokens, 0, min(self.n, key_tokens))


@dataclass(frozen=True)
class Only(Mask):
    """The tokens of [start, stop) see each other; those outside, padding, see nothing and are not seen."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        _at_least(0, self, "start", self.start)
        _at_least(self.start, self, "stop", self.stop)

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        if self.stop > min(tokens, key_tokens):
            raise MaskError(
                f"{self} reaches behind the last of {tokens} queries and {key_tokens} keys; "
                f"stop may be at most {min(tokens, key_tokens)}"
            )
        yield rectangle(self.start, self.stop, self.start, self.stop)


@dataclass(frozen=True, repr=False)
class BlockSparse(Mask):
    """Blocks of ``block`` tokens: block i of queries sees block j of keys if ``layout[i][j]``. The last may be shorter."""

    block: int
    layout: Sequence[Sequence[bool]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", tuple(tuple(map(bool, row)) for row in self.layout))
        _at_least(1, self, "block", self.block)
        widths = {len(row) for row in self.layout}
        if len(widths) > 1:
            raise MaskError(f"{self}: its rows have {sorted(widths)} flags; each needs one flag per block of keys")

    def __repr__(self) -> str:
        return f"BlockSparse({self.block}, {reprlib.repr(self.layout)})"

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        size = len(self.layout), len(self.layout[0]) if self.layout else 0
        wanted = -(-tokens // self.block), -(-key_tokens // self.block)
        if size != wanted:
            raise MaskError(
                f"{self} is a layout of {size[0]} x {size[1]} blocks, but {tokens} queries and {key_tokens} keys are "
                f"{wanted[0]} x {wanted[1]} blocks of {self.block}; pass a layout of that size"
            )
        cells = (
            rectangle(i, min(i + self.block, tokens), j, min(j + self.block, key_tokens))
            for i, row in zip(range(0, tokens, self.block), self.layout)
            for j, sees in zip(range(0, key_tokens, self.block), row)
            if sees
        )
        return join(cell for cell in cells if cell)


@dataclass(frozen=True, repr=False)
class And(Mask):
    """``left & right``."""

    left: Mask
    right: Mask

    def __repr__(self) -> str:
        return " & ".join(f"({side})" if isinstance(side, Or) else f"{side}" for side in (self.left, self.right))

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        pairs = _meetings(self.left.bands(tokens, key_tokens), self.right.bands(tokens, key_tokens))
        return (intersect(a, b) for a, b in pairs)


@dataclass(frozen=True, repr=False)
class Or(Mask):
    """``left | right``: the left, and what the right has beyond it."""

    left: Mask
    right: Mask

    def __repr__(self) -> str:
        return f"{self.left} | {self.right}"

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        left, right = self.left.bands(tokens, key_tokens), self.right.bands(tokens, key_tokens)
        return join((*left, *subtract(right, left)))


def _at_least(least: int, mask: Mask, name: str, given: int, otherwise: str = "") -> None:
    if given < least:
        raise MaskError(f"{mask}: {name} is {given}, but it counts tokens; it must be {least} or more{otherwise}")

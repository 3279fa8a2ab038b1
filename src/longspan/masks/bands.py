r"""Bands, the integer representation of attention masks: intersection, difference, union, area, restriction to a rank.

           keys ->                      A band is the intersection of a rectangle and a diagonal strip: query q of
           k_start       k_stop         [q_start, q_stop) sees key k of [k_start, k_stop) exactly if lo <= k - q <= hi.
    q_start  ####\         .
             #####\  hi    .            Causal, a window, a document and a full rectangle are one band each. The
             .#####\       .            intersection of two bands is a band, and so is the part of a band between a
             . \####\      .            rank's queries and keys. The cost of every function below depends on the
          lo .  \####\     .            number of bands, not of tokens.
             .   \####\    .
    q_stop

Every band returned by this file is canonical: its six numbers are as tight as its (query, key) pairs allow. So two bands hold
the same pairs exactly if they are equal, and each query of a band sees at least one of its keys. No torch, ranks or kernels.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from heapq import merge
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple


class Band(NamedTuple):
    """A set of (query, key) pairs: all (q, k) with q_start <= q < q_stop, k_start <= k < k_stop and lo <= k - q <= hi."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    lo: int
    hi: int


def trim(q_start: int, q_stop: int, k_start: int, k_stop: int, lo: int, hi: int) -> Band | None:
    """The canonical band of all (q, k) with q_start <= q < q_stop, k_start <= k < k_stop and lo <= k - q <= hi.

    Canonical: each of the six returned numbers is as tight as the pairs allow (q_start is the first query that sees a key, lo
    the smallest k - q, and so on). The bounds of any two of q, k and k - q imply bounds of the third; applying each
    implication once is enough.

    Returns:
        The band, or None if there are no such pairs.
    """
    tight = Band(
        max(q_start, k_start - hi), min(q_stop, k_stop - lo),
        max(k_start, q_start + lo), min(k_stop, q_stop + hi),
        max(lo, k_start - q_stop + 1), min(hi, k_stop - 1 - q_start),
    )  # fmt: skip
    return tight if tight.q_start < tight.q_stop and tight.k_start < tight.k_stop and tight.lo <= tight.hi else None


def rectangle(q_start: int, q_stop: int, k_start: int, k_stop: int) -> Band | None:
    """The canonical band in which every query of [q_start, q_stop) sees every key of [k_start, k_stop).

    None if one of the two ranges is empty.
    """
    if q_start >= q_stop or k_start >= k_stop:
        return None
    return Band(q_start, q_stop, k_start, k_stop, k_start - q_stop + 1, k_stop - 1 - q_start)


def shift(band: Band, dq: int, dk: int) -> Band:
    """A new band with ``dq`` added to every query index and ``dk`` to every key index, so lo and hi change by dk - dq."""
    q_start, q_stop, k_start, k_stop, lo, hi = band
    return Band(q_start + dq, q_stop + dq, k_start + dk, k_stop + dk, lo + dk - dq, hi + dk - dq)


def intersect(a: Band, b: Band) -> Band | None:
    """The canonical band of the (query, key) pairs that are in both ``a`` and ``b``; None if there are none."""
    return trim(
        max(a.q_start, b.q_start), min(a.q_stop, b.q_stop),
        max(a.k_start, b.k_start), min(a.k_stop, b.k_stop),
        max(a.lo, b.lo), min(a.hi, b.hi),
    )  # fmt: skip


def subtract(bands: Iterable[Band], holes: Iterable[Band]) -> tuple[Band, ...]:
    """The (query, key) pairs of ``bands`` that are in no band of ``holes``, as sorted canonical bands.

    Args:
        bands: canonical bands; if they are disjoint, the result is disjoint.
        holes: canonical bands, which may overlap.
    """
    bands = sorted(bands)
    cut_by: dict[Band, list[Band]] = {band: [] for band in bands}
    for band, hole in intersecting_rows(bands, sorted(holes)):
        cut_by[band].append(hole)
    return tuple(sorted(piece for band, cuts in cut_by.items() for piece in _without(band, cuts)))


def _without(band: Band, holes: Sequence[Band]) -> Iterator[Band]:
    """Yield disjoint bands that together hold the (query, key) pairs of ``band`` that are in none of ``holes``.

    Args:
        band: the band to cut.
        holes: sorted bands, so a piece that ends before a hole begins cannot intersect a later hole.
    """
    pieces = [band]
    for hole in holes:
        yield from (piece for piece in pieces if piece.q_stop <= hole.q_start)
        pieces = [rest for piece in pieces if piece.q_stop > hole.q_start for rest in _around(piece, hole)]
    yield from pieces


def _around(band: Band, hole: Band) -> Iterator[Band]:
    """Yield up to six disjoint bands that together hold the pairs of ``band`` that are not in ``hole``.

    They are: the queries before and after the intersection; of its queries, the keys left and right of it; inside its
    rectangle, the diagonals below and above it. Yields ``band`` itself if the two do not intersect.
    """
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
    """The same (query, key) pairs in fewer bands, sorted: neighbours whose union is again a band are replaced by that band.

    Only neighbours in the order of queries, then of keys, then of diagonals are tried. This undoes a cut by rows or columns in
    n log n time for n bands, but need not give the fewest bands.

    Args:
        bands: disjoint canonical bands.
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
    """The union of two disjoint bands if it is itself a band, else None.

    It is one exactly if the smallest band that contains both holds no further (query, key) pair.
    """
    around = Band(
        min(a.q_start, b.q_start), max(a.q_stop, b.q_stop),
        min(a.k_start, b.k_start), max(a.k_stop, b.k_stop),
        min(a.lo, b.lo), max(a.hi, b.hi),
    )  # fmt: skip
    return around if area([around]) == area([a, b]) else None


def area(bands: Iterable[Band]) -> int:
    """The number of (query, key) pairs in the bands; for disjoint bands the number of True entries of the dense mask.

    Attention's work is proportional to it. A canonical band is its rectangle without two complete triangles, the corners
    outside the diagonal strip.
    """
    pairs = 0
    for q_start, q_stop, k_start, k_stop, lo, hi in bands:
        below, above = lo - (k_start - q_stop + 1), (k_stop - 1 - q_start) - hi
        pairs += (q_stop - q_start) * (k_stop - k_start) - below * (below + 1) // 2 - above * (above + 1) // 2
    return pairs


def blind_rows(bands: Iterable[Band], tokens: int) -> tuple[range, ...]:
    """The queries of [0, tokens) that see no key in any of ``bands``, as sorted ranges. Their attention output is 0."""
    bands = sorted(bands)
    reached = accumulate((band.q_stop for band in bands), max, initial=0)
    starts = (*(band.q_start for band in bands), tokens)
    return tuple(range(stop, start) for stop, start in zip(reached, starts) if stop < start)


def localize(bands: Iterable[Band], q_runs: tuple[range, ...], k_runs: tuple[range, ...]) -> tuple[Band, ...]:
    """The part of the bands between the queries and the keys that one rank holds, in the rank's local indices, joined and
    sorted.

    Equals ``dense[concat(q_runs)][:, concat(k_runs)]``, where ``dense`` is the boolean mask of the bands. Pieces that are one
    band in local indices are joined: under the zigzag layout, Causal restricted to one rank is one causal band.

    Args:
        bands: disjoint bands in positions of the whole row.
        q_runs: the positions of the queries that the rank holds: disjoint ranges, in the order in which it stores them; local
            query index 0 is the first position of the first range.
        k_runs: the positions of the keys that it holds, likewise.
    """
    queries, keys = _places(q_runs), _places(k_runs)
    parts = (
        (band, Band(q_run.start, q_run.stop, k_run.start, k_run.stop, band.lo, band.hi), dq, dk)
        for band in bands
        for q_run, dq in _over(queries, band.q_start, band.q_stop)
        for k_run, dk in _over(keys, band.k_start, band.k_stop)
    )
    return join(shift(piece, dq, dk) for band, held, dq, dk in parts if (piece := intersect(band, held)))


def _places(runs: tuple[range, ...]) -> list[tuple[range, int]]:
    """The non-empty ``runs`` sorted by position, each as (run, offset); local index on the rank = position in the whole row +
    offset.

    Args:
        runs: ranges of positions, in the order in which the rank stores them.
    """
    at = accumulate(map(len, runs), initial=0)
    return sorted(((run, start - run.start) for run, start in zip(runs, at) if run), key=lambda place: place[0].start)


def _over(places: list[tuple[range, int]], start: int, stop: int) -> list[tuple[range, int]]:
    """Those (range, offset) pairs of ``places``, sorted and disjoint, whose range overlaps the positions [start, stop)."""
    first = bisect_right(places, start, key=lambda place: place[0].stop)
    return places[first : bisect_left(places, stop, key=lambda place: place[0].start)]


def intersecting_rows(left: Iterable[Band], right: Iterable[Band]) -> Iterator[tuple[Band, Band]]:
    """Yield every pair (band of ``left``, band of ``right``) whose query ranges overlap, by one sweep over the queries.

    The two bands of a pair need not have a key in common.

    Args:
        left, right: sorted bands.
    """
    going: dict[bool, list[Band]] = {True: [], False: []}  # bands whose first query is passed; finished ones are removed lazily
    for band, is_left in merge(((band, True) for band in left), ((band, False) for band in right)):
        others = going[not is_left] = [other for other in going[not is_left] if other.q_stop > band.q_start]
        for other in others:
            yield (band, other) if is_left else (other, band)
        going[is_left].append(band)

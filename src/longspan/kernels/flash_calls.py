r"""Calls of a flash operator with window and variable lengths that cover the bands of a mask. Integers only: no torch.

    a band                   one call: rows, keys, window            a chain of bands           one call: their lengths
      k_start                  query i of R sees the keys              ##\
    ####\        left            i + K - R - left                         \##\                  the first of each begins at the
    #####\                       to i + K - R + right                         \####\            query and key after the last of
     \#####\   right         (aligned at the bottom right)                                      the one before: documents

Every canonical band is such a call, so that a mask of any length is as many calls as it has bands, or chains of them. An edge
of a band that cuts nothing off is an unlimited window, which is what a document that is shorter than the window of its
neighbours has: they are one call.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

from longspan.masks.bands import Band, trim

MOST_DOCUMENTS = 65_535
"""The most documents of one call: the operator starts a block of the GPU's grid for each, in a dim of this size."""
PLANS = 64
"""How many plans are kept. A step has one for each kind of mask and ring hop."""


@dataclass(frozen=True, slots=True)
class Window:
    """One of the two windows of a call: how many keys a query sees on one side, beside the key that is aligned with it.

    Queries and keys are aligned at the bottom right: the last query with the last key.

    Attributes:
        limit: the number of keys; None if the edge of the band cuts nothing off.
        least: where ``limit`` is None, any limit of at least this many keys shows the same.
    """

    limit: int | None
    least: int

    def joined(self, other: "Window") -> "Window | None":
        """The window with which one call shows two bands: a query of either sees what its own window shows it.

        This is the window of one band, and ``other`` that of the other. None if no window does that for both.
        """
        limits = {window.limit for window in (self, other) if window.limit is not None}
        least = max(window.least for window in (self, other))
        if len(limits) > 1 or any(limit < least for limit in limits):
            return None
        return Window(limits.pop() if limits else None, least)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the operator: a run of queries, a run of keys, and the documents that follow one another in both.

    Attributes:
        q_start, k_start: the first query and the first key.
        lengths: (queries, keys) of each document; one document is a dense call.
        left, right: the windows. A causal mask is an unlimited left and a right of 0.
        fresh: no query of this call is in an earlier call of the plan, so its results are written, not merged.
    """

    q_start: int
    k_start: int
    lengths: tuple[tuple[int, int], ...]
    left: Window
    right: Window
    fresh: bool = True

    @property
    def rows(self) -> int:
        """The number of queries of all documents."""
        return sum(rows for rows, _ in self.lengths)

    @property
    def keys(self) -> int:
        """The number of keys of all documents."""
        return sum(keys for _, keys in self.lengths)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The calls that cover some bands, in order; ``plan`` makes it. Compared by identity, so that a cache can have it as a key.

    Attributes:
        calls: the calls.
        disjoint_queries, disjoint_keys: whether no query (no key) is in two calls.
    """

    calls: tuple[Call, ...]
    disjoint_queries: bool
    disjoint_keys: bool


@lru_cache(maxsize=PLANS)
def plan(bands: tuple[Band, ...]) -> Plan:
    """The calls that cover every (query, key) pair of the bands exactly once.

    Args:
        bands: disjoint canonical bands (masks/bands.py).
    """
    chains: list[_Chain] = []
    open_chains: dict[tuple[int, int], _Chain] = {}  # by the query and the key after the last ones of the chain
    for band in sorted(chain.from_iterable(map(_expressible, bands))):
        one = _Chain.of(band)
        longer = open_chains.pop((band.q_start, band.k_start), None)
        if longer is None or not longer.takes(one):
            longer = one
            chains.append(one)
        open_chains[band.q_stop, band.k_stop] = longer
    calls, reach = [], 0
    for collected in chains:
        call = collected.call(fresh=collected.q_start >= reach)
        calls.append(call)
        reach = max(reach, call.q_start + call.rows)
    return Plan(tuple(calls), all(call.fresh for call in calls), _are_disjoint([(c.k_start, c.keys) for c in calls]))


@dataclass(slots=True)
class _Chain:
    """Bands that may become one call of the flash operator, while they are collected.

    Each begins at the query and the key after the last ones of the band before.

    Attributes:
        q_start, k_start: the first query and the first key.
        lengths: (queries, keys) of each band.
        left, right: the windows that show every band.
        most_rows, most_keys: the most queries and the most keys of one band.
    """

    q_start: int
    k_start: int
    lengths: list[tuple[int, int]]
    left: Window
    right: Window
    most_rows: int
    most_keys: int

    @classmethod
    def of(cls, band: Band) -> "_Chain":
        """A chain of one band, with windows aligned at the band's last query and last key."""
        rows, keys = band.q_stop - band.q_start, band.k_stop - band.k_start
        shift = band.k_stop - band.q_stop  # of the last key from the last query
        left, right = (
            Window(None, hidden) if limit >= hidden else Window(limit, 0)
            for limit, hidden in ((shift - band.lo, keys - 1), (band.hi - shift, rows - 1))
        )
        return cls(band.q_start, band.k_start, [(rows, keys)], left, right, rows, keys)

    def takes(self, one: "_Chain") -> bool:
        """Append ``one``, which begins where this chain ends, and return True; if no call can show both, change nothing and
        return False."""
        left, right = self.left.joined(one.left), self.right.joined(one.right)
        most_rows, most_keys = max(self.most_rows, one.most_rows), max(self.most_keys, one.most_keys)
        if left is None or right is None or len(self.lengths) == MOST_DOCUMENTS:
            return False
        if not _is_expressible(left, right, most_rows, most_keys):
            return False
        self.lengths += one.lengths
        self.left, self.right, self.most_rows, self.most_keys = left, right, most_rows, most_keys
        return True

    def call(self, fresh: bool) -> Call:
        """The collected bands as one call; ``fresh`` says that none of its queries is in an earlier call."""
        return Call(self.q_start, self.k_start, tuple(self.lengths), self.left, self.right, fresh)


def _is_expressible(left: Window, right: Window, most_rows: int, most_keys: int) -> bool:
    """Whether a call with these windows shows a document what they say.

    Where one window is limited, the operator limits the other to the keys of the longest document, which would hide keys of a
    document with more queries than that.

    Args:
        left, right: the windows.
        most_rows, most_keys: the most queries and the most keys of a document of the call.
    """
    if left.limit is None and right.limit is None:
        return True
    return (right.limit is not None and right.limit < most_keys) or most_rows <= most_keys + 1


def _expressible(band: Band) -> Iterator[Band]:
    """Yield bands that a call can show and that together are ``band``: itself, or pieces of its rows.

    It is cut at the rows where its left or right edge begins or ceases to hide keys.
    """
    one = _Chain.of(band)
    if _is_expressible(one.left, one.right, one.most_rows, one.most_keys):
        yield band
        return
    corners = (band.k_stop - 1 - band.hi, band.k_start - band.lo + 1, (band.q_start + band.q_stop) // 2)
    cut = next(row for row in corners if band.q_start < row < band.q_stop)
    for start, stop in ((band.q_start, cut), (cut, band.q_stop)):
        piece = trim(start, stop, *band[2:])
        assert piece is not None, "every query of a canonical band sees a key"
        yield from _expressible(piece)


def _are_disjoint(runs: Sequence[tuple[int, int]]) -> bool:
    """Whether no two of the ranges (start, size) overlap."""
    reach = 0
    for start, size in sorted(runs):
        if start < reach:
            return False
        reach = start + size
    return True


def head_groups(heads: int, kv_heads: int, rows: int, keys: int, dim: int, most: int) -> tuple[tuple[slice, slice], ...]:
    """The heads of one attention in groups, each a call of its own, so that no tensor of a call has ``most`` elements or more.

    The operator's backward indexes with 32 bits. A key/value head whose query heads alone are too many is in several calls.

    Args:
        heads, kv_heads: all heads; ``heads`` is a multiple of ``kv_heads``.
        rows, keys, dim: queries, keys and head dim of the call.
        most: the bound, 2**31.

    Returns:
        (query heads, key/value heads) of each call.
    """
    group = heads // kv_heads
    together = (most - 1) // (max(rows * group, keys) * dim)
    if together:
        starts = range(0, kv_heads, together)
        kv_slices = [slice(start, min(start + together, kv_heads)) for start in starts]
        return tuple((slice(kv.start * group, kv.stop * group), kv) for kv in kv_slices)
    at_a_time = max(1, (most - 1) // (rows * dim))
    return tuple(
        (slice(kv * group + start, kv * group + min(start + at_a_time, group)), slice(kv, kv + 1))
        for kv in range(kv_heads)
        for start in range(0, group, at_a_time)
    )

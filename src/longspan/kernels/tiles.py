r"""Cut the bands of a mask into tiles of a few shapes that fused attention operators support. Integers only: no torch.

    keys ->                                        wide band: squares of its width    narrow band: a few masked rows
    |####\        left edge cut: RECTANGLE, LOWER
    |#####\                                            \###|\                              \##\___
     \#####\       both edges slanted: a window          \##|#\                             _\##\__
      \#####\                                             \#|##\                            __\##\_
       \#####|                                             \|###\                           ___\##\
        \####|     right edge cut: UPPER, RECTANGLE      UPPER, LOWER                        BAND

A tile is a RECTANGLE (every query sees every key), a LOWER square (key <= query, aligned top left), an UPPER square
(key >= query), or a BAND: query i of the tile sees its keys i to i + keys - rows. Equal tiles at equal distances form one
Stack, which one operator call computes. The size of a mask of a tile never depends on the length of the sequence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import groupby

from longspan.masks.bands import Band

NARROW = 1024
"""The number of keys that a query sees in a band, below which BAND tiles (few queries, one small mask) are used.

A wider band is covered by UPPER and LOWER squares of its width, which are then faster.
"""

COLUMN = 16_384
"""The most keys of one tile on a CPU, so that their keys, values and gradients stay in cache.

A tenth faster than uncut tiles from 65,536 keys on.
"""


def masked_rows(width: int) -> int:
    """The number of queries of a BAND tile, for a band in which a query sees ``width`` keys: 128 if width >= 128, else 64.

    Fewer rows compute fewer hidden scores (a row computes rows + width - 1 keys), but operators are slow on very few rows.
    """
    return 128 if width >= 128 else 64


class Shape(Enum):
    """Which keys of a tile its queries see.

    RECTANGLE: all. LOWER, a square: query i sees keys 0 to i of the tile. UPPER, a square: query i sees keys i to the last.
    BAND: query i sees keys i to i + keys - rows.
    """

    RECTANGLE = auto()
    LOWER = auto()
    UPPER = auto()
    BAND = auto()


@dataclass(frozen=True, slots=True)
class Stack:
    """``count`` tiles of one shape and size; tile i begins at query q_start + i * q_step and key k_start + i * k_step.

    A tile is a rectangle of queries and keys that one call of an attention operator computes. The tiles of a stack never
    overlap in their queries; they may overlap in their keys.

    Attributes:
        rows, keys: the number of queries and of keys of one tile.
        fresh: no query of this stack is in an earlier stack of the plan, so its results are written, not merged.
    """

    shape: Shape
    q_start: int
    k_start: int
    rows: int
    keys: int
    count: int = 1
    q_step: int = 0
    k_step: int = 0
    fresh: bool = True

    @property
    def q_stop(self) -> int:
        """The index of the last query of the last tile, plus 1."""
        return self.q_start + (self.count - 1) * self.q_step + self.rows

    def chunks(self, tiles: int) -> Iterator["Stack"]:
        """Yield stacks of at most ``tiles`` tiles each, in order, that together are the tiles of this one."""
        for done in range(0, self.count, tiles):
            q_start, k_start = self.q_start + done * self.q_step, self.k_start + done * self.k_step
            yield replace(self, q_start=q_start, k_start=k_start, count=min(tiles, self.count - done))


def plan(bands: Sequence[Band]) -> tuple[Stack, ...]:
    """The bands as stacks of tiles that cover every (query, key) pair of them exactly once, sorted by first query, then by key.

    Args:
        bands: disjoint canonical bands (masks/bands.py).
    """
    stacks, reach = [], 0
    for stack in sorted(_fuse([tile for band in bands for tile in _cut(band)]), key=lambda s: (s.q_start, s.k_start)):
        stacks.append(replace(stack, fresh=stack.q_start >= reach))
        reach = max(reach, stack.q_stop)
    return tuple(stacks)


def columns(stacks: Sequence[Stack], keys: int = COLUMN) -> tuple[Stack, ...]:
    """The same stacks with large single tiles cut into columns of at most ``keys`` keys, which need less memory at a time.

    Cut are tiles that are alone in their stack: one in which every query sees every key (RECTANGLE) into columns, and a causal
    square (LOWER) into, for each column, a smaller causal square and the rectangle below it. Other stacks are returned as they
    are.
    """
    return tuple(column for stack in stacks for column in _columns(stack, keys))


def _columns(stack: Stack, keys: int) -> Iterator[Stack]:
    """Yield ``stack`` cut into columns of at most ``keys`` keys; itself if it has several tiles, few keys or another shape."""
    if stack.count > 1 or stack.keys <= keys or stack.shape not in (Shape.LOWER, Shape.RECTANGLE):
        yield stack
        return
    for done in range(0, stack.keys, keys):
        width, fresh = min(keys, stack.keys - done), stack.fresh and done == 0
        column = replace(stack, k_start=stack.k_start + done, keys=width, fresh=fresh)
        if stack.shape is Shape.LOWER:
            yield replace(column, q_start=stack.q_start + done, rows=width)
            below = done + width
            column = replace(column, shape=Shape.RECTANGLE, q_start=stack.q_start + below, rows=stack.rows - below)
        if column.rows:
            yield column


def _cut(band: Band) -> Iterator[Stack]:
    """Yield stacks of tiles that cover the (query, key) pairs of one band exactly once.

    The band is cut into ranges of rows on which its left and right edges are each either straight or slanted, and those into
    tiles.
    """
    first = band.k_start - band.lo  # up to this row the left edge is the rectangle's (straight); below it is slanted
    last = band.k_stop - 1 - band.hi  # from this row on the right edge is the rectangle's (straight); above it is slanted
    if last < first:
        top, bottom = last, first + 1
        yield from _trapezoid(band, band.q_start, top)
        yield from _trapezoid(band, top, bottom)
    else:
        top = first + 1 if first > band.q_start else band.q_start
        bottom = max(top, last if last < band.q_stop - 1 else band.q_stop)
        yield from _trapezoid(band, band.q_start, top)
        yield from _walk(band, top, bottom)
    yield from _trapezoid(band, bottom, band.q_stop)


def _trapezoid(band: Band, start: int, stop: int) -> Iterator[Stack]:
    """Yield the tiles of the rows [start, stop) of a band: at most one each of UPPER, RECTANGLE and LOWER.

    On these rows the left and the right edge of the band are each either straight or slanted. Yields nothing for no rows.
    """
    rows = stop - start
    if rows < 1:
        return
    left = max(band.k_start, start + band.lo), max(band.k_start, stop - 1 + band.lo)  # of the first row, of the last
    right = min(band.k_stop, start + band.hi + 1), min(band.k_stop, stop + band.hi)
    first, stop_key = left[1], right[0]  # the keys that every row sees; a square takes the column on its edge from them
    if right[1] > right[0]:
        stop_key -= 1
        yield Stack(Shape.LOWER, start, stop_key, rows, rows)
    elif left[1] > left[0]:
        first += 1
    if first > left[0]:
        yield Stack(Shape.UPPER, start, left[0], first - left[0], first - left[0])
    if stop_key > first:
        yield Stack(Shape.RECTANGLE, start, first, rows, stop_key - first)


def _walk(band: Band, start: int, stop: int) -> Iterator[Stack]:
    """Yield the stacks of the rows [start, stop) of a band, all of which see its full width (both edges slanted).

    A narrow band (fewer than ``NARROW`` keys) gives BAND tiles; a wider one UPPER and LOWER squares, and a trapezoid for the
    rest.
    """
    width = band.hi - band.lo + 1
    narrow = width < NARROW
    height = masked_rows(width) if narrow else width
    count, rest = divmod(stop - start, height)
    at, key = start + count * height, start + band.lo
    if narrow:
        if count:
            yield Stack(Shape.BAND, start, key, height, height + width - 1, count, height, height)
        if rest:
            yield Stack(Shape.BAND, at, at + band.lo, rest, rest + width - 1)
        return
    if count:
        yield Stack(Shape.UPPER, start, key, height - 1, height - 1, count, height, height)
        yield Stack(Shape.LOWER, start, key + width - 1, height, height, count, height, height)
    yield from _trapezoid(band, at, stop)


def _fuse(tiles: Sequence[Stack]) -> Iterator[Stack]:
    """Yield the same tiles in fewer stacks: single tiles of one shape and size at equal distances are joined into one stack."""
    yield from (tile for tile in tiles if tile.count > 1)
    single = [tile for tile in tiles if tile.count == 1]
    single.sort(key=lambda t: (t.shape.value, t.rows, t.keys, t.q_start, t.k_start))
    for _, equal in groupby(single, key=lambda t: (t.shape, t.rows, t.keys)):
        stack, *following = equal
        for tile in following:
            q_step, k_step = (tile.q_start - stack.q_start) // stack.count, (tile.k_start - stack.k_start) // stack.count
            follows = (
                tile.q_start == stack.q_start + stack.count * q_step
                and tile.k_start == stack.k_start + stack.count * k_step
                and q_step >= tile.rows
                and k_step >= 0
                and (stack.count == 1 or (q_step, k_step) == (stack.q_step, stack.k_step))
            )
            if follows:
                stack = replace(stack, count=stack.count + 1, q_step=q_step, k_step=k_step)
            else:
                yield stack
                stack = tile
        yield stack

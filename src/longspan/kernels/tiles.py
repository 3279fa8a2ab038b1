r"""Cut bands into what a fused operator can do in one call. Integers only: no torch.

    keys ->                                        wide: as high as it is wide        narrow: a few rows, masked
    |####\        left open: RECTANGLE, LOWER
    |#####\                                            \###|\                              \##\___
     \#####\       both bounded: walked                  \##|#\                             _\##\__
      \#####\                                             \#|##\                            __\##\_
       \#####|                                             \|###\                           ___\##\
        \####|     right open: UPPER, RECTANGLE          UPPER, LOWER                        BAND

A tile is a RECTANGLE that is fully visible, a LOWER square (key <= query, top left aligned), an UPPER square (key >= query)
or a BAND: query i of the tile sees its keys i to i + keys - rows. Equal tiles at equal distances are one Stack, computed in
one call. No tile knows how it is computed, and none has a mask that grows with the sequence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import groupby

from longspan.masks.bands import Band

NARROW = 1024  # keys; up to here a few masked rows at a time are faster than squares of the band's width, from here slower

COLUMN = 16_384  # keys; what so many bring and take stays in a CPU's cache: a tenth faster over 65,536 keys and more


def masked_rows(width: int) -> int:
    """The height of a masked tile. It computes rows + width - 1 keys a row, but the operator is slow on very few rows."""
    return 128 if width >= 128 else 64


class Shape(Enum):
    RECTANGLE = auto()
    LOWER = auto()
    UPPER = auto()
    BAND = auto()


@dataclass(frozen=True, slots=True)
class Stack:
    """``count`` tiles of ``rows`` queries and ``keys`` keys, each one step from the one before.

    Tiles of a stack never share a query (they may share keys). ``fresh``: no query of this stack is in an earlier one.
    ``documents`` are the (rows, keys) of tiles of unequal sizes that lie corner to corner and fill this one (see ``corners``).
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
    documents: tuple[tuple[int, int], ...] = ()

    @property
    def q_stop(self) -> int:
        return self.q_start + (self.count - 1) * self.q_step + self.rows

    def chunks(self, tiles: int) -> Iterator["Stack"]:
        """The same tiles, at most ``tiles`` at a time."""
        for done in range(0, self.count, tiles):
            q_start, k_start = self.q_start + done * self.q_step, self.k_start + done * self.k_step
            yield replace(self, q_start=q_start, k_start=k_start, count=min(tiles, self.count - done))


def plan(bands: Sequence[Band]) -> tuple[Stack, ...]:
    """Stacks that together cover the bands exactly once, in the order of their first query."""
    stacks, reach = [], 0
    for stack in sorted(_fuse([tile for band in bands for tile in _cut(band)]), key=lambda s: (s.q_start, s.k_start)):
        stacks.append(replace(stack, fresh=stack.q_start >= reach))
        reach = max(reach, stack.q_stop)
    return tuple(stacks)


def corners(stacks: Sequence[Stack]) -> tuple[Stack, ...]:
    """The same, with tiles of one shape that touch at their corners, as packed documents do, as one stack of count 1."""
    chains: list[list[Stack]] = []
    for stack in stacks:
        if chains and _touch(chains[-1][-1], stack):
            chains[-1].append(stack)
        else:
            chains.append([stack])
    return tuple(chain[0] if len(chain) == 1 else _documents(chain) for chain in chains)


def columns(stacks: Sequence[Stack], keys: int = COLUMN) -> tuple[Stack, ...]:
    """The same, with single tiles of many keys cut into columns of at most ``keys``."""
    return tuple(column for stack in stacks for column in _columns(stack, keys))


def _columns(stack: Stack, keys: int) -> Iterator[Stack]:
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


def _touch(a: Stack, b: Stack) -> bool:
    alike = a.shape is b.shape and a.fresh == b.fresh and a.count == b.count == 1
    return alike and (b.q_start, b.k_start) == (a.q_start + a.rows, a.k_start + a.keys)


def _documents(chain: Sequence[Stack]) -> Stack:
    lengths = tuple((tile.rows, tile.keys) for tile in chain)
    return replace(chain[0], rows=sum(rows for rows, _ in lengths), keys=sum(keys for _, keys in lengths), documents=lengths)


def _cut(band: Band) -> Iterator[Stack]:
    """Cut one band by rows, where its left edge leaves the rectangle's and where its right edge reaches it."""
    first = band.k_start - band.lo  # the row whose left edge is the rectangle's own; rows above are open to the left
    last = band.k_stop - 1 - band.hi  # the row whose right edge is the rectangle's own; rows below are open to the right
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
    """The rows start to stop, on which each edge is either straight or slanted: at most UPPER, RECTANGLE and LOWER."""
    rows = stop - start
    if rows < 1:
        return
    left = max(band.k_start, start + band.lo), max(band.k_start, stop - 1 + band.lo)  # of the first row, of the last
    right = min(band.k_stop, start + band.hi + 1), min(band.k_stop, stop + band.hi)
    first, stop_key = left[1], right[0]  # what every row sees, less the column that a square has on its edge
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
    """The rows start to stop, all of which see the band's full width."""
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
    """Single tiles of one shape and size at equal distances become one stack."""
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

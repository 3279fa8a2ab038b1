"""The masks that a user writes: constructors, ``&`` and ``|``. Integers only: no torch, no ranks, no kernels.

A mask knows no length; asked for one it gives disjoint bands, the list that kernels, ring and cost model read (bands.py):

    (Documents((3, 5)) & Causal()).bands(8, 8) == (Band(0, 3, 0, 3, -2, 0), Band(3, 8, 3, 8, -4, 0))
"""

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate

from longspan.errors import MaskError
from longspan.masks.bands import Band, intersect, join, meetings, rectangle, shift, subtract, trim


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


def full_repr(mask: object) -> str:
    """The repr of a mask, or of a tuple of masks, with every document length, which ``repr`` shortens."""
    if isinstance(mask, Mask):
        values = ", ".join(full_repr(getattr(mask, field.name)) for field in fields(mask))  # type: ignore[arg-type]
        return f"{type(mask).__name__}({values})"
    if isinstance(mask, tuple) and any(isinstance(item, Mask) for item in mask):
        return f"({', '.join(map(full_repr, mask))})"
    return repr(mask)


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
class SinkTokens(Mask):
    """Everybody sees the first ``n`` keys: Causal() & (Window(255) | SinkTokens(4)) keeps four tokens in sight for ever."""

    n: int

    def __post_init__(self) -> None:
        _at_least(0, self, "n", self.n)

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        yield rectangle(0, tokens, 0, min(self.n, key_tokens))


@dataclass(frozen=True)
class Span(Mask):
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
class Bands(Mask):
    """Bands written out, where no constructor says what is meant. They are disjoint: what overlaps is joined by ``|``."""

    given: Sequence[Band]

    def __post_init__(self) -> None:
        given = tuple(sorted(Band(*band) for band in self.given))
        object.__setattr__(self, "given", given)
        for band in given:
            _at_least(0, self, f"the first query or key of {band}", min(band.q_start, band.k_start))
        for one, other in meetings(given, given):
            if one is not other and (both := intersect(one, other)):
                raise MaskError(
                    f"{self}: {one} and {other} overlap, in {both}, and what stands in both would be counted twice; "
                    f"pass disjoint bands, or join masks by |, which takes care of it"
                )

    def __repr__(self) -> str:
        return f"Bands({reprlib.repr(self.given)})"

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        for band in self.given:
            if band.q_stop > tokens or band.k_stop > key_tokens:
                raise MaskError(f"{band} reaches behind the last of {tokens} queries and {key_tokens} keys; cut it there")
            yield trim(*band)


@dataclass(frozen=True, repr=False)
class And(Mask):
    """``left & right``."""

    left: Mask
    right: Mask

    def __repr__(self) -> str:
        return " & ".join(f"({side})" if isinstance(side, Or) else f"{side}" for side in (self.left, self.right))

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        pairs = meetings(self.left.bands(tokens, key_tokens), self.right.bands(tokens, key_tokens))
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


def hides_later_tokens(mask: Mask) -> bool:
    """Whether the mask, by its kind, shows no token behind the query: causal, alone or combined by ``&`` with anything."""
    if isinstance(mask, And):
        return hides_later_tokens(mask.left) or hides_later_tokens(mask.right)
    if isinstance(mask, Or):
        return hides_later_tokens(mask.left) and hides_later_tokens(mask.right)
    return isinstance(mask, Causal) or (isinstance(mask, Window) and mask.right == 0)


def shows_later_tokens(mask: Mask) -> bool:
    """Whether the mask is of a kind that is meant to show tokens behind the query: full, a prefix, a two-sided window."""
    if isinstance(mask, And | Or):
        return not hides_later_tokens(mask) and (shows_later_tokens(mask.left) or shows_later_tokens(mask.right))
    return isinstance(mask, Full | PrefixLM) or (isinstance(mask, Window) and mask.right != 0)


def documents_of(mask: Mask | None) -> Documents | None:
    """The packed documents that a mask keeps apart: ``Documents(...)``, alone or combined by ``&``."""
    if isinstance(mask, And):
        return documents_of(mask.left) or documents_of(mask.right)
    return mask if isinstance(mask, Documents) and mask.key_lengths is None else None


def _at_least(least: int, mask: Mask, name: str, given: int, otherwise: str = "") -> None:
    if given < least:
        raise MaskError(f"{mask}: {name} is {given}, but it counts tokens; it must be {least} or more{otherwise}")

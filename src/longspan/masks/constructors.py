"""Attention masks: the constructors (Causal, Window, Documents, ...) and their combinations by ``&`` and ``|``.

A mask does not contain a sequence length. ``mask.bands(tokens, key_tokens)`` gives its disjoint bands for one length; kernels,
ring and planner use only these (bands.py):

    (Documents((3, 5)) & Causal()).bands(8, 8) == (Band(0, 3, 0, 3, -2, 0), Band(3, 8, 3, 8, -4, 0))

A new mask is a class here with ``_draw``. Integers only: no torch, no ranks, no kernels.
"""

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate

from longspan.errors import MaskError
from longspan.masks.bands import Band, intersect, join, meetings, rectangle, shift, subtract, trim


class Mask:
    """Which keys each query attends to, for any number of tokens. Immutable; compared and hashed by value.

    ``a & b`` shows the pairs that both masks show, ``a | b`` those that at least one shows.
    """

    def bands(self, tokens: int, key_tokens: int) -> tuple[Band, ...]:
        """The bands of this mask for one length.

        Args:
            tokens: the number of queries.
            key_tokens: the number of keys.

        Returns:
            Disjoint canonical bands, sorted.

        Raises:
            MaskError: the mask has a fixed length (``Documents``, ``BlockSparse``, ...) that differs from this one.
        """
        return _bands(self, tokens, key_tokens)

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        """The bands for this length in any order: disjoint and canonical, or None for an empty one."""
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)


@lru_cache(maxsize=64)
def _bands(mask: Mask, tokens: int, key_tokens: int) -> tuple[Band, ...]:
    return tuple(sorted(band for band in mask._draw(tokens, key_tokens) if band))


def rows(mask: Mask | Sequence[Mask], rows: int, tokens: int, key_tokens: int) -> tuple[Band, ...]:
    """The bands of a batch laid out as one long row, in which row b begins at query b * tokens and key b * key_tokens.

    Tokens of different rows never see each other.

    Args:
        mask: one mask for every row, or a sequence with one mask per row.
        rows: the rows of the batch.
        tokens, key_tokens: queries and keys of one row.

    Raises:
        MaskError: the sequence has not one mask per row, or a mask has another length.
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
    """Every query sees every key: bidirectional attention."""

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        yield rectangle(0, tokens, 0, key_tokens)


@dataclass(frozen=True)
class Causal(Mask):
    """Query q sees keys 0 to q. With unequally many queries and keys, both are counted from the first token (top left)."""

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        yield trim(0, tokens, 0, key_tokens, -tokens, 0)


@dataclass(frozen=True)
class Window(Mask):
    """Query q sees keys q - left to q + right (sliding window); None is no limit. Window(None, 0) equals Causal().

    Raises:
        MaskError: ``left`` or ``right`` is negative.
    """

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
    """Packed documents: a token sees every token of its own document. ``Documents(...) & Causal()`` is the causal version.

    Args:
        lengths: tokens of each document, in order; their sum is the length of the row.
        key_lengths: keys of each document where there are not as many keys as queries (default: ``lengths``).

    Raises:
        MaskError: a length is negative, or ``key_lengths`` has not one entry per document.
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
    """The row is cut into chunks of ``n`` tokens; a token sees every token of its own chunk. The last chunk may be shorter."""

    n: int

    def __post_init__(self) -> None:
        _at_least(1, self, "n", self.n)

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        for start in range(0, min(tokens, key_tokens), self.n):
            yield rectangle(start, min(start + self.n, tokens), start, min(start + self.n, key_tokens))


@dataclass(frozen=True)
class PrefixLM(Mask):
    """Causal, and every query also sees the first ``n`` keys: a bidirectional prefix."""

    n: int

    def __post_init__(self) -> None:
        _at_least(0, self, "n", self.n)

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        prefix = min(self.n, tokens)
        yield rectangle(0, prefix, 0, min(self.n, key_tokens))
        yield trim(prefix, tokens, 0, key_tokens, -tokens, 0)


@dataclass(frozen=True)
class SinkTokens(Mask):
    """Every query sees the first ``n`` keys (attention sinks, arXiv:2309.17453): Causal() & (Window(255) | SinkTokens(4))."""

    n: int

    def __post_init__(self) -> None:
        _at_least(0, self, "n", self.n)

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        yield rectangle(0, tokens, 0, min(self.n, key_tokens))


@dataclass(frozen=True)
class Span(Mask):
    """The tokens of [start, stop) see each other; tokens outside (padding) see nothing and are seen by none."""

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
    """Block-sparse mask: query block i sees key block j if ``layout[i][j]``; blocks have ``block`` tokens, the last fewer."""

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
    """A mask given directly by its bands, for patterns without a constructor.

    Args:
        given: disjoint bands. For overlapping ones combine several masks by ``|``.

    Raises:
        MaskError: two bands overlap, or a band begins at a negative index.
    """

    given: Sequence[Band]

    def __post_init__(self) -> None:
        given = tuple(sorted(Band(*band) for band in self.given))
        object.__setattr__(self, "given", given)
        for band in given:
            _at_least(0, self, f"the first query or key of {band}", min(band.q_start, band.k_start))
        for one, other in meetings(given, given):
            if one is not other and (both := intersect(one, other)):
                raise MaskError(
                    f"{self}: {one} and {other} overlap, in {both}, whose pairs would be counted twice; "
                    f"pass disjoint bands, or join masks by |, which removes the overlap"
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
    """``left & right``: a query sees a key if it does in both masks."""

    left: Mask
    right: Mask

    def __repr__(self) -> str:
        return " & ".join(f"({side})" if isinstance(side, Or) else f"{side}" for side in (self.left, self.right))

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        pairs = meetings(self.left.bands(tokens, key_tokens), self.right.bands(tokens, key_tokens))
        return (intersect(a, b) for a, b in pairs)


@dataclass(frozen=True, repr=False)
class Or(Mask):
    """``left | right``: a query sees a key if it does in at least one of the masks."""

    left: Mask
    right: Mask

    def __repr__(self) -> str:
        return f"{self.left} | {self.right}"

    def _draw(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        left, right = self.left.bands(tokens, key_tokens), self.right.bands(tokens, key_tokens)
        return join((*left, *subtract(right, left)))


def hides_later_tokens(mask: Mask) -> bool:
    """Whether the mask's constructors guarantee that no query sees a later token: causal, or causal ``&`` any mask.

    False does not mean that a later token is visible: it is decided by the constructors, not by the bands.
    """
    if isinstance(mask, And):
        return hides_later_tokens(mask.left) or hides_later_tokens(mask.right)
    if isinstance(mask, Or):
        return hides_later_tokens(mask.left) and hides_later_tokens(mask.right)
    return isinstance(mask, Causal) or (isinstance(mask, Window) and mask.right == 0)


def shows_later_tokens(mask: Mask) -> bool:
    """Whether the mask is built of a constructor whose purpose is to show later tokens: Full, PrefixLM, a two-sided Window."""
    if isinstance(mask, And | Or):
        return not hides_later_tokens(mask) and (shows_later_tokens(mask.left) or shows_later_tokens(mask.right))
    return isinstance(mask, Full | PrefixLM) or (isinstance(mask, Window) and mask.right != 0)


def documents_of(mask: Mask | None) -> Documents | None:
    """The ``Documents`` of a mask that is one, or that is one ``&`` any mask; None for other masks and with ``key_lengths``."""
    if isinstance(mask, And):
        return documents_of(mask.left) or documents_of(mask.right)
    return mask if isinstance(mask, Documents) and mask.key_lengths is None else None


def _at_least(least: int, mask: Mask, name: str, given: int, otherwise: str = "") -> None:
    if given < least:
        raise MaskError(f"{mask}: {name} is {given}, but it counts tokens; it must be {least} or more{otherwise}")

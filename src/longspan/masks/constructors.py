"""Attention masks: the constructors (Causal, Window, Documents, ...) and their combinations by ``&`` and ``|``.

A mask does not contain a sequence length. ``mask.bands(tokens, key_tokens)`` gives its disjoint bands for one length; kernels,
ring and planner use only these (bands.py):

    (Documents((3, 5)) & Causal()).bands(8, 8) == (Band(0, 3, 0, 3, -2, 0), Band(3, 8, 3, 8, -4, 0))

A new mask is a class here with ``_bands``, which yields its bands. Integers only: no torch, no ranks, no kernels.
"""

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate

from longspan.errors import MaskError
from longspan.masks.bands import Band, intersect, intersecting_rows, join, rectangle, shift, subtract, trim
from longspan.masks.counted import counted, whole


class Mask:
    """Which keys each query attends to, for any number of tokens. Immutable; compared and hashed by value.

    ``a & b``: a query sees the keys that it sees in both masks. ``a | b``: those that it sees in at least one of them.
    """

    def bands(self, tokens: int, key_tokens: int) -> tuple[Band, ...]:
        """The mask for one length, as disjoint canonical bands, sorted.

        Args:
            tokens: the number of queries.
            key_tokens: the number of keys.

        Returns:
            A tuple of ``Band`` (masks/bands.py) whose (query, key) pairs are those that the mask shows; empty if it shows
            none.

        Raises:
            MaskError: the mask has a length of its own (``Documents``, ``BlockSparse``, ...) that differs from this one.
        """
        return _sorted_bands(self, tokens, key_tokens)

    def _bands(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        """Implemented by each mask: yield its bands for ``tokens`` queries and ``key_tokens`` keys, in any order.

        The bands must be disjoint and canonical (made by ``trim`` or ``rectangle``); a None among them is skipped. Raises
        MaskError if the mask does not fit these lengths.
        """
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)


@lru_cache(maxsize=64)
def _sorted_bands(mask: Mask, tokens: int, key_tokens: int) -> tuple[Band, ...]:
    """The bands of ``mask`` for ``tokens`` queries and ``key_tokens`` keys, sorted; cached."""
    return tuple(sorted(band for band in mask._bands(tokens, key_tokens) if band))


def batch_bands(mask: Mask | Sequence[Mask], rows: int, tokens: int, key_tokens: int) -> tuple[Band, ...]:
    """The bands of a batch laid out as one long row, in which row b begins at query b * tokens and key b * key_tokens.

    Tokens of different rows never see each other.

    Args:
        mask: one mask for every row, or a sequence with one mask per row.
        rows: the number of rows of the batch.
        tokens, key_tokens: the number of queries and of keys of one row.

    Returns:
        Disjoint canonical bands in indices of the long row, row after row.

    Raises:
        MaskError: the sequence does not have one mask per row, or a mask does not fit ``tokens`` and ``key_tokens``.
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
    """The repr of a mask, or of a tuple of masks, in full: ``repr`` shortens long lists of document lengths, this does not.

    Any other object gives its ``repr``. Equal texts mean equal masks, so they can be hashed and compared between ranks.
    """
    if isinstance(mask, Mask):
        values = ", ".join(full_repr(getattr(mask, field.name)) for field in fields(mask))  # type: ignore[arg-type]
        return f"{type(mask).__name__}({values})"
    if isinstance(mask, tuple) and any(isinstance(item, Mask) for item in mask):
        return f"({', '.join(map(full_repr, mask))})"
    return repr(mask)


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key: bidirectional attention."""

    def _bands(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        yield rectangle(0, tokens, 0, key_tokens)


@dataclass(frozen=True)
class Causal(Mask):
    """Query q sees keys 0 to q, both counted from 0: also with more keys than queries, query 0 sees key 0 only."""

    def _bands(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        yield trim(0, tokens, 0, key_tokens, -tokens, 0)


@dataclass(frozen=True)
class Window(Mask):
    """Sliding window: query q sees keys q - left to q + right; None means no limit on that side. Window(None, 0) equals
    Causal().

    Raises:
        MaskError: ``left`` or ``right`` is negative.
    """

    left: int | None
    right: int | None = 0

    def __post_init__(self) -> None:
        for name, reach in (("left", self.left), ("right", self.right)):
            if reach is not None:
                counted(0, self, name, reach, " or None for no limit")

    def _bands(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        lo = -tokens if self.left is None else -self.left
        hi = key_tokens if self.right is None else self.right
        yield trim(0, tokens, 0, key_tokens, lo, hi)


@dataclass(frozen=True, repr=False)
class Documents(Mask):
    """Packed documents: a token sees every token of its own document. ``Documents(...) & Causal()`` is the causal version.

    Args:
        lengths: the number of tokens of each document, in order; their sum is the length of the row.
        key_lengths: the number of keys of each document, where it differs from that of its queries (default: ``lengths``).

    Raises:
        MaskError: a length is negative, or ``key_lengths`` does not have one entry per document.
    """

    lengths: Sequence[int]
    key_lengths: Sequence[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", whole(self.lengths))
        object.__setattr__(self, "key_lengths", None if self.key_lengths is None else whole(self.key_lengths))
        for name, sizes in (("lengths", self.lengths), ("key_lengths", self.key_lengths or ())):
            counted(0, self, f"the smallest of {name}", min(sizes, default=0))
        if self.key_lengths is not None and len(self.lengths) != len(self.key_lengths):
            raise MaskError(
                f"{self}: {len(self.lengths)} documents of queries and {len(self.key_lengths)} of keys cannot be paired; "
                f"pass as many key_lengths as lengths (0 is legal for one that has none)"
            )

    def __repr__(self) -> str:
        keys = "" if self.key_lengths is None else f", key_lengths={reprlib.repr(self.key_lengths)}"
        return f"Documents({reprlib.repr(self.lengths)}{keys})"

    def _bands(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
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
    """The row is cut into chunks of ``n`` tokens (the last may be shorter); a token sees every token of its own chunk.

    Raises MaskError if ``n`` is less than 1.
    """

    n: int

    def __post_init__(self) -> None:
        counted(1, self, "n", self.n)

    def _bands(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        for start in range(0, min(tokens, key_tokens), self.n):
            yield rectangle(start, min(start + self.n, tokens), start, min(start + self.n, key_tokens))


@dataclass(frozen=True)
class PrefixLM(Mask):
    """Bidirectional prefix: query q sees keys 0 to q, as under Causal, and also the first ``n`` keys.

    Raises MaskError if ``n`` is negative.
    """

    n: int

    def __post_init__(self) -> None:
        counted(0, self, "n", self.n)

    def _bands(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        prefix = min(self.n, tokens)
        yield rectangle(0, prefix, 0, min(self.n, key_tokens))
        yield trim(prefix, tokens, 0, key_tokens, -tokens, 0)


@dataclass(frozen=True)
class SinkTokens(Mask):
    """Attention sinks (arXiv:2309.17453): every query sees the first ``n`` keys, and no others.

    Combine it with a window: Causal() & (Window(255) | SinkTokens(4)). Raises MaskError if ``n`` is negative.
    """

    n: int

    def __post_init__(self) -> None:
        counted(0, self, "n", self.n)

    def _bands(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        yield rectangle(0, tokens, 0, min(self.n, key_tokens))


@dataclass(frozen=True)
class Span(Mask):
    """The tokens of [start, stop) see each other; tokens outside (padding) see nothing and are seen by none.

    Raises MaskError if ``start`` is negative or ``stop`` is less than ``start``.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        counted(0, self, "start", self.start)
        counted(self.start, self, "stop", self.stop)

    def _bands(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        if self.stop > min(tokens, key_tokens):
            raise MaskError(
                f"{self} goes beyond {tokens} queries or {key_tokens} keys; stop may be at most {min(tokens, key_tokens)}"
            )
        yield rectangle(self.start, self.stop, self.start, self.stop)


@dataclass(frozen=True, repr=False)
class BlockSparse(Mask):
    """Block-sparse mask: every query of block i sees every key of block j if ``layout[i][j]``.

    Args:
        block: the number of tokens of a block; the last block of queries and of keys may be shorter.
        layout: one row of flags per block of queries, with one flag per block of keys.

    Raises:
        MaskError: ``block`` is less than 1, or the rows of ``layout`` differ in length.
    """

    block: int
    layout: Sequence[Sequence[bool]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", tuple(tuple(map(bool, row)) for row in self.layout))
        counted(1, self, "block", self.block)
        widths = {len(row) for row in self.layout}
        if len(widths) > 1:
            raise MaskError(f"{self}: its rows have {sorted(widths)} flags; each needs one flag per block of keys")

    def __repr__(self) -> str:
        return f"BlockSparse({self.block}, {reprlib.repr(self.layout)})"

    def _bands(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        size = len(self.layout), len(self.layout[0]) if self.layout else 0
        wanted = -(-tokens // self.block), -(-key_tokens // self.block)
        if size != wanted:
            raise MaskError(
                f"{self} is a layout of {size[0]} x {size[1]} blocks, but {tokens} queries and {key_tokens} keys are "
                f"{wanted[0]} x {wanted[1]} blocks of {self.block}; pass a layout of that size"
            )
        blocks = (
            rectangle(i, min(i + self.block, tokens), j, min(j + self.block, key_tokens))
            for i, row in zip(range(0, tokens, self.block), self.layout)
            for j, sees in zip(range(0, key_tokens, self.block), row)
            if sees
        )
        return join(block for block in blocks if block)


@dataclass(frozen=True, repr=False)
class Bands(Mask):
    """A mask given directly by its bands, for patterns without a constructor.

    Args:
        given: disjoint bands (masks/bands.py). For overlapping ones combine several masks by ``|``.

    Raises:
        MaskError: two bands overlap, or a band begins at a negative index.
    """

    given: Sequence[Band]

    def __post_init__(self) -> None:
        given = tuple(sorted(Band(*band) for band in self.given))
        object.__setattr__(self, "given", given)
        for band in given:
            counted(0, self, f"the first query or key of {band}", min(band.q_start, band.k_start))
        for one, other in intersecting_rows(given, given):
            if one is not other and (both := intersect(one, other)):
                raise MaskError(
                    f"{self}: {one} and {other} overlap, in {both}, whose pairs would be counted twice; "
                    f"pass disjoint bands, or join masks by |, which removes the overlap"
                )

    def __repr__(self) -> str:
        return f"Bands({reprlib.repr(self.given)})"

    def _bands(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        for band in self.given:
            if band.q_stop > tokens or band.k_stop > key_tokens:
                raise MaskError(f"{band} goes beyond {tokens} queries or {key_tokens} keys; shorten it")
            yield trim(*band)


@dataclass(frozen=True, repr=False)
class And(Mask):
    """``left & right``: a query sees a key if it sees it in both masks."""

    left: Mask
    right: Mask

    def __repr__(self) -> str:
        return " & ".join(f"({side})" if isinstance(side, Or) else f"{side}" for side in (self.left, self.right))

    def _bands(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        pairs = intersecting_rows(self.left.bands(tokens, key_tokens), self.right.bands(tokens, key_tokens))
        return (intersect(a, b) for a, b in pairs)


@dataclass(frozen=True, repr=False)
class Or(Mask):
    """``left | right``: a query sees a key if it sees it in at least one of the masks."""

    left: Mask
    right: Mask

    def __repr__(self) -> str:
        return f"{self.left} | {self.right}"

    def _bands(self, tokens: int, key_tokens: int) -> Iterable[Band | None]:
        left, right = self.left.bands(tokens, key_tokens), self.right.bands(tokens, key_tokens)
        return join((*left, *subtract(right, left)))


def hides_later_tokens(mask: Mask) -> bool:
    """Whether the mask's constructors guarantee that no query q sees a key k > q: causal, or causal ``&`` any mask.

    False does not mean that a later token is visible: only the constructors are looked at, not the bands.
    """
    if isinstance(mask, And):
        return hides_later_tokens(mask.left) or hides_later_tokens(mask.right)
    if isinstance(mask, Or):
        return hides_later_tokens(mask.left) and hides_later_tokens(mask.right)
    return isinstance(mask, Causal) or (isinstance(mask, Window) and mask.right == 0)


def shows_later_tokens(mask: Mask) -> bool:
    """Whether ``mask`` has a constructor that is there to show later tokens: Full, PrefixLM, or Window with right != 0.

    False if the whole mask is causal all the same, as in Full() & Causal() (see ``hides_later_tokens``). False for Documents,
    Chunked, Span and other masks that are commonly combined with Causal.
    """
    if isinstance(mask, And | Or):
        return not hides_later_tokens(mask) and (shows_later_tokens(mask.left) or shows_later_tokens(mask.right))
    return isinstance(mask, Full | PrefixLM) or (isinstance(mask, Window) and mask.right != 0)


def documents_in_mask(mask: Mask | None) -> Documents | None:
    """The ``Documents`` mask that ``mask`` is, or that it contains as an operand of ``&``; the first if there are several.

    None if there is none, if ``mask`` is None, or if those ``Documents`` have ``key_lengths``.
    """
    if isinstance(mask, And):
        return documents_in_mask(mask.left) or documents_in_mask(mask.right)
    return mask if isinstance(mask, Documents) and mask.key_lengths is None else None

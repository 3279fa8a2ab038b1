"""Closed-form communication volume of one attention layer: collectives and bytes that a rank sends. Integers only: no torch.

    ulysses    one all-to-all for q, k, v and one for the output in each pass     about 4·N·h/P elements a rank and pass
    ring       keys and values to the ranks that need them, in the forward and again in the backward; gradients back in fp32

Tests count collectives and bytes at the Transport and compare them with these functions by ``==``. Source: arXiv:2309.14509.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from longspan.distributed.layout import Heads, Layout, split


@dataclass(frozen=True)
class Traffic:
    """What one rank sends: the number of collectives, and the bytes sent to *other* ranks."""

    collectives: int = 0
    bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.collectives + other.collectives, self.bytes + other.bytes)


def tokens_to_heads_elements(sizes: Sequence[int], widths: Sequence[int], rank: int) -> int:
    """Elements that ``rank`` sends to others in the all-to-all from tokens to heads: its tokens, for every other rank's heads.

    Args:
        sizes: tokens that each rank holds.
        widths: elements of the heads that each rank computes, for one token.
        rank: the sending rank.
    """
    return sizes[rank] * (sum(widths) - widths[rank])


def heads_to_tokens_elements(sizes: Sequence[int], widths: Sequence[int], rank: int) -> int:
    """Elements that ``rank`` sends to others in the all-to-all from heads to tokens: its heads, for every other rank's tokens.

    Args as in ``tokens_to_heads_elements``.
    """
    return (sum(sizes) - sizes[rank]) * widths[rank]


def attention_traffic(
    heads: Heads,
    sizes: Sequence[int],
    key_sizes: Sequence[int],
    ulysses_rank: int,
    *,
    rows: int = 1,
    qk_dim: int,
    v_dim: int,
    itemsize: int,
) -> tuple[Traffic, Traffic]:
    """Traffic of one attention layer on the ulysses axis: per pass one all-to-all for q, k, v and one for the output.

    With equal parts and equal heads a rank sends 4·N·h/P · (P-1)/P elements a pass; DeepSpeed-Ulysses (arXiv:2309.14509,
    section 3.2) states 4·N·h/P for large P.

    Args:
        heads: the partition of heads over the ulysses ranks.
        sizes: query tokens of each ulysses rank of this ring rank.
        key_sizes: key tokens of each ulysses rank of this ring rank.
        ulysses_rank: the sending rank.
        rows: rows of the batch.
        qk_dim, v_dim: head dims of queries and keys, and of values.
        itemsize: bytes of an element.

    Returns:
        (forward, backward).
    """
    if heads.ulysses == 1:
        return Traffic(), Traffic()
    sent = _sent_elements(heads, None, sizes, key_sizes, ulysses_rank, qk_dim, v_dim)
    forward, backward = sent.qkv_to_heads + sent.out_to_tokens, sent.out_to_heads + sent.qkv_to_tokens
    return Traffic(2, forward * rows * itemsize), Traffic(2, backward * rows * itemsize)


def recomputable_attention_traffic(
    heads: Heads,
    sizes: Sequence[int],
    key_sizes: Sequence[int],
    ulysses_rank: int,
    *,
    rows: int = 1,
    qk_dim: int,
    v_dim: int,
    itemsize: int,
) -> tuple[Traffic, Traffic]:
    """Traffic of one layer of ``attend(recomputable=True)``, whose backward exchanges q, k, v and the output again.

    Forward, for each head chunk: one all-to-all for q, k, v and one for the output. Backward: one for q, k, v, the output and
    its gradient, and one for the gradients of q, k, v. Selective recomputation sends nothing. With equal heads and no key/value
    head in several chunks, the forward equals that of ``attention_traffic`` and the backward is 8 instead of 4·N·h/P · (P-1)/P.

    Args and Returns as in ``attention_traffic``; ``heads`` also has the number of chunks.
    """
    if heads.ulysses == 1:
        return Traffic(), Traffic()
    forward = backward = 0
    for chunk in range(heads.chunks):
        sent = _sent_elements(heads, chunk, sizes, key_sizes, ulysses_rank, qk_dim, v_dim)
        forward += sent.qkv_to_heads + sent.out_to_tokens
        backward += sent.qkv_to_heads + 2 * sent.out_to_heads + sent.qkv_to_tokens
    unit = rows * itemsize
    return Traffic(2 * heads.chunks, forward * unit), Traffic(2 * heads.chunks, backward * unit)


class _Sent(NamedTuple):
    """Elements that a rank sends to others for one row, for each kind of exchange."""

    qkv_to_heads: int
    out_to_heads: int
    qkv_to_tokens: int
    out_to_tokens: int


def _sent_elements(
    heads: Heads, chunk: int | None, sizes: Sequence[int], key_sizes: Sequence[int], rank: int, qk_dim: int, v_dim: int
) -> _Sent:
    """The elements that ``rank`` sends for one head chunk (None: all heads), one row."""
    ranks = range(heads.ulysses)
    q_widths = [len(heads.query_of(p, chunk)) * qk_dim for p in ranks]
    kv_widths = [len(heads.kv_of(p, chunk)) * (qk_dim + v_dim) for p in ranks]
    out_widths = [len(heads.query_of(p, chunk)) * v_dim for p in ranks]
    to_heads, to_tokens = tokens_to_heads_elements, heads_to_tokens_elements
    return _Sent(
        qkv_to_heads=to_heads(sizes, q_widths, rank) + to_heads(key_sizes, kv_widths, rank),
        out_to_heads=to_heads(sizes, out_widths, rank),
        qkv_to_tokens=to_tokens(sizes, q_widths, rank) + to_tokens(key_sizes, kv_widths, rank),
        out_to_tokens=to_tokens(sizes, out_widths, rank),
    )


def ring_traffic(
    leaving: Sequence[int], arriving: Sequence[int], width: int, *, itemsize: int, grad_itemsize: int
) -> tuple[Traffic, Traffic]:
    """Traffic of one attention layer on the ring axis.

    Keys and values are sent once in the forward and once in the backward; their gradients are sent back to the owner.

    Args:
        leaving: keys that this rank sends, for each hop. A hop in which no rank needs a key has no entry and no collective.
        arriving: keys that this rank receives, for each hop.
        width: elements of one key and its value over this rank's heads.
        itemsize: bytes of an element of keys and values.
        grad_itemsize: bytes of an element of their gradients (fp32 or fp64).

    Returns:
        (forward, backward).
    """
    sent = sum(leaving) * width * itemsize
    returned = sum(arriving) * width * grad_itemsize
    return Traffic(len(leaving), sent), Traffic(2 * len(leaving), sent + returned)


def causal_keys_sent(layout: Layout, ring_rank: int) -> int:
    """The keys that a ring rank sends in one pass under a causal mask, for one row: those that other ranks' queries see.

    Contiguous: all its keys to every later ring rank. Zigzag: its early piece to every other ring rank, and its late piece to
    the earlier ring ranks, whose own late pieces come after it.
    """
    later_ranks = layout.ring - 1 - ring_rank
    if not layout.zigzag:
        return later_ranks * sum(map(len, layout.runs(ring_rank)))
    pieces = split(layout.tokens, 2 * layout.ring)
    return (layout.ring - 1) * pieces[ring_rank] + ring_rank * pieces[2 * layout.ring - 1 - ring_rank]

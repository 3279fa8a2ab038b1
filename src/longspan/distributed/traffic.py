"""Closed-form communication volume of one attention layer: collectives and bytes that a rank sends. Integers only: no torch.

    ulysses    one all-to-all for q, k, v and one for the output, each pass       about 4·N·h/P elements a rank and pass
    ring       keys and values around the ring, forward and again backward, their gradients back in fp32

Tests count what passes through the Transport and compare it by ``==``. Source: arXiv:2309.14509.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.distributed.layout import Heads, Layout, split


@dataclass(frozen=True)
class Traffic:
    """What one rank sends to the others: how many collectives, and how many bytes that are not for itself."""

    collectives: int = 0
    bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.collectives + other.collectives, self.bytes + other.bytes)


def tokens_to_heads_elements(sizes: Sequence[int], widths: Sequence[int], rank: int) -> int:
    """Elements that ``rank`` sends in the all-to-all from tokens to heads: for each other rank, my tokens of its heads.

    ``sizes[p]`` tokens are held by rank p, whose heads are ``widths[p]`` elements wide. The exchange back sends
    ``heads_to_tokens_elements``: to each other rank, its tokens of my heads.
    """
    return sizes[rank] * (sum(widths) - widths[rank])


def heads_to_tokens_elements(sizes: Sequence[int], widths: Sequence[int], rank: int) -> int:
    """Elements that ``rank`` sends in the all-to-all from heads to tokens (see ``tokens_to_heads_elements``)."""
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
    """(forward, backward) of one attention layer on the ulysses axis: one exchange for q, k, v, one for the output, each way.

    With equal parts and equal heads a rank sends 4·N·h/P · (P-1)/P elements each way: DeepSpeed-Ulysses
    (arXiv:2309.14509, section 3.2) states 4·N·h/P for large P. ``sizes`` and ``key_sizes`` are those of the rank's ring rank.
    """
    if heads.ulysses == 1:
        return Traffic(), Traffic()
    there, out_there, back, out_back = _elements(heads, None, sizes, key_sizes, ulysses_rank, qk_dim, v_dim)
    unit = rows * itemsize
    return Traffic(2, (there + out_back) * unit), Traffic(2, (out_there + back) * unit)


def kept_attention_traffic(
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
    """(forward, backward) under selective recomputation: q, k, v are not saved and the backward exchanges them again.

    Per chunk, one exchange for q, k, v and one for the output; back, one for q, k, v, the output and its gradient, and one for
    the gradients of q, k, v. Recomputation sends nothing. With equal heads, where no chunks have a key/value head in common,
    the forward sends what ``attention_traffic`` says, and the backward (8 instead of 4)·N·h/P · (P-1)/P elements.
    """
    if heads.ulysses == 1:
        return Traffic(), Traffic()
    forward = backward = 0
    for chunk in range(heads.chunks):
        there, out_there, back, out_back = _elements(heads, chunk, sizes, key_sizes, ulysses_rank, qk_dim, v_dim)
        forward += there + out_back
        backward += there + 2 * out_there + back
    unit = rows * itemsize
    return Traffic(2 * heads.chunks, forward * unit), Traffic(2 * heads.chunks, backward * unit)


def _elements(
    heads: Heads, chunk: int | None, sizes: Sequence[int], key_sizes: Sequence[int], rank: int, qk_dim: int, v_dim: int
) -> tuple[int, int, int, int]:
    """What ``rank`` sends of one row: q, k, v to the heads; the output there; q, k, v to the tokens; the output there."""
    ranks = range(heads.ulysses)
    q_widths = [len(heads.query_of(p, chunk)) * qk_dim for p in ranks]
    kv_widths = [len(heads.kv_of(p, chunk)) * (qk_dim + v_dim) for p in ranks]
    out_widths = [len(heads.query_of(p, chunk)) * v_dim for p in ranks]
    return (
        tokens_to_heads_elements(sizes, q_widths, rank) + tokens_to_heads_elements(key_sizes, kv_widths, rank),
        tokens_to_heads_elements(sizes, out_widths, rank),
        heads_to_tokens_elements(sizes, q_widths, rank) + heads_to_tokens_elements(key_sizes, kv_widths, rank),
        heads_to_tokens_elements(sizes, out_widths, rank),
    )


def ring_traffic(
    leaving: Sequence[int], arriving: Sequence[int], width: int, *, itemsize: int, grad_itemsize: int
) -> tuple[Traffic, Traffic]:
    """(forward, backward) of one attention layer on the ring axis, from the keys that leave and arrive at each hop.

    ``width`` is the elements of one key and its value over this rank's heads. Keys and values pass once in the forward and
    once again in the backward; their gradients return in fp32 (``grad_itemsize``). A hop that no rank needs is no collective.
    """
    passed = sum(leaving) * width * itemsize
    back = sum(arriving) * width * grad_itemsize
    return Traffic(len(leaving), passed), Traffic(2 * len(leaving), passed + back)


def causal_keys_sent(layout: Layout, ring_rank: int) -> int:
    """The keys that a ring rank sends in one pass under a causal mask of one row: only what a later query sees.

    Zigzag: everyone needs my early piece, and only the ranks before me my late one. Contiguous: the ranks behind me need all.
    """
    behind = layout.ring - 1 - ring_rank
    if not layout.zigzag:
        return behind * sum(map(len, layout.runs(ring_rank)))
    pieces = split(layout.tokens, 2 * layout.ring)
    return (layout.ring - 1) * pieces[ring_rank] + ring_rank * pieces[2 * layout.ring - 1 - ring_rank]

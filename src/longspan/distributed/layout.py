"""Who holds which tokens and computes which heads, and what that costs on the wire. Integers only: no torch, no process groups.

tokens 0 .. N-1      ring=2, ulysses=2, contiguous            ring=2, ulysses=2, zigzag

  ring rank 0        |--u0--|--u1--|                           |-u0-u1-|               |-u0-u1-|
  ring rank 1                      |--u0--|--u1--|                     |-u0-u1-|-u0-u1-|

Zigzag cuts 2R pieces and gives ring rank r the pieces r and 2R-1-r: under a causal mask an early piece is cheap and a
late one dear, and every rank gets one of each. Ulysses then cuts the run of a ring rank into consecutive shares.

heads 0 .. H-1       dealt as evenly as possible to the ulysses ranks, in contiguous runs; a rank also gets the key/value
                     heads that its query heads read, so a key/value head that two ranks need is replicated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from longspan.errors import LayoutError

Runs = tuple[range, ...]


def split(count: int, parts: int) -> tuple[int, ...]:
    """``count`` things dealt to ``parts`` as evenly as possible, the larger shares first: split(7, 3) == (3, 2, 2)."""
    share, extra = divmod(count, parts)
    return (share + 1,) * extra + (share,) * (parts - extra)


def consecutive(sizes: Sequence[int]) -> Runs:
    """The ranges that lie side by side with these sizes: consecutive((3, 2)) == (range(0, 3), range(3, 5))."""
    stops = tuple(accumulate(sizes))
    return tuple(range(stop - size, stop) for size, stop in zip(sizes, stops))


def select(runs: Runs, window: range) -> Runs:
    """What stands at the places ``window`` of the runs laid side by side, empty runs left out."""
    offsets = consecutive([len(run) for run in runs])
    cuts = (run[max(window.start - at.start, 0) : max(window.stop - at.start, 0)] for run, at in zip(runs, offsets))
    return tuple(cut for cut in cuts if cut)


@dataclass(frozen=True)
class Layout:
    """How ``tokens`` tokens lie on ``ring`` x ``ulysses`` ranks. Every token has one owner; shares differ by at most one.

    Raises LayoutError where a rank would have no token.
    """

    tokens: int
    ring: int = 1
    ulysses: int = 1
    zigzag: bool = False

    def __post_init__(self) -> None:
        if self.tokens < self.ring * self.ulysses:
            raise LayoutError(
                f"tokens={self.tokens} is fewer than the {self.ring * self.ulysses} ranks of a sequence "
                f"(ring={self.ring} x ulysses={self.ulysses}); pass at least one token a rank, or use fewer ranks a sequence"
            )

    def runs(self, ring_rank: int) -> Runs:
        """The positions that the ulysses ranks of this ring rank hold together, in their order."""
        if not self.zigzag:
            return (consecutive(split(self.tokens, self.ring))[ring_rank],)
        pieces = consecutive(split(self.tokens, 2 * self.ring))
        return tuple(piece for piece in (pieces[ring_rank], pieces[2 * self.ring - 1 - ring_rank]) if piece)

    def batch_runs(self, ring_rank: int, rows: int) -> Runs:
        """The same of a batch of ``rows``, laid out as one row: row b stands behind b * tokens others."""
        runs = self.runs(ring_rank)
        return tuple(range(run.start + b * self.tokens, run.stop + b * self.tokens) for b in range(rows) for run in runs)

    def sizes(self, ring_rank: int) -> tuple[int, ...]:
        """How many tokens each ulysses rank of this ring rank holds."""
        return split(sum(map(len, self.runs(ring_rank))), self.ulysses)

    def mine(self, ring_rank: int, ulysses_rank: int) -> Runs:
        """The positions that one rank holds, in its order: this is its ``position_ids``."""
        return select(self.runs(ring_rank), consecutive(self.sizes(ring_rank))[ulysses_rank])


@dataclass(frozen=True)
class Heads:
    """How ``query`` query heads and ``kv`` key/value heads are dealt to ``ulysses`` ranks, and by each cut into ``chunks``.

    Chunk j is the j-th share of every rank's heads, so that all ranks work on every chunk: 8 heads on 2 ranks in 2 chunks
    are 0 1 | 4 5 and then 2 3 | 6 7. A key/value head that several ranks *or chunks* read is sent to each of them.

    Raises LayoutError where a rank would have no query head, or no query head of some chunk, or the query heads do not
    share the key/value heads evenly.
    """

    query: int
    kv: int
    ulysses: int = 1
    chunks: int = 1

    def __post_init__(self) -> None:
        if self.kv < 1 or self.query % self.kv:
            raise LayoutError(
                f"{self.query} query heads cannot share {self.kv} key/value heads evenly; "
                f"the query heads must be a multiple of the key/value heads"
            )
        if self.ulysses > self.query:
            raise LayoutError(
                f"ulysses={self.ulysses} exceeds the {self.query} query heads; "
                f"{self._instead()} (or any ulysses up to {self.query}, with ring to match)"
            )
        fewest = self.query // self.ulysses
        if not 1 <= self.chunks <= fewest:
            raise LayoutError(
                f"head_chunks={self.chunks} cannot cut the {fewest} query head{'s' * (fewest > 1)} that some rank computes "
                f"({self.query} on ulysses={self.ulysses}); use head_chunks={fewest}, or any from 1 to it"
            )

    def _instead(self) -> str:
        divisors = [d for d in range(1, self.query + 1) if self.ulysses % d == 0]
        best = max(divisors, key=lambda d: (self.query % d == 0, d))
        return f"use ulysses={best} ring={self.ulysses // best}"

    def query_of(self, ulysses_rank: int, chunk: int | None = None) -> range:
        """The query heads that a rank computes: all of them, or those of one chunk."""
        mine = consecutive(split(self.query, self.ulysses))[ulysses_rank]
        if chunk is None:
            return mine
        share = consecutive(split(len(mine), self.chunks))[chunk]
        return mine[share.start : share.stop]

    def kv_of(self, ulysses_rank: int, chunk: int | None = None) -> range:
        """The key/value heads that these query heads read."""
        mine, group = self.query_of(ulysses_rank, chunk), self.query // self.kv
        return range(mine.start // group, (mine.stop - 1) // group + 1)

    @property
    def replicated(self) -> bool:
        """Whether some key/value head is read by several ranks or chunks, so that its gradients must be summed."""
        return sum(len(self.kv_of(p, j)) for p in range(self.ulysses) for j in range(self.chunks)) > self.kv

    def groups(self, ulysses_rank: int, chunk: int | None = None) -> tuple[tuple[slice, slice], ...]:
        """These heads as (query heads, key/value heads) in which every key/value head serves equally many query heads.

        Kernels know only regular groups. 28 query heads over 4 key/value heads on 8 ranks give rank 1 the query heads 4-7:
        three of them read key/value head 0 and one reads head 1, so it has two groups. Indices count from these heads.
        """
        mine, kv, group = self.query_of(ulysses_rank, chunk), self.kv_of(ulysses_rank, chunk), self.query // self.kv
        readers = [min(mine.stop, (head + 1) * group) - max(mine.start, head * group) for head in kv]
        regular: list[tuple[int, int]] = []  # (readers of each head, how many heads)
        for count in readers:
            same = bool(regular) and regular[-1][0] == count
            regular[-1:] = [(count, regular[-1][1] + 1)] if same else [*regular[-1:], (count, 1)]
        queries = consecutive([count * heads for count, heads in regular])
        keys = consecutive([heads for _, heads in regular])
        return tuple((slice(q.start, q.stop), slice(k.start, k.stop)) for q, k in zip(queries, keys))


@dataclass(frozen=True)
class Traffic:
    """What one rank sends to the others: how many collectives, and how many bytes that are not for itself."""

    collectives: int = 0
    bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.collectives + other.collectives, self.bytes + other.bytes)


def tokens_to_heads_elements(sizes: Sequence[int], widths: Sequence[int], rank: int) -> int:
    """Elements that ``rank`` sends when tokens are traded for heads: to each other rank, my tokens of the heads it computes.

    ``sizes[p]`` tokens are held by rank p, whose heads are ``widths[p]`` elements wide. The way back sends
    ``heads_to_tokens_elements``: to each other rank, its tokens of my heads.
    """
    return sizes[rank] * (sum(widths) - widths[rank])


def heads_to_tokens_elements(sizes: Sequence[int], widths: Sequence[int], rank: int) -> int:
    """Elements that ``rank`` sends when heads are traded for tokens (see ``tokens_to_heads_elements``)."""
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

    With equal shares and equal heads a rank sends 4·N·h/P · (P-1)/P elements each way: DeepSpeed-Ulysses
    (arXiv:2309.14509, section 3.2) states 4·N·h/P for large P. ``sizes`` and ``key_sizes`` are those of the rank's ring rank.
    """
    if heads.ulysses == 1:
        return Traffic(), Traffic()
    there, out_there, home, out_home = _elements(heads, None, sizes, key_sizes, ulysses_rank, qk_dim, v_dim)
    unit = rows * itemsize
    return Traffic(2, (there + out_home) * unit), Traffic(2, (out_there + home) * unit)


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
    """(forward, backward) where q, k and v are not kept on the heads' side: the backward brings them there again.

    Per chunk, one exchange for q, k, v and one for the output; back, one for q, k, v, the output and its gradient, and one for
    the gradients of q, k, v. Recomputation sends nothing. With equal heads, where no chunks share a key/value head, the
    forward sends what ``attention_traffic`` says, and the backward (8 instead of 4)·N·h/P · (P-1)/P elements.
    """
    if heads.ulysses == 1:
        return Traffic(), Traffic()
    forward = backward = 0
    for chunk in range(heads.chunks):
        there, out_there, home, out_home = _elements(heads, chunk, sizes, key_sizes, ulysses_rank, qk_dim, v_dim)
        forward += there + out_home
        backward += there + 2 * out_there + home
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
    once again in the backward; their gradients go home in fp32 (``grad_itemsize``). A hop that no rank needs is no collective.
    """
    passed = sum(leaving) * width * itemsize
    home = sum(arriving) * width * grad_itemsize
    return Traffic(len(leaving), passed), Traffic(2 * len(leaving), passed + home)


def causal_keys_sent(layout: Layout, ring_rank: int) -> int:
    """The keys that a ring rank sends in one pass under a causal mask of one row: only what a later query sees.

    Zigzag: everyone needs my early piece, and only the ranks before me my late one. Contiguous: the ranks behind me need all.
    """
    behind = layout.ring - 1 - ring_rank
    if not layout.zigzag:
        return behind * sum(map(len, layout.runs(ring_rank)))
    pieces = split(layout.tokens, 2 * layout.ring)
    return (layout.ring - 1) * pieces[ring_rank] + ring_rank * pieces[2 * layout.ring - 1 - ring_rank]


@dataclass(frozen=True)
class Degrees:
    """A choice of ulysses x ring, and the sentence that says why."""

    ulysses: int
    ring: int
    why: str


def choose_degrees(ranks: int, query_heads: int, kv_heads: int, ranks_per_node: int) -> Degrees:
    """How ``ranks`` ranks should share a sequence: ulysses inside a node as far as the heads reach, the ring for the rest.

    Ulysses sends every element once and its traffic falls with the ranks, so it is taken as far as it goes: not beyond the
    query heads, not across nodes (an all-to-all is as fast as its slowest link; a ring hides behind the kernel), and by
    preference to a degree that gives the fullest rank at most a tenth more than its share of the heads: it sets the pace.
    """
    Heads(query_heads, kv_heads)
    fits = [d for d in range(1, ranks + 1) if ranks % d == 0 and d <= query_heads and d <= max(ranks_per_node, 1)]
    ulysses = max(fits, key=lambda d: (10 * max(split(query_heads, d)) * d <= 11 * query_heads, d))
    ring = ranks // ulysses
    limit = "the ranks" if ulysses == ranks else f"what {query_heads} query heads and nodes of {ranks_per_node} ranks allow"
    copies = "" if ulysses <= kv_heads else f", so each key/value head is held by about {ulysses / kv_heads:.3g} ranks"
    rest = "no ring is needed" if ring == 1 else f"ring={ring} takes the rest"
    return Degrees(ulysses, ring, f"ulysses={ulysses} is {limit}{copies}; {rest}")

"""The partition of tokens and heads over the ranks of a sequence: ring, ulysses, tensor. Integers only: no torch.

tokens 0 .. N-1      ring=2, ulysses=2, contiguous            ring=2, ulysses=2, zigzag

  ring rank 0        |--u0--|--u1--|                           |--u0---|               |--u1---|
  ring rank 1                      |--u0--|--u1--|                     |--u0---|--u1---|

Zigzag cuts the row into 2R pieces and gives ring rank r the pieces r and 2R-1-r. Under a causal mask an early piece has few
visible keys and a late piece many, so every ring rank has equal work. The tokens of a ring rank, its two pieces one after the
other, are then split into ulysses x tensor consecutive shares; tensor rank t of ulysses rank u holds share u * tensor + t.
Attention and feed-forward run on the shares of all tensor ranks together (gathered), everything else on a rank's own share.

heads 0 .. H-1       split as evenly as possible over the ulysses ranks, in contiguous ranges. A rank also gets the key/value
                     heads that its query heads read, so a key/value head that two ranks need is replicated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from longspan.errors import LayoutError

Runs = tuple[range, ...]
"""Positions of a row (token indices, or indices of a rank's own rows) as ranges, in the order in which a rank stores them."""


def split(count: int, parts: int) -> tuple[int, ...]:
    """The sizes of ``parts`` parts of ``count`` items, as equal as possible, larger ones first: split(7, 3) == (3, 2, 2)."""
    size, extra = divmod(count, parts)
    return (size + 1,) * extra + (size,) * (parts - extra)


def consecutive(sizes: Sequence[int]) -> Runs:
    """Adjacent ranges with the given sizes, the first of which starts at 0: consecutive((3, 2)) == (range(0, 3), range(3,
    5))."""
    stops = tuple(accumulate(sizes))
    return tuple(range(stop - size, stop) for size, stop in zip(sizes, stops))


def select(runs: Runs, window: range) -> Runs:
    """The elements window.start to window.stop - 1 of the ranges ``runs`` put one after another, as ranges without empty ones.

    select((range(0, 3), range(8, 12)), range(2, 5)) == (range(2, 3), range(8, 10))
    """
    offsets = consecutive([len(run) for run in runs])
    cuts = (run[max(window.start - at.start, 0) : max(window.stop - at.start, 0)] for run, at in zip(runs, offsets))
    return tuple(cut for cut in cuts if cut)


@dataclass(frozen=True)
class Layout:
    """The partition of a row of ``tokens`` tokens over ``ring`` x ``ulysses`` x ``tensor`` ranks; each token is on one rank.

    Its methods give the positions (token indices in the row) or numbers of tokens that ranks hold. Ranks are indices on an
    axis, from 0.

    Attributes:
        tokens: tokens of the row.
        ring, ulysses: degrees of the two axes.
        zigzag: give each ring rank an early and a late piece of the row instead of one contiguous piece.
        tensor: degree of the tensor axis.

    Raises:
        LayoutError: there are fewer tokens than ranks.
    """

    tokens: int
    ring: int = 1
    ulysses: int = 1
    zigzag: bool = False
    tensor: int = 1

    def __post_init__(self) -> None:
        ranks = self.ring * self.ulysses * self.tensor
        if self.tokens < ranks:
            more = f" x tensor={self.tensor}" if self.tensor > 1 else ""
            raise LayoutError(
                f"tokens={self.tokens} is fewer than the {ranks} ranks of a sequence (ring={self.ring} x "
                f"ulysses={self.ulysses}{more}); pass at least one token a rank, or use fewer ranks a sequence"
            )

    def runs(self, ring_rank: int) -> Runs:
        """The positions in the row that all ulysses and tensor ranks of ring rank ``ring_rank`` hold together, in their order.

        One range; with zigzag, two, or one if the row is too short for a late piece.
        """
        if not self.zigzag:
            return (consecutive(split(self.tokens, self.ring))[ring_rank],)
        pieces = consecutive(split(self.tokens, 2 * self.ring))
        return tuple(piece for piece in (pieces[ring_rank], pieces[2 * self.ring - 1 - ring_rank]) if piece)

    def batch_runs(self, ring_rank: int, rows: int) -> Runs:
        """The positions that ring rank ``ring_rank`` holds in a batch of ``rows`` rows laid one after another.

        They are those of ``runs`` for each row b in turn, shifted by b * tokens.
        """
        runs = self.runs(ring_rank)
        return tuple(range(run.start + b * self.tokens, run.stop + b * self.tokens) for b in range(rows) for run in runs)

    def shares(self, ring_rank: int, ulysses_rank: int) -> tuple[int, ...]:
        """For each tensor rank of (``ring_rank``, ``ulysses_rank``), the number of tokens that it holds."""
        sizes = split(sum(map(len, self.runs(ring_rank))), self.ulysses * self.tensor)
        return sizes[ulysses_rank * self.tensor : (ulysses_rank + 1) * self.tensor]

    def sizes(self, ring_rank: int) -> tuple[int, ...]:
        """For each ulysses rank of ring rank ``ring_rank``, the number of tokens that its tensor ranks hold together.

        Attention gathers these over the tensor ranks: they are a ulysses rank's tokens in the all-to-all.
        """
        return tuple(sum(self.shares(ring_rank, ulysses_rank)) for ulysses_rank in range(self.ulysses))

    def gathered(self, ring_rank: int, ulysses_rank: int) -> Runs:
        """The positions in the row that all tensor ranks of (``ring_rank``, ``ulysses_rank``) hold together, as one or two
        ranges."""
        return select(self.runs(ring_rank), consecutive(self.sizes(ring_rank))[ulysses_rank])

    def mine(self, ring_rank: int, ulysses_rank: int, tensor_rank: int = 0) -> Runs:
        """The positions in the row that the rank (``ring_rank``, ``ulysses_rank``, ``tensor_rank``) holds, as one or two
        ranges.

        They are in the rank's order, and are the ``position_ids`` of its tokens.
        """
        shares = self.shares(ring_rank, ulysses_rank)
        return select(self.gathered(ring_rank, ulysses_rank), consecutive(shares)[tensor_rank])


@dataclass(frozen=True)
class Heads:
    """The partition of query and key/value heads over ``ulysses`` ranks, and of each rank's heads into ``chunks`` chunks.

    Chunk j is the j-th part of every rank's heads, so that all ranks work on every chunk: 8 heads on 2 ranks in 2 chunks are
    0 1 | 4 5 and then 2 3 | 6 7. A key/value head that several ranks or chunks read is sent for each of them.

    Attributes:
        query, kv: numbers of query heads and of key/value heads.
        ulysses: ranks that split the heads.
        chunks: parts of each rank's query heads that are exchanged one after another.

    Raises:
        LayoutError: a rank, or a chunk of a rank, would have no query head, or ``query`` is not a multiple of ``kv``.
    """

    query: int
    kv: int
    ulysses: int = 1
    chunks: int = 1

    def __post_init__(self) -> None:
        if self.kv < 1 or self.query < 1 or self.query % self.kv:
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
        """The start of a remedy, for an error: "use ulysses=U ring=R" with U a legal degree and U x R the ranks that were
        asked for."""
        divisors = [d for d in range(1, self.query + 1) if self.ulysses % d == 0]
        best = max(divisors, key=lambda d: (self.query % d == 0, d))
        return f"use ulysses={best} ring={self.ulysses // best}"

    def query_of(self, ulysses_rank: int, chunk: int | None = None) -> range:
        """The query heads that ulysses rank ``ulysses_rank`` computes in head chunk ``chunk``; with None, in all chunks
        together."""
        mine = consecutive(split(self.query, self.ulysses))[ulysses_rank]
        if chunk is None:
            return mine
        part = consecutive(split(len(mine), self.chunks))[chunk]
        return mine[part.start : part.stop]

    def kv_of(self, ulysses_rank: int, chunk: int | None = None) -> range:
        """The key/value heads that the query heads of ulysses rank ``ulysses_rank`` read, in head chunk ``chunk``; None: in
        all chunks."""
        mine, group = self.query_of(ulysses_rank, chunk), self.query // self.kv
        return range(mine.start // group, (mine.stop - 1) // group + 1)

    @property
    def replicated(self) -> bool:
        """Whether some key/value head is read by several ranks or chunks, so that its gradients must be summed."""
        return sum(len(self.kv_of(p, j)) for p in range(self.ulysses) for j in range(self.chunks)) > self.kv

    def groups(self, ulysses_rank: int, chunk: int | None = None) -> tuple[tuple[slice, slice], ...]:
        """A rank's heads cut into regular groups: within a group each key/value head is read by equally many query heads.

        Kernels support regular groups only. 28 query heads over 4 key/value heads on 8 ranks give rank 1 the query heads 4-7:
        three of them read key/value head 0 and one reads head 1, so it has two groups.

        Args:
            ulysses_rank: the rank.
            chunk: only the heads of this head chunk; None: all heads of the rank.

        Returns:
            (query heads, key/value heads) of each group, as slices of the heads that this rank computes (in this chunk).
        """
        mine, kv, group = self.query_of(ulysses_rank, chunk), self.kv_of(ulysses_rank, chunk), self.query // self.kv
        readers = [min(mine.stop, (head + 1) * group) - max(mine.start, head * group) for head in kv]
        regular: list[tuple[int, int]] = []  # (query heads of each key/value head, number of such key/value heads)
        for count in readers:
            same = bool(regular) and regular[-1][0] == count
            regular[-1:] = [(count, regular[-1][1] + 1)] if same else [*regular[-1:], (count, 1)]
        queries = consecutive([count * heads for count, heads in regular])
        keys = consecutive([heads for _, heads in regular])
        return tuple((slice(q.start, q.stop), slice(k.start, k.stop)) for q, k in zip(queries, keys))


@dataclass(frozen=True)
class Degrees:
    """The degrees of the ulysses and ring axes, and in ``why`` one sentence with the reason for them, which is shown to the
    user."""

    ulysses: int
    ring: int
    why: str


def choose_degrees(ranks: int, query_heads: int, kv_heads: int, ranks_per_node: int) -> Degrees:
    """Choose ulysses x ring for the ``ranks`` of a sequence: the largest good ulysses degree, and ring = ranks / ulysses.

    Ulysses sends every element once, and its traffic per rank falls with its degree. Its degree is limited by the query heads
    and by the ranks of a node: an all-to-all is as slow as its slowest link, while a ring overlaps with the kernel. Among the
    divisors of ``ranks``, degrees that give no rank more than 1.1 x the mean number of query heads are preferred, because the
    rank with the most heads determines the time.

    Args:
        ranks: ranks that hold one sequence.
        query_heads, kv_heads: the model's numbers of heads.
        ranks_per_node: ranks with a fast connection to each other.

    Returns:
        The degrees and the reason.

    Raises:
        LayoutError: the query heads are not a multiple of the key/value heads.
    """
    Heads(query_heads, kv_heads)
    fits = [d for d in range(1, ranks + 1) if ranks % d == 0 and d <= query_heads and d <= max(ranks_per_node, 1)]
    ulysses = max(fits, key=lambda d: (10 * max(split(query_heads, d)) * d <= 11 * query_heads, d))
    ring = ranks // ulysses
    limit = "the ranks" if ulysses == ranks else f"what {query_heads} query heads and nodes of {ranks_per_node} ranks allow"
    copies = "" if ulysses <= kv_heads else f", so each key/value head is held by about {ulysses / kv_heads:.3g} ranks"
    rest = "no ring is needed" if ring == 1 else f"ring={ring} takes the rest"
    return Degrees(ulysses, ring, f"ulysses={ulysses} is {limit}{copies}; {rest}")

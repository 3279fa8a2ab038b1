"""Trade tokens for heads, and back: one all-to-all each way. Knows nothing of masks, kernels or models.

    x_BSHD  my tokens, every head   --tokens_to_heads-->   x_BTGD  every token, my heads
                                    <--heads_to_tokens--

    What rank u sends, two tensors of one trade (q and k) and two ranks:

        to rank 0                              to rank 1
        [ token | q heads of 0 | k heads of 0 ] [ token | q heads of 1 | k heads of 1 ]      one flat buffer, one collective
        [ token | ...                         ] [ token | ...                         ]

    What it receives is the rows of rank 0's tokens, then those of rank 1: with one row in the batch that *is* every
    token of my heads, so q and k are views of it and nothing is unpacked.

A head that two ranks need (a key/value head with fewer of them than ranks) is sent to both, and on the way back what they
return is summed: the two functions are each other's adjoint, and inverses only where nothing is replicated.

B batch   S my tokens   T every token   H every head   G my heads   D head size   R rows: B * T   W widths of my heads
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch._library.opaque_object import MemberType, register_opaque_type
from torch._opaque_base import OpaqueBase
from torch.profiler import record_function

from longspan.distributed.collectives import Scratch, Transport
from longspan.distributed.layout import Heads
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import LayoutError


@dataclass(frozen=True)
class Crowd:
    """Tensors that share their tokens: how many each rank holds, and which heads of each tensor each rank computes."""

    sizes: tuple[int, ...]
    heads: tuple[tuple[range, ...], ...]  # [tensor][rank]
    dims: tuple[int, ...]  # head size of each tensor
    counts: tuple[int, ...]  # heads of each tensor in all
    summed: tuple[bool, ...]  # whether some head of the tensor comes home more than once, from other ranks or in other trades

    def widths(self, rank: int) -> tuple[int, ...]:
        """How many elements of one token each tensor sends to ``rank``."""
        return tuple(len(heads[rank]) * dim for heads, dim in zip(self.heads, self.dims))


class Trade(OpaqueBase):
    """One exchange, planned: crowds of tensors on the ranks of a group, what carries it, and what it packs into."""

    def __init__(self, crowds: Sequence[Crowd], group: dist.ProcessGroup, transport: Transport, scratch: Scratch) -> None:
        self.crowds, self.group, self.transport, self.scratch = tuple(crowds), group, transport, scratch
        self.rank, self.ranks = group.rank(), range(group.size())
        self.columns = tuple(crowd.widths(self.rank) for crowd in self.crowds)
        self.dims = tuple(dim for crowd in self.crowds for dim in crowd.dims)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Trade":
        return self  # torch.compile copies its graphs, and a plan that names process groups is the same in all of them

    def sent(self, rows: int) -> list[int]:
        """Elements that tokens_to_heads sends to each rank: my tokens, its heads."""
        return [rows * sum(crowd.sizes[self.rank] * sum(crowd.widths(p)) for crowd in self.crowds) for p in self.ranks]

    def received(self, rows: int) -> list[int]:
        """Elements that tokens_to_heads receives from each rank: its tokens, my heads."""
        return [rows * sum(crowd.sizes[p] * sum(crowd.widths(self.rank)) for crowd in self.crowds) for p in self.ranks]


_READ = ("crowds", "rank", "columns", "dims")
register_opaque_type(Trade, typ="reference", members=dict.fromkeys(_READ, MemberType.USE_REAL))


def tokens_to_heads(
    x_BSHD: Shaped[Tensor, "batch my_tokens heads head_dim"], mesh: ParallelMesh, tokens: int | None = None
) -> Shaped[Tensor, "batch tokens my_heads head_dim"]:
    """Every token of my heads. On one ulysses rank it is ``x`` itself; over a ring, the tokens of the ring rank.

    The heads are dealt as evenly as possible. ``tokens`` is the length of the whole row (default: equal shares).
    Raises LayoutError for fewer heads than ranks. Source: DeepSpeed-Ulysses, arXiv:2309.14509, section 3.1.
    """
    trade = plan_trade([x_BSHD.shape], mesh, tokens)
    if trade is None:
        return x_BSHD
    rows_RW: Tensor = trade_tokens_for_heads([x_BSHD], trade)[0]
    return rows_RW.view(x_BSHD.shape[0], sum(trade.crowds[0].sizes), -1, x_BSHD.shape[3])


def heads_to_tokens(
    x_BTGD: Shaped[Tensor, "batch tokens my_heads head_dim"], mesh: ParallelMesh, heads: int, tokens: int | None = None
) -> Shaped[Tensor, "batch my_tokens heads head_dim"]:
    """My tokens of all ``heads`` heads: the inverse, and the adjoint, of ``tokens_to_heads``."""
    batch, held, _, dim = x_BTGD.shape
    coordinate = mesh.coordinate
    whole = tokens if tokens is not None else held * coordinate.ring
    mine = coordinate.layout(whole).sizes(coordinate.ring_rank)[coordinate.ulysses_rank]
    trade = plan_trade([torch.Size((batch, mine, heads, dim))], mesh, whole)
    if trade is None:
        return x_BTGD
    x_BSHD: Tensor = trade_heads_for_tokens([x_BTGD.reshape(batch * held, -1)], trade, batch)[0]
    return x_BSHD


def plan_trade(
    shapes: Sequence[torch.Size], mesh: ParallelMesh, tokens: int | None, key_tokens: int | None = None
) -> Trade | None:
    """The exchange of q (and k, v) of these local shapes [batch, my tokens, heads, dim]; None on one ulysses rank.

    The first has the query heads, the others the key/value heads; ``key_tokens`` is the length of k and v where it is not
    that of q.
    """
    heads = Heads(shapes[0][2], shapes[-1][2], mesh.coordinate.ulysses)
    (trade,) = plan_trades(shapes[:1], shapes[1:], heads, mesh, tokens, key_tokens)
    return trade


def plan_trades(
    queries: Sequence[torch.Size],
    keys: Sequence[torch.Size],
    heads: Heads,
    mesh: ParallelMesh,
    tokens: int | None,
    key_tokens: int | None = None,
) -> tuple[Trade | None, ...]:
    """One exchange for each chunk of the heads: of tensors that have the query heads, then of those that have the keys'."""
    shares = [_Share(shape, heads.query_of, False) for shape in queries]
    key_shares = [_Share(shape, heads.kv_of, heads.replicated) for shape in keys]
    crowds = [(_sizes(queries[0], mesh, tokens), shares)]
    if keys:
        key_sizes = _sizes(keys[0], mesh, tokens if key_tokens is None else key_tokens)
        same = key_sizes == crowds[0][0]
        crowds = [(key_sizes, shares + key_shares)] if same else [*crowds, (key_sizes, key_shares)]
    if heads.ulysses == 1:
        return (None,) * heads.chunks
    return tuple(
        Trade(
            [_crowd(sizes, shares, heads.ulysses, chunk) for sizes, shares in crowds],
            mesh.ulysses_group, mesh.transport, mesh.scratch,
        )
        for chunk in range(heads.chunks)
    )  # fmt: skip


class _Share(NamedTuple):
    """A tensor, which of its heads (rank, chunk) gets, and whether some head is got more than once."""

    shape: torch.Size
    dealt: Callable[[int, int], range]
    summed: bool


def _crowd(sizes: tuple[int, ...], shares: Sequence[_Share], ranks: int, chunk: int) -> Crowd:
    return Crowd(
        sizes,
        tuple(tuple(share.dealt(rank, chunk) for rank in range(ranks)) for share in shares),
        tuple(share.shape[3] for share in shares),
        tuple(share.shape[2] for share in shares),
        tuple(share.summed for share in shares),
    )


def _sizes(shape: torch.Size, mesh: ParallelMesh, tokens: int | None) -> tuple[int, ...]:
    coordinate = mesh.coordinate
    whole = tokens if tokens is not None else shape[1] * coordinate.sequence_ranks
    sizes = coordinate.layout(whole).sizes(coordinate.ring_rank)
    if sizes[coordinate.ulysses_rank] != shape[1]:
        raise LayoutError(
            f"this rank passed {shape[1]} tokens, but holds {sizes[coordinate.ulysses_rank]} of tokens={whole}; "
            f"pass tokens= the length of the whole row, and the tokens that shard_batch gave to this rank"
        )
    return sizes


@torch.library.custom_op("longspan::trade_tokens_for_heads", mutates_args=())
def trade_tokens_for_heads(xs_BSHD: Sequence[Tensor], trade: Trade) -> list[Tensor]:
    """Rows [batch * every token, widths of my heads] of each crowd, from its tensors [batch, my tokens, heads, dim]."""
    return start_tokens_for_heads(xs_BSHD, trade)()


@torch.library.custom_op("longspan::trade_heads_for_tokens", mutates_args=())
def trade_heads_for_tokens(rows_RW: Sequence[Tensor], trade: Trade, batch: int) -> list[Tensor]:
    """The adjoint: tensors [batch, my tokens, heads, dim] from the rows of each crowd; replicated heads are summed."""
    homes = [
        new_home((batch, crowd.sizes[trade.rank], count, dim), summed, rows_RW[0])
        for crowd in trade.crowds
        for count, dim, summed in zip(crowd.counts, crowd.dims, crowd.summed)
    ]
    start_heads_for_tokens(rows_RW, trade, homes)()
    return [home.to(rows_RW[0].dtype) for home in homes]


def start_tokens_for_heads(xs_BSHD: Sequence[Tensor], trade: Trade) -> Callable[[], list[Tensor]]:
    """Send what ``trade_tokens_for_heads`` sends, and return at once: call the result, once, for the rows."""
    batch = xs_BSHD[0].shape[0]
    with record_function("longspan::exchange"), ExitStack() as stack:
        send = stack.enter_context(trade.scratch.lend(sum(trade.sent(batch)), xs_BSHD[0]))
        _pack(xs_BSHD, send, trade)
        arrival = trade.transport.all_to_all(send, trade.sent(batch), trade.received(batch), trade.group)
        lent = stack.pop_all()

    def finish() -> list[Tensor]:
        with lent:
            received = arrival.wait()
        return _as_rows(received, trade, batch)

    return finish


def start_heads_for_tokens(rows_RW: Sequence[Tensor], trade: Trade, homes: Sequence[Tensor]) -> Callable[[], None]:
    """Send what ``trade_heads_for_tokens`` sends, and return at once: call the result, once, to bring the heads home.

    Each tensor's home [batch, my tokens, heads, dim] gets the heads that this trade moves: added to what is there where heads
    are ``summed``, else written over it.
    """
    batch = homes[0].shape[0]
    with record_function("longspan::exchange"), ExitStack() as stack:
        if batch == 1 and len(rows_RW) == 1 and rows_RW[0].is_contiguous():
            send = rows_RW[0].view(-1)  # they lie as they are sent
        else:
            send = stack.enter_context(trade.scratch.lend(sum(trade.received(batch)), rows_RW[0]))
            _lay(rows_RW, send, trade, batch)
        arrival = trade.transport.all_to_all(send, trade.received(batch), trade.sent(batch), trade.group)
        lent = stack.pop_all()

    def finish() -> None:
        with lent:
            received = arrival.wait()
        _unpack(received, trade, homes)

    return finish


def new_home(shape: Sequence[int], summed: bool, like: Tensor) -> Tensor:
    """Memory for heads that come home: in fp32 at least and at 0 where they are summed, so that they are rounded once."""
    if summed:
        return like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))
    return like.new_empty(shape)


def _blocks(flat: Tensor, trade: Trade, batch: int) -> list[list[list[Tensor]]]:
    """The send buffer of tokens_to_heads as views [B, S, heads of p, D]: by rank p, crowd and tensor."""
    blocks = []
    for p, block in zip(trade.ranks, flat.split(trade.sent(batch))):
        shares = block.split([batch * crowd.sizes[trade.rank] * sum(crowd.widths(p)) for crowd in trade.crowds])
        blocks.append(
            [
                [
                    columns.unflatten(2, (len(heads[p]), dim))
                    for columns, heads, dim in zip(
                        share.view(batch, crowd.sizes[trade.rank], sum(crowd.widths(p))).split(crowd.widths(p), 2),
                        crowd.heads,
                        crowd.dims,
                    )
                ]
                for share, crowd in zip(shares, trade.crowds)
            ]
        )
    return blocks


def _pack(xs_BSHD: Sequence[Tensor], send: Tensor, trade: Trade) -> None:
    batch = xs_BSHD[0].shape[0]
    for p, block in zip(trade.ranks, _blocks(send, trade, batch)):
        tensors = iter(xs_BSHD)
        for share, crowd in zip(block, trade.crowds):
            for place_BSGD, heads in zip(share, crowd.heads):
                place_BSGD.copy_(next(tensors)[:, :, heads[p].start : heads[p].stop])


def _unpack(received: Tensor, trade: Trade, homes: Sequence[Tensor]) -> None:
    for p, block in zip(trade.ranks, _blocks(received, trade, homes[0].shape[0])):
        places = iter(homes)
        for share, crowd in zip(block, trade.crowds):
            for piece_BSGD, heads, summed in zip(share, crowd.heads, crowd.summed):
                place_BSGD = next(places)[:, :, heads[p].start : heads[p].stop]
                if summed:
                    place_BSGD.add_(piece_BSGD)
                else:
                    place_BSGD.copy_(piece_BSGD)


def _shares(flat: Tensor, trade: Trade, batch: int) -> list[list[Tensor]]:
    """The buffer that tokens_to_heads received as views [B, S of p, W]: by crowd and rank p."""
    shares: list[list[Tensor]] = [[] for _ in trade.crowds]
    for p, block in zip(trade.ranks, flat.split(trade.received(batch))):
        widths = [sum(crowd.widths(trade.rank)) for crowd in trade.crowds]
        pieces = block.split([batch * crowd.sizes[p] * width for crowd, width in zip(trade.crowds, widths)])
        for crowd, width, piece, mine in zip(trade.crowds, widths, pieces, shares):
            mine.append(piece.view(batch, crowd.sizes[p], width))
    return shares


def _as_rows(received: Tensor, trade: Trade, batch: int) -> list[Tensor]:
    if batch == 1 and len(trade.crowds) == 1:
        return [received.view(sum(trade.crowds[0].sizes), -1)]
    with record_function("longspan::exchange"):
        return [torch.cat(pieces, 1).flatten(0, 1) for pieces in _shares(received, trade, batch)]


def _lay(rows_RW: Sequence[Tensor], send: Tensor, trade: Trade, batch: int) -> None:
    """Copy the rows of each crowd to where heads_to_tokens sends them from."""
    for rows, crowd, places in zip(rows_RW, trade.crowds, _shares(send, trade, batch)):
        whole_BTW = rows.unflatten(0, (batch, sum(crowd.sizes)))
        for place_BSW, piece in zip(places, whole_BTW.split(crowd.sizes, 1)):
            place_BSW.copy_(piece)


@trade_tokens_for_heads.register_fake
def _(xs_BSHD: Sequence[Tensor], trade: Trade) -> list[Tensor]:
    batch = xs_BSHD[0].shape[0]
    return [xs_BSHD[0].new_empty(batch * sum(crowd.sizes), sum(crowd.widths(trade.rank))) for crowd in trade.crowds]


@trade_heads_for_tokens.register_fake
def _(rows_RW: Sequence[Tensor], trade: Trade, batch: int) -> list[Tensor]:
    return [
        rows_RW[0].new_empty(batch, crowd.sizes[trade.rank], count, dim)
        for crowd in trade.crowds
        for count, dim in zip(crowd.counts, crowd.dims)
    ]


def _keep_trade(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.trade, ctx.batch = inputs[1], inputs[0][0].shape[0]


def _keep_trade_and_batch(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, ctx.trade, ctx.batch = inputs


def _back_to_tokens(ctx: Any, grads_RW: list[Tensor]) -> tuple[list[Tensor], None]:
    return trade_heads_for_tokens(grads_RW, ctx.trade, ctx.batch), None


def _back_to_heads(ctx: Any, grads_BSHD: list[Tensor]) -> tuple[list[Tensor], None, None]:
    return trade_tokens_for_heads(grads_BSHD, ctx.trade), None, None


trade_tokens_for_heads.register_autograd(_back_to_tokens, setup_context=_keep_trade)
trade_heads_for_tokens.register_autograd(_back_to_heads, setup_context=_keep_trade_and_batch)

"""The DeepSpeed-Ulysses exchange: one all-to-all that re-partitions tensors from tokens to heads, and one back.

    x_BSHD  my tokens, every head   --tokens_to_heads-->   x_BTGD  every token, my heads
                                    <--heads_to_tokens--

    What rank u sends, two tensors of one exchange (q and k) and two ranks:

        to rank 0                              to rank 1
        [ token | q heads of 0 | k heads of 0 ] [ token | q heads of 1 | k heads of 1 ]      one flat buffer, one collective
        [ token | ...                         ] [ token | ...                         ]

    What it receives is the rows of rank 0's tokens, then those of rank 1: with one row in the batch that *is* every
    token of my heads, so q and k are views of it and nothing is unpacked.

A head that two ranks need (a key/value head with fewer of them than ranks) is sent to both, and on the way back what they
return is summed: the two functions are each other's adjoint, and inverses only where nothing is replicated. Knows nothing of
masks, kernels or models. Source: DeepSpeed-Ulysses, arXiv:2309.14509, section 3.1.

B batch   S my tokens   T every token   H every head   G my heads   D head size   R rows: B * T   W widths of my heads
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.profiler import record_function

from longspan._compat import OpaqueBase, register_opaque
from longspan.attention.plan_cache import Constant, cached
from longspan.distributed.collectives import Scratch, Transport
from longspan.distributed.layout import Heads
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import LayoutError


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Tensors with the same token partition (q, or q, k and v), which travel side by side in one all-to-all.

    ``sizes[p]`` tokens of a row are held by rank p, which computes the heads ``heads[t][p]`` of tensor t. Tensor t has
    ``counts[t]`` heads of size ``dims[t]``; its heads are ``summed[t]`` where some head returns more than once, from several
    ranks or in several exchanges.
    """

    sizes: tuple[int, ...]
    heads: tuple[tuple[range, ...], ...]
    dims: tuple[int, ...]
    counts: tuple[int, ...]
    summed: tuple[bool, ...]

    def widths(self, rank: int) -> tuple[int, ...]:
        """How many elements of one token each tensor sends to ``rank``."""
        return tuple(len(heads[rank]) * dim for heads, dim in zip(self.heads, self.dims))


class ExchangePlan(OpaqueBase):
    """One all-to-all: its tensors, the process group, the transport, and the buffer that it packs into."""

    def __init__(
        self, groups: Sequence[TensorGroup], process_group: dist.ProcessGroup, transport: Transport, scratch: Scratch
    ) -> None:
        self.groups, self.process_group, self.transport, self.scratch = tuple(groups), process_group, transport, scratch
        self.rank, self.ranks = process_group.rank(), range(process_group.size())
        self.widths = tuple(tuple(group.widths(p) for p in self.ranks) for group in self.groups)  # [group][rank][tensor]
        self.my_widths = tuple(widths[self.rank] for widths in self.widths)
        self.dims = tuple(dim for group in self.groups for dim in group.dims)
        # elements of one row of the batch, by rank and group: what tokens_to_heads sends, and what it receives
        self.sends = [[group.sizes[self.rank] * sum(widths[p]) for group, widths in self._both()] for p in self.ranks]
        self.receives = [[group.sizes[p] * sum(widths[self.rank]) for group, widths in self._both()] for p in self.ranks]
        self._sent, self._received = [sum(parts) for parts in self.sends], [sum(parts) for parts in self.receives]

    def _both(self) -> list[tuple[TensorGroup, tuple[tuple[int, ...], ...]]]:
        return list(zip(self.groups, self.widths))

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExchangePlan":
        return self  # torch.compile copies its graphs, and a plan that names process groups is the same in all of them

    def sent(self, batch: int) -> list[int]:
        """Elements that tokens_to_heads sends to each rank: my tokens, its heads."""
        return [batch * elements for elements in self._sent]

    def received(self, batch: int) -> list[int]:
        """Elements that tokens_to_heads receives from each rank: its tokens, my heads."""
        return [batch * elements for elements in self._received]


register_opaque(ExchangePlan, members=("groups", "rank", "my_widths", "dims"))


def tokens_to_heads(
    x_BSHD: Shaped[Tensor, "batch my_tokens heads head_dim"], mesh: ParallelMesh, tokens: int | None = None
) -> Shaped[Tensor, "batch tokens my_heads head_dim"]:
    """Exchange this rank's tokens of every head for every token of its heads, in one all-to-all.

    The heads are divided as evenly as possible over the ulysses ranks. Differentiable: the adjoint is ``heads_to_tokens``.

    Args:
        x_BSHD: This rank's tokens, [batch, my tokens, heads, head_dim].
        mesh: The mesh whose ulysses axis exchanges. On one ulysses rank the result is ``x_BSHD`` itself.
        tokens: The length of the whole row, where ranks hold unequally many (default: every rank holds as many as this one).

    Returns:
        [batch, tokens, my heads, head_dim]; over a ring, the tokens of this ring rank.

    Raises:
        LayoutError: There are fewer heads than ulysses ranks, or this rank's tokens are not its part of ``tokens``.

    Source: DeepSpeed-Ulysses, arXiv:2309.14509, section 3.1.
    """
    plan: ExchangePlan | None = _plan(x_BSHD.shape, mesh, tokens).plan
    if plan is None:
        return x_BSHD
    rows_RW: Tensor = exchange_to_heads([x_BSHD], plan)[0]
    return rows_RW.view(x_BSHD.shape[0], sum(plan.groups[0].sizes), -1, x_BSHD.shape[3])


def heads_to_tokens(
    x_BTGD: Shaped[Tensor, "batch tokens my_heads head_dim"], mesh: ParallelMesh, heads: int, tokens: int | None = None
) -> Shaped[Tensor, "batch my_tokens heads head_dim"]:
    """Exchange every token of this rank's heads for its tokens of all heads: the inverse and adjoint of ``tokens_to_heads``.

    Args:
        x_BTGD: Every token of this rank's heads, [batch, tokens, my heads, head_dim].
        mesh: The mesh whose ulysses axis exchanges. On one ulysses rank the result is ``x_BTGD`` itself.
        heads: The number of all heads.
        tokens: The length of the whole row (default: that of ``x_BTGD`` times the ring ranks).

    Returns:
        [batch, my tokens, heads, head_dim].

    Raises:
        LayoutError: There are fewer heads than ulysses ranks.

    Source: DeepSpeed-Ulysses, arXiv:2309.14509, section 3.1.
    """
    batch, held, _, dim = x_BTGD.shape
    coordinate = mesh.coordinate
    whole = tokens if tokens is not None else held * coordinate.ring
    mine = coordinate.layout(whole).sizes(coordinate.ring_rank)[coordinate.ulysses_rank]
    plan: ExchangePlan | None = _plan(torch.Size((batch, mine, heads, dim)), mesh, whole).plan
    if plan is None:
        return x_BTGD
    x_BSHD: Tensor = exchange_to_tokens([x_BTGD.reshape(batch * held, -1)], plan, batch)[0]
    return x_BSHD


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _plan(shape: torch.Size, mesh: ParallelMesh, tokens: int | None) -> Constant[ExchangePlan | None]:
    return Constant(plan_exchange([shape], mesh, tokens))


def plan_exchange(
    shapes: Sequence[torch.Size], mesh: ParallelMesh, tokens: int | None, key_tokens: int | None = None
) -> ExchangePlan | None:
    """The exchange of q (and k, v) of these local shapes [batch, my tokens, heads, dim]; None on one ulysses rank.

    The first has the query heads, the others the key/value heads; ``key_tokens`` is the length of k and v where it is not
    that of q. Made once per shape and mesh.
    """

    def make() -> ExchangePlan | None:
        heads = Heads(shapes[0][2], shapes[-1][2], mesh.coordinate.ulysses)
        return plan_exchanges(shapes[:1], shapes[1:], heads, mesh, tokens=tokens, key_tokens=key_tokens)[0]

    return cached(mesh, (*shapes, tokens, key_tokens), make)


def plan_exchanges(
    queries: Sequence[torch.Size],
    keys: Sequence[torch.Size],
    heads: Heads,
    mesh: ParallelMesh,
    *,
    tokens: int | None,
    key_tokens: int | None = None,
) -> tuple[ExchangePlan | None, ...]:
    """One exchange for each chunk of the heads, of tensors with the query heads and tensors with the key/value heads.

    Tensors of one token partition are one group; key/value tensors of another length are a second one.
    """
    sizes = _sizes(queries[0], mesh, tokens)
    key_sizes = _sizes(keys[0], mesh, tokens if key_tokens is None else key_tokens) if keys else sizes
    if heads.ulysses == 1:
        return (None,) * heads.chunks

    def plan(chunk: int) -> ExchangePlan:
        ranks = range(heads.ulysses)
        q = (tuple(heads.query_of(p, chunk) for p in ranks), False)
        kv = (tuple(heads.kv_of(p, chunk) for p in ranks), heads.replicated)
        tensors = [(sizes, shape, *q) for shape in queries] + [(key_sizes, shape, *kv) for shape in keys]
        groups = [_group([tensor for tensor in tensors if tensor[0] == each]) for each in dict.fromkeys((sizes, key_sizes))]
        return ExchangePlan(groups, mesh.ulysses_group, mesh.transport, mesh.scratch)

    return tuple(plan(chunk) for chunk in range(heads.chunks))


def _group(tensors: Sequence[tuple[tuple[int, ...], torch.Size, tuple[range, ...], bool]]) -> TensorGroup:
    sizes, shapes, heads, summed = zip(*tensors)
    dims, counts = tuple(shape[3] for shape in shapes), tuple(shape[2] for shape in shapes)
    return TensorGroup(sizes=sizes[0], heads=heads, dims=dims, counts=counts, summed=summed)


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


@torch.library.custom_op("longspan::exchange_to_heads", mutates_args=())
def exchange_to_heads(xs_BSHD: Sequence[Tensor], plan: ExchangePlan) -> list[Tensor]:
    """Rows [batch * every token, widths of my heads] of each group, from its tensors [batch, my tokens, heads, dim]."""
    return start_exchange_to_heads(xs_BSHD, plan)()


@torch.library.custom_op("longspan::exchange_to_tokens", mutates_args=())
def exchange_to_tokens(rows_RW: Sequence[Tensor], plan: ExchangePlan, batch: int) -> list[Tensor]:
    """The adjoint: tensors [batch, my tokens, heads, dim] from the rows of each group; replicated heads are summed."""
    outputs = [
        new_output((batch, group.sizes[plan.rank], count, dim), summed, rows_RW[0])
        for group in plan.groups
        for count, dim, summed in zip(group.counts, group.dims, group.summed)
    ]
    start_exchange_to_tokens(rows_RW, plan, outputs)()
    return [output.to(rows_RW[0].dtype) for output in outputs]


def start_exchange_to_heads(xs_BSHD: Sequence[Tensor], plan: ExchangePlan) -> Callable[[], list[Tensor]]:
    """Send what ``exchange_to_heads`` sends, and return at once: call the result, once, for the rows."""
    batch = xs_BSHD[0].shape[0]
    sent = plan.sent(batch)
    with record_function("longspan::exchange"), ExitStack() as stack:
        send = stack.enter_context(plan.scratch.lend(sum(sent), xs_BSHD[0]))
        _pack(xs_BSHD, send, plan)
        arrival = plan.transport.all_to_all(send, sent, plan.received(batch), plan.process_group)
        lent = stack.pop_all()

    def finish() -> list[Tensor]:
        with lent:
            received = arrival.wait()
        return _as_rows(received, plan, batch)

    return finish


def start_exchange_to_tokens(rows_RW: Sequence[Tensor], plan: ExchangePlan, outputs: Sequence[Tensor]) -> Callable[[], None]:
    """Send what ``exchange_to_tokens`` sends, and return at once: call the result, once, to write the outputs.

    Each output [batch, my tokens, heads, dim] gets the heads that this exchange moves: added to what is there where heads are
    ``summed``, else written over it.
    """
    batch = outputs[0].shape[0]
    received = plan.received(batch)
    with record_function("longspan::exchange"), ExitStack() as stack:
        if batch == 1 and len(rows_RW) == 1 and rows_RW[0].is_contiguous():
            send = rows_RW[0].view(-1)  # they lie as they are sent
        else:
            send = stack.enter_context(plan.scratch.lend(sum(received), rows_RW[0]))
            _pack_rows(rows_RW, send, plan, batch)
        arrival = plan.transport.all_to_all(send, received, plan.sent(batch), plan.process_group)
        lent = stack.pop_all()

    def finish() -> None:
        with lent:
            received = arrival.wait()
        _unpack(received, plan, outputs)

    return finish


def new_output(shape: Sequence[int], summed: bool, like: Tensor) -> Tensor:
    """The buffer that returning heads are written to: zeros in fp32 at least where they are summed, to be rounded once."""
    if summed:
        return like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))
    return like.new_empty(shape)


def _blocks(flat: Tensor, plan: ExchangePlan, batch: int) -> list[list[list[Tensor]]]:
    """The send buffer of exchange_to_heads as views [B, S, heads of p, D]: by rank p, group and tensor."""
    blocks = []
    for p, block in zip(plan.ranks, flat.split(plan.sent(batch))):
        parts = zip(plan.groups, plan.widths, block.split([batch * elements for elements in plan.sends[p]]))
        blocks.append(
            [
                [
                    columns.unflatten(2, (len(heads[p]), dim))
                    for columns, heads, dim in zip(
                        part.view(batch, group.sizes[plan.rank], sum(widths[p])).split(widths[p], 2), group.heads, group.dims
                    )
                ]
                for group, widths, part in parts
            ]
        )
    return blocks


def _pack(xs_BSHD: Sequence[Tensor], send: Tensor, plan: ExchangePlan) -> None:
    batch = xs_BSHD[0].shape[0]
    for p, block in zip(plan.ranks, _blocks(send, plan, batch)):
        tensors = iter(xs_BSHD)
        for part, group in zip(block, plan.groups):
            for target_BSGD, heads in zip(part, group.heads):
                target_BSGD.copy_(next(tensors)[:, :, heads[p].start : heads[p].stop])


def _unpack(received: Tensor, plan: ExchangePlan, outputs: Sequence[Tensor]) -> None:
    for p, block in zip(plan.ranks, _blocks(received, plan, outputs[0].shape[0])):
        remaining = iter(outputs)
        for part, group in zip(block, plan.groups):
            for piece_BSGD, heads, summed in zip(part, group.heads, group.summed):
                target_BSGD = next(remaining)[:, :, heads[p].start : heads[p].stop]
                if summed:
                    target_BSGD.add_(piece_BSGD)
                else:
                    target_BSGD.copy_(piece_BSGD)


def _row_parts(flat: Tensor, plan: ExchangePlan, batch: int) -> list[list[Tensor]]:
    """The buffer that exchange_to_heads received as views [B, S of p, W]: by group and rank p."""
    parts: list[list[Tensor]] = [[] for _ in plan.groups]
    for p, block in zip(plan.ranks, flat.split(plan.received(batch))):
        pieces = block.split([batch * elements for elements in plan.receives[p]])
        for group, widths, piece, of_group in zip(plan.groups, plan.my_widths, pieces, parts):
            of_group.append(piece.view(batch, group.sizes[p], sum(widths)))
    return parts


def _as_rows(received: Tensor, plan: ExchangePlan, batch: int) -> list[Tensor]:
    if batch == 1 and len(plan.groups) == 1:
        return [received.view(sum(plan.groups[0].sizes), -1)]
    with record_function("longspan::exchange"):
        return [torch.cat(pieces, 1).flatten(0, 1) for pieces in _row_parts(received, plan, batch)]


def _pack_rows(rows_RW: Sequence[Tensor], send: Tensor, plan: ExchangePlan, batch: int) -> None:
    """Copy the rows of each group to where exchange_to_tokens sends them from."""
    for rows, group, parts in zip(rows_RW, plan.groups, _row_parts(send, plan, batch)):
        whole_BTW = rows.unflatten(0, (batch, sum(group.sizes)))
        for part_BSW, piece in zip(parts, whole_BTW.split(group.sizes, 1)):
            part_BSW.copy_(piece)


@exchange_to_heads.register_fake
def _(xs_BSHD: Sequence[Tensor], plan: ExchangePlan) -> list[Tensor]:
    batch = xs_BSHD[0].shape[0]
    return [xs_BSHD[0].new_empty(batch * sum(group.sizes), sum(w)) for group, w in zip(plan.groups, plan.my_widths)]


@exchange_to_tokens.register_fake
def _(rows_RW: Sequence[Tensor], plan: ExchangePlan, batch: int) -> list[Tensor]:
    return [
        rows_RW[0].new_empty(batch, group.sizes[plan.rank], count, dim)
        for group in plan.groups
        for count, dim in zip(group.counts, group.dims)
    ]


def _save_plan(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.plan, ctx.batch = inputs[1], inputs[0][0].shape[0]


def _save_plan_and_batch(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, ctx.plan, ctx.batch = inputs


def _backward_to_tokens(ctx: Any, grads_RW: list[Tensor]) -> tuple[list[Tensor], None]:
    return exchange_to_tokens(grads_RW, ctx.plan, ctx.batch), None


def _backward_to_heads(ctx: Any, grads_BSHD: list[Tensor]) -> tuple[list[Tensor], None, None]:
    return exchange_to_heads(grads_BSHD, ctx.plan), None, None


exchange_to_heads.register_autograd(_backward_to_tokens, setup_context=_save_plan)
exchange_to_tokens.register_autograd(_backward_to_heads, setup_context=_save_plan_and_batch)

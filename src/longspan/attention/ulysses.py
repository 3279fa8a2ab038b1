"""The DeepSpeed-Ulysses exchange: one all-to-all that re-partitions tensors from tokens to heads, and one back.

    x_BSHD  my tokens, every head   --tokens_to_heads-->   x_BTGD  every token, my heads
                                    <--heads_to_tokens--

    The send buffer of a rank, for two tensors in one exchange (q and k) and two ranks:

        to rank 0                              to rank 1
        [ token | q heads of 0 | k heads of 0 ] [ token | q heads of 1 | k heads of 1 ]      one flat buffer, one collective
        [ token | ...                         ] [ token | ...                         ]

    The receive buffer holds the rows of rank 0's tokens, then those of rank 1. With one row in the batch this is every token
    of my heads, so q and k are views of it and nothing is unpacked.

A key/value head that two ranks need is sent to both, and what both return is summed. So the two functions are each other's
adjoint, but inverses only where nothing is replicated. Independent of masks, kernels and models. Source: DeepSpeed-Ulysses,
arXiv:2309.14509, section 3.1.

The suffix of a tensor's name gives its dims: B batch, S my tokens, T every token, H every head, G my heads, D head size,
R rows (B * T), W the widths (heads x head size) of my heads of all tensors side by side.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.profiler import record_function

from longspan import _compat
from longspan.attention.exchange_buffers import as_rows, pack, pack_rows, unpack
from longspan.attention.plan import ExchangePlan, OwnPart, TensorGroup
from longspan.attention.plan_cache import Constant, cached
from longspan.distributed.collectives import all_to_all_into
from longspan.distributed.layout import Heads
from longspan.distributed.mesh import ParallelMesh, refuse_no_mesh
from longspan.errors import LayoutError
from longspan.kernels.protocol import accumulation_dtype


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
        LayoutError: ``mesh`` is no ParallelMesh, there are fewer heads than ulysses ranks, or this rank's tokens are not its
            part of ``tokens``.

    Source: DeepSpeed-Ulysses, arXiv:2309.14509, section 3.1.
    """
    refuse_no_mesh(mesh)
    plan: ExchangePlan | None = _plan(x_BSHD.shape, mesh, tokens).plan
    if plan is None:
        return x_BSHD
    rows_RW: Tensor = exchange_to_heads([x_BSHD], plan)[0]
    (group,) = plan.groups
    return rows_RW.view(x_BSHD.shape[0], sum(group.sizes), len(group.heads[0][plan.rank]), x_BSHD.shape[3])


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
        LayoutError: ``mesh`` is no ParallelMesh; there are fewer heads than ulysses ranks.

    Source: DeepSpeed-Ulysses, arXiv:2309.14509, section 3.1.
    """
    refuse_no_mesh(mesh)
    batch, held, own_heads, dim = x_BTGD.shape
    coordinate = mesh.coordinate
    whole = tokens if tokens is not None else held * coordinate.ring
    mine = coordinate.layout(whole).sizes(coordinate.ring_rank)[coordinate.ulysses_rank]
    plan: ExchangePlan | None = _plan(torch.Size((batch, mine, heads, dim)), mesh, whole).plan
    if plan is None:
        return x_BTGD
    x_BSHD: Tensor = exchange_to_tokens([x_BTGD.reshape(batch * held, own_heads * dim)], plan, batch)[0]
    return x_BSHD


@_compat.constant_when_compiled
def _plan(shape: torch.Size, mesh: ParallelMesh, tokens: int | None) -> Constant[ExchangePlan | None]:
    """The exchange of one tensor of local shape ``shape`` in rows of ``tokens`` tokens (None: equally many on every rank).

    It is in the wrapper ``Constant``, and a constant for torch.compile.
    """
    return Constant(plan_exchange([shape], mesh, tokens))


def plan_exchange(
    shapes: Sequence[torch.Size], mesh: ParallelMesh, tokens: int | None, key_tokens: int | None = None
) -> ExchangePlan | None:
    """The all-to-all of q (and k, v), cached per shape and mesh.

    Args:
        shapes: local shapes [batch, my tokens, heads, dim]; the first has the query heads, the others the key/value heads.
        mesh: the mesh whose ulysses axis exchanges.
        tokens: the length of a whole row of q (None: equally many tokens on every rank).
        key_tokens: the length of a whole row of k and v (None: that of q).

    Returns:
        The plan; None on one ulysses rank.
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
    """One all-to-all for each head chunk, each carrying all given tensors.

    Args:
        queries: local shapes [batch, my tokens, heads, dim] of tensors with the query heads.
        keys: local shapes of tensors with the key/value heads.
        heads: the partition of the heads, with the number of chunks.
        mesh: the mesh whose ulysses axis exchanges.
        tokens, key_tokens: tokens of a whole row of ``queries`` (None: equally many per rank) and ``keys`` (None: as many).

    Returns:
        The plans by chunk; None for each on one ulysses rank. Tensors of one token partition are one group.

    Raises:
        LayoutError: this rank's tokens are not its part of ``tokens``.
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
    """One TensorGroup of tensors, each given as (tokens of each rank, local shape, heads of each rank, whether results are
    summed)."""
    sizes, shapes, heads, summed = zip(*tensors)
    dims, counts = tuple(shape[3] for shape in shapes), tuple(shape[2] for shape in shapes)
    return TensorGroup(sizes=sizes[0], heads=heads, dims=dims, counts=counts, summed=summed)


def _sizes(shape: torch.Size, mesh: ParallelMesh, tokens: int | None) -> tuple[int, ...]:
    """For each ulysses rank of this ring rank, its tokens of a row of ``tokens`` (None: all ranks have as many as ``shape``).

    Raises:
        LayoutError: ``shape`` [batch, my tokens, ...] does not have this rank's number of tokens.
    """
    coordinate = mesh.coordinate
    whole = tokens if tokens is not None else shape[1] * coordinate.attention_ranks
    sizes = coordinate.layout(whole).sizes(coordinate.ring_rank)
    if sizes[coordinate.ulysses_rank] != shape[1]:
        raise LayoutError(
            f"this rank passed {shape[1]} tokens, but holds {sizes[coordinate.ulysses_rank]} of tokens={whole}; "
            f"pass tokens= the length of the whole row, and the tokens that shard_batch gave to this rank"
        )
    return sizes


@torch.library.custom_op("longspan::exchange_to_heads", mutates_args=())
def exchange_to_heads(xs_BSHD: Sequence[Tensor], plan: ExchangePlan) -> list[Tensor]:
    """All-to-all from tokens to heads.

    Args:
        xs_BSHD: the tensors of all groups of the plan, [batch, my tokens, heads, dim].
        plan: the all-to-all.

    Returns:
        For each group its rows [batch * every token, widths of my heads].
    """
    return start_exchange_to_heads(xs_BSHD, plan)()


@torch.library.custom_op("longspan::exchange_to_tokens", mutates_args=())
def exchange_to_tokens(rows_RW: Sequence[Tensor], plan: ExchangePlan, batch: int) -> list[Tensor]:
    """All-to-all from heads to tokens, the adjoint of ``exchange_to_heads``.

    Args:
        rows_RW: for each group its rows [batch * every token, widths of my heads].
        plan: the all-to-all.
        batch: rows of the batch.

    Returns:
        The tensors of all groups, [batch, my tokens, heads, dim]; heads that several ranks return are summed.
    """
    outputs = _new_outputs(plan, batch, rows_RW[0])
    start_exchange_to_tokens(rows_RW, plan, outputs)()
    return [output.to(rows_RW[0].dtype) for output in outputs]


def start_exchange_to_heads(xs_BSHD: Sequence[Tensor], plan: ExchangePlan) -> Callable[[], list[Tensor]]:
    """Start ``exchange_to_heads(xs_BSHD, plan)`` without waiting.

    Returns:
        A function, to be called once, that waits and returns for each group its rows [batch * every token, widths of my heads].
    """
    batch = xs_BSHD[0].shape[0]
    if batch == 1 and plan.own is not None:
        return _start_around_own_to_heads(xs_BSHD, plan, plan.own)
    outgoing, incoming = plan.sent(batch), plan.received(batch)
    with record_function("longspan::exchange"), ExitStack() as stack:
        send = stack.enter_context(plan.scratch.lend(sum(outgoing), xs_BSHD[0]))
        pack(xs_BSHD, send, plan, plan.ranks)
        received = plan.scratch.take(sum(incoming), send)
        wait = all_to_all_into(plan.transport, received, send, outgoing, incoming, group=plan.process_group)
        lent = stack.pop_all()

    def finish() -> list[Tensor]:
        with lent:
            wait()
        return as_rows(received, plan, batch)

    return finish


def _start_around_own_to_heads(xs_BSHD: Sequence[Tensor], plan: ExchangePlan, own: OwnPart) -> Callable[[], list[Tensor]]:
    """``start_exchange_to_heads`` of one row, where this rank's own part is copied to its place while the others' is sent."""
    with record_function("longspan::exchange"), ExitStack() as stack:
        received = plan.scratch.take(sum(plan.received(1)), xs_BSHD[0])
        send = stack.enter_context(plan.scratch.lend(sum(own.sent), xs_BSHD[0]))
        pack(xs_BSHD, send, plan, own.other_ranks)
        wait = all_to_all_into(plan.transport, received[own.others], send, own.sent, own.received, group=plan.process_group)
        pack(xs_BSHD, received[own.mine], plan, own.ranks)
        lent = stack.pop_all()

    def finish() -> list[Tensor]:
        with lent:
            wait()
        return as_rows(received, plan, 1)

    return finish


def start_exchange_to_tokens(rows_RW: Sequence[Tensor], plan: ExchangePlan, outputs: Sequence[Tensor]) -> Callable[[], None]:
    """Start the all-to-all from heads to tokens without waiting for it.

    Args:
        rows_RW: for each group its rows [batch * every token, widths of my heads].
        plan: the all-to-all.
        outputs: [batch, my tokens, heads, dim], one for each tensor of the plan. Only the heads of this exchange are written; a
            tensor whose heads come from several ranks (``TensorGroup.summed``) is added to.

    Returns:
        A function, to be called once, that waits and writes ``outputs``.
    """
    batch = outputs[0].shape[0]
    in_order = batch == 1 and len(rows_RW) == 1 and rows_RW[0].is_contiguous()  # already as the send buffer
    if in_order and plan.own is not None:
        return _start_around_own_to_tokens(rows_RW[0].view(-1), plan, plan.own, outputs)
    outgoing, incoming = plan.received(batch), plan.sent(batch)
    with record_function("longspan::exchange"), ExitStack() as stack:
        if in_order:
            send = rows_RW[0].view(-1)
            received = stack.enter_context(plan.scratch.lend(sum(incoming), send))
        else:
            send = stack.enter_context(plan.scratch.lend(sum(outgoing), rows_RW[0]))
            pack_rows(rows_RW, send, plan, batch)
            received = plan.scratch.take(sum(incoming), send)
        wait = all_to_all_into(plan.transport, received, send, outgoing, incoming, group=plan.process_group)
        lent = stack.pop_all()

    def finish() -> None:
        with lent:
            wait()
            unpack(received, plan, plan.ranks, outputs)

    return finish


def _start_around_own_to_tokens(
    send: Tensor, plan: ExchangePlan, own: OwnPart, outputs: Sequence[Tensor]
) -> Callable[[], None]:
    """``start_exchange_to_tokens`` of one row: this rank's own part is copied from ``send`` while the others' is sent."""
    with record_function("longspan::exchange"), ExitStack() as stack:
        received = stack.enter_context(plan.scratch.lend(sum(own.sent), send))
        wait = all_to_all_into(plan.transport, received, send[own.others], own.received, own.sent, group=plan.process_group)
        unpack(send[own.mine], plan, own.ranks, outputs)
        lent = stack.pop_all()

    def finish() -> None:
        with lent:
            wait()
            unpack(received, plan, own.other_ranks, outputs)

    return finish


def _new_outputs(plan: ExchangePlan, batch: int, like: Tensor) -> list[Tensor]:
    """A tensor [batch, my tokens, heads, dim] for each tensor of ``plan``, for ``start_exchange_to_tokens`` to write to."""
    shapes = [
        ((batch, group.sizes[plan.rank], count, dim), summed)
        for group in plan.groups
        for count, dim, summed in zip(group.counts, group.dims, group.summed)
    ]
    memory = iter(plan.scratch.take_several([math.prod(shape) for shape, summed in shapes if not summed], like))
    return [new_output(shape, summed, like) if summed else next(memory).view(shape) for shape, summed in shapes]


def new_output(shape: Sequence[int], summed: bool, like: Tensor) -> Tensor:
    """A tensor of ``shape`` for ``start_exchange_to_tokens`` to write to: uninitialised in the dtype of ``like``, or if
    ``summed`` zeros.

    The zeros are in fp32 (fp64 for fp64), because the results of several ranks are added to them.
    """
    return like.new_zeros(shape, dtype=accumulation_dtype(like.dtype)) if summed else like.new_empty(shape)


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

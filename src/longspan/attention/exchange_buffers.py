"""The send and receive buffers of a Ulysses exchange: what is copied where. Independent of how they are sent.

    block of rank p    [batch, my tokens, widths of p's heads] of each group, one after another: what ``pack`` fills and
                       ``unpack`` reads; its elements are ``ExchangePlan.sent(batch)[p]``
    rows               [batch * every token, widths of my heads] of each group: what attention reads and returns

Consecutive ranks with equally many heads have blocks of one shape, which one permuted copy a tensor fills or reads: with even
heads one copy in place of one for each rank.

The suffix of a tensor's name gives its dims, as in ulysses.py, and P ranks of equal blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count, groupby

import torch
from torch import Tensor
from torch.profiler import record_function

from longspan.attention.plan import ExchangePlan


def pack(xs_BSHD: Sequence[Tensor], blocks: Tensor, plan: ExchangePlan, ranks: range) -> None:
    """Copy the heads of ``ranks`` of the tensors, [batch, my tokens, heads, dim] each, into their flat blocks, one after
    another."""
    for tensor, heads, piece_PBSGD, _ in _pieces(blocks, plan, ranks, xs_BSHD[0].shape[0]):
        piece_PBSGD.copy_(_by_rank(xs_BSHD[tensor], heads, len(piece_PBSGD)))


def unpack(blocks: Tensor, plan: ExchangePlan, ranks: range, outputs: Sequence[Tensor]) -> None:
    """Write what an exchange to tokens received from ``ranks`` into ``outputs``, each block into the heads of its rank.

    A tensor whose heads come from several ranks (``TensorGroup.summed``) is added to, any other is overwritten.

    Args:
        blocks: the received elements, one flat block for each of ``ranks``.
        plan: the plan of the exchange.
        ranks: whose blocks they are.
        outputs: the tensors of all groups, [batch, my tokens, heads, dim]; those that are added to begin as zeros.
    """
    for tensor, heads, piece_PBSGD, summed in _pieces(blocks, plan, ranks, outputs[0].shape[0]):
        target_PBSGD = _by_rank(outputs[tensor], heads, len(piece_PBSGD))
        if summed:
            target_PBSGD.add_(piece_PBSGD)
        else:
            target_PBSGD.copy_(piece_PBSGD)


def _by_rank(x_BSHD: Tensor, heads: range, ranks: int) -> Tensor:
    """The given heads, equally many for each of ``ranks`` ranks, as a view [ranks, batch, my tokens, heads of a rank, dim]."""
    x_BSPGD: Tensor = x_BSHD[:, :, heads.start : heads.stop].unflatten(2, (ranks, len(heads) // ranks))
    return x_BSPGD.permute(2, 0, 1, 3, 4)


def _pieces(blocks: Tensor, plan: ExchangePlan, ranks: range, batch: int) -> Iterator[tuple[int, range, Tensor, bool]]:
    """What of the blocks of ``ranks`` is copied at once.

    Yields:
        The number of the tensor among those of the plan, its heads, a view [ranks, batch, my tokens, heads of a rank, dim] of
        the blocks, and whether to add it. Heads that several ranks compute come once for each of them.
    """
    runs = _runs(ranks, lambda p: [widths[p] for widths in plan.widths])
    for run, parts in _split(blocks, runs, plan.sends, batch):
        tensors = count()
        for group, widths, part in zip(plan.groups, plan.widths, parts):
            columns = part.unflatten(1, (batch, group.sizes[plan.rank], sum(widths[run[0]]))).split(widths[run[0]], 3)
            for column, heads, dim, summed, tensor in zip(columns, group.heads, group.dims, group.summed, tensors):
                piece_PBSGD = column.unflatten(3, (len(heads[run[0]]), dim))
                if all(heads[p].stop == heads[p + 1].start for p in run[:-1]):
                    yield tensor, range(heads[run[0]].start, heads[run[-1]].stop), piece_PBSGD, summed
                else:
                    yield from ((tensor, heads[p], piece_PBSGD[i : i + 1], summed) for i, p in enumerate(run))


def as_rows(received: Tensor, plan: ExchangePlan, batch: int) -> list[Tensor]:
    """What an exchange to heads received, as one tensor [batch * every token, widths of my heads] for each group.

    With one row and one group it is a view, else a copy.
    """
    if batch == 1 and len(plan.groups) == 1:
        return [received.view(sum(plan.groups[0].sizes), -1)]
    with record_function("longspan::exchange"):
        by_group = zip(*(parts for _, parts in _row_parts(received, plan, batch)))
        return [torch.cat([x_BSW for part in parts for x_BSW in part], 1).flatten(0, 1) for parts in by_group]


def pack_rows(rows_RW: Sequence[Tensor], send: Tensor, plan: ExchangePlan, batch: int) -> None:
    """Copy the rows of each group into ``send``, the send buffer of an exchange to tokens, in rank order."""
    wholes_BTW = [rows.unflatten(0, (batch, sum(group.sizes))) for rows, group in zip(rows_RW, plan.groups)]
    for run, parts in _row_parts(send, plan, batch):
        for whole_BTW, group, part_PBSW in zip(wholes_BTW, plan.groups, parts):
            first, tokens = sum(group.sizes[: run[0]]), group.sizes[run[0]]
            of_run = whole_BTW[:, first : first + len(run) * tokens]
            part_PBSW.copy_(of_run.unflatten(1, (len(run), tokens)).transpose(0, 1))


def _row_parts(flat: Tensor, plan: ExchangePlan, batch: int) -> Iterator[tuple[range, list[Tensor]]]:
    """A buffer that ``exchange_to_heads`` receives, as views.

    Yields:
        Ranks with equally many tokens, and for each group their part [ranks, batch, tokens of a rank, widths of my heads].
    """
    runs = _runs(plan.ranks, lambda p: [group.sizes[p] for group in plan.groups])
    for run, parts in _split(flat, runs, plan.receives, batch):
        shapes = [(batch, group.sizes[run[0]], sum(widths)) for group, widths in zip(plan.groups, plan.my_widths)]
        yield run, [part.unflatten(1, shape) for part, shape in zip(parts, shapes)]


def _runs(ranks: range, shape: Callable[[int], object]) -> list[range]:
    """``ranks`` cut into the longest runs of consecutive ranks for which ``shape(rank)`` is equal."""
    runs = (list(run) for _, run in groupby(ranks, shape))
    return [range(run[0], run[-1] + 1) for run in runs]


def _split(
    blocks: Tensor, runs: Sequence[range], elements: Sequence[Sequence[int]], batch: int
) -> Iterator[tuple[range, Sequence[Tensor]]]:
    """Views of the flat buffer of an exchange: for each run of ranks, (the run, for each group of heads a view [ranks of the
    run, batch x elements of the group]).

    Args:
        blocks: one block for each rank, in rank order; in a block the groups follow one another, each with all rows.
        runs: all ranks, divided so that those of a run have equal ``elements``.
        elements: ``elements[rank][group]`` is the number of elements of one row of the batch.
        batch: rows of the batch.
    """
    parts = [[batch * one for one in elements[run[0]]] for run in runs]
    for run, sizes, flat in zip(runs, parts, blocks.split([len(run) * sum(sizes) for run, sizes in zip(runs, parts)])):
        yield run, flat.view(len(run), sum(sizes)).split(sizes, 1)

"""The send and receive buffers of a Ulysses exchange: what is copied where. Independent of how they are sent.

    block of rank p    [batch, my tokens, widths of p's heads] of each group, one after another: what ``pack`` fills and
                       ``unpack`` reads; its elements are ``ExchangePlan.sent(batch)[p]``
    rows               [batch * every token, widths of my heads] of each group: what attention reads and returns

The suffix of a tensor's name gives its dims, as in ulysses.py.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from longspan.attention.plan import ExchangePlan


def pack(xs_BSHD: Sequence[Tensor], block: Tensor, plan: ExchangePlan, p: int) -> None:
    """Copy rank ``p``'s heads of the tensors, [batch, my tokens, heads, dim] each, into its flat block."""
    for x_BSHD, (piece_BSGD, heads, _) in zip(xs_BSHD, _pieces(block, plan, p, xs_BSHD[0].shape[0])):
        piece_BSGD.copy_(x_BSHD[:, :, heads.start : heads.stop])


def unpack(block: Tensor, plan: ExchangePlan, p: int, outputs: Sequence[Tensor]) -> None:
    """Copy rank ``p``'s flat block into its heads of ``outputs``; add where several ranks return a head."""
    for output, (piece_BSGD, heads, summed) in zip(outputs, _pieces(block, plan, p, outputs[0].shape[0])):
        target_BSGD = output[:, :, heads.start : heads.stop]
        if summed:
            target_BSGD.add_(piece_BSGD)
        else:
            target_BSGD.copy_(piece_BSGD)


def _pieces(block: Tensor, plan: ExchangePlan, p: int, batch: int) -> Iterator[tuple[Tensor, range, bool]]:
    """For each tensor of the plan a view [batch, my tokens, heads of p, dim] of the block, the heads, whether to add them."""
    parts = block.split([batch * elements for elements in plan.sends[p]])
    for group, widths, part in zip(plan.groups, plan.widths, parts):
        columns = part.view(batch, group.sizes[plan.rank], sum(widths[p])).split(widths[p], 2)
        for column, heads, dim, summed in zip(columns, group.heads, group.dims, group.summed):
            yield column.unflatten(2, (len(heads[p]), dim)), heads[p], summed


def as_rows(received: Tensor, plan: ExchangePlan, batch: int) -> list[Tensor]:
    """What an exchange to heads received, as one tensor [batch * every token, widths of my heads] for each group.

    With one row and one group it is a view, else a copy.
    """
    if batch == 1 and len(plan.groups) == 1:
        return [received.view(sum(plan.groups[0].sizes), -1)]
    with record_function("longspan::exchange"):
        return [torch.cat(pieces, 1).flatten(0, 1) for pieces in _row_parts(received, plan, batch)]


def pack_rows(rows_RW: Sequence[Tensor], send: Tensor, plan: ExchangePlan, batch: int) -> None:
    """Copy the rows of each group into ``send``, the send buffer of an exchange to tokens, in rank order."""
    for rows, group, parts in zip(rows_RW, plan.groups, _row_parts(send, plan, batch)):
        whole_BTW = rows.unflatten(0, (batch, sum(group.sizes)))
        for part_BSW, piece in zip(parts, whole_BTW.split(group.sizes, 1)):
            part_BSW.copy_(piece)


def _row_parts(flat: Tensor, plan: ExchangePlan, batch: int) -> list[list[Tensor]]:
    """A buffer that ``exchange_to_heads`` receives, as views: result[group][p] is [batch, tokens of rank p, widths of my
    heads]."""
    parts: list[list[Tensor]] = [[] for _ in plan.groups]
    for p, block in zip(plan.ranks, flat.split(plan.received(batch))):
        pieces = block.split([batch * elements for elements in plan.receives[p]])
        for group, widths, piece, of_group in zip(plan.groups, plan.my_widths, pieces, parts):
            of_group.append(piece.view(batch, group.sizes[p], sum(widths)))
    return parts

"""Tensor parallelism on gloo's own all-gather and reduce-scatter, where they are faster than those through ``Transport``.

gloo's all-gather passes the pieces around a ring; its reduce-scatter is an all-reduce on the wire, which sends twice as much. A
baseline is given the faster one of each, as measured on the same links just before its step.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.distributed import collectives
from longspan.distributed.collectives import TorchTransport, Transport

REPEATS = 2


@contextmanager
def faster(group: dist.ProcessGroup, tokens: int, hidden: int) -> Iterator[dict[str, str]]:
    """Context manager in which ``all_gather`` and ``reduce_scatter`` are the faster ones.

    Args:
        group: the tensor ranks.
        tokens, hidden: the sizes of the whole tensor on which they are timed.

    Returns:
        The names of those that were chosen, with the seconds of both.
    """
    mine = [tokens // group.size()] * group.size()
    piece, whole = torch.randn(1, mine[0], hidden), torch.randn(1, tokens, hidden)
    ours, transport = (collectives._gather, collectives._sum_pieces), TorchTransport()
    chosen, names = [], {}
    for name, tensor, pair in (("all-gather", piece, (ours[0], _gather)), ("reduce-scatter", whole, (ours[1], _sum_pieces))):
        through_transport, own = (_seconds(function, (tensor, group, transport, 1, mine)) for function in pair)
        chosen.append(pair[own < through_transport])
        kept = "gloo's own" if own < through_transport else "Transport"
        names[name] = f"{kept} ({through_transport:.3f} s through Transport, {own:.3f} s gloo's own)"
    collectives._gather, collectives._sum_pieces = chosen
    try:
        yield names
    finally:
        collectives._gather, collectives._sum_pieces = ours


def _gather(x: Tensor, group: dist.ProcessGroup, transport: Transport, dim: int, sizes: Sequence[int]) -> Tensor:
    first = x.movedim(dim, 0).contiguous()
    pieces = [first.new_empty(size, *first.shape[1:]) for size in sizes]
    dist.all_gather(pieces, first, group=group)
    return torch.cat(pieces).movedim(0, dim)


def _sum_pieces(x: Tensor, group: dist.ProcessGroup, transport: Transport, dim: int, sizes: Sequence[int]) -> Tensor:
    pieces = [piece.contiguous() for piece in x.movedim(dim, 0).split(list(sizes))]
    mine = torch.empty_like(pieces[group.rank()])
    dist.reduce_scatter(mine, pieces, group=group)
    return mine.movedim(0, dim)


def _seconds(collective: Callable[..., Tensor], arguments: tuple[object, ...]) -> float:
    """Seconds of one call, as the slowest rank needs, so that every rank chooses alike."""
    collective(*arguments)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(REPEATS):
        collective(*arguments)
    spent = torch.tensor((time.perf_counter() - start) / REPEATS)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return float(spent)

"""Every collective has its true adjoint, and a Transport can be replaced and counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longspan.distributed.collectives import (
    CountingTransport,
    TorchTransport,
    all_gather,
    all_reduce_sum,
    all_to_all_into,
)
from longspan.distributed.traffic import Traffic
from tests.helpers.ranks import on_ranks


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_reduce_sum_and_its_adjoint(ranks: int, tmp_path: Path) -> None:
    on_ranks(ranks, _all_reduce_sum, tmp_path=tmp_path)


def _all_reduce_sum() -> None:
    group = dist.group.WORLD
    xs, ys = (_everyones(seed, (3, 2)) for seed in (0, 1))
    x = xs[group.rank()].clone().requires_grad_()
    out = all_reduce_sum(x, group)
    torch.testing.assert_close(out, xs.sum(0))
    (out * ys[group.rank()]).sum().backward()
    torch.testing.assert_close(x.grad, ys.sum(0))


@pytest.mark.parametrize("dim", [0, 1])
def test_all_gather_of_uneven_pieces_and_its_adjoint(dim: int, tmp_path: Path) -> None:
    for ranks, sizes in [(1, (4,)), (2, (3, 2)), (3, (2, 0, 5))]:
        on_ranks(ranks, _all_gather, dim, sizes, tmp_path=tmp_path)


def _all_gather(dim: int, sizes: tuple[int, ...]) -> None:
    group, transport = dist.group.WORLD, CountingTransport(TorchTransport())
    rank = group.rank()
    torch.manual_seed(0)
    pieces = [torch.randn((size, 3) if dim == 0 else (3, size)).double() for size in sizes]
    ys = _everyones(1, tuple(torch.cat(pieces, dim).shape))
    x = pieces[rank].clone().requires_grad_()
    out = all_gather(x, group, transport, dim, sizes)
    torch.testing.assert_close(out, torch.cat(pieces, dim))
    (out * ys[rank]).sum().backward()
    torch.testing.assert_close(x.grad, ys.sum(0).split(sizes, dim)[rank])
    if group.size() > 1:
        others = (len(sizes) - 1) * x.numel() + sum(piece.numel() for piece in pieces) - x.numel()
        assert transport.traffic == Traffic(2, others * 8)


class _Receives:
    """A user's transport, which has ``all_to_all`` alone."""

    def all_to_all(self, *arguments: Any) -> Any:
        return TorchTransport().all_to_all(*arguments)


@pytest.mark.parametrize("inner", [TorchTransport, _Receives])
def test_an_all_to_all_into_given_memory_is_counted_and_needs_nothing_of_a_transport(inner: Any, tmp_path: Path) -> None:
    on_ranks(3, _into_given_memory, inner, tmp_path=tmp_path)


def _into_given_memory(inner: Any) -> None:
    transport, group, rank = CountingTransport(inner()), dist.group.WORLD, dist.get_rank()
    assert group is not None
    sends = [[0, 1, 2], [3, 0, 1], [2, 2, 0]]  # sends[rank][to]
    receives = [row[rank] for row in sends]
    send = torch.arange(sum(sends[rank])) + 10 * rank
    received = torch.full((sum(receives),), -1)
    all_to_all_into(transport, received, send, sends[rank], receives, group=group)()
    parts = [(torch.arange(sum(row)) + 10 * p).split(row)[rank] for p, row in enumerate(sends)]
    assert torch.equal(received, torch.cat(parts))
    assert transport.traffic == Traffic(1, 8 * sum(sends[rank]))


def _everyones(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """What every rank draws, on every rank: [rank, *shape]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dist.get_world_size(), *shape, generator=generator, dtype=torch.float64)

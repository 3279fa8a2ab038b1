"""The exchanges move the right elements, are each other's adjoint, and send exactly what the closed form says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.attention.ulysses import (
    exchange_to_heads,
    exchange_to_tokens,
    heads_to_tokens,
    plan_exchange,
    start_exchange_to_heads,
    start_exchange_to_tokens,
    tokens_to_heads,
)
from longspan.distributed.collectives import CountingTransport, TorchTransport
from longspan.distributed.fake_world import fake_world
from longspan.distributed.layout import Heads, Layout
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.traffic import Traffic, attention_traffic
from tests.helpers.ranks import on_ranks

# batch, tokens, key tokens, query heads, key/value heads, qk dim, v dim
SHAPES = [
    (1, 16, 16, 4, 4, 8, 8),
    (1, 13, 13, 7, 7, 3, 3),
    (2, 9, 9, 28, 4, 4, 4),
    (3, 11, 11, 5, 1, 6, 2),
    (2, 10, 17, 6, 3, 4, 8),
    (0, 12, 12, 4, 2, 4, 4),
]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_the_exchanges(ranks: int, tmp_path: Path) -> None:
    on_ranks(ranks, _every_token_of_my_heads, tmp_path=tmp_path)


def _every_token_of_my_heads() -> None:
    for shape in SHAPES:
        if shape[3] >= torch.distributed.get_world_size():
            _one_shape(*shape)


def _one_shape(batch: int, tokens: int, key_tokens: int, heads: int, kv: int, qk_dim: int, v_dim: int) -> None:
    transport = CountingTransport(TorchTransport())
    mesh = ParallelMesh(ulysses=torch.distributed.get_world_size(), transport=transport)
    rank, ranks = mesh.coordinate.ulysses_rank, mesh.coordinate.ulysses
    torch.manual_seed(0)  # the same whole tensors on every rank
    kinds = [(tokens, heads, qk_dim), (key_tokens, kv, qk_dim), (key_tokens, kv, v_dim)]
    wholes = [torch.randn(batch, n, h, d).double() for n, h, d in kinds]
    mine = [_my_tokens(x, rank, ranks).requires_grad_() for x in wholes]
    heads_of = Heads(heads, kv, ranks)
    plan = plan_exchange([x.shape for x in mine], mesh, tokens, key_tokens)
    if plan is None:
        assert ranks == 1
        return
    rows = exchange_to_heads(mine, plan)
    columns = [c for x, group in zip(rows, plan.groups) for c in x.split(group.widths(rank), 1)]
    owned = [heads_of.query_of(rank), heads_of.kv_of(rank), heads_of.kv_of(rank)]
    for got, whole, own in zip(columns, wholes, owned):
        assert torch.equal(got, whole[:, :, own.start : own.stop].flatten(0, 1).flatten(1))

    # Adjoint: <exchange(x), y> == <x, adjoint(y)>, summed over ranks, for whatever y each rank draws.
    torch.manual_seed(1 + rank)
    ys = [torch.randn_like(x) for x in rows]
    back = torch.autograd.grad(rows, mine, ys)
    inner = torch.stack([torch.stack([(a * b).sum() for a, b in zip(*pair)]).sum() for pair in ((rows, ys), (mine, back))])
    torch.distributed.all_reduce(inner)
    torch.testing.assert_close(inner[0], inner[1], rtol=1e-12, atol=1e-12)

    # The gradient of a head is the sum of what every rank that computes it sends back.
    all_ys = [None] * ranks
    my_ys = [c for y, group in zip(ys, plan.groups) for c in y.split(group.widths(rank), 1)]
    torch.distributed.all_gather_object(all_ys, my_ys)
    for t, (grad, whole) in enumerate(zip(back, wholes)):
        expected = torch.zeros_like(whole)
        for p in range(ranks):
            own = heads_of.query_of(p) if t == 0 else heads_of.kv_of(p)
            expected[:, :, own.start : own.stop] += all_ys[p][t].view(batch, whole.shape[1], len(own), whole.shape[3])
        torch.testing.assert_close(grad, _my_tokens(expected, rank, ranks), rtol=1e-12, atol=1e-12)

    # Two collectives each way for a layer, and every byte of the closed form.
    out = plan_exchange([torch.Size((*mine[0].shape[:3], v_dim))], mesh, tokens)
    assert out is not None
    out_rows = torch.zeros(batch * tokens, len(owned[0]) * v_dim, dtype=torch.float64, requires_grad=True)
    sizes, key_sizes = (Layout(n, 1, ranks).sizes(0) for n in (tokens, key_tokens))
    expected_traffic = attention_traffic(heads_of, sizes, key_sizes, rank, rows=batch, qk_dim=qk_dim, v_dim=v_dim, itemsize=8)
    transport.traffic = Traffic()
    rows = exchange_to_heads(mine, plan)
    outs = exchange_to_tokens([out_rows], out, batch)
    assert transport.traffic == expected_traffic[0]
    transport.traffic = Traffic()
    torch.autograd.grad([*rows, *outs], [*mine, out_rows], [*ys, *(torch.zeros_like(x) for x in outs)])
    assert transport.traffic == expected_traffic[1]


def _my_tokens(whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    positions = Layout(whole.shape[1], 1, ranks).mine(0, rank)[0]
    return whole[:, positions.start : positions.stop].clone()


def test_the_public_pair_is_inverse_and_keeps_order(tmp_path: Path) -> None:
    on_ranks(3, _there_and_back, tmp_path=tmp_path)


def _there_and_back() -> None:
    mesh = ParallelMesh(ulysses=3)
    torch.manual_seed(0)
    whole = torch.randn(2, 10, 7, 5)
    mine = _my_tokens(whole, mesh.coordinate.ulysses_rank, 3)
    there = tokens_to_heads(mine, mesh, tokens=10)
    own = Heads(7, 7, 3).query_of(mesh.coordinate.ulysses_rank)
    assert torch.equal(there, whole[:, :, own.start : own.stop])
    assert torch.equal(heads_to_tokens(there, mesh, heads=7, tokens=10), mine)


def test_the_public_pair_takes_a_batch_of_no_row(tmp_path: Path) -> None:
    on_ranks(2, _no_row, tmp_path=tmp_path)


def _no_row() -> None:
    mesh = ParallelMesh(ulysses=2)
    mine = torch.zeros(0, 3, 5, 4, requires_grad=True)
    there = tokens_to_heads(mine, mesh)
    assert there.shape == (0, 6, 3 - mesh.coordinate.ulysses_rank, 4)
    back = heads_to_tokens(there, mesh, heads=5)
    assert back.shape == mine.shape
    back.sum().backward()
    assert mine.grad is not None


class Nowhere:
    """A transport that sends nothing and receives what the memory holds."""

    def all_to_all(self, send: torch.Tensor, *splits: Any) -> "Nowhere":
        self.received = send.new_empty(sum(splits[1]))
        return self

    def all_to_all_into(self, received: torch.Tensor, *splits: Any) -> "Nowhere":
        self.received = received
        return self

    def wait(self) -> torch.Tensor:
        return self.received


COPIES = (torch.ops.aten.copy_.default, torch.ops.aten.add_.Tensor, torch.ops.aten.cat.default)


class Copies(TorchDispatchMode):
    """The number of copies and additions to views: what packs and unpacks."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func in COPIES
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("batch", "heads", "kv", "between", "first"),
    [
        (1, 16, 8, (3, 3), (6, 6)),  # the first rank copies its own part by itself
        (2, 16, 8, (4, 4), (4, 4)),  # and one copy of the rows
        (1, 20, 20, (6, 6), (9, 9)),  # four ranks have 3 heads, four have 2
        (1, 16, 2, (17, 17), (18, 18)),  # a key/value head is sent to four ranks, one copy each
    ],
)
def test_ranks_with_equally_many_heads_are_packed_by_one_copy_a_tensor(
    batch: int, heads: int, kv: int, between: tuple[int, int], first: tuple[int, int]
) -> None:
    for rank, expected in ((0, first), (3, between)):
        with fake_world(rank, 8):
            mesh = ParallelMesh(8, transport=Nowhere())
            xs = [torch.randn(batch, 5, n, 4) for n in (heads, kv, kv)]
            plan = plan_exchange([x.shape for x in xs], mesh, 40)
            assert plan is not None
            outputs = [torch.zeros_like(x) for x in xs]
            with Copies() as there:
                rows = start_exchange_to_heads(xs, plan)()
            with Copies() as back:
                start_exchange_to_tokens(rows, plan, outputs)()
        assert (there.number, back.number) == expected

"""A world of which one rank exists: coordinates and sizes of that rank, finite values, and refusals that do not hang."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longspan import ParallelMesh
from longspan.distributed.collectives import all_gather, reduce_scatter
from longspan.distributed.consensus import exchange_integers, gather, raise_together
from longspan.distributed.fake_world import FakeTransport, fake_world, is_fake, reduce_scatter_filled
from longspan.errors import ModelError, RunError
from tests.helpers.ranks import on_ranks
from tests.helpers.rehearsals import in_fake_world


def mesh() -> tuple[Any, ...]:
    mesh = ParallelMesh(4, 2, tensor=2, pipeline=2, transport=FakeTransport())
    groups = (mesh.world_group, mesh.ulysses_group, mesh.fsdp_group, mesh.loss_control_group)
    return mesh.coordinate, all(map(is_fake, groups)), [group.size() for group in groups]


def test_a_mesh_of_64_ranks_has_the_groups_of_the_rank_that_exists(tmp_path: Path) -> None:
    at, fake, sizes = on_ranks(1, in_fake_world, 37, 64, mesh, tmp_path=tmp_path)[0]
    # 37 = ((((1 of pipeline) · 2 + 0 of data) · 2 + 0 of ring) · 4 + 2 of ulysses) · 2 + 1 of tensor
    assert (at.pipeline_rank, at.data_rank, at.ring_rank, at.ulysses_rank, at.tensor_rank) == (1, 0, 0, 2, 1)
    assert at.data == 2
    assert fake
    assert sizes == [64, 4, 16, 32]


def exchanged() -> tuple[Any, ...]:
    group, transport = dist.group.WORLD, FakeTransport()
    assert group is not None
    received = transport.all_to_all(torch.arange(3.0), [1, 1, 1, 0], [2, 2, 2, 2], group).wait()
    nothing = transport.all_to_all(torch.empty(0), [0] * 4, [1] * 4, group).wait()
    x = torch.ones(2, requires_grad=True)
    whole = all_gather(x, group, transport, 0, [2] * 4)
    piece = reduce_scatter(whole, group, transport, 0, [2] * 4)
    piece.sum().backward()
    facts = gather({"rank": dist.get_rank()}, group), exchange_integers((7, dist.get_rank()), group)
    return received.tolist(), nothing.tolist(), whole.shape, piece.shape, x.grad.isfinite().all().item(), *facts  # type: ignore[union-attr]


def test_received_buffers_have_the_right_size_and_finite_values(tmp_path: Path) -> None:
    received, nothing, whole, piece, finite, facts, table = on_ranks(1, in_fake_world, 3, 4, exchanged, tmp_path=tmp_path)[0]
    assert received == [0, 1, 2, 0, 1, 2, 0, 1]
    assert nothing == [0, 0, 0, 0]
    assert (whole, piece, finite) == ((8,), (2,), True)
    assert facts == [{"rank": 3}] * 4
    assert table == [[7, 3]] * 4


def refusing() -> None:
    with raise_together(ParallelMesh(transport=FakeTransport()).world_group):
        raise ModelError("of rank 3")


def refused() -> tuple[str, str]:
    with pytest.raises(ModelError) as found:
        refusing()
    with pytest.raises(RunError) as again, fake_world(0, 2):
        pass
    return str(found.value), str(again.value)


def test_an_error_is_raised_as_it_is_and_a_second_world_is_refused(tmp_path: Path) -> None:
    found, again = on_ranks(1, in_fake_world, 3, 4, refused, tmp_path=tmp_path)[0]
    assert found == "of rank 3"
    assert "needs a process without a process group" in again


def reduced() -> list[float]:
    piece, own = torch.full((2,), torch.nan), dist.reduce_scatter_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "reduce_scatter_tensor", lambda *_: None)
        with reduce_scatter_filled():
            dist.reduce_scatter_tensor(output=piece, input=torch.arange(8.0), group=dist.group.WORLD)
    assert dist.reduce_scatter_tensor is own
    return piece.tolist()


def test_a_reduce_scatter_that_writes_nothing_is_filled_with_this_ranks_part(tmp_path: Path) -> None:
    """What PyTorch before 2.13 needs, whose fake group leaves the output as it was."""
    assert on_ranks(1, in_fake_world, 3, 4, reduced, tmp_path=tmp_path)[0] == [6, 7]

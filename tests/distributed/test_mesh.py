"""A mesh cuts the world as asked, leaves the rest to data, and refuses what does not divide on every rank alike."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longspan.attention.api import attend
from longspan.batch.shard import shard_batch
from longspan.distributed.collectives import all_reduce_sum
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.mesh import (
    ParallelMesh,
    rank_sets,
)
from longspan.errors import LayoutError
from longspan.loss import cross_entropy
from longspan.masks.constructors import Causal
from tests.helpers.ranks import on_ranks


def test_what_is_left_is_data_parallel(tmp_path: Path) -> None:
    found = on_ranks(4, _coordinate, {"ulysses": 2}, tmp_path=tmp_path)
    assert [(p.data, p.ulysses, p.data_rank, p.ulysses_rank) for p in found] == [(2, 2, d, u) for d in (0, 1) for u in (0, 1)]


def test_neighbours_share_ulysses_then_ring(tmp_path: Path) -> None:
    found = on_ranks(4, _coordinate, {"ulysses": 2, "ring": 2}, tmp_path=tmp_path)
    assert [(p.ring_rank, p.ulysses_rank) for p in found] == [(r, u) for r in (0, 1) for u in (0, 1)]
    assert all(p.zigzag for p in found)


def _coordinate(degrees: dict[str, Any]) -> MeshCoordinate:
    mesh = ParallelMesh(**degrees)
    coordinate = mesh.coordinate
    assert mesh.world_group.size() == dist.get_world_size()
    assert mesh.loss_group.size() == mesh.fsdp_mesh.size() == mesh.world_group.size()
    assert mesh.sequence_group.size() == coordinate.sequence_ranks
    assert mesh.sequence_group.rank() == coordinate.sequence_rank
    return coordinate


def test_each_group_of_a_test_has_one_worker(tmp_path: Path) -> None:
    """The harness, not the mesh: two workers of gloo corrupt the heap, too rarely for any other test to show why."""
    assert on_ranks(2, _workers, tmp_path=tmp_path) == [[1] * 5] * 2


def _workers() -> list[int]:
    mesh = ParallelMesh()
    groups = [dist.group.WORLD, mesh.world_group, mesh.loss_group, mesh.sequence_group, mesh.ulysses_group]
    return [group._get_backend(torch.device("cpu")).options._threads for group in groups]


@pytest.mark.parametrize(
    ("degrees", "text"),
    [
        ({"ulysses": 3}, r"ulysses=3 x ring=1 does not divide the world of 2 ranks; their product may be 1, 2"),
        ({"ulysses": 0}, r"ulysses=0 ring=1 tensor=1 pipeline=1: each degree must be at least 1"),
        ({"ulysses": "auto"}, r"ulysses='auto' ring=1 tensor=1 pipeline=1 heads=None cannot be chosen from"),
        ({"layout": "diagonal"}, r"layout='diagonal' is unknown; legal are 'contiguous' and 'zigzag'"),
    ],
)
def test_refusals_say_what_is_legal(degrees: dict[str, Any], text: str, tmp_path: Path) -> None:
    on_ranks(2, _refused, degrees, text, tmp_path=tmp_path)


def _refused(degrees: dict[str, Any], text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        ParallelMesh(**degrees)


def test_a_plain_process_is_a_world_of_one(tmp_path: Path) -> None:
    on_ranks(1, _world_of_one, tmp_path=tmp_path)


def _world_of_one() -> None:
    dist.destroy_process_group()
    mesh = ParallelMesh()
    assert mesh.world_group.size() == 1
    assert repr(mesh) == "ParallelMesh(data=1, ring=1, ulysses=1, device='cpu')"


def test_auto_takes_ulysses_as_far_as_the_heads_reach(tmp_path: Path) -> None:
    coordinate = on_ranks(4, _coordinate, {"ulysses": "auto", "heads": (6, 2)}, tmp_path=tmp_path)[0]
    assert (coordinate.ulysses, coordinate.ring, coordinate.zigzag) == (2, 2, True)


def test_ranks_that_ask_for_different_meshes_are_refused(tmp_path: Path) -> None:
    on_ranks(2, _different, tmp_path=tmp_path)


def _different() -> None:
    with pytest.raises(
        LayoutError, match=r"rank 0 asks for ulysses=1 ring=1 tensor=1 pipeline=1 layout=None but rank 1 for ulysses=2 ring=1"
    ):
        ParallelMesh(ulysses=dist.get_rank() + 1)


def test_the_rank_sets_of_tensor_and_pipeline(tmp_path: Path) -> None:
    """A tensor axis (the same rows, other parts of the parameters) and a pipeline axis (other layers, outside the loss)."""
    expected = {"sequence": (0, 1, 2, 3), "loss": tuple(range(4)), "fsdp": (0, 2)}
    found = on_ranks(8, _sets_with_more_axes, tmp_path=tmp_path)
    assert found[0] == expected
    assert found[7] == {"sequence": (4, 5, 6, 7), "loss": (4, 5, 6, 7), "fsdp": (5, 7)}


def _sets_with_more_axes() -> dict[str, tuple[int, ...]]:
    mesh = ParallelMesh(pipeline=2, ulysses=2, tensor=2)
    names = {dim: dim for dim in mesh.device_mesh.mesh_dim_names or ()}
    return {name: tuple(found.mesh.tolist()) for name, found in rank_sets(mesh.device_mesh, names).items()}


ADOPTED = [
    ((2, 2), ("dp", "cp"), {}, (2, 1, 2)),
    ((1, 2, 2), ("replicas", "rows", "columns"), {"data": "replicas", "ring": "rows", "ulysses": "columns"}, (1, 2, 2)),
    ((4,), ("cp",), {"data": None}, (1, 1, 4)),
    ((2, 2, 1), ("dp", "cp", "tp"), {"ring": "cp", "ulysses": "tp"}, (2, 2, 1)),
    ((2, 1, 2), ("dp", "pp", "cp"), {}, (2, 1, 2)),
]


@pytest.mark.parametrize(("shape", "dims", "names", "degrees"), ADOPTED)
def test_a_device_mesh_is_taken_over(shape: Any, dims: Any, names: Any, degrees: Any, tmp_path: Path) -> None:
    on_ranks(4, _adopted, shape, dims, names, degrees, tmp_path=tmp_path)


def _adopted(shape: tuple[int, ...], dims: tuple[str, ...], names: dict[str, Any], degrees: tuple[int, ...]) -> None:
    device_mesh = init_device_mesh("cpu", shape, mesh_dim_names=dims)
    mesh = ParallelMesh.from_device_mesh(device_mesh, **names)
    assert mesh.device_mesh is device_mesh
    assert mesh.ulysses_group is device_mesh.get_group(names.get("ulysses", "cp"))
    own = ParallelMesh(ulysses=degrees[2], ring=degrees[1])
    assert mesh.coordinate == own.coordinate
    assert (mesh.coordinate.data, mesh.coordinate.ring, mesh.coordinate.ulysses) == degrees
    assert mesh.data_group.size() == degrees[0]
    assert mesh.ring_group.size() == degrees[1]
    _compare_with_one_device(mesh)


def _compare_with_one_device(mesh: ParallelMesh) -> None:
    """Loss and gradients of attention and a head over every axis, against one device that has all rows."""
    random = torch.Generator().manual_seed(0)
    replicas = mesh.coordinate.data
    ids = torch.randint(13, (replicas, 1, 9), generator=random)
    embedding, head = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((13, 8), (8, 13)))
    weights = torch.randn(replicas, 9, 13, generator=random, dtype=torch.float64)

    def score(part: dict[str, Any], weight: torch.Tensor, where: ParallelMesh | None, tokens: int) -> list[torch.Tensor]:
        table, out = embedding.clone().requires_grad_(), head.clone().requires_grad_()
        x = table[part["input_ids"]].unflatten(-1, (4, 2))
        y = attend(x, x, x, mask=Causal(), mesh=where, tokens=tokens) if where else attend(x, x, x, mask=Causal())
        logits = y.flatten(2) @ out
        total = (logits * weight).sum()
        loss = cross_entropy(logits, part["shift_labels"], mesh=where)
        total = loss + (all_reduce_sum(total, where.loss_group) if where else total)
        total.backward()
        assert table.grad is not None
        assert out.grad is not None
        return [total.detach(), table.grad, out.grad]

    rows = ids.flatten(0, 1)
    shifted = torch.nn.functional.pad(rows[:, 1:], (0, 1), value=-100)
    expected = score({"input_ids": rows, "shift_labels": shifted}, weights, None, 9)
    mine = ids[mesh.coordinate.data_rank]
    part = shard_batch({"input_ids": mine, "labels": mine, "w": weights[[mesh.coordinate.data_rank]]}, mesh, dims={"w": 1})
    loss, *grads = score(part, part["w"], mesh, 9)
    for grad in grads:
        dist.all_reduce(grad, group=mesh.fsdp_group)
    found = [loss, *(grad / mesh.fsdp_group.size() for grad in grads)]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "dims", "names", "text"),
    [
        ((2, 2), ("dp", "sp"), {}, r"ulysses='cp' is no dim of the DeviceMesh \('dp', 'sp'\) of sizes \(2, 2\); name one of"),
        ((4,), ("cp",), {}, r"data='dp' is no dim of the DeviceMesh .*, or pass data=None"),
        ((2, 2), ("cp", "dp"), {}, r"are not in the order of the DeviceMesh \('cp', 'dp'\)"),
        (
            (2, 2),
            ("dp", "cp"),
            {"ring": "cp"},
            r"they must be different dims in the order pipeline, data, ring, ulysses, tensor",
        ),
        ((2, 2, 1), ("dp", "tp", "cp"), {}, r"the dims tp of the DeviceMesh .* are left over from data='dp', ulysses='cp'"),
        (
            (4,),
            ("dp",),
            {"ulysses": None},
            r"data='dp' of the DeviceMesh .* name no dim for any of ring, ulysses, tensor; make it",
        ),
        (
            (2, 2),
            ("pp", "tp"),
            {"pipeline": "pp", "data": None, "ulysses": None, "tensor": "tp"},
            r"name no dim for any of data, ring, ulysses; make it with one more dim, of size 1, and pass its name",
        ),
        ((2, 2), ("dp", "cp"), {"layout": "diagonal"}, r"layout='diagonal' is unknown"),
    ],
)
def test_a_device_mesh_that_does_not_fit_is_refused(shape: Any, dims: Any, names: Any, text: str, tmp_path: Path) -> None:
    on_ranks(4, _not_adopted, shape, dims, names, text, tmp_path=tmp_path)


def _not_adopted(shape: tuple[int, ...], dims: tuple[str, ...], names: dict[str, Any], text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        ParallelMesh.from_device_mesh(init_device_mesh("cpu", shape, mesh_dim_names=dims), **names)


def test_ranks_in_another_order_are_refused_and_so_are_different_names(tmp_path: Path) -> None:
    on_ranks(2, _other_orders, tmp_path=tmp_path)


def _other_orders() -> None:
    with pytest.raises(LayoutError, match=r"is not the 2 ranks of the process group in their order"):
        ParallelMesh.from_device_mesh(DeviceMesh("cpu", [1, 0], mesh_dim_names=("cp",)), data=None)
    device_mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
    with pytest.raises(LayoutError, match=r"rank 0 asks for .* ulysses=cp .* but rank 1 for .* ulysses=dp"):
        ParallelMesh.from_device_mesh(device_mesh, ulysses=("cp", "dp")[dist.get_rank()], data=None)


def test_the_timeout_holds_for_every_group(tmp_path: Path) -> None:
    """A rank that does not come to a collective of any axis is reported after the mesh's timeout, not after 30 minutes."""
    assert on_ranks(2, _waited, tmp_path=tmp_path) == [True, True]


def _waited() -> bool:
    mesh = ParallelMesh(ulysses=2, timeout=timedelta(seconds=1))
    dist.barrier(group=mesh.ulysses_group)
    started = time.monotonic()
    if dist.get_rank() == 0:
        for group in (mesh.ulysses_group, mesh.world_group):
            with pytest.raises(RuntimeError):
                dist.all_reduce(torch.zeros(1), group=group)
    else:
        time.sleep(4)
    return time.monotonic() - started < 30


def test_the_timeout_holds_for_what_stages_send_and_for_the_control_of_a_stage(tmp_path: Path) -> None:
    assert on_ranks(4, _stages_waited, tmp_path=tmp_path, seconds=15) == [True] * 4


def _stages_waited() -> bool:
    mesh = ParallelMesh(pipeline=2, timeout=timedelta(seconds=1))
    for group in (mesh.pipeline_group, mesh.loss_control_group):
        dist.barrier(group=group)
    started = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError):
            dist.recv(torch.zeros(1), 2, group=mesh.pipeline_group)
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.zeros(1), group=mesh.loss_control_group)
        return time.monotonic() - started < 6
    time.sleep(8)
    return True

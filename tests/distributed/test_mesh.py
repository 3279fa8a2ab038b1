"""A mesh cuts the world as asked, leaves the rest to data, and refuses what does not divide on every rank alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longspan.distributed.mesh import ParallelMesh
from longspan.errors import LayoutError
from tests.helpers.ranks import on_ranks


def test_what_is_left_is_data_parallel(tmp_path: Path) -> None:
    places = on_ranks(4, _place, {"ulysses": 2}, tmp_path=tmp_path)
    assert [(p.data, p.ulysses, p.data_rank, p.ulysses_rank) for p in places] == [(2, 2, d, u) for d in (0, 1) for u in (0, 1)]


def test_neighbours_share_ulysses_then_ring(tmp_path: Path) -> None:
    places = on_ranks(4, _place, {"ulysses": 2, "ring": 2}, tmp_path=tmp_path)
    assert [(p.ring_rank, p.ulysses_rank) for p in places] == [(r, u) for r in (0, 1) for u in (0, 1)]
    assert all(p.zigzag for p in places)


def _place(degrees: dict[str, Any]):  # type: ignore[no-untyped-def]
    mesh = ParallelMesh(**degrees)
    place = mesh.place
    assert mesh.degree == dist.get_world_size()
    assert mesh.mean_group.size() == mesh.fsdp_mesh.size() == mesh.degree
    assert mesh.sequence_group.size() == place.ring * place.ulysses
    assert mesh.sequence_group.rank() == place.ring_rank * place.ulysses + place.ulysses_rank
    return place


def test_each_group_of_a_test_has_one_worker(tmp_path: Path) -> None:
    """The harness, not the mesh: two workers of gloo corrupt the heap, too rarely for any other test to show why."""
    assert on_ranks(2, _workers, tmp_path=tmp_path) == [[1] * 5] * 2


def _workers() -> list[int]:
    mesh = ParallelMesh()
    groups = [dist.group.WORLD, mesh.agreement_group, mesh.mean_group, mesh.sequence_group, mesh.ulysses_group]
    return [group._get_backend(torch.device("cpu")).options._threads for group in groups]


@pytest.mark.parametrize(
    ("degrees", "text"),
    [
        ({"ulysses": 3}, r"ulysses=3 x ring=1 does not divide the world of 2 ranks; their product may be 1, 2"),
        ({"ulysses": 0}, r"ulysses=0 and ring=1 must be at least 1"),
        ({"tensor": 2}, r"tensor=2 is not supported yet; use tensor=1"),
        ({"ulysses": "auto"}, r"ulysses='auto' ring=1 heads=None cannot be chosen from"),
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
    assert mesh.degree == 1
    assert repr(mesh) == "ParallelMesh(data=1, ring=1, ulysses=1, device='cpu')"


def test_auto_takes_ulysses_as_far_as_the_heads_reach(tmp_path: Path) -> None:
    place = on_ranks(4, _place, {"ulysses": "auto", "heads": (6, 2)}, tmp_path=tmp_path)[0]
    assert (place.ulysses, place.ring, place.zigzag) == (2, 2, True)


def test_ranks_that_ask_for_different_meshes_are_told_so(tmp_path: Path) -> None:
    on_ranks(2, _different, tmp_path=tmp_path)


def _different() -> None:
    with pytest.raises(LayoutError, match=r"rank 0 asks for ulysses=1 ring=1 layout=None but rank 1 for ulysses=2 ring=1"):
        ParallelMesh(ulysses=dist.get_rank() + 1)

"""``unshard`` is the inverse of the cut, its adjoint sums; a mapping gives a part, a list gives parts."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longspan.batch.shard import shard_batch, unshard
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError
from longspan.masks.constructors import Causal, Documents
from tests.helpers.ranks import on_ranks
from tests.helpers.typed_batches import part_and_parts


@pytest.mark.parametrize(("ulysses", "ring"), [(3, 1), (1, 3), (2, 2)])
def test_unshard_is_the_inverse_and_its_adjoint_sums(ulysses: int, ring: int, tmp_path: Path) -> None:
    on_ranks(ulysses * ring, _unshard, ulysses, ring, tmp_path=tmp_path)


def _unshard(ulysses: int, ring: int) -> None:
    mesh = ParallelMesh(ulysses, ring)
    torch.manual_seed(0)
    whole = torch.randn(2, 11, 3, dtype=torch.float64)
    asks = torch.randn(ulysses * ring, *whole.shape, dtype=torch.float64)
    batch = {"input_ids": torch.zeros(2, 11, dtype=torch.long), "x": whole, "asked": asks.sum(0)}
    part = shard_batch(batch, mesh, dims={"x": 1, "asked": 1})
    x = part["x"].requires_grad_()
    together = unshard(x, mesh, tokens=11)
    assert torch.equal(together, whole)
    (together * asks[dist.get_rank()]).sum().backward()
    torch.testing.assert_close(x.grad, part["asked"], rtol=1e-12, atol=1e-12)
    one = torch.ones(1, part["input_ids"].shape[1], dtype=torch.float64, requires_grad=True)
    unshard(one, mesh, tokens=11).sum(1).sum().backward()  # a gradient without memory of its own
    assert torch.equal(one.grad, torch.full_like(one, ulysses * ring))


def test_a_mapping_gives_a_part_and_a_list_gives_parts(tmp_path: Path) -> None:
    on_ranks(1, _typed, tmp_path=tmp_path)


def _typed() -> None:
    mesh, batch = ParallelMesh(), {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    part, parts = part_and_parts(batch, mesh)
    assert [one.keys() for one in parts] == [part.keys()] * 2
    with pytest.raises(BatchError, match=r"unshard was given 8 tokens in dim 1, but this rank holds 9 of tokens=9"):
        unshard(part["input_ids"], mesh, tokens=9)


def test_a_part_is_on_the_device_of_the_mesh(tmp_path: Path) -> None:
    assert on_ranks(2, _on_another_device, tmp_path=tmp_path) == [["input_ids"] * 2 + ["position_ids"] * 2] * 2


def _on_another_device() -> list[str]:
    """The meta device stands for a GPU; returns the names of the tensors that were pinned, of two micro-batches."""
    mesh, pinned = ParallelMesh(ulysses=2), []
    mesh.device = torch.device("meta")
    batch = {"input_ids": torch.arange(8)[None], "embeds": torch.randn(1, 8, requires_grad=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(len(tensor)) or tensor)
        parts = shard_batch([batch, batch], mesh, dims={"embeds": 1})
    named = [(name, value) for part in parts for name, value in part.items() if isinstance(value, torch.Tensor)]
    assert {value.device.type for _, value in named} == {"meta"}
    return sorted(name for name, _ in named if name != "embeds")[: len(pinned)]


def test_a_default_device_is_not_asked_for_the_numbers_that_ranks_exchange(tmp_path: Path) -> None:
    """``torch.set_default_device("cuda")`` in a program; the meta device, which has no numbers, stands for it."""
    on_ranks(2, _with_a_default_device, tmp_path=tmp_path)


def _with_a_default_device() -> None:
    batch = {"input_ids": torch.arange(22).view(2, 11), "labels": torch.arange(22).view(2, 11)}
    meshes = [ParallelMesh(ulysses=2), ParallelMesh(ring=2)]
    for mesh, mask in zip(meshes, (Causal(), Documents([4, 7]) & Causal())):
        expected = shard_batch(batch, mesh, mask=mask)
        with torch.device("meta"):
            found = shard_batch(batch, mesh, mask=mask)
            rows = unshard(found["input_ids"], mesh, tokens=11)
        assert found["longspan"] == expected["longspan"]
        assert all(torch.equal(found[name], expected[name]) for name in ("input_ids", "shift_labels", "position_ids"))
        assert torch.equal(rows, batch["input_ids"])

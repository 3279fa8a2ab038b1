"""Checkpoints: whole or not there, the same state back, on any number of ranks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from longspan.batch.shard import shard_batch
from longspan.cli import checkpoint
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import RunError
from longspan.integrations import state_dict
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig
from longspan.parallelize import parallelize
from tests.helpers.ranks import on_ranks

CONFIG = DecoderConfig(vocab=11, layers=2, hidden=12, heads=4, kv_heads=2, head_dim=4, ffn=16, tied=True)
NONE: Mapping[str, int] = {}


def _trained(
    zero: int, seed: int = 0, steps: int = 2, degrees: Mapping[str, int] = NONE, dtype: torch.dtype = torch.float32
) -> tuple[Any, torch.optim.Optimizer, ParallelMesh]:
    mesh = ParallelMesh(**degrees)
    model = parallelize(Decoder(CONFIG, seed=seed).to(dtype), mesh, zero=zero)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        _step(model, optimizer, mesh, step)
    return model, optimizer, mesh


def _step(model: Any, optimizer: torch.optim.Optimizer, mesh: ParallelMesh, step: int) -> float:
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(step))
    rows = ids.tensor_split(mesh.coordinate.data)[mesh.coordinate.data_rank]
    loss = model(**shard_batch({"input_ids": rows, "labels": rows}, mesh)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _save(folder: Path, zero: int) -> list[float]:
    model, optimizer, mesh = _trained(zero)
    torch.manual_seed(5)
    torch.rand(3)
    checkpoint.save(folder, 2, model, optimizer, {"step": 2}, mesh, keep=2)
    return [*torch.rand(2).tolist(), *(_step(model, optimizer, mesh, step) for step in (2, 3, 4))]


def _load(folder: Path, zero: int) -> list[float]:
    model, optimizer, mesh = _trained(zero, seed=1, steps=1)
    path = checkpoint.newest(folder)
    assert path is not None
    checkpoint.load(path, model, optimizer)
    return [*torch.rand(2).tolist(), *(_step(model, optimizer, mesh, step) for step in (2, 3, 4))]


@pytest.mark.parametrize("zero", [0, 3])
def test_what_is_loaded_goes_on_as_what_was_saved_bit_by_bit(zero: int, tmp_path: Path) -> None:
    saved = on_ranks(2, _save, tmp_path, zero, tmp_path=tmp_path)
    assert on_ranks(2, _load, tmp_path, zero, tmp_path=tmp_path) == saved


@pytest.mark.parametrize(("saving", "loading"), [((4, 3), (2, 0)), pytest.param((2, 0), (3, 3), marks=pytest.mark.long)])
def test_other_ranks_and_another_sharding_read_it(saving: tuple[int, int], loading: tuple[int, int], tmp_path: Path) -> None:
    (saved, *_) = on_ranks(saving[0], _save, tmp_path, saving[1], tmp_path=tmp_path)
    for found in on_ranks(loading[0], _load, tmp_path, loading[1], tmp_path=tmp_path):
        assert found == pytest.approx(saved, rel=1e-5)


Saved = tuple[int, dict[str, int], int]
"""(ranks, degrees, zero)."""

ONE: Saved = (1, {}, 0)
ULYSSES: Saved = (2, {"ulysses": 2}, 2)
TENSOR: Saved = (4, {"tensor": 2, "ulysses": 2}, 3)
WHOLE_TENSOR: Saved = (2, {"tensor": 2}, 0)


@pytest.mark.parametrize(
    ("saving", "loading"), [(TENSOR, ONE), (TENSOR, ULYSSES), (ONE, TENSOR), (ULYSSES, TENSOR), (WHOLE_TENSOR, TENSOR)], ids=str
)
def test_a_checkpoint_is_free_of_the_layout(saving: Saved, loading: Saved, tmp_path: Path, pool: Any) -> None:
    (saved, *_) = pool(saving[0]).run(_next_losses, tmp_path, *saving[1:], True)
    for found in pool(loading[0]).run(_next_losses, tmp_path, *loading[1:], False):
        assert found == pytest.approx(saved, rel=1e-10)


def _next_losses(folder: Path, degrees: Mapping[str, int], zero: int, saves: bool) -> list[float]:
    """The losses of three steps after a checkpoint of two, in fp64; the loading ranks begin with other weights."""
    seed, steps = (0, 2) if saves else (1, 1)
    model, optimizer, mesh = _trained(zero, seed, steps, degrees, torch.float64)
    if saves:
        checkpoint.save(folder, 2, model, optimizer, {"step": 2}, mesh, keep=2)
    else:
        path = checkpoint.newest(folder)
        assert path is not None
        checkpoint.load(path, model, optimizer)
    return [_step(model, optimizer, mesh, step) for step in (2, 3, 4)]


def _save_several(folder: Path) -> None:
    model, optimizer, mesh = _trained(0)
    (folder / "checkpoints" / ".step-000003").mkdir(parents=True)  # what a killed run leaves
    (folder / "checkpoints" / ".step-000003" / "rubbish").touch()
    for step in (1, 2, 3, 3, 4):
        checkpoint.save(folder, step, model, optimizer, {"step": step}, mesh, keep=2)


def test_the_newest_stay_and_a_draft_of_a_killed_run_goes(tmp_path: Path) -> None:
    on_ranks(1, _save_several, tmp_path, tmp_path=tmp_path)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000003", "step-000004"]
    assert not list(folder.rglob("rubbish"))
    assert checkpoint.newest(tmp_path) == folder / "step-000004"
    assert checkpoint.facts(folder / "step-000003") == {"step": 3}


def _save_around_a_million(folder: Path) -> None:
    model, optimizer, mesh = _trained(0)
    for step in (999_999, 1_000_000):
        checkpoint.save(folder, step, model, optimizer, {"step": step}, mesh, keep=1)


def test_the_millionth_step_is_newer_than_the_one_before(tmp_path: Path) -> None:
    on_ranks(1, _save_around_a_million, tmp_path, tmp_path=tmp_path)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert checkpoint.facts(newest) == {"step": 1_000_000}


def _save_where_only_rank_0_can(folder: Path) -> str:
    model, optimizer, mesh = _trained(3)
    if mesh.coordinate.data_rank == 1:
        storage = torch.distributed.checkpoint.filesystem
        storage._write_item = _refuse
    with pytest.raises(RunError) as error:
        checkpoint.save(folder, 2, model, optimizer, {"step": 2}, mesh, keep=2)
    return str(error.value)


def _refuse(*_: object) -> None:
    raise OSError(122, "Disk quota exceeded")


def test_a_rank_that_cannot_write_stops_all_with_its_text_and_leaves_nothing(tmp_path: Path) -> None:
    first, second = on_ranks(2, _save_where_only_rank_0_can, tmp_path, tmp_path=tmp_path)
    assert first == second
    assert "step-000002 cannot be written: Disk quota exceeded; make room, or choose another disk with --runs-folder" in first
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_run_without_a_checkpoint_has_no_newest(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None


def _load_damaged(folder: Path) -> list[str]:
    model, optimizer, mesh = _trained(0)
    checkpoint.save(folder, 2, model, optimizer, {"step": 2}, mesh, keep=2)
    path = checkpoint.newest(folder)
    assert path is not None
    found = []
    for name in ("__0_0.distcp", ".metadata"):
        (path / name).write_bytes(b"")
        with pytest.raises(RunError, match=r"the checkpoint .* cannot be read: .*; use another one, or start a new") as error:
            checkpoint.load(path, model)
        found.append(str(error.value))
    return found


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    ((*texts,),) = on_ranks(1, _load_damaged, tmp_path, tmp_path=tmp_path)
    assert all("\n" not in text for text in texts)
    for damage in ("[", "[1]", "{}"):
        (tmp_path / "run.json").write_text(damage)
        with pytest.raises(RunError, match=r"is damaged: its run\.json cannot be read"):
            checkpoint.facts(tmp_path)


def test_a_damaged_name_of_the_newest_does_not_start_the_run_over(tmp_path: Path) -> None:
    for name in ("step-000025", "step-1000000"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_bytes(b"\xff")
    with pytest.raises(RunError, match=r"latest is damaged, .*; write one of these into it: step-000025, step-1000000$"):
        checkpoint.newest(tmp_path)


def test_a_checkpoint_of_another_kind_is_refused_by_field(tmp_path: Path) -> None:
    theirs = json.loads(json.dumps({"layers": 2, "hidden": 8}))
    checkpoint.refuse_differences(tmp_path, "model", theirs, {"layers": 2})
    with pytest.raises(RunError, match="is of another model: hidden is 8, not 9, heads is None, not 1; ask for its own model"):
        checkpoint.refuse_differences(tmp_path, "model", theirs, {"layers": 2, "hidden": 9, "heads": 1})


class Device:
    """The random generator of a rank's device, kept by the CPU."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        self.generator.set_state(state)


def _random_of_a_device(folder: Path, saves: bool, seed: int) -> list[float]:
    """The numbers that a device draws after its state was saved, or read; every rank's begins with another seed."""
    model, optimizer, mesh = _trained(0)
    device = Device(seed + mesh.world_group.rank())
    with (
        patch.object(state_dict, "_device", lambda model: torch.device("cuda", 0)),
        patch.object(torch, "get_device_module", lambda _: device),
    ):
        if saves:
            torch.rand(3, generator=device.generator)
            checkpoint.save(folder, 2, model, optimizer, {"step": 2}, mesh, keep=2)
        else:
            path = checkpoint.newest(folder)
            assert path is not None
            checkpoint.load(path, model, optimizer)
    return torch.rand(2, generator=device.generator).tolist()


def _drawn(seed: int) -> list[float]:
    return torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()


def test_each_rank_s_device_goes_on_with_its_own_random_numbers(tmp_path: Path) -> None:
    saved = on_ranks(2, _random_of_a_device, tmp_path, True, 100, tmp_path=tmp_path)
    assert saved[0] != saved[1]
    assert on_ranks(3, _random_of_a_device, tmp_path, False, 200, tmp_path=tmp_path) == [*saved, _drawn(202)]


def test_a_checkpoint_without_a_device_s_random_state_leaves_it_alone(tmp_path: Path) -> None:
    on_ranks(2, _save, tmp_path, 0, tmp_path=tmp_path)
    assert on_ranks(2, _random_of_a_device, tmp_path, False, 200, tmp_path=tmp_path) == [_drawn(200), _drawn(201)]


def _read_more(folder: Path) -> None:
    model, optimizer, mesh = _trained(0)
    checkpoint.save(folder, 2, model, optimizer, {"step": 2}, mesh, keep=2)
    asked = state_dict.sharded_state(model, optimizer)
    asked["model"]["more"] = torch.zeros(1)
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: model\.more"):
        state_dict.read_sharded_state(asked, checkpoint.newest(folder))


def test_a_weight_that_a_checkpoint_lacks_is_refused(tmp_path: Path) -> None:
    on_ranks(2, _read_more, tmp_path, tmp_path=tmp_path)

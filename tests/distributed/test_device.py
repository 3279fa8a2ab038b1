"""Each rank's device: chosen by its number before anything else asks for one, shared only with a warning."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from longspan.distributed import device
from longspan.distributed.device import (
    _refuse_equal,
    choose_device,
    device_of,
    join_world,
    refuse_shared_devices,
    shared_devices,
    visible_devices,
)
from longspan.distributed.groups import set_timeout
from longspan.errors import RunError
from tests.helpers.ranks import on_ranks

SEES = {"is_available": True, "current_accelerator": torch.device("cuda"), "device_count": 0}


def pretend(monkeypatch: pytest.MonkeyPatch, accelerator: dict[str, Any], cuda: dict[str, Any] | None = None) -> None:
    for module, values in ((torch.accelerator, SEES | accelerator), (torch.cuda, cuda or {})):
        for name, value in values.items():
            monkeypatch.setattr(module, name, lambda value=value: value)


@pytest.mark.parametrize(
    ("environment", "accelerator", "cuda", "chosen"),
    [
        ({"LOCAL_RANK": "3"}, {"device_count": 8}, {}, "cuda:3"),
        ({"LOCAL_RANK": "3"}, {"device_count": 1}, {}, "cuda:0"),  # one visible device for each task
        ({"LOCAL_RANK": "5"}, {"device_count": 4}, {}, "cuda:1"),
        ({}, {"device_count": 8}, {}, "cuda:0"),
        ({"LOCAL_RANK": "3"}, {"device_count": 8}, {"is_initialized": True, "current_device": 6}, "cuda:6"),
        ({"LOCAL_RANK": "3"}, {"device_count": 8}, {"is_initialized": True, "current_device": 0}, "cuda:3"),
        ({"LOCAL_RANK": "3"}, {"is_available": False}, {}, "cpu"),
        ({"LOCAL_RANK": "3"}, {"current_accelerator": torch.device("mps"), "device_count": 1}, {}, "cpu"),
    ],
)
def test_each_rank_takes_the_device_of_its_number(
    environment: dict[str, str],
    accelerator: dict[str, Any],
    cuda: dict[str, Any],
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    pretend(monkeypatch, accelerator, {"is_initialized": False} | cuda)
    assert choose_device() == torch.device(chosen)
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("cuda:2") == torch.device("cuda:2")
    assert visible_devices() == (0 if chosen == "cpu" else accelerator["device_count"])


def test_the_device_is_set_before_anything_asks_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", calls.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: calls.append("the process group") or True)
    join_world(torch.device("cuda:1"))
    assert calls == [torch.device("cuda:1"), "the process group"]


def test_ranks_of_their_own_device_are_bound_to_it_and_ranks_that_share_one_use_gloo(tmp_path: Path) -> None:
    for devices, backend in ((3, "cpu:gloo,cuda:nccl"), (2, "cpu:gloo,cuda:gloo")):
        found = on_ranks(3, _joined, devices, str(tmp_path / f"store{devices}"), tmp_path=tmp_path)
        assert [options["backend"] for options, _ in found] == [backend] * 3
        bound = [torch.device("cuda", rank) for rank in range(3)] if devices == 3 else [None] * 3
        assert [options["device_id"] for options, _ in found] == bound
        assert [(options["rank"], options["world_size"]) for options, _ in found] == [(rank, 3) for rank in range(3)]
        warned = ["ranks 0 and 2 are both on GPU 0 of here, where NCCL cannot connect them"] if devices == 2 else []
        assert [[text.partition(":")[0] for text in texts] for _, texts in found] == [warned, [], []]


def _joined(devices: int, path: str) -> tuple[dict[str, Any], list[str]]:
    """The arguments with which ``join_world`` makes the process group on accelerators that are not there, and its warnings."""
    rank, given, texts = dist.get_rank(), {}, []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(device.__name__).addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "3")
        patch.setattr(torch.accelerator, "set_device_index", lambda _: None)
        patch.setattr(device, "_meeting_point", lambda: (dist.FileStore(path, 3), rank, 3))
        patch.setattr(device, "_hardware", lambda own: f"GPU {own.index % devices} of here")
        patch.setattr(dist, "is_initialized", lambda: False)
        patch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options, backend=backend))
        join_world(torch.device("cuda", rank))
    given.pop("store")
    return given, texts


def test_the_first_two_ranks_that_share_a_device_are_found(tmp_path: Path) -> None:
    assert on_ranks(3, _shared, str(tmp_path / "store"), tmp_path=tmp_path) == [(1, 2, "GPU 1")] * 3


def _shared(path: str) -> tuple[int, int, str] | None:
    rank = dist.get_rank()
    return shared_devices(f"GPU {min(rank, 1)}", dist.FileStore(path, 3), rank, 3)


def test_two_ranks_on_one_device_are_refused_by_name_in_a_group_that_the_program_has_made(tmp_path: Path) -> None:
    on_ranks(3, _refused, tmp_path=tmp_path)


def _refused() -> None:
    group, rank = dist.new_group(backend="gloo"), dist.get_rank()
    _refuse_equal(f"GPU {rank}", group)
    with pytest.raises(RunError, match=r"ranks 0 and 2 are both on GPU 0, and NCCL needs a device for each rank"):
        _refuse_equal(f"GPU {rank % 2}", group)
    refuse_shared_devices(torch.device("cpu"), group)


def test_on_the_cpu_nothing_is_shared_and_groups_keep_their_timeout(tmp_path: Path) -> None:
    on_ranks(1, _on_the_cpu, tmp_path=tmp_path)


def _on_the_cpu() -> None:
    assert device_of(init_device_mesh("cpu", (1,))) == torch.device("cpu")
    set_timeout([dist.group.WORLD], None)

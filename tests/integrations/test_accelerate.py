"""OneDevice on ranks that torchrun launched, where accelerate sees several processes, against an Accelerator on one device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import default_data_collator

from longspan import RunError, parallelize, shard_batch
from longspan.integrations.accelerate import OneDevice
from tests.helpers.device import DEVICE
from tests.helpers.ranks import mesh_of
from tests.helpers.trainers import Pool, environment, llama

ROWS = 10
"""Rows of the data set: in batches of 4, the last one has 2."""


class Stream(IterableDataset[dict[str, Tensor]]):
    """A data set without a length."""

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.rows)


def accelerator(mesh: dict[str, int] | None, **settings: Any) -> Any:
    """An Accelerator on one device if ``mesh`` is None, else a OneDevice over a mesh of these degrees."""
    plain = Accelerator(cpu=DEVICE.type == "cpu", **settings)
    return plain if mesh is None else OneDevice.over(plain, mesh_of(**mesh))


def numbered(count: int = ROWS) -> list[dict[str, Tensor]]:
    """Rows of 4 tokens, each token the number of its row."""
    return [{"input_ids": torch.full((4,), number), "labels": torch.full((4,), number)} for number in range(count)]


def rows_read(mesh: dict[str, int], stream: bool) -> list[list[int]]:
    """The numbers of the rows in each batch of this rank."""
    with environment(launched=True):
        data: Any = Stream(numbered()) if stream else numbered()
        loader = accelerator(mesh).prepare(DataLoader(data, batch_size=4, collate_fn=default_data_collator))
        return [batch["input_ids"][:, 0].tolist() for batch in loader]


@pytest.mark.parametrize("stream", [False, True])
def test_each_replica_reads_its_own_rows_and_the_ranks_of_a_sequence_the_same(stream: bool, pool: Pool) -> None:
    replicas = [[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]
    assert pool(2).run(rows_read, {}, stream) == list(replicas)
    assert pool(2).run(rows_read, {"ulysses": 2}, stream) == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]] * 2


def losses(mesh: dict[str, int] | None, zero: int = 0) -> list[float]:
    """The loss and the norm of each step of two epochs over a stream; micro-batches of 4 rows, two a step, one at the end."""
    with environment(launched=mesh is not None):
        accelerate = accelerator(mesh, gradient_accumulation_steps=2)
        random = torch.Generator().manual_seed(1)
        ids = [torch.randint(3, 97, (16,), generator=random) for _ in range(ROWS)]
        loader = DataLoader(Stream([{"input_ids": row, "labels": row} for row in ids]), 4, collate_fn=default_data_collator)
        model: Any = llama() if mesh is None else parallelize(llama(), mesh_of(**mesh), zero=zero)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        model, optimizer, loader, schedule = accelerate.prepare(model, optimizer, loader, schedule)
        found = []
        for batch in (batch for _ in range(2) for batch in loader):
            with accelerate.accumulate(model):
                loss = model(**(batch if mesh is None else shard_batch(batch, mesh_of(**mesh)))).loss
                accelerate.backward(loss)
                norm = accelerate.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            found += [loss.item(), float(norm or 0)]
        return found


@pytest.mark.parametrize(("mesh", "zero"), [({}, 3), ({"ulysses": 2}, 0), ({"ring": 2}, 2)])
def test_a_stream_with_accumulation_and_a_schedule_trains_as_on_one_device(mesh: Any, zero: int, pool: Pool) -> None:
    (alone,) = pool(1).run(losses, None)
    for theirs in pool(2).run(losses, mesh, zero):
        assert theirs == pytest.approx(alone, rel=1e-5)


def rates(mesh: dict[str, int] | None, kind: str, accumulated: int) -> list[float]:
    """The learning rate after each of six micro-batches."""
    with environment(launched=mesh is not None):
        accelerate = accelerator(mesh, gradient_accumulation_steps=accumulated)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        if kind == "OneCycleLR":  # with fewer steps than are taken
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=4)
        model, optimizer, schedule = accelerate.prepare(model, optimizer, schedule)
        found = []
        for _ in range(6):
            with accelerate.accumulate(model):
                accelerate.backward(model(torch.ones(1, 2)).sum())
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            found.append(optimizer.param_groups[0]["lr"])
        return found


@pytest.mark.parametrize("kind", ["LambdaLR", "OneCycleLR"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_schedule_steps_as_on_one_device(kind: str, accumulated: int, pool: Pool) -> None:
    (alone,) = pool(1).run(rates, None, kind, accumulated)
    if (kind, accumulated) == ("LambdaLR", 2):
        assert alone == pytest.approx([1, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 4])
    assert pool(2).run(rates, {"ulysses": 2}, kind, accumulated) == [alone] * 2


def triggers() -> list[bool]:
    """What this rank's checks find where the last rank alone sets the trigger once, and then both do."""
    with environment(launched=True):
        mesh = mesh_of(ulysses=2)
        accelerate, found = accelerator({"ulysses": 2}), []
        for setting in ((), (1,), (), (0, 1), ()):
            if mesh.coordinate.ulysses_rank in setting:
                accelerate.set_trigger()
            found.append(accelerate.check_trigger())
        return found


def test_a_trigger_that_one_rank_sets_is_seen_by_all(pool: Pool) -> None:
    assert pool(2).run(triggers) == [[False, True, False, True, False]] * 2


def gathered(mesh: dict[str, int] | None) -> list[Any]:
    """What ``gather_for_metrics`` gives of tensors and of objects, at each batch."""
    with environment(launched=mesh is not None):
        accelerate, found = accelerator(mesh), []
        for batch in accelerate.prepare(DataLoader(numbered(6), batch_size=4, collate_fn=default_data_collator)):
            numbers = batch["input_ids"][:, 0]
            texts = [f"row {number}" for number in numbers.tolist()]
            for given in (numbers, {"rows": numbers}, texts, {"texts": texts}, [*texts, "more"], None):
                found.append(accelerate.gather_for_metrics(given))
            found.append(accelerate.gather_for_metrics(numbers, use_gather_object=True))
        return [one.tolist() if isinstance(one, Tensor) else str(one) for one in found]


def test_objects_are_gathered_for_metrics_as_on_one_device(pool: Pool) -> None:
    (alone,) = pool(1).run(gathered, None)
    assert pool(2).run(gathered, {"ulysses": 2}) == [alone] * 2


def refusal() -> str:
    with environment(launched=True), pytest.raises(RunError) as found:
        accelerator({"ulysses": 2}, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    return str(found.value)


def test_batches_that_accelerate_dispatches_are_refused(pool: Pool) -> None:
    for text in pool(2).run(refusal):
        assert "dispatch_batches=True) reads the data set on one rank" in text
        assert "leave it out" in text

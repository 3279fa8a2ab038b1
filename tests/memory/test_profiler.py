"""What a step allocates, by what it is for: the sums are those of the tensors themselves."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longspan import MemoryOptions, ParallelMesh, parallelize, shard_batch
from longspan.cli.metrics import memory_table
from longspan.memory import profiler as allocations
from longspan.memory.profiler import CATEGORIES, Change, Mark, Recorded, Timeline
from tests.helpers.one_device import VOCAB, llama

MIB = 2**20


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1024, 512, bias=False)  # 2 MiB
        self.head = nn.Linear(512, 2048, bias=False)  # 4 MiB

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.first(x)), labels)


def test_only_the_memory_of_one_device_is_recorded() -> None:
    """A step on an accelerator allocates in host memory too, maybe at the same address."""

    def event(device: str, size: int) -> SimpleNamespace:
        kept = SimpleNamespace(ptr=64, alloc_size=size, device=torch.device(device))
        return SimpleNamespace(tag=SimpleNamespace(name="Allocation"), typed=(None, kept), start_time_ns=abs(size))

    inner = SimpleNamespace(
        tag=SimpleNamespace(name="TorchOp"), name="aten::mm", children=[event("cuda:0", 10), event("cpu", 5)]
    )
    tree = [inner, event("cpu", -5), event("cuda:0", -10)]
    assert list(allocations._allocations(tree, (), "cuda")) == [(10, 64, 10, ("aten::mm",)), (10, 64, -10, ())]
    assert [size for _, _, size, _ in allocations._allocations(tree, (), "cpu")] == [5, -5]


def test_every_byte_has_its_category_and_every_phase_its_mark(capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    x, labels = torch.randn(256, 1024), torch.randint(2048, (256,))

    def step() -> None:
        model(x, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Recorded(model, optimizer) as recorded:
        model(x, labels).backward()  # a micro-batch
        optimizer.zero_grad()
        os.write(2, b"a line of another\n")
        step()
    timeline = recorded.timeline
    assert capfd.readouterr().err == "a line of another\n"  # nothing of the profiler's own
    phases = ["forward", "loss", "backward"]
    assert [mark.phase for mark in timeline.marks] == [*phases, *phases, "update"]
    assert sorted(timeline.marks) == list(timeline.marks)
    assert timeline.marks[0].when <= timeline.changes[0].when
    (*_, update) = timeline.marks
    assert {change.category for change in timeline.changes if change.when > update.when} <= {"optimizer", "gradients"}
    assert timeline.before == dict.fromkeys(CATEGORIES, 0) | {"parameters": 6 * MIB, "optimizer": 12 * MIB + 8}
    peak = timeline.at_peak()
    assert peak["parameters"] == 6 * MIB
    gradients = max(total for category, total in running(timeline) if category == "gradients")
    assert 6 * MIB <= gradients <= 6 * MIB + 4096
    logits = max(total for category, total in running(timeline) if category == "logits")
    assert 2 * MIB <= logits <= 6 * MIB + 4096  # log-softmax, 2 MiB, then its gradient; those of the head are activations
    assert timeline.peak() == sum(peak.values()) >= 22 * MIB
    assert sum(change.size for change in timeline.changes if change.category == "gradients") == 0  # zero_grad let them go


@pytest.mark.parametrize("chunked_loss", [False, True])
def test_the_loss_of_a_hugging_face_model_is_a_phase_with_memory_of_its_own(chunked_loss: bool) -> None:
    mesh = ParallelMesh()
    model = parallelize(llama(), mesh, memory=MemoryOptions(chunked_loss=chunked_loss))
    optimizer = torch.optim.SGD(model.parameters())
    ids = torch.arange(512).view(1, 512) % VOCAB
    with Recorded(model, optimizer) as recorded:
        model(**shard_batch({"input_ids": ids, "labels": ids}, mesh)).loss.backward()
        optimizer.step()
    timeline = recorded.timeline
    assert [mark.phase for mark in timeline.marks] == ["forward", "loss", "backward", "update"]
    after = timeline.marks[2].when
    in_backward = sum(size for when, category, size in timeline.changes if category == "logits" and when > after and size > 0)
    whole = ids.numel() * VOCAB * 8
    assert in_backward >= whole  # the gradient of the logits, or the logits again
    logits = max(total for category, total in running(timeline) if category == "logits")
    assert whole <= logits <= 4 * whole


def running(timeline: Timeline) -> list[tuple[str, int]]:
    now, found = dict(timeline.before), []
    for _, category, size in timeline.changes:
        now[category] += size
        found.append((category, now[category]))
    return found


def test_the_plot_and_the_table_say_the_peak(tmp_path: Path) -> None:
    before = dict.fromkeys(CATEGORIES, 0) | {"parameters": 6 * MIB}
    timeline = Timeline(before, [Change(10, "logits", 2 * MIB), Change(20, "logits", -2 * MIB), Change(30, "exchange", MIB)])
    assert timeline.at_peak() == before | {"logits": 2 * MIB}
    timeline = replace(timeline, marks=[Mark(10, "forward"), Mark(25, "update")])
    timeline.plot(tmp_path / "memory.html", "train-001: memory of rank 0 of 2 in step 2", "zero=3\n<b>")
    page = (tmp_path / "memory.html").read_text()
    drawn = page[page.rindex("Plotly.newPlot") :]
    assert "<title>train-001: memory of rank 0 of 2 in step 2</title>" in page
    assert "height:100vh" in page
    named = ["peak 8.0 MiB", "forward", "update", "train-001: memory of rank 0 of 2 in step 2", "zero=3", "&lt;b&gt;"]
    assert [name for name in (*named, *CATEGORIES) if name not in drawn] == []
    assert memory_table(timeline, 2).splitlines()[0].endswith("8.0 MiB")
    assert "logits               2.0 MiB   25.0%" in memory_table(timeline, 2)
    assert "The 985 MiB a rank of the progress line" in memory_table(timeline, 2, 985 * MIB)


def test_memory_that_another_thread_freed_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiler sees no free of gloo's threads; that the address is given out again shows it."""
    events = [(1, 0xA, 100, ()), (2, 0xB, 10, ()), (3, 0xA, 60, ()), (4, 0xA, -60, ())]
    monkeypatch.setattr(allocations, "_allocations", lambda *_: events)
    model = Small()
    with Recorded(model, torch.optim.SGD(model.parameters())) as recorded:
        pass
    assert recorded.timeline.peak() == 6 * MIB + 110
    assert sum(change.size for change in recorded.timeline.changes) == 10

"""What a run writes and shows: records on disk and in TensorBoard, lines on a terminal and in a log."""

import io
import json
import mmap
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longspan.cli import metrics
from longspan.cli.metrics import Display, Journal, Record
from longspan.distributed.mesh import ParallelMesh
from tests.helpers.ranks import on_ranks


def record(step: int, **figures: float) -> Record:
    known: Record = {"step": step, "loss": 2.5, "tokens_per_s": 12_345.0, "peak_share": 0.5, "memory_bytes": 2**30}
    return known | {"exchanged_bytes": 1536} | figures


def test_a_journal_keeps_every_record_and_drops_what_lies_behind_the_step_it_goes_on_from(tmp_path: Path) -> None:
    first = Journal(tmp_path, 0, lead=True)
    for step in (1, 2, 3):
        first.write(record(step, loss=float(step)))
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('rubbish\n{"loss": 1.0}\n')  # damage, also bytes that are no text
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n{"step": 4, "lo')  # and half a line of a run that was killed
    second = Journal(tmp_path, 2, lead=True)
    second.write(record(3, loss=30.0))
    second.close()
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in found] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert "step" not in events.Tags()["scalars"]


def test_a_disk_that_fails_where_a_run_goes_on_leaves_the_records(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / ".metrics.jsonl").mkdir()  # nothing can be written there
    assert Journal(tmp_path, 1, lead=True).fault is not None
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


def test_a_run_that_another_process_trains_is_refused_and_keeps_its_records(tmp_path: Path) -> None:
    first = Journal(tmp_path, 0, lead=True)
    first.write(record(1))
    assert "is being trained by another process; wait until that has ended" in str(Journal(tmp_path, 0, lead=True).fault)
    first.write(record(2))
    with pytest.raises(ZeroDivisionError), first:
        record(1 // 0)
    third = Journal(tmp_path, 2, lead=True)
    third.close()
    assert third.fault is None
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_only_the_lead_rank_writes(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, lead=False)
    journal.write(record(1))
    journal.close()
    assert list(tmp_path.iterdir()) == []
    assert journal.fault is None


def test_a_disk_that_fails_is_kept_for_the_next_agreement(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gone", 0, lead=True)
    cause, _, advice = str(journal.fault).partition("; ")
    assert cause.endswith("cannot be written: No such file or directory")
    assert advice == "make room and go on with --resume, or choose another disk with --runs-folder"
    journal.write(record(1))
    journal.close()


def test_a_log_gets_a_few_lines_and_the_last_one() -> None:
    file = io.StringIO()
    with Display("train-001", 100, 0, lead=True, console=Console(file=file)) as display:
        for step in range(1, 101):
            display.show(record(step), 3.4e11)
    lines = file.getvalue().splitlines()
    assert len(lines) == 21
    assert lines[0].startswith(
        "train-001  step 1/100  loss 2.5000  12.3k tokens/s  50% of 340 GFLOP/s  1 GiB a rank  1.5 KiB exchanged  0:0"
    )
    assert lines[-1].startswith("train-001  step 100/100  ")
    assert lines[-1].endswith("0:00 left")


def test_a_terminal_gets_one_line_that_is_redrawn() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=200)
    with Display("train-001", 3, 0, lead=True, console=console) as display:
        for step in (1, 2, 3):
            display.show(record(step), 3.4e11)
        display.say("a line that stays")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "step 3/3 0:00:00" in shown
    assert "loss 2.5000  12.3k tokens/s  50% of 340 GFLOP/s  1 GiB a rank  1.5 KiB exchanged" in shown
    assert "a line that stays\n" in file.getvalue()
    assert "0:00 left" not in file.getvalue()


def test_other_ranks_show_nothing() -> None:
    file = io.StringIO()
    with Display("train-001", 3, 0, lead=False, console=Console(file=file, force_terminal=True)) as display:
        display.show(record(1), 1e9)
        display.say("nothing")
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    ("show", "number", "text"),
    [
        (metrics.short, 0, "0"),
        (metrics.short, 0.5, "0.5"),
        (metrics.short, 999, "999"),
        (metrics.short, 1000, "1k"),
        (metrics.short, 12345.6, "12.3k"),
        (metrics.short, 3.4e11, "340 G"),
        (metrics.short, 2e20, "2e+05 P"),
        (metrics.binary, 0, "0 B"),
        (metrics.binary, 2047, "2 KiB"),
        (metrics.binary, 2**20, "1 MiB"),
        (metrics.binary, 5 * 2**40, "5 TiB"),
        (metrics.clock, 0, "0:00"),
        (metrics.clock, 59.6, "1:00"),
        (metrics.clock, 3675, "1:01:15"),
    ],
)
def test_numbers_as_people_read_them(show, number, text) -> None:
    assert show(number) == text


def test_the_fullest_rank_is_found_by_all(tmp_path: Path) -> None:
    found = on_ranks(2, _fullest, tmp_path=tmp_path)
    (full, before, after), (other, *_) = found
    assert full == other  # what is found is the same on both, and the peak of the one that took most
    assert before + 60 * 2**20 <= full <= after


def _fullest():
    mesh = ParallelMesh()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of this rank, not of the process it was forked from
    before = metrics.peak_bytes(mesh.device)
    if mesh.coordinate.data_rank == 0:
        with mmap.mmap(-1, 64 * 2**20) as fresh:  # what is freed on the heap may be given out again and takes no new memory
            fresh.write(bytes(64 * 2**20))
    return metrics.fullest_rank_bytes(mesh), before, metrics.peak_bytes(mesh.device)


def test_the_peak_of_all_ranks_is_the_sum_of_each_and_the_same_on_all(tmp_path: Path) -> None:
    (mine, one), (_, other) = on_ranks(2, _peak, tmp_path=tmp_path)
    assert one == other
    assert one > 1e8
    assert mine is True


def _peak():
    mesh = ParallelMesh()
    peak = metrics.measured_peak_flops(mesh, torch.float32, seconds=0.01)
    return peak > 0, peak

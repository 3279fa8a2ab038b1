"""Metrics of a run: written to a file and to TensorBoard, shown on the terminal. Knows numbers and units only.

    record {"step": 42, "loss": 2.31, ...}  --Journal-->  runs/NAME/metrics.jsonl, events.out.tfevents.*
                                            --Display-->  train-001 ━━━━━╸━━━━━━━ step 42/100 0:00:48
                                                          loss 2.3100  11.2k tokens/s  48% of 170 GFLOP/s ...

Rank 0 writes and shows; on the other ranks the same objects do nothing.
"""

import errno
import json
import math
import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from longspan.distributed.mesh import ParallelMesh
from longspan.errors import RunError
from longspan.memory.profiler import Timeline

METRICS = "metrics.jsonl"
MEMORY = "memory.html"
Record = dict[str, int | float]
"""The metrics of a step by name, with units in the name; ``step`` is one of them."""

PLAIN_LINES = 20
"""About how many progress lines a run prints where the output is no terminal."""


class Output(Console):
    """A console whose closed pipe is a BrokenPipeError; rich's own ends the process with exit code 1 and no message."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()  # what is left in the buffers goes nowhere
        raise BrokenPipeError


def output(width: int) -> Console:
    """The console of a verb that prints a table: as wide as the terminal, ``width`` where there is none."""
    return Output(width=None if Output().is_terminal else width)


class Journal:
    """Writes the records of a run to metrics.jsonl and to TensorBoard; opening it drops the records after ``step``.

    A write error is not raised here, where one rank alone would have it: it is kept in ``fault`` for the next agreement.
    """

    def __init__(self, folder: Path, step: int, lead: bool) -> None:
        self.fault: RunError | None = None
        self._folder, self._lead = folder, lead
        if not lead:
            return
        try:
            path = folder / METRICS
            kept = [line for line in _lines(path) if _is_up_to(step, line)]
            path.write_text("".join(kept))
            self._file = path.open("ab", buffering=0)
            self._events = _Events(folder, step + 1)
        except OSError as error:
            self._keep(error)

    def write(self, record: Record) -> None:
        """Append a record, which has a ``step``, and flush it to the disk."""
        if not self._lead or self.fault is not None:
            return
        try:
            self._append(json.dumps(record).encode() + b"\n")
            self._events.write(record)
        except OSError as error:
            self._keep(error)

    def write_memory(self, timeline: Timeline, title: str, about: str) -> None:
        """Write the memory timeline of a step as an HTML page, with these lines above it."""
        if not self._lead or self.fault is not None:
            return
        try:
            timeline.plot(self._folder / MEMORY, title, about)
        except OSError as error:
            self._keep(error)

    def close(self) -> None:
        """Flush and close the files."""
        if not self._lead or self.fault is not None:
            return
        try:
            self._file.close()
            self._events.close()
        except OSError as error:
            self._keep(error)

    def _append(self, line: bytes) -> None:
        """Write the whole line or nothing: a disk that is nearly full takes only a part of it."""
        whole = self._file.tell()
        written = self._file.write(line)
        if written != len(line):
            self._file.truncate(whole)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _keep(self, error: OSError) -> None:
        self.fault = RunError(
            f"the metrics of {self._folder} cannot be written: {error.strerror}; make room and go on with --resume, "
            f"or choose another disk with --runs-folder"
        )


class _Events:
    """TensorBoard's event file of scalars; unlike TensorBoard's own writer, it raises on a full disk."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._file = (folder / f"events.out.tfevents.{time.time():.0f}.{first_step}").open("wb")
        self._records = RecordWriter(self._file)
        self._add(Event(file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)  # TensorBoard then drops this step and later ones of earlier files
        self._add(Event(step=first_step, session_log=start))

    def write(self, record: Record) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in record.items() if name != "step"]
        self._add(Event(step=int(record["step"]), summary=Summary(value=values)))

    def close(self) -> None:
        self._records.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()


class Display:
    """The progress of a run: redrawn in place on a terminal, a few plain lines where the output is none."""

    def __init__(self, name: str, steps: int, done: int, lead: bool, console: Console | None = None) -> None:
        self._name, self._steps, self._lead = name, steps, lead
        self._console = console or Output()
        self._redraws = lead and self._console.is_terminal
        steps_of = TextColumn("step {task.completed}/{task.total}")
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), steps_of, TimeRemainingColumn())
        self._task = self._bar.add_task(name, total=steps, completed=done)
        self._live = Live(console=self._console, refresh_per_second=4)
        self._every = max(1, steps // PLAIN_LINES)
        self._started, self._done = time.monotonic(), done

    def show(self, record: Record, peak_flops: float) -> None:
        """Redraw the progress, or print a line where it is due; ``peak_flops`` is the reference of ``peak_share``."""
        step, state = int(record["step"]), _state(record, peak_flops)
        self._bar.update(self._task, completed=step)
        if self._redraws:
            self._live.update(Group(self._bar, Text(state)))
        elif step % self._every == 0 or step in (self._done + 1, self._steps):
            left = (time.monotonic() - self._started) / (step - self._done) * (self._steps - step)
            self.say(f"{self._name}  step {step}/{self._steps}  {state}  {clock(left)} left")

    def say(self, line: str) -> None:
        """Print a line above the progress that is redrawn."""
        if self._lead:
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def __enter__(self) -> "Display":
        if self._redraws:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()


def measured_peak_flops(mesh: ParallelMesh, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of large square matmuls on all ranks at once, for ``seconds``: the best rate of each rank, summed."""
    size = 1024 if mesh.device.type == "cpu" else 8192
    x = torch.ones(size, size, dtype=dtype, device=mesh.device)
    dist.barrier(group=mesh.world_group)
    best, stop = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        x[0, 0] = (x @ x)[0, 0].item()  # reading a number waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    total = torch.tensor(best, dtype=torch.float64)
    dist.all_reduce(total, group=mesh.world_group)
    return float(total)


def fullest_rank_bytes(mesh: ParallelMesh) -> int:
    """The largest ``peak_bytes`` of all ranks."""
    mine = torch.tensor(peak_bytes(mesh.device))
    dist.all_reduce(mine, dist.ReduceOp.MAX, group=mesh.world_group)
    return int(mine)


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this rank in bytes: allocated on its CUDA device, or resident in its process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _state(record: Record, peak_flops: float) -> str:
    return "  ".join(
        (
            f"loss {record['loss']:.4f}",
            f"{short(record['tokens_per_s'])} tokens/s",
            f"{record['peak_share']:.0%} of {short(peak_flops)}FLOP/s",
            f"{binary(record['memory_bytes'])} a rank",
            f"{binary(record['exchanged_bytes'])} exchanged",
        )
    )


def short(number: int | float) -> str:
    """A number with an SI prefix: 12345 as 12.3k, 3.4e11 as 340 G."""
    power = min(5, max(0, int(math.log10(number) // 3))) if number >= 1 else 0
    return f"{number / 1000**power:.3g}{('', 'k', ' M', ' G', ' T', ' P')[power]}"


def binary(size: int | float) -> str:
    """Bytes with a binary prefix: 2048 as 2 KiB."""
    power = min(4, int(math.log2(size) // 10)) if size >= 1 else 0
    return f"{size / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def clock(seconds: int | float) -> str:
    """Seconds as minutes and hours: 75 as 1:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _is_up_to(step: int, line: str) -> bool:
    """Whether a line is a record of this step or an earlier one; a damaged line is not."""
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False


def _lines(path: Path) -> list[str]:
    """The complete lines of a file: a killed run may leave half of one at the end."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def memory_table(timeline: Timeline, step: int, process_bytes: int | None = None) -> str:
    """The bytes of each category at the peak of a step, a line each, for the terminal.

    ``process_bytes``: the memory of the whole process, where that is what the progress line shows (on the CPU).
    """
    peak, total = timeline.at_peak(), timeline.peak()
    lines = [f"  {name:<14}{size / 2**20:10,.1f} MiB {size / total:7.1%}" for name, size in peak.items()]
    if process_bytes is not None:
        lines.append(
            f"  These are the tensors. The {binary(process_bytes)} a rank of the progress line are the whole process at its "
            f"peak: also Python, PyTorch's libraries and memory that is kept for reuse."
        )
    return "\n".join([f"Memory of rank 0 at the peak of step {step}: {total / 2**20:,.1f} MiB", *lines])

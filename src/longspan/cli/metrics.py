"""Metrics of a run: written to a file, TensorBoard and trackers, shown on the terminal. Independent of model and training.

    record {"step": 42, "loss": 2.31, ...}  --Journal-->  runs/NAME/metrics.jsonl, events.out.tfevents.*
                                            --Display-->  train-001 ━━━━━╸━━━━━━━ step 42/100 0:00:48
                                                          loss 2.3100  11.2k tokens/s  48% of 170 GFLOP/s ...

Only rank 0 (``lead``) writes and shows; the methods of the same objects do nothing on the other ranks.
"""

import errno
import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from longspan.cli.run_folder import lock_run
from longspan.cli.trackers import Tracker, failed, open_tracker
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import RunError
from longspan.memory.profiler import Timeline

METRICS = "metrics.jsonl"
MEMORY = "memory.html"
Record = dict[str, int | float]
"""The metrics of a step by name, with units in the name; ``step`` is one of them."""

PLAIN_LINES = 20
"""About how many progress lines a run prints if its output is not a terminal."""


class Output(Console):
    """A rich console that raises BrokenPipeError if its output is a closed pipe; rich itself exits with code 1."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()  # it discards what is left in the buffers
        raise BrokenPipeError


def output(width: int) -> Console:
    """A console on stdout for tables: as wide as the terminal, or ``width`` columns if the output is not a terminal."""
    return Output(width=None if Output().is_terminal else width)


class Journal:
    """Writes the records of a run to metrics.jsonl and to a TensorBoard event file; no other process can meanwhile. A context
    manager: exit closes it.

    A write error is not raised, because only one rank has it: the attribute ``fault`` becomes a RunError, later writes do
    nothing, and the caller raises ``fault`` on all ranks. It is None as long as every write has succeeded.

    Args:
        folder: the run's folder.
        step: the last step that is done (0 in a new run); records of later steps are removed from metrics.jsonl.
        lead: whether this rank writes.
        trackers: names of experiment trackers (cli/trackers.py) that get each record too.
        settings: settings of the run, which the trackers get too.
    """

    def __init__(
        self, folder: Path, step: int, lead: bool, trackers: tuple[str, ...] = (), settings: Mapping[str, Any] | None = None
    ) -> None:
        self.fault: RunError | None = None
        self._folder, self._lead = folder, lead
        self._trackers: dict[str, Tracker] = {}
        self._is_open = False
        self._lock: int | None = None
        if not lead:
            return
        try:
            self._lock = lock_run(folder)
            path = folder / METRICS
            kept = [line for line in _lines(path) if _is_up_to(step, line)]
            draft = path.with_name(f".{METRICS}")  # a full disk leaves the records of earlier steps whole
            draft.write_text("".join(kept))
            os.replace(draft, path)
            self._file = path.open("ab", buffering=0)
            self._events = _Events(folder, step + 1)
            self._is_open = True
            self._trackers = {name: open_tracker(name, folder.name, settings or {}) for name in trackers}
        except OSError as error:
            self._keep(error)
        except RunError as fault:  # of the lock or a tracker
            self.fault = fault

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def write(self, record: Record) -> None:
        """Append ``record``, which must have a ``step``, as one line of metrics.jsonl and as scalars of TensorBoard; on rank 0
        only.

        A write error is not raised, but kept as ``fault``.
        """
        if not self._lead or self.fault is not None:
            return
        try:
            self._append(json.dumps(record).encode() + b"\n")
            self._events.write(record)
        except OSError as error:
            self._keep(error)
        for name, tracker in self._trackers.items():
            try:
                tracker.log({key: value for key, value in record.items() if key != "step"}, int(record["step"]))
            except Exception as error:  # every client has its own errors
                self.fault = self.fault or failed(name, error)

    def write_memory(self, timeline: Timeline, title: str, about: str) -> None:
        """Write ``timeline`` to memory.html, with the heading ``title`` and the lines ``about`` below it; on rank 0 only.

        A write error is not raised, but kept as ``fault``.
        """
        if not self._lead or self.fault is not None:
            return
        try:
            timeline.plot(self._folder / MEMORY, title, about)
        except OSError as error:
            self._keep(error)

    def close(self) -> None:
        """Flush and close the files and the runs of the trackers, and let another process train the run."""
        for tracker in self._trackers.values():
            tracker.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if not self._is_open:
            return
        try:
            self._file.close()
            self._events.close()
        except OSError as error:
            self._keep(error)

    def _append(self, line: bytes) -> None:
        """Append ``line`` to metrics.jsonl. If the disk takes only a part of it, remove that part and raise OSError."""
        whole = self._file.tell()
        written = self._file.write(line)
        if written != len(line):
            self._file.truncate(whole)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _keep(self, error: OSError) -> None:
        """Turn a write error into the RunError ``fault``, which the caller raises on all ranks."""
        self.fault = RunError(
            f"the metrics of {self._folder} cannot be written: {error.strerror}; make room and go on with --resume, "
            f"or choose another disk with --runs-folder"
        )


class _Events:
    """Writes a TensorBoard event file of scalars. TensorBoard's own writer does not raise on a full disk; this one does.

    Args:
        folder: where the file is made.
        first_step: of earlier event files in ``folder``, TensorBoard ignores this step and later ones.
    """

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
    """Shows the progress of a run: redrawn in place on a terminal, else about PLAIN_LINES lines. A context manager.

    Args:
        name: the run's name.
        steps: the steps of the whole run.
        done: the steps that were done before (0 in a new run).
        lead: whether this rank prints; the others print nothing.
        console: default: stdout.
    """

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
        """Show the record of a step: redraw the progress, or print a line every ``steps / PLAIN_LINES`` steps.

        Args:
            record: the step's metrics by name.
            peak_flops: the FLOP/s of which ``record["peak_share"]`` is a fraction.
        """
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
    """Measure the FLOP/s of square matmuls on all ranks at once, for ``seconds``. Every rank must call it.

    Returns:
        The sum over all ranks of each rank's fastest matmul, equal on every rank.
    """
    size = 1024 if mesh.device.type == "cpu" else 8192
    generator = torch.Generator(mesh.device).manual_seed(0)
    x = torch.randn(size, size, device=mesh.device, generator=generator).to(dtype)  # a GPU is faster on constant numbers
    dist.barrier(group=mesh.world_group)
    best, stop = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # reading a number waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    del x
    if mesh.device.type != "cpu":  # peak_bytes is to be that of the training
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(mesh.device)
    total = torch.tensor(best, dtype=torch.float64, device="cpu")
    dist.all_reduce(total, group=mesh.world_group)
    return float(total)


def fullest_rank_bytes(mesh: ParallelMesh) -> int:
    """The largest peak memory of any rank in bytes, on every rank. Every rank must call it."""
    mine = torch.tensor(peak_bytes(mesh.device), device="cpu")
    dist.all_reduce(mine, dist.ReduceOp.MAX, group=mesh.world_group)
    return int(mine)


def peak_bytes(device: torch.device) -> int:
    """The peak memory of this rank in bytes.

    On an accelerator: what torch has allocated since the speed was measured. On the CPU: what was resident in the process since
    its start.
    """
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _state(record: Record, peak_flops: float) -> str:
    """The line of a step: loss, tokens a second, share of the peak, memory and bytes exchanged."""
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
    """A number with three digits and an SI prefix, from k to P: 12345 as 12.3k, 3.4e11 as 340 G."""
    power = min(5, max(0, int(math.log10(number) // 3))) if number >= 1 else 0
    return f"{number / 1000**power:.3g}{('', 'k', ' M', ' G', ' T', ' P')[power]}"


def binary(size: int | float) -> str:
    """Bytes with three digits and a binary prefix, up to TiB: 2048 as 2 KiB."""
    power = min(4, int(math.log2(size) // 10)) if size >= 1 else 0
    return f"{size / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def clock(seconds: int | float) -> str:
    """Seconds, rounded to whole ones, as M:SS, or H:MM:SS from one hour on: 75 as 1:15, 3675 as 1:01:15, 59.6 as 1:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _is_up_to(step: int, line: str) -> bool:
    """Whether ``line`` is a JSON record with a ``step`` of at most ``step``; False for a damaged line."""
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False


def _lines(path: Path) -> list[str]:
    """The complete lines of the file ``path``, each with its newline; a partial last line is left out. [] if there is no
    file."""
    if not path.exists():
        return []
    return [line for line in path.read_text(errors="replace").splitlines(keepends=True) if line.endswith("\n")]


def memory_table(timeline: Timeline, step: int, process_bytes: int | None = None) -> str:
    """Text for the terminal: the total at the peak of a step, and one line per category with MiB and percent.

    Args:
        timeline: the memory of the step.
        step: its number.
        process_bytes: the peak memory of the whole process, if the progress line shows that (on the CPU); a sentence about the
            difference is added. None: nothing is added.
    """
    peak, total = timeline.at_peak(), timeline.peak()
    lines = [f"  {name:<14}{size / 2**20:10,.1f} MiB {size / total:7.1%}" for name, size in peak.items()]
    if process_bytes is not None:
        lines.append(
            f"  These are the tensors. The {binary(process_bytes)} a rank of the progress line are the whole process at its "
            f"peak: also Python, PyTorch's libraries and memory that is kept for reuse."
        )
    return "\n".join([f"Memory of rank 0 at the peak of step {step}: {total / 2**20:,.1f} MiB", *lines])

"""Memory profiler of a training step: a timeline of its allocations by category, with the peak. Independent of ranks.

    with Recorded(model, optimizer) as recorded:          allocated
        loss = model(**part).loss                              |          peak
        loss.backward()                                        |       ___/\\_    logits, exchange, activations
        optimizer.step()                                       |   ___/      \\___   gradients
    recorded.timeline.at_peak()                                |__/______________\\__   parameters, optimizer
    recorded.timeline.plot("memory.html")                      +------------------------ seconds

PyTorch's profiler reports every allocation with its address and the operators it is made in. The operators' names give its
category; addresses of gradients are recorded when the optimizer's step begins. Memory that was allocated before the step is
counted from model and optimizer. (On CUDA the profiler reports the caching allocator; that has never run on a GPU.)
"""

import html
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longspan import _compat

CATEGORIES = ("parameters", "optimizer", "gradients", "activations", "logits", "exchange")
"""The categories, in the order in which a plot stacks them. "activations" is everything else, including temporaries."""
NAMES = (
    ("longspan::exchange", "exchange"),
    ("longspan::loss", "logits"),
    ("cross_entropy", "logits"),
    ("log_softmax", "logits"),
    ("nll_loss", "logits"),
    ("FSDP::post_backward", "gradients"),
    ("FSDP::", "parameters"),
    ("longspan::mean_gradients", "gradients"),
    ("Optimizer.", "optimizer"),
)
"""(part of an operator's name, category): the first entry that matches an operator around an allocation gives its category."""


FORWARD = "longspan::forward"
"""The event that a hook of the model writes when its forward begins."""
PHASES = (
    (FORWARD, "forward"),
    ("autograd::engine::evaluate_function", "backward"),
    ("Optimizer.step", "update"),
    *((part, "loss") for part, category in NAMES if category == "logits"),
)
"""The phase of a step that an operator belongs to, by a part of its name."""
FOLLOWS = {
    "forward": ("", "backward"),
    "loss": ("", "forward"),
    "backward": ("", "forward", "loss"),
    "update": ("", "backward"),
}
"""The phases after which a phase may begin: a forward inside a backward is recomputation."""
NOISE = (b"SyncActivityProfilerHandler.cpp", b"Memory block of unknown size was allocated", b"gpuGetDeviceCount failed")
"""Lines of PyTorch's profiler on stderr that tell a reader nothing: where it starts and stops, and that there is no GPU."""


class Mark(NamedTuple):
    """The beginning of a phase of the step in a ``Timeline``.

    Attributes:
        when: the time, in nanoseconds of the profiler's clock.
        phase: "forward", "loss", "backward" or "update".
    """

    when: int
    phase: str


class Change(NamedTuple):
    """One allocation or free in a ``Timeline``.

    Attributes:
        when: the time, in nanoseconds of the profiler's clock.
        category: what the memory is for, one of ``CATEGORIES``.
        size: bytes; negative for a free.
    """

    when: int
    category: str
    size: int


@dataclass(frozen=True)
class Timeline:
    """The memory of a training step over time, as ``Recorded`` makes it.

    Args:
        before: bytes of each category before the step.
        changes: every allocation and free during the step, by time.
        marks: where the phases of the step begin.
    """

    before: dict[str, int]
    changes: Sequence[Change]
    marks: Sequence[Mark] = ()

    def peak(self) -> int:
        """The largest number of bytes that were allocated at one time, those from before the step included."""
        return sum(self.at_peak().values())

    def at_peak(self) -> dict[str, int]:
        """{category: its bytes} at the time when most bytes were allocated."""
        now = dict(self.before)
        most, total = dict(now), sum(now.values())
        largest = total
        for _, category, size in self.changes:
            now[category] += size
            total += size
            if total > largest:
                most, largest = dict(now), total
        return most

    def plot(self, path: str | Path, title: str = "Memory of one training step", about: str = "") -> None:
        """Write the timeline as one self-contained HTML page with a stacked plot (MiB over milliseconds).

        Args:
            path: the file to write.
            title: the first line of the page.
            about: the lines below it, such as the options of the run; "" for none.
        """
        import plotly.graph_objects as graph

        start = min([*(change.when for change in self.changes[:1]), *(mark.when for mark in self.marks[:1])], default=0)
        heading = "<br>".join([html.escape(title), *(f"<sup>{html.escape(line)}</sup>" for line in about.splitlines())])
        figure = graph.Figure(layout={"title": heading, "hovermode": "x unified", "margin": {"t": 140}})
        figure.update_xaxes(title="milliseconds").update_yaxes(title="MiB")
        columns = list(self._samples())
        for category in CATEGORIES:
            figure.add_scatter(
                x=[(when - start) / 1e6 for when, _ in columns], y=[now[category] / 2**20 for _, now in columns],
                name=category, stackgroup="memory", line={"shape": "hv", "width": 0},
            )  # fmt: skip
        peak = self.peak() / 2**20
        figure.add_hline(y=peak, line_dash="dot", annotation_text=f"peak {peak:,.1f} MiB", annotation_position="top right")
        for when, phase in self.marks:
            figure.add_vline(x=(when - start) / 1e6, line_dash="dash", line_width=1, annotation_text=phase)
        chart = figure.to_html(full_html=False, default_height="100vh", config={"responsive": True})
        Path(path).write_text(
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f"<style>body {{ margin: 0; overflow: hidden }}</style></head><body>{chart}</body></html>",
            encoding="utf-8",
        )

    def _samples(self, most: int = 4_000) -> Iterator[tuple[int, dict[str, int]]]:
        """Yield at most ``most`` points of the timeline, each a time in nanoseconds and the bytes of each category.

        The changes are divided into groups of consecutive ones, and of each group the point with the most bytes is yielded.
        """
        every = max(1, -(-len(self.changes) // most))
        now = dict(self.before)
        for first in range(0, len(self.changes), every):
            fullest, at = -1, 0
            kept = dict(now)
            for when, category, size in self.changes[first : first + every]:
                now[category] += size
                if sum(now.values()) > fullest:
                    fullest, kept, at = sum(now.values()), dict(now), when
            yield at, kept


class Recorded:
    """Context manager that records every allocation of a training step; ``timeline`` exists after the block.

    The block must contain one ``optimizer.step()``, at whose beginning the gradients are identified.

    Args:
        model: its parameters, buffers and gradients are counted in the memory before the step.
        optimizer: its states are counted too.
        device: the device whose memory is recorded; None: that of the model's first parameter.
    """

    timeline: Timeline

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device | None = None) -> None:
        self._model, self._optimizer = model, optimizer
        first = next(model.parameters(), None)
        self._device = (device or (torch.device("cpu") if first is None else first.device)).type
        self._gradients: set[int] = set()

    def __enter__(self) -> "Recorded":
        self._before = dict.fromkeys(CATEGORIES, 0) | {
            "parameters": _bytes([*self._model.parameters(), *self._model.buffers()], self._device),
            "optimizer": _bytes((x for state in self._optimizer.state.values() for x in state.values()), self._device),
            "gradients": _bytes((parameter.grad for parameter in self._model.parameters()), self._device),
        }
        self._block = ExitStack()
        self._block.enter_context(_without_noise())
        self._profile = self._block.enter_context(torch.profiler.profile(profile_memory=True, acc_events=True))
        for hook in (
            self._optimizer.register_step_pre_hook(self._note_gradients),
            self._model.register_forward_pre_hook(_mark_forward),
        ):
            self._block.callback(hook.remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._block.__exit__(kind, error, trace)
        if error is None:
            tree = _compat.event_tree(self._profile.profiler)
            self.timeline = Timeline(self._before, self._changes(tree), _marks(tree))

    def _note_gradients(self, *_: Any) -> None:
        """Hook of the optimizer's step: store the addresses of the gradients, by which ``_changes`` recognises their memory."""
        self._gradients = {_storage(p.grad) for p in self._model.parameters() if p.grad is not None}

    def _changes(self, tree: Sequence[Any]) -> list[Change]:
        """Every allocation and free in a tree of profiler events, ordered by time.

        Args:
            tree: the root events of PyTorch's profiler; each has the events inside it as ``children``.

        Returns:
            (time in nanoseconds, one of ``CATEGORIES`` by the operator around the event, bytes, negative where freed).
        """
        found = sorted(_allocations(tree, (), self._device))
        stepped = next((when for when, _, _, names in found if any(name.startswith("Optimizer.step") for name in names)), None)
        live: dict[int, tuple[int, int]] = {}
        changes: list[Change] = []
        for when, address, size, names in found:
            if address in live:  # a free, or a new use of memory that another thread freed, which the profiler does not see
                made, freed = live.pop(address)
                if address in self._gradients and (stepped is None or changes[made].when < stepped <= when):
                    changes[made] = changes[made]._replace(category="gradients")
                changes.append(Change(when, changes[made].category, -freed))
            if size > 0:
                live[address] = (len(changes), size)
                changes.append(Change(when, _category(names), size))
        for address, (made, _) in live.items():
            if address in self._gradients:
                changes[made] = changes[made]._replace(category="gradients")
        return changes


def _allocations(
    events: Sequence[Any], names: tuple[str, ...], device_type: str
) -> Iterator[tuple[int, int, int, tuple[str, ...]]]:
    """Yield each allocation and free on one kind of device in a tree of profiler events, not sorted by time.

    Args:
        events: the events of one level.
        names: names of the operators that enclose them.
        device_type: "cpu", or that of an accelerator; a step on one allocates in host memory too, which is another memory.

    Yields:
        (time in nanoseconds, address, size in bytes, names of the enclosing operators); a free has a negative size.
    """
    for event in events:
        if event.tag.name == "Allocation":
            kept = event.typed[1]
            if kept.device.type == device_type:
                yield event.start_time_ns, kept.ptr, kept.alloc_size, names
        else:
            yield from _allocations(event.children, (*names, event.name), device_type)


def _mark_forward(*_: Any) -> None:
    """Forward pre-hook of the model: write the beginning of the forward into the profile."""
    if not torch.compiler.is_compiling():
        with torch.profiler.record_function(FORWARD):
            pass


def _marks(tree: Sequence[Any]) -> list[Mark]:
    """The beginnings of the phases in a tree of profiler events, by time; a phase counts only behind one that it may follow."""
    marks: list[Mark] = []
    for when, phase in sorted(_phases(tree)):
        if (marks[-1].phase if marks else "") in FOLLOWS[phase]:
            marks.append(Mark(when, phase))
    return marks


def _phases(events: Sequence[Any]) -> Iterator[tuple[int, str]]:
    """Yield (time in nanoseconds, phase) for each operator at which a phase of the step may begin.

    The phase is "forward", "loss", "backward" or "update", found from the operator's name. Operators called within it are not
    looked at. The result is not sorted by time.
    """
    for event in events:
        phase = next((phase for part, phase in PHASES if part in event.name), None)
        if phase is not None:
            yield event.start_time_ns, phase
        else:
            yield from _phases(event.children)


@contextmanager
def _without_noise() -> Iterator[None]:
    """Context manager: while the block runs, hold back stderr, also of C++ code; then write it without lines that have
    ``NOISE``."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if not any(noise in line for noise in NOISE):
                    os.write(2, line)


def _category(names: Sequence[str]) -> str:
    """The category of memory that was allocated inside the operators called ``names``; "activations" if none of them is
    known."""
    return next((category for part, category in NAMES if any(part in name for name in names)), "activations")


def _bytes(tensors: Any, device_type: str) -> int:
    """The total bytes of the storages of those of ``tensors`` that are tensors on this kind of device.

    A storage that several share counts once. Of a DTensor, only this rank's shard counts.
    """
    here = (_local(x) for x in tensors if isinstance(x, Tensor) and x.device.type == device_type)
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in here}
    return sum(sizes.values())


def _storage(x: Tensor) -> int:
    """The address of the memory of ``x``; of a DTensor, of this rank's shard."""
    return _local(x).untyped_storage().data_ptr()


def _local(x: Tensor) -> Tensor:
    """This rank's shard if ``x`` is a DTensor; else ``x``."""
    local: Tensor = x.to_local() if isinstance(x, DTensor) else x
    return local

"""Memory profiler of a training step: a timeline of its allocations by category, with the peak. Knows nothing of ranks.

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

from collections.abc import Iterator, Sequence
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
    ("_TiledLoss", "logits"),
    ("cross_entropy", "logits"),
    ("log_softmax", "logits"),
    ("nll_loss", "logits"),
    ("FSDP::post_backward", "gradients"),
    ("FSDP::", "parameters"),
    ("longspan::mean_gradients", "gradients"),
    ("Optimizer.", "optimizer"),
)
"""(part of an operator's name, category): the first entry that matches an operator around an allocation gives its category."""


class Change(NamedTuple):
    """One allocation (positive ``size`` in bytes) or free (negative), at ``when`` in nanoseconds of the profiler's clock."""

    when: int
    category: str
    size: int


@dataclass(frozen=True)
class Timeline:
    """The memory of a step: bytes by category before it, and every allocation and free in it."""

    before: dict[str, int]
    changes: Sequence[Change]

    def peak(self) -> int:
        """The largest number of bytes allocated at one time."""
        return sum(self.at_peak().values())

    def at_peak(self) -> dict[str, int]:
        """The bytes of each category at the time of the peak."""
        now = dict(self.before)
        most, total = dict(now), sum(now.values())
        largest = total
        for _, category, size in self.changes:
            now[category] += size
            total += size
            if total > largest:
                most, largest = dict(now), total
        return most

    def plot(self, path: str | Path) -> None:
        """Write the timeline to ``path`` as one self-contained HTML page with a stacked plot (MiB over milliseconds)."""
        import plotly.graph_objects as graph

        start = self.changes[0].when if self.changes else 0
        figure = graph.Figure(layout={"title": "Memory of one training step", "hovermode": "x unified"})
        figure.update_xaxes(title="milliseconds").update_yaxes(title="MiB")
        columns = list(self._samples())
        for category in CATEGORIES:
            figure.add_scatter(
                x=[(when - start) / 1e6 for when, _ in columns], y=[now[category] / 2**20 for _, now in columns],
                name=category, stackgroup="memory", line={"shape": "hv", "width": 0},
            )  # fmt: skip
        figure.write_html(path)

    def _samples(self, most: int = 4_000) -> Iterator[tuple[int, dict[str, int]]]:
        """At most ``most`` points (time, bytes by category) for a plot: the highest of each group of consecutive changes."""
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
    """

    timeline: Timeline

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._gradients: set[int] = set()

    def __enter__(self) -> "Recorded":
        self._before = dict.fromkeys(CATEGORIES, 0) | {
            "parameters": _bytes([*self._model.parameters(), *self._model.buffers()]),
            "optimizer": _bytes(x for state in self._optimizer.state.values() for x in state.values()),
            "gradients": _bytes(parameter.grad for parameter in self._model.parameters()),
        }
        self._hook = self._optimizer.register_step_pre_hook(self._note_gradients)
        self._profile = torch.profiler.profile(profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hook.remove()
        self._profile.__exit__(kind, error, trace)
        if error is None:
            self.timeline = Timeline(self._before, self._changes())

    def _note_gradients(self, *_: Any) -> None:
        self._gradients = {_storage(p.grad) for p in self._model.parameters() if p.grad is not None}

    def _changes(self) -> list[Change]:
        profiler: Any = self._profile.profiler
        found = sorted(_allocations(_compat.event_tree(profiler), ()))
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


def _allocations(events: Sequence[Any], names: tuple[str, ...]) -> Iterator[tuple[int, int, int, tuple[str, ...]]]:
    """(time, address, size, names of the enclosing operators) of every allocation and free in a tree of profiler events."""
    for event in events:
        if event.tag.name == "Allocation":
            kept = event.typed[1]
            yield event.start_time_ns, kept.ptr, kept.alloc_size, names
        else:
            yield from _allocations(event.children, (*names, event.name))


def _category(names: Sequence[str]) -> str:
    return next((category for part, category in NAMES if any(part in name for name in names)), "activations")


def _bytes(tensors: Any) -> int:
    """The bytes of the storages of ``tensors``, each storage counted once (tied weights share one)."""
    sizes = {_storage(x): _local(x).untyped_storage().nbytes() for x in tensors if isinstance(x, Tensor)}
    return sum(sizes.values())


def _storage(x: Tensor) -> int:
    return _local(x).untyped_storage().data_ptr()


def _local(x: Tensor) -> Tensor:
    local: Tensor = x.to_local() if isinstance(x, DTensor) else x
    return local

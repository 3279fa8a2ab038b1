"""Where the memory of a step goes: every allocation while it runs, by what it is for. Knows nothing of ranks or layouts.

    with Recorded(model, optimizer) as recorded:          allocated
        loss = model(**part).loss                              |          peak
        loss.backward()                                        |       ___/\\_    logits, exchange, activations
        optimizer.step()                                       |   ___/      \\___   gradients
    recorded.timeline.at_peak()                                |__/______________\\__   parameters, optimizer
    recorded.timeline.plot("memory.html")                      +------------------------ seconds

PyTorch's profiler reports every allocation with the operators that it is made under; their names say what it is for, and the
address, what is still there when the gradients are complete. What has been there before is counted from model and optimizer.
(On CUDA the profiler reports those of the caching allocator; that has never run on a GPU.)
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
"""In the order in which a plot stacks them. Activations are whatever is nothing else, temporary results among them."""
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
"""What an allocation is for, by the name of any operator that it is made under; the first that fits."""


class Change(NamedTuple):
    """Bytes that were allocated, or freed where they are negative, in nanoseconds of the profiler's clock."""

    when: int
    category: str
    size: int


@dataclass(frozen=True)
class Timeline:
    """A step: what was there when it began, by category, and every change."""

    before: dict[str, int]
    changes: Sequence[Change]

    def peak(self) -> int:
        """The most bytes that were there at once."""
        return sum(self.at_peak().values())

    def at_peak(self) -> dict[str, int]:
        """The bytes of each category when most were there."""
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
        """Write the timeline as a page that a browser shows, complete in one file."""
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
        """At most so many moments: of each run of changes the fullest."""
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
    """A block in which every allocation is written down; ``timeline`` is there when it ends.

    The optimizer's step tells which tensors are gradients, so the block holds one.
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
            if address in live:  # a free, or memory that another thread had freed, which the profiler does not see
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
    """When, where, how much, and the operators that it is made under."""
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

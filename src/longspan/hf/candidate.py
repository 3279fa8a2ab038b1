"""The model that is to become parallel, and the protocol of everything in which it deviates from a plain token-wise model.

    for each deviation, in one order:   found = deviation.probe(candidate)          None: the model does not deviate so
    then, in the same order:            undo = found.install(model, mesh)

A probe runs on one rank, changes nothing and has no collective; it raises for a model that cannot be parallel. What a probe
found is open to those behind it (``Candidate.finding``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from longspan.distributed.mesh import ParallelMesh
from longspan.kernels.protocol import Kernel
from longspan.kernels.user_function import KernelFunction
from longspan.memory.options import MemoryOptions

Undo = Callable[[], None]
"""Takes back what an ``install`` did."""
F = TypeVar("F")


@runtime_checkable
class Found(Protocol):
    """What a probe found, and how the model is changed for it."""

    def install(self, model: Any, mesh: ParallelMesh) -> Undo:
        """Change ``model`` (inside an adapter's wrapper, where there is one) in place for ``mesh``; returns the way back."""
        ...


@runtime_checkable
class Deviation(Protocol):
    """A file of this folder that knows one way in which models deviate."""

    def probe(self, candidate: "Candidate", /) -> Found | None:
        """What is found of it in the candidate. Raises LongspanError, by name, for what cannot be parallel."""
        ...


@dataclass(frozen=True)
class Candidate:
    """A Transformers model with the options that ``parallelize`` was given.

    Attributes:
        called: what the user calls: the model, or peft's wrapper of it.
        model: the Transformers model itself, whose configs name longspan's attention while it is probed.
        mesh: the ranks it will run on.
        memory: the options that save memory.
        kernel: what attention computes with: a name, "hf:" and a name of Transformers' registry, a Kernel or a function.
        configs: every module that has a config, with the config that the user gave.
        findings: what the probes found so far, by type.
    """

    called: Any
    model: Any
    mesh: ParallelMesh
    memory: MemoryOptions
    kernel: str | Kernel | KernelFunction
    configs: Sequence[tuple[Any, Any]]
    findings: dict[type[Any], Any] = field(default_factory=dict)

    def finding(self, kind: type[F]) -> F | None:
        """What an earlier probe found, by its type."""
        return self.findings.get(kind)


def remove_all(handles: Sequence[Any]) -> Undo:
    """The way back from hooks: removes each."""

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo

"""The protocol of deviations: how a file of this folder tests and changes a model that is not plainly token-wise.

    for each deviation, in one order:   found = deviation.probe(candidate)          None: the model does not deviate so
    then, in the same order:            undo = found.install(model, mesh)

A candidate is the model before it is changed. A probe runs on one rank, changes nothing and has no collective; it raises for a
model that cannot be parallel. Later probes can read what it returned, its finding (``Candidate.finding``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from longspan.distributed.mesh import ParallelMesh
from longspan.kernels.protocol import Kernel
from longspan.kernels.user_function import KernelFunction
from longspan.memory.options import MemoryOptions

Undo = Callable[[], None]
"""A function that removes what an ``install`` changed."""
F = TypeVar("F")


@runtime_checkable
class Found(Protocol):
    """What a ``probe`` found out about a model; ``install`` later changes the model accordingly."""

    def install(self, model: Any, mesh: ParallelMesh) -> Undo:
        """Change ``model`` in place so that it computes over ``mesh``.

        Args:
            model: the Transformers model itself, also if peft wraps it.
            mesh: the ranks.

        Returns:
            A function that undoes the change.
        """
        ...


@runtime_checkable
class Deviation(Protocol):
    """The interface of the files of this folder that each handle one way in which some Transformers models differ.

    DEVIATIONS in adapter.py lists these files, in the order in which they are probed and installed.
    """

    def probe(self, candidate: "Candidate", /) -> Found | None:
        """Test whether the model in ``candidate`` differs in the way that this file handles. Changes nothing.

        Returns:
            What was found, to be installed later; None if the model does not differ in this way.

        Raises:
            LongspanError: the model cannot be parallel; the message names the module or config field.
        """
        ...


@dataclass(frozen=True)
class Candidate:
    """A Transformers model before it is made parallel, with the options of ``parallelize``: what every ``probe`` is given.

    Attributes:
        called: what the user calls: the model, or peft's wrapper of it.
        model: the Transformers model itself, whose configs name longspan's attention while it is probed.
        mesh: the ranks it will run on.
        memory: the options that save memory.
        kernel: what attention computes with: a name, "hf:" and a name of Transformers' registry, a Kernel or a function.
        configs: every module that has a config, with the config that the user gave.
        findings: {class: what the probe that returned an object of that class found}, of the probes so far.
    """

    called: Any
    model: Any
    mesh: ParallelMesh
    memory: MemoryOptions
    kernel: str | Kernel | KernelFunction
    configs: Sequence[tuple[Any, Any]]
    findings: dict[type[Any], Any] = field(default_factory=dict)

    def finding(self, kind: type[F]) -> F | None:
        """What an earlier one of the model's probes (the tuple of ``hf/adapter.py``) found, as the ``kind`` that it returned.

        None if that probe found nothing or has not run yet.
        """
        return self.findings.get(kind)


def remove_all(handles: Sequence[Any]) -> Undo:
    """A function that calls ``remove()`` of each of ``handles``, in their order."""

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo

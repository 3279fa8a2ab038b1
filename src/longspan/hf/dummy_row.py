"""A dummy row without labels for a data replica that has no row in a step, so that it joins every collective.

    no row   --add-->   one row of zeros, labelled -100   --model-->   logits of it   --remove-->   no row

Layers reshape by -1, which fails on a tensor without elements; so the model computes one row. Independent of attention.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from longspan.batch.dummy_rows import with_dummy_rows
from longspan.distributed.mesh import ParallelMesh
from longspan.hf.candidate import Candidate, Undo, remove_all


@dataclass(frozen=True)
class DummyRow:
    """Gives the model a row of zeros with labels -100 in each call without rows. Installed in every model."""

    def install(self, model: nn.Module, mesh: ParallelMesh) -> Undo:
        """Register hooks: a call of ``model`` without rows gets one row of zeros, which is removed from the outputs again.

        Returns:
            A function that removes the hooks.
        """
        return remove_all([
            model.register_forward_pre_hook(_add, with_kwargs=True), model.register_forward_hook(_remove, with_kwargs=True)
        ])  # fmt: skip


def probe(candidate: Candidate) -> DummyRow:
    """A DummyRow, which every model gets."""
    return DummyRow()


def _add(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: in a call without rows, replace its empty tensors by one row of zeros (labels: -100), and its
    BatchInfo."""
    return args, with_dummy_rows(kwargs)


def _remove(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook: remove the row that ``_add`` added from every tensor of the output."""
    if kwargs["longspan"].is_dummy:
        for name, value in output.items():
            if isinstance(value, Tensor) and value.ndim:
                output[name] = value[:0].clone()  # FSDP2 hooks outputs, which may be no views
    return output

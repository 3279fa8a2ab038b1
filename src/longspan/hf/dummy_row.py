"""A replica without rows joins every collective of the others, by a row that nobody learns from. Knows nothing of attention.

    no row   --stand_in-->   one row of zeros, labelled -100   --model-->   logits of it   --take_out-->   no row

Layers reshape by -1, which no tensor without elements can answer; so the model computes one row.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from longspan.batch.context import BatchInfo
from longspan.batch.shard import IGNORE


class StandIn(BatchInfo):
    """The step of a replica without rows."""


def stand_in(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A hook before the model's forward: where no row is given, one."""
    step = kwargs.get("longspan")
    if step is None or step.rows:
        return args, kwargs
    row = {
        name: value.new_full([size or 1 for size in value.shape], IGNORE if "labels" in name else 0)
        for name, value in kwargs.items()
        if isinstance(value, Tensor) and value.numel() == 0
    }
    alone: dict[str, Any] = {"rows": 1, "mask": None, "padding": None, "documents": None, "restarts": None}
    target = step.target if step.target is None else replace(step.target, **alone)
    return args, kwargs | row | {"longspan": StandIn(**vars(step) | alone | {"target": target})}


def take_out(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A hook behind it: where no row was given, none is returned."""
    if isinstance(kwargs["longspan"], StandIn):
        for name, value in output.items():
            if isinstance(value, Tensor) and value.ndim:
                output[name] = value[:0].clone()  # FSDP2 hooks outputs, and wants none to be a view
    return output

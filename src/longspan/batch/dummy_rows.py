"""Dummy rows without labels for a part without rows, so that its replica joins every collective and exchange of the others.

part of no row   --with_dummy_rows-->   rows of zeros, labelled -100: nobody learns from them
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from longspan.batch.context import BatchInfo, Part
from longspan.batch.labels import IGNORE


def with_dummy_rows(part: Mapping[str, Any], rows: int = 1) -> Part:
    """A copy of ``part`` in which ``rows`` rows of zeros (labels: -100) replace empty tensors, and a BatchInfo of such rows.

    A part with rows, or without a BatchInfo, is copied as it is.
    """
    step = part.get("longspan")
    if not isinstance(step, BatchInfo) or step.rows:
        return dict(part)
    filled = {
        name: value.new_full([size or rows for size in value.shape], IGNORE if "labels" in name else 0)
        for name, value in part.items()
        if isinstance(value, Tensor) and value.numel() == 0
    }
    alone: dict[str, Any] = {"rows": rows, "mask": None, "padding": None, "documents": None, "restarts": None}
    target = step.target if step.target is None else replace(step.target, **alone)
    return {**part, **filled, "longspan": replace(step, **alone, is_dummy=True, target=target)}


def fill_empty_parts(parts: Sequence[Mapping[str, Any]]) -> list[Part]:
    """Copies of the micro-batches of a step, in which those without rows have as many dummy rows as the others have rows, and
    one if none has any."""
    steps = [step for part in parts if isinstance(step := part.get("longspan"), BatchInfo)]
    return [with_dummy_rows(part, max([1, *(step.rows for step in steps)])) for part in parts]

"""The uncertainty of a prediction: the median error of the formulas on published runs of the nearest kind of layout.

Half of those runs were predicted worse. A kind without published runs has the error of the nearest kind that has some, which
says little of it; the text beside the number says so.

strategy  ->  kind: offload | model | sequence | data  ->  the source of that kind with the largest error (published_errors.py)
"""

from typing import Any

import numpy as np

from longspan.planner.closed_forms import Number
from longspan.planner.published_errors import MEMORY, STEP_TIME, Row
from longspan.planner.strategy import Strategy

KINDS = ("offload", "model", "sequence", "data")
"""What decides the kind of a layout, the first that holds: optimizer states or parameters on the host; tensor or pipeline > 1;
ulysses or ring > 1; none of them."""


RUNS = {
    "offload": "runs with offload",
    "model": "tensor- or pipeline-parallel runs",
    "sequence": "sequence-parallel runs",
    "data": "data-parallel runs",
}
"""What the published runs of a kind are called."""


def kind(strategy: Strategy) -> str:
    """The name in ``KINDS`` of the kind of layout that ``strategy`` is."""
    if strategy.offload_optimizer or strategy.offload_parameters:
        return "offload"
    if strategy.tensor * strategy.pipeline > 1:
        return "model"
    return "sequence" if strategy.ring * strategy.ulysses > 1 else "data"


def time_error(strategy: Strategy) -> tuple[float, str]:
    """The uncertainty of the step time that is predicted for ``strategy``.

    Returns:
        (median relative error, what it is the error of, as text).
    """
    return _largest(STEP_TIME, kind(strategy))


def memory_error(strategy: Strategy) -> tuple[float, str]:
    """The uncertainty of the memory that is predicted for ``strategy``.

    Returns:
        (median relative error, what it is the error of, as text).
    """
    return _largest(MEMORY, kind(strategy))


def memory_bound(s: Any) -> Number:
    """How many times the predicted memory a device must have for a strategy ``s`` to fit: 1 + the error of the prediction.

    The fields of ``s`` are numbers, or arrays of them.
    """
    of = {name: 1 + _largest(MEMORY, name)[0] for name in KINDS}
    is_offload = np.asarray(s.offload_optimizer, dtype=bool) | np.asarray(s.offload_parameters, dtype=bool)
    on_devices = np.where(s.ring * s.ulysses > 1, of["sequence"], of["data"])
    return np.where(is_offload, of["offload"], np.where(s.tensor * s.pipeline > 1, of["model"], on_devices))


def _largest(rows: tuple[Row, ...], wanted: str) -> tuple[float, str]:
    """The row of the kind ``wanted``, or of the nearest kind that has rows, with the largest error, as (error, text)."""
    nearest = next(name for name in (wanted, *KINDS[1:], KINDS[0]) if any(row[0] == name for row in rows))
    _, source, runs, error = max((row for row in rows if row[0] == nearest), key=lambda row: row[3])
    text = f"the median error of {runs} runs of {source}" if runs > 1 else f"the error of one run of {source}"
    if nearest == wanted:
        return error, text
    return error, (
        f"{text}; no published run of this kind: the error is that of {RUNS[nearest]}, and may be several times as large"
    )

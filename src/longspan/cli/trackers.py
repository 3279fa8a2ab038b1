"""Experiment trackers that ``longspan train --log-to`` writes the records of a run to: wandb, trackio, mlflow.

    record {"step": 42, "loss": 2.31, ...}   ->   the tracker's own client, on rank 0, beside metrics.jsonl and TensorBoard

None of them is a dependency: the one that is asked for must be installed. Keys, servers and offline modes are the client's own
settings (WANDB_MODE, MLFLOW_TRACKING_URI, ...). The project is called "longspan", the run as its folder.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from longspan.errors import RunError

PROJECT = "longspan"
NAMES = ("wandb", "trackio", "mlflow")


class Tracker(NamedTuple):
    """An open run of a tracker: ``log(metrics, step)`` and ``close()``."""

    log: Callable[[dict[str, float], int], object]
    close: Callable[[], object]


def refuse_missing(names: tuple[str, ...]) -> None:
    """Raise RunError for a name that is no tracker, or one that is not installed; the message has the line that installs it."""
    for name in names:
        if name not in NAMES:
            raise RunError(f"log_to={name!r} is unknown; legal are {', '.join(NAMES)} (TensorBoard is always written)")
        if find_spec(name) is None:
            raise RunError(f"log_to={name!r} needs {name}, which is not installed; pip install {name}, or leave it out")


def open_tracker(name: str, run: str, settings: Mapping[str, Any]) -> Tracker:
    """Open a run of the tracker ``name``, one of ``NAMES``.

    Args:
        name: the tracker.
        run: the run's name; resumed under the same name.
        settings: the settings of the run, by name.

    Raises:
        RunError: the tracker's client raised; the message has its reason.
    """
    try:
        client: Any = import_module(name)
        if name == "mlflow":
            client.set_experiment(PROJECT)
            client.start_run(run_name=run)
            client.log_params(dict(settings))
            return Tracker(lambda metrics, step: client.log_metrics(metrics, step=step), client.end_run)
        opened = client.init(project=PROJECT, name=run, config=dict(settings))
        return Tracker(lambda metrics, step: opened.log(metrics, step=step), opened.finish)
    except Exception as error:  # every client has its own errors
        raise failed(name, error) from error


def failed(name: str, error: Exception) -> RunError:
    """The RunError of what a tracker's client raised."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return RunError(f"{name} did not take the records of the run: {reason}; mend its settings, or leave --log-to {name} out")

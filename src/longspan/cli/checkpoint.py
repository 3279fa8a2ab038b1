"""Sharded, atomic checkpoints of a training run (PyTorch distributed checkpoint). Independent of the loss and the data.

    runs/NAME/checkpoints/
        .step-000150        a draft that every rank is writing its shards to
        step-000100/        complete, renamed from its draft:  .metadata  __0_0.distcp  __1_0.distcp ...  run.json
        latest              the name of the newest complete checkpoint, replaced last

A checkpoint can be loaded on any number of ranks and under any ZeRO stage. ``run.json`` holds what is not a tensor (step,
model description, data, settings) and is read without loading a tensor.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from longspan.cli.settings_file import LATEST, settings_of_run
from longspan.distributed.consensus import raise_together
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import RunError
from longspan.integrations.state_dict import load_sharded_state, read_sharded_state, sharded_state

FACTS = "run.json"


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
    mesh: ParallelMesh,
    keep: int,
) -> None:
    """Write the checkpoint of a step, then remove all but the newest ``keep`` of the run. Every rank must call it.

    Args:
        run: the run's folder.
        step: names the checkpoint's folder, ``checkpoints/step-NNNNNN``; an existing one is replaced.
        model: its weights are saved.
        optimizer: its states are saved.
        facts: what ``run.json`` will hold; must be convertible to JSON.
        mesh: the ranks.
        keep: the number of checkpoints to keep, at least 1.

    Raises:
        RunError: a rank cannot write (full disk, quota); raised on every rank, and the draft is removed.
    """
    folder = run / "checkpoints"
    written, final = folder / f".step-{step:06d}", folder / f"step-{step:06d}"
    tensors = sharded_state(model, optimizer)
    with _all_or_none(written, mesh):
        if dist.get_rank() == 0:
            shutil.rmtree(written, ignore_errors=True)
            written.mkdir(parents=True)
    with _all_or_none(written, mesh):
        save_tensors(tensors, checkpoint_id=written)
    with _all_or_none(written, mesh):
        if dist.get_rank() == 0:
            _write(written / FACTS, json.dumps(facts, indent=2) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            os.replace(written, final)
            _write(folder / LATEST, final.name + "\n")
            for old in sorted(folder.glob("step-*"), key=_step_of)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)


def _step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder, step-NNNNNN."""
    return int(path.name.removeprefix("step-"))


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load the weights of the checkpoint in the folder ``path`` into ``model``, in place.

    Every rank must call it; a process without a process group can too.

    Args:
        path: the checkpoint.
        model: gets the weights.
        optimizer: gets its states, and torch's random states (the CPU's, and on a GPU each rank's own) are restored too, so
            that on a CPU a resumed run continues bit for bit; None: the weights alone.

    Raises:
        RunError: the checkpoint is damaged.
    """
    tensors = {"model": get_model_state_dict(model)} if optimizer is None else sharded_state(model, optimizer)
    try:
        read_sharded_state(tensors, path)
    except (CheckpointException, RuntimeError) as error:
        raise RunError(f"the checkpoint {path} cannot be read: {_cause(error)}; use another one, or start a new run") from error
    if optimizer is None:
        set_model_state_dict(model, tensors["model"])
    else:
        load_sharded_state(model, optimizer, tensors)


def facts(path: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """The contents of ``run.json`` of the checkpoint in the folder ``path``: what ``save`` was given as ``facts``.

    Raises:
        RunError: it cannot be read, or lacks ``step`` or one of the names in ``needed``.
    """
    try:
        held: dict[str, Any] = json.loads((path / FACTS).read_text())
        for name in ("step", *needed):
            held[name]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"the checkpoint {path} is damaged: its {FACTS} cannot be read; use another one") from error
    return held


def newest(run: Path) -> Path | None:
    """The folder of the newest complete checkpoint of the run in the folder ``run``; None if there is none yet.

    Raises:
        RunError: the file that names it is damaged.
    """
    folder = run / "checkpoints"
    try:
        return folder / (folder / LATEST).read_text().strip()
    except OSError:
        return None
    except ValueError as error:
        there = ", ".join(path.name for path in sorted(folder.glob("step-*"), key=_step_of))
        raise RunError(
            f"{folder / LATEST} is damaged, and should hold the name of a checkpoint; write one of these into it: {there}"
        ) from error


def find(name: str, runs_folder: str) -> Path:
    """The folder of the checkpoint that ``name`` means.

    Args:
        name: a checkpoint's folder, a run's folder, the name of a run in ``runs_folder``, or ``latest`` (the run started
            last). For a run it is the newest checkpoint.
        runs_folder: the folder of all runs.

    Raises:
        RunError: there is no such run, or it has no checkpoint yet.
    """
    if (Path(name) / FACTS).is_file():
        return Path(name)
    is_run = (Path(name) / "config.json").is_file()
    run = Path(name) if is_run else Path(runs_folder, settings_of_run(runs_folder, name)[0])
    path = newest(run)
    if path is None:
        raise RunError(f"the run {run} has no checkpoint yet; go on with it: longspan train --resume {run.name}")
    return path


def refuse_differences(path: Path, what: str, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raise RunError if a field of ``mine`` has another value in ``theirs``; the message lists the fields and both values.

    Args:
        path: the checkpoint, for the message.
        what: ``"model"``, ``"text"`` or ``"optimizer"``, for the message.
        theirs: this part of the checkpoint's ``run.json``.
        mine: the same part of this run.
    """
    different = [name for name in mine if theirs.get(name) != mine[name]]
    if different:
        listed = ", ".join(f"{name} is {theirs.get(name)}, not {mine[name]}" for name in different)
        raise RunError(f"the checkpoint {path} is of another {what}: {listed}; ask for its own {what}, or start another run")


@contextmanager
def _all_or_none(written: Path, mesh: ParallelMesh) -> Iterator[None]:
    """Context manager: a write error of one rank in the block is raised on every rank as the same RunError.

    Every rank must enter it; exit waits for all of them. After an error the draft folder ``written`` is removed.
    """

    def convert(found: BaseException) -> RunError | None:
        if not isinstance(found, OSError | CheckpointException | RuntimeError):
            return None
        full = written.parent.exists() and shutil.disk_usage(written.parent).free < 2**20
        cause = os.strerror(errno.ENOSPC) if full else _cause(found)  # torch's writer reports a full disk as a wrong position
        return RunError(
            f"the checkpoint {written.parent / written.name[1:]} cannot be written: {cause}; make room, or choose another disk "
            f"with --runs-folder; earlier checkpoints are whole"
        )

    def undo() -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(written, ignore_errors=True)

    with raise_together(mesh.world_group, convert, undo):
        yield


def _cause(error: BaseException) -> str:
    """One line about an error for a message: the text of the operating system if it is an OSError, else its first line.

    A CheckpointException, which holds an error for each rank, is replaced by the first of these.
    """
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)


def _write(path: Path, text: str) -> None:
    """Write ``text`` to the file ``path``, which holds the old text or the new one at any moment; on return it is on the
    disk."""
    draft = path.with_name(f".{path.name}")
    with open(draft, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)

"""The folder of a run: made under a name that is free, or found again where the run is resumed.

    runs/.NAME-uuid/config.json   a draft   --renamed-->   runs/NAME/config.json,   and the name in runs/latest

A folder that is renamed replaces no other one that holds files, so that of two commands which choose one name at the same time
one gets it; the other takes the next free name, or is refused if it asked for this one. While a run writes there, its process
holds a lock on runs/NAME/.lock, which the kernel releases when the process ends.

Independent of what the run does.
"""

import errno
import fcntl
import os
import shutil
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import torch.distributed as dist

from longspan.cli.config import Train
from longspan.cli.settings_file import LATEST, as_json
from longspan.distributed.consensus import raise_together
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import RunError

LOCK = ".lock"


def lock_run(folder: Path) -> int:
    """Lock the run in ``folder`` against other processes until the returned file descriptor is closed.

    On a file system without locks nothing is locked.

    Raises:
        RunError: another process has locked it.
        OSError: the file of the lock cannot be made.
    """
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise RunError(
            f"the run {folder} is being trained by another process; wait until that has ended, or start another run"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return lock


def open_run(config: Train, mesh: ParallelMesh) -> Path:
    """The folder of the run, equal on every rank; rank 0 makes it for a new run. Every rank must call it.

    Raises:
        RunError: the name exists already, or the folder cannot be made; raised on every rank.
    """
    names = [""]
    with raise_together(mesh.world_group):
        if dist.get_rank() == 0:
            names = [config.run if config.resume else _new_run(config)]
    dist.broadcast_object_list(names, group=mesh.world_group, group_src=0)
    return Path(config.runs_folder, names[0])


def _new_run(config: Train) -> str:
    """Make the folder of a new run with its config.json, on rank 0; returns the run's name.

    Raises:
        RunError: the name exists already, or the folder cannot be made.
    """
    runs = Path(config.runs_folder)
    try:
        runs.mkdir(parents=True, exist_ok=True)
        name = config.run or _next_free(runs)
        while not _make(runs, replace(config, run=name)):
            if config.run:
                raise RunError(f"the run {runs / name} exists; go on with --resume {name}, or name another one with --run")
            name = _next_free(runs)
        (runs / LATEST).write_text(name + "\n")
    except OSError as error:
        raise RunError(
            f"the folder of the run cannot be made in {runs}: {error.strerror}; make room, or choose another disk with "
            f"--runs-folder"
        ) from error
    return name


def _make(runs: Path, config: Train) -> bool:
    """Make the folder of the run ``config.run`` in ``runs``, with its config.json; False if there is one of that name."""
    final = runs / config.run
    if final.exists():
        return False
    draft = runs / f".{config.run}-{uuid4().hex}"
    draft.mkdir()
    try:
        (draft / "config.json").write_text(as_json(config))
        os.rename(draft, final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another command was faster
            return False
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return True


def _next_free(runs: Path) -> str:
    """The first of train-001, train-002, ... that is not a folder in ``runs``."""
    taken = {path.name for path in runs.iterdir()}
    return next(name for number in range(1, len(taken) + 2) if (name := f"train-{number:03}") not in taken)

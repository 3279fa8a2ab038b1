"""Starts ranks as separate processes, as a launcher does: each with its own environment variables."""

import os
import random
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.helpers.processes import end, start

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("SLURM", "PMI", "MPI", "OMPI", "PET_", "RANK", "WORLD", "LOCAL", "MASTER")
"""Prefixes of the environment variables of launchers; processes that are started here do not inherit such variables."""


def started(environments: Sequence[dict[str, str]], command: Sequence[str], folder: Path) -> list[tuple[int, str]]:
    """Run ``command`` in ``folder`` once for each environment, all at the same time, with a limit of 240 s.

    Returns:
        (exit code, stdout and stderr) of each, in the order of ``environments``.
    """
    base = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    base |= {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    running = [start(command, env=base | one, cwd=folder) for one in environments]
    try:
        outputs = ["".join(process.communicate(timeout=240)) for process in running]
    finally:
        for process in running:
            end(process)
    return [(process.returncode, output) for process, output in zip(running, outputs)]


def srun_tasks(tasks: int, **others: str) -> list[dict[str, str]]:
    """The environments of the tasks of a Slurm job on this machine, each with the variables ``others`` too."""
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": str(tasks), **others}
    return [job | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(tasks)]


def free_port() -> str:
    """The number, as text, of a TCP port of this machine that no process uses.

    It is below those that the system gives to outgoing connections, one of which could take it before a rank listens.
    """
    for port in random.SystemRandom().sample(range(20_000, 29_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)
    raise RuntimeError("no port between 20,000 and 29,000 is free")

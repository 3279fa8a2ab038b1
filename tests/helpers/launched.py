"""Ranks that are processes of their own, as a launcher starts them: an environment each, and what they return and print."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.processes import end, start

LAUNCHERS = ("SLURM", "PMI", "MPI", "OMPI", "RANK", "WORLD", "LOCAL", "MASTER")
"""How the variables of launchers begin, which a process that is started here must not inherit."""


def started(environments: Sequence[dict[str, str]], command: Sequence[str], folder: Path) -> list[tuple[int, str]]:
    """Run ``command`` in ``folder`` once for each environment, all at once; the exit code and output of each."""
    base = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    base |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = [start(command, env=base | one, cwd=folder) for one in environments]
    try:
        outputs = ["".join(process.communicate(timeout=240)) for process in running]
    finally:
        for process in running:
            end(process)
    return [(process.returncode, output) for process, output in zip(running, outputs)]


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])

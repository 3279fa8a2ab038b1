"""Ranks on several hosts: one torchrun in each network namespace, and the end of all of them when one fails."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from benchmarks.hosts.namespaces import INTERFACE, Hosts

ROOT = Path(__file__).parents[2]
PORT = 29_500


def torchrun(hosts: Hosts, host: int, ranks_per_host: int, program: Sequence[str], *, elastic: bool = False) -> list[str]:
    """The command that starts the ranks of one host.

    Args:
        hosts: all hosts.
        host: this one.
        ranks_per_host: its ranks.
        program: what a rank runs, as torchrun takes it: ``-m MODULE ARGUMENTS`` or ``--no-python PROGRAM ARGUMENTS``.
        elastic: meet by torchrun's c10d rendezvous. Without it host numbers are fixed, and the agents send nothing meanwhile.
    """
    master = hosts.address(0)
    # torchrun looks for its own host in the names of the machine, which all hosts here share: so it is given
    meeting = (
        ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{master}:{PORT}", "--rdzv-conf", f"is_host={int(host == 0)}"]
        if elastic
        else ["--node-rank", str(host), "--master-addr", master, "--master-port", str(PORT)]
    )
    ranks = ["--nnodes", str(len(hosts.names)), "--nproc-per-node", str(ranks_per_host), "--local-addr", hosts.address(host)]
    return hosts.command(host, [sys.executable, "-m", "torch.distributed.run", *ranks, *meeting, *program])


def environment() -> dict[str, str]:
    """The environment of the ranks: gloo on the interface of their host, one thread each, the modules of this checkout."""
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def run(hosts: Hosts, ranks_per_host: int, program: Sequence[str], *, timeout: float) -> None:
    """Run ``program`` on every host until all ranks have ended.

    Raises:
        RuntimeError: a host's torchrun failed, or they took longer than ``timeout`` seconds; all ranks have been ended.
    """
    running: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        logs = [stack.enter_context(TemporaryFile()) for _ in hosts.names]
        stack.callback(_reap, running)
        stack.callback(hosts.end_processes)
        for host, log in enumerate(logs):
            command = torchrun(hosts, host, ranks_per_host, program)
            running.append(subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=log, stderr=log))
        _wait(running, logs, time.monotonic() + timeout)


def _reap(running: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in running:
        process.wait()


def _wait(running: Sequence[subprocess.Popen[bytes]], logs: Sequence[IO[bytes]], until: float) -> None:
    while any(process.poll() is None for process in running):
        failed = [host for host, process in enumerate(running) if process.poll() not in (None, 0)]
        if failed:
            raise RuntimeError(f"the ranks of host {failed[0]} failed:\n{_tail(logs[failed[0]])}")
        if time.monotonic() > until:
            raise RuntimeError(f"the ranks took too long and were ended; host 0 printed:\n{_tail(logs[0])}")
        time.sleep(0.1)
    for host, process in enumerate(running):
        if process.returncode:
            raise RuntimeError(f"the ranks of host {host} failed:\n{_tail(logs[host])}")


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-40:])

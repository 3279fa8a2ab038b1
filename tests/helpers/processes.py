"""Run programs in tests. A program that takes too long is killed with every process that it has started, ranks too."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


def run(
    command: Sequence[str], *, timeout: float = 120, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end.

    Returns:
        Its exit code, and its stdout and stderr as text.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``timeout`` seconds; it and all that it started are killed.
    """
    with start(command, env=env, cwd=cwd) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            end(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def output(command: Sequence[str], *, timeout: float = 120) -> str:
    """Run a program, assert that its exit code is 0, and return its stdout."""
    done = run(command, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start a program in a new session, with text pipes for stdout and stderr. The caller must call ``end``."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, cwd=cwd, start_new_session=True)


def end(process: subprocess.Popen[str]) -> None:
    """Kill the program and every process of its ``family``, and wait for the program."""
    for pid in family(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def family(leader: int) -> set[int]:
    """The ids of all running processes that descend from ``leader`` or are in the session of one that does; Linux only.

    Sessions count because a process whose parent has ended has lost its descent, and torchrun gives each rank a session.
    """
    everyone = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                everyone[int(path.parent.name)] = {int(parent), int(session)}
    found = {leader}
    while new := {pid for pid, above in everyone.items() if above & found} - found:
        found |= new
    return found & set(everyone)


def left_of(leader: int, seconds: float = 10) -> set[int]:
    """The ``family`` of a program that has ended, after up to ``seconds`` in which its helpers notice that and end too."""
    until = time.monotonic() + seconds
    while (left := family(leader)) and time.monotonic() < until:
        time.sleep(0.05)
    return left

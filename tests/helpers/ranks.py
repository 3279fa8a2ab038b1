"""Run test bodies on real ranks: forked processes, gloo, a file as rendezvous; no ports, no environment variables.

    on_ranks(4, body, *args, tmp_path=tmp_path)   ->  [what body(*args) returned on rank 0, 1, 2, 3]

    with Ranks(4, tmp_path) as ranks:                 the same ranks for many bodies: processes and process group are
        ranks.run(body, *args)                        made once, so hypothesis can run hundreds of examples

A body is a function at the top of a module: it is sent to the ranks by its name, and a test's monkeypatches do not exist
there. It runs inside an initialised process group with one thread per rank. If a rank raises, the others are killed at once
and the test fails with that rank's traceback, so that a deadlock is reported as the error that caused it.

With LONGSPAN_TEST_DEVICE=cuda the ranks share the GPUs by gloo; the tensors of ``args`` and results are moved at this boundary,
and a body makes its own on the GPU without a word about it (device.py).
"""

import atexit
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from multiprocessing import Pipe, current_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch

from longspan import ParallelMesh
from tests.helpers.device import DEVICE, moved

ROOT = Path(__file__).parents[2]
MOST_GROUPS = 60  # a pool whose ranks have more is forked anew, because every gloo group keeps a thread that polls


def on_ranks(ranks: int, body: Callable[..., Any], *args: Any, tmp_path: Path, seconds: float = 240.0) -> list[Any]:
    """``Ranks.run`` on ranks that are forked for this call and killed after it."""
    with Ranks(ranks, tmp_path, seconds) as pool:
        return pool.run(body, *args)


@cache
def mesh_of(ulysses: int = 1, ring: int = 1, tensor: int = 1) -> ParallelMesh:
    """A mesh of this layout, made once per rank: making one takes milliseconds, and its process groups are never freed."""
    return ParallelMesh(ulysses, ring, tensor=tensor, device=DEVICE if DEVICE.type == "cpu" else None)


class Ranks:
    """``ranks`` forked processes with one process group. A context manager: exit kills them.

    ``tmp_path``: where the rendezvous files are made; ``seconds``: the timeout of the process group, and of each answer.
    """

    def __init__(self, ranks: int, tmp_path: Path, seconds: float = 240.0) -> None:
        self.ranks, self.tmp_path, self.seconds = ranks, tmp_path, seconds
        self.processes: list[int] = []
        self.pipes: list[Connection[Any, Any]] = []
        self.groups = 0

    def run(self, body: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``body(*args)`` on every rank; the results in the order of the ranks. Forks the ranks if none are running.

        Raises:
            AssertionError: a rank raised (with its traceback), died or did not answer. All ranks are killed; the next call
                forks new ones.
        """
        body = _of_a_module(body)
        if self.groups > MOST_GROUPS:
            self.close()
        if not self.processes:
            self._fork(body.__module__)
        for pipe in self.pipes:
            pipe.send((body, args if DEVICE.type == "cpu" else moved(args, torch.device("cpu"))))
        results: dict[int, Any] = {}
        while len(results) < self.ranks:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            answered = cast("list[Connection[Any, Any]]", wait(waiting, timeout=self.seconds))
            if not answered:
                self.close()
                raise AssertionError(f"of {self.ranks} ranks only {sorted(results)} answered within {self.seconds:g} s")
            for pipe in answered:
                rank = self.pipes.index(pipe)
                try:
                    failure, results[rank], self.groups = pipe.recv()
                except (EOFError, ConnectionResetError):
                    failure = f"rank {rank} died"
                if failure is not None:
                    self.close()
                    raise AssertionError(f"on rank {rank} of {self.ranks}:\n{failure}")
        found = [results[rank] for rank in range(self.ranks)]
        return found if DEVICE.type == "cpu" else [moved(result, DEVICE) for result in found]

    def close(self) -> None:
        if self.processes:
            server().ask(end=self.processes)
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes, self.groups = [], [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _fork(self, module: str) -> None:
        folder = tempfile.mkdtemp(dir=self.tmp_path)
        self.pipes, theirs = map(list, zip(*(Pipe() for _ in range(self.ranks))))
        try:
            fork = {"module": module, "folder": folder, "seconds": self.seconds, "key": current_process().authkey.hex()}
            self.processes = server().ask([pipe.fileno() for pipe in theirs], fork=fork)["ranks"]
        finally:
            for pipe in theirs:
                pipe.close()


class ForkServer:
    """Starts the fork server in a new process, which imports ``modules``, and sends it requests."""

    def __init__(self, modules: list[str]) -> None:
        self.control, theirs = socket.socketpair()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "tests.helpers.fork_server", str(theirs.fileno()), *modules]
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()

    def ask(self, pipes: list[int] | None = None, **request: Any) -> dict[str, Any]:
        """Send a request of ``fork_server.serve`` with the file descriptors ``pipes``; returns the answer.

        Raises:
            AssertionError: the server answered with a failure, such as a module that cannot be imported.
            RuntimeError: the server has died.
        """
        socket.send_fds(self.control, [json.dumps(request).encode()], pipes or [])
        answer = self.control.recv(65_536)
        if not answer:
            raise RuntimeError("the fork server of the test ranks has died")
        found: dict[str, Any] = json.loads(answer)
        if "failure" in found:
            raise AssertionError(f"the fork server of the test ranks:\n{found['failure']}")
        return found

    def close(self) -> None:
        self.control.close()
        self.process.wait()


@cache
def server() -> ForkServer:
    """The fork server of this process, started by the first call. It checks jaxtyping shapes if this process does.

    Tests of torch.compile do not check shapes, because dynamo cannot trace the checks.
    """
    checked = "tests.helpers.shapes"
    found = ForkServer([*[checked] * (checked in sys.modules), __name__])
    atexit.register(found.close)
    return found


def _of_a_module(body: Callable[..., Any]) -> Callable[..., Any]:
    """``body``; if it is defined in the running script (``__main__``), the same function of the module as ranks import it."""
    if body.__module__ != "__main__":
        return body
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "run the script as a module: python -m"
    found: Callable[..., Any] = getattr(importlib.import_module(spec.name), body.__name__)
    return found

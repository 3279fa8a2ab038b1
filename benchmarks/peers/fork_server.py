"""A process that has imported one library and forks the ranks of its contestants: importing takes longer than most work.

    controller  --a socket: {"rank": 0, "ranks": 2, "folder": ...} and the ends of three pipes-->  server  --fork-->  rank

It has run nothing but imports when it forks: no thread, no tensor, no process group.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class ForkServer:
    """The controller's side of a fork server of one module of ``benchmarks.peers.sides``.

    Args:
        side: the module.
        environment: variables of the process and its ranks.
    """

    def __init__(self, side: str, environment: dict[str, str]) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair()
        environ = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1"} | environment
        command = [sys.executable, "-m", "benchmarks.peers.fork_server", side, str(theirs.fileno())]
        self._process = subprocess.Popen(command, env=environ, cwd=ROOT, pass_fds=[theirs.fileno()])
        theirs.close()

    def fork(self, rank: int, ranks: int, folder: str, pipes: tuple[int, int, int]) -> int:
        """Start a rank whose standard input, output and error are ``pipes``. Returns its process id."""
        request = json.dumps({"rank": rank, "ranks": ranks, "folder": folder}).encode()
        with self._lock:
            socket.send_fds(self._socket, [request], list(pipes))
            answer = self._socket.recv(64)
        if not answer:
            raise RuntimeError("the fork server ended while it imported its library; its error stands above")
        return int(answer)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


def serve(side: str, descriptor: int) -> None:
    """Fork a rank for each request, until the controller closes the socket."""
    from benchmarks.peers import rank

    refusal = ""
    try:
        import_module(f"benchmarks.peers.sides.{side}")
    except Exception as error:  # the ranks answer with it
        refusal = f"{type(error).__name__}: {error}"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps the ranks
    requests = socket.socket(fileno=descriptor)
    while True:
        message, pipes, _, _ = socket.recv_fds(requests, 4096, 3)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for place, pipe in enumerate(pipes):
                os.dup2(pipe, place)
                os.close(pipe)
            sys.stdin = os.fdopen(0)
            rank.serve(side, refusal, **json.loads(message))
            os._exit(0)
        for pipe in pipes:
            os.close(pipe)
        requests.send(str(pid).encode())


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))

"""A contestant: the ranks of one library at one piece of work, each in a process, which make turns when they are asked to.

    with Contestant(name="longspan", side="ulysses", ranks=2, case={...}) as one:
        one.turn()      seconds of the slowest rank
        one.peak()      MiB of the fullest rank

What a library cannot do is its own error, in its own words: ``Refused``. Between turns the processes wait for a line of input
and use no processor.
"""

import atexit
import json
import os
import select
import signal
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.fork_server import ForkServer

PATIENCE = 1800
"""Seconds after which a contestant that does not answer is ended and its row says so."""


class Refused(Exception):
    """A library's own error at this piece of work."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one turn took.

    Attributes:
        seconds: from the common beginning until the slowest rank was done.
        cpu_seconds: of all ranks together.
    """

    seconds: float
    cpu_seconds: float


class Contestant:
    """The processes of one library at one piece of work.

    Args:
        name: the name in tables.
        side: the module of ``benchmarks.peers.sides`` that knows the library.
        ranks: processes that form one group.
        case: what to do, as the module's ``prepare`` takes it.
        worlds: independent groups of ``ranks`` processes that work at the same time.
        environment: variables of the processes.
    """

    def __init__(
        self, *, name: str, side: str, ranks: int, case: dict[str, Any], worlds: int = 1,
        environment: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.case = name, case
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        self._folders = [tempfile.TemporaryDirectory() for _ in range(worlds)]
        server = _server(side, tuple(sorted((environment or {}).items())))
        self._ranks = [
            _Rank(server, rank, ranks, folder.name, self._log.fileno()) for folder in self._folders for rank in range(ranks)
        ]

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self) -> None:
        """Build model and data on every rank."""
        self._ask({"do": "prepare", "case": self.case})

    def turn(self) -> Turn:
        """Make one turn on every rank."""
        answers = self._ask({"do": "turn"})
        return Turn(seconds=max(one["seconds"] for one in answers), cpu_seconds=sum(one["cpu"] for one in answers))

    def peak(self, whole: bool = False) -> float:
        """MiB of the fullest rank in one turn, less what its process took before the model was built unless ``whole``."""
        return max(one["peak"] - (0.0 if whole else one["baseline"]) for one in self._ask({"do": "peak"}))

    def results(self, to: Path) -> None:
        """Write loss and gradients into files ``to``.0, ``to``.1, ... of the ranks."""
        self._ask(*({"do": "results", "to": f"{to}.{number}"} for number in range(len(self._ranks))))

    def close(self) -> None:
        """End the processes; nothing happens if they are ended already."""
        if self._log.closed:
            return
        for rank in self._ranks:
            rank.close()
        for folder in self._folders:
            folder.cleanup()
        self._log.close()

    def _ask(self, *questions: dict[str, Any]) -> list[dict[str, float]]:
        """Ask every rank its question, or all of them the only one, and wait for the answers."""
        for rank, question in zip(self._ranks, questions * len(self._ranks) if len(questions) == 1 else questions):
            rank.send(question)
        answers: list[dict[str, float]] = []
        waiting = [rank.answers for rank in self._ranks]
        while waiting:
            ready, _, _ = select.select(waiting, [], [], PATIENCE)
            if not ready:
                raise Refused(f"no answer within {PATIENCE} s")
            for pipe in ready:
                line = pipe.readline()
                answer = json.loads(line) if line else {"error": self._last_words()}
                if "error" in answer:
                    raise Refused(answer["error"])
                answers.append(answer)
                waiting.remove(pipe)
        return answers

    def _last_words(self) -> str:
        """The last line that a process wrote to its standard error before the system ended it."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return (
            f"the process was ended, as the system does where memory is short; its last line: {lines[-1] if lines else 'none'}"
        )


class _Rank:
    """One process and the pipes to it."""

    def __init__(self, server: ForkServer, rank: int, ranks: int, folder: str, log: int) -> None:
        (stdin, questions), (answers, stdout) = os.pipe(), os.pipe()
        self.pid = server.fork(rank, ranks, folder, (stdin, stdout, log))
        os.close(stdin)
        os.close(stdout)
        self.questions, self.answers = os.fdopen(questions, "w"), os.fdopen(answers)

    def send(self, question: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # the process has ended: its pipe of answers says so
            self.questions.write(json.dumps(question) + "\n")
            self.questions.flush()

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with suppress(BrokenPipeError):
            self.questions.close()
        self.answers.close()


_STARTING = threading.Lock()
_SERVERS: dict[tuple[str, tuple[tuple[str, str], ...]], ForkServer] = {}


def _server(side: str, environment: tuple[tuple[str, str], ...]) -> ForkServer:
    """The one fork server of a side and its environment, which ends with this process."""
    with _STARTING:
        if (side, environment) not in _SERVERS:
            _SERVERS[side, environment] = ForkServer(side, dict(environment))
            atexit.register(_SERVERS[side, environment].close)
        return _SERVERS[side, environment]

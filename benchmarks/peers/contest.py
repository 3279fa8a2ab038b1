"""A contest: all contestants of one table, started together, warmed up, then asked for turns in alternation.

A contestant that cannot do the work is left out of the rounds, and its own error is kept for its row.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.peers.contestant import Contestant, Refused, Turn
from benchmarks.peers.pairs import Spread, in_turns, paired_ratio, spread

OURS = "longspan"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contestant before it is started; the fields are the arguments of ``Contestant``."""

    name: str
    side: str
    case: dict[str, Any]
    ranks: int = 2
    worlds: int = 1
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)

    def start(self) -> Contestant:
        return Contestant(
            name=self.name, side=self.side, case=self.case, ranks=self.ranks, worlds=self.worlds, environment=self.environment
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a contest measured.

    Attributes:
        turns: for each contestant that can do the work, its turns in the order of the rounds.
        refused: for each of the others, its own error.
    """

    turns: dict[str, list[Turn]]
    refused: dict[str, str]

    def seconds(self, name: str) -> list[float]:
        return [turn.seconds for turn in self.turns[name]]

    def median(self, name: str) -> float:
        return spread(self.seconds(name)).median

    def ratio(self, ours: str, theirs: str) -> Spread:
        """The spread of seconds of ``ours`` over those of ``theirs``, round by round."""
        return paired_ratio(self.seconds(ours), self.seconds(theirs))


def hold(entries: Sequence[Entry], rounds: int, warm_ups: int = 1) -> Outcome:
    """Measure ``rounds`` rounds after ``warm_ups`` turns that are not measured."""
    refused: dict[str, str] = {}
    with ExitStack() as stack:
        ready: dict[str, Contestant] = {}
        for entry in entries:
            one = stack.enter_context(entry.start())
            try:
                one.prepare()
                for _ in range(warm_ups):
                    one.turn()
                ready[entry.name] = one
            except Refused as error:
                refused[entry.name] = str(error)
                one.close()
            progress(f"    {entry.name}: {'cannot: ' + refused[entry.name][:90] if entry.name in refused else 'ready'}")
        turns = in_turns({name: partial(_turn, name, one, refused) for name, one in ready.items()}, rounds)
    done = {name: [turn for turn in some if turn is not None] for name, some in turns.items() if name not in refused}
    return Outcome(turns=done, refused=refused)


def progress(line: str) -> None:
    """One line on standard error, at once."""
    print(line, file=sys.stderr, flush=True)


def _turn(name: str, one: Contestant, refused: dict[str, str]) -> Turn | None:
    """One turn; None from the round on in which the contestant fails, and its error in ``refused``."""
    if name in refused:
        return None
    try:
        measured = one.turn()
    except Refused as error:
        refused[name] = str(error)
        one.close()
        return None
    progress(f"    {name}: {measured.seconds:.3f} s")
    return measured

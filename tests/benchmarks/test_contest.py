"""Contestants as real processes: turns are measured, results come back, and a library's own error is its row."""

from pathlib import Path

import pytest
import torch

from benchmarks.peers import contest
from benchmarks.peers.contest import Entry, hold
from benchmarks.peers.contestant import Refused, Turn
from benchmarks.peers.items import longest, step, truth

EXCHANGE = {"kind": "exchange", "tokens": 64, "heads": 2, "kv_heads": 2, "dim": 8}


def test_two_contestants_take_turns_and_one_that_refuses_is_left_out() -> None:
    entries = [
        Entry(name="bare", side="one_device", case=EXCHANGE),
        Entry(name="copy", side="one_device", case=EXCHANGE | {"kind": "copy"}),
        Entry(name="unknown", side="one_device", case={"kind": "no such work"}),
        Entry(name="missing", side="no_such_library", case=EXCHANGE),
    ]
    outcome = hold(entries, rounds=3)
    assert {name: len(turns) for name, turns in outcome.turns.items()} == {"bare": 3, "copy": 3}
    assert all(turn.seconds > 0 and turn.cpu_seconds > 0 for turn in outcome.turns["bare"])
    assert outcome.refused["unknown"] == "KeyError: 'no such work'"
    assert outcome.refused["missing"].startswith("ModuleNotFoundError")
    assert outcome.ratio("bare", "bare").median == 1


class _FailsInItsSecondTurn:
    """A contestant in place of processes."""

    turns, closed = 0, False

    def turn(self) -> Turn:
        self.turns += 1
        if self.turns == 2:
            raise Refused("killed")
        return Turn(seconds=1.0, cpu_seconds=1.0)

    def close(self) -> None:
        self.closed = True


def test_a_contestant_that_fails_in_a_round_is_left_out_and_the_others_go_on() -> None:
    one, refused = _FailsInItsSecondTurn(), dict[str, str]()
    turns = [contest._turn("one", one, refused) for _ in range(3)]  # type: ignore[arg-type]
    assert [turn is None for turn in turns] == [False, True, True]
    assert refused == {"one": "killed"}
    assert one.closed
    assert one.turns == 2


def test_one_rank_that_fails_ends_the_contestant_with_its_error(tmp_path: Path) -> None:
    with Entry(name="bare", side="one_device", case=EXCHANGE).start() as one:
        one.prepare()
        with pytest.raises(Refused, match="'Bare' object has no attribute 'results'"):
            one.results(tmp_path / "results")


def test_the_worst_gradient_has_a_floor_and_shows_what_is_missing_or_no_number() -> None:
    expected = {"large": torch.full((4,), 1.0).double(), "small": torch.full((4,), 1e-9).double()}
    close = {"large": torch.full((4,), 1.0), "small": torch.zeros(4)}
    assert truth.worst(close, expected) < 1e-5  # the small one is below 1e-3 of the whole norm
    assert truth.worst(close | {"large": torch.full((4,), 1.5)}, expected) == pytest.approx(0.5)
    assert truth.worst({"small": torch.zeros(4)}, expected) == float("inf")
    assert truth.worst(close | {"small": torch.full((4,), float("nan"))}, expected) != truth.worst(close, expected)


def test_the_search_finds_the_longest_length_under_the_cap() -> None:
    tried: list[int] = []

    def peak_of(tokens: int) -> float:
        tried.append(tokens)
        return 500 + tokens * 0.25

    tokens, mib = longest.search(peak_of, largest=10**6)
    assert 0.94 * longest.CAP_MIB < mib <= longest.CAP_MIB
    assert mib == 500 + tokens * 0.25
    assert len(tried) <= 4
    assert longest.search(peak_of, largest=4096) == (4096, 500 + 1024)
    assert longest.search(lambda tokens: 10**6, largest=4096) == (0, float("inf"))


def test_the_flops_of_a_step_are_those_of_its_products_and_of_the_causal_half() -> None:
    case = {"tokens": 10, "layers": 1, "vocab": 7, "hidden": 4, "heads": 2, "kv_heads": 2, "ffn": 5}
    products = 4 * 4 * 4 + 3 * 4 * 5 + 4 * 7  # q, k, v and out; the feed-forward; the head
    scores = sum(range(1, 11)) * 4 * 2  # each query sees itself and those before it; scores and values
    assert step.flops_of(case) == 3 * 2 * (10 * products + scores)

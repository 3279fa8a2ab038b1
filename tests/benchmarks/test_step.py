"""The findings of the training step: each stands where its contestants have run, and none where one was left out."""

from benchmarks.peers.contest import Outcome
from benchmarks.peers.contestant import Turn
from benchmarks.peers.items import step

CASE = step.Case(title="small", case=step.llama(128, 1), entries=step.beside_peers, rounds=2)
PEER = "peer"


def findings(*names: str) -> str:
    turns = [Turn(seconds=seconds, cpu_seconds=seconds) for seconds in (1.0, 1.25)]
    return step._findings(CASE, Outcome(turns=dict.fromkeys(names, turns), refused={}), step.OURS, {PEER: "right"}, 1e9)[0]


def test_every_finding_stands_where_all_have_run() -> None:
    text = findings(step.OURS, PEER, step.ALONE, "its collectives alone", step.ONE, step.BARE, step.TWINS)
    for begin in (
        "Best peer that is right: peer",
        "longspan, zero=0 over its limit",
        "Speed-up over one rank",
        "One rank over",
    ):
        assert f"- {begin}" in text


def test_a_contestant_that_was_left_out_leaves_its_finding_out() -> None:
    text = findings(step.OURS, PEER, "its collectives alone", step.ONE, step.BARE)
    assert "One rank over the bare model" in text
    assert "independent" not in text
    assert "limit" not in text

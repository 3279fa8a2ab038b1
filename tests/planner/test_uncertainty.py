"""The uncertainty of a prediction: one table, that of docs/planner.md, and the nearest kind of layout in it."""

from pathlib import Path

import pytest

from longspan import plan
from longspan.planner import uncertainty
from longspan.planner.published_errors import MEMORY, STEP_TIME
from longspan.planner.strategy import Strategy
from longspan.planner.uncertainty import KINDS, kind, memory_error, time_error

PAGE = Path(__file__).parents[2] / "docs" / "planner.md"


def test_the_page_and_the_planner_have_the_same_errors() -> None:
    lines = PAGE.read_text().partition("### Uncertainty by kind of layout")[2].partition("###")[0].splitlines()
    shown = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("|")][2:]
    held = [(k, number, source, str(runs), f"{error:.1%}") for number, rows in (("step time", STEP_TIME), ("memory", MEMORY))
            for k, source, runs, error in rows]  # fmt: skip
    assert shown == held
    medians = PAGE.read_text().partition("### Step time")[2].partition("###")[0]
    whole = [row for row in STEP_TIME if sum(other[1] == row[1] for other in STEP_TIME) == 1]
    same = [row for row in whole if f"| {row[1]} | {row[2]} | {row[3]:.1%} |" in medians]
    assert same, "a source all of whose runs are of one kind has one error in both tables"


@pytest.mark.parametrize(
    ("strategy", "name"),
    [(Strategy(data=8, zero=3), "data"), (Strategy(ulysses=8), "sequence"), (Strategy(ring=2, tensor=2), "model"),
     (Strategy(pipeline=2), "model"), (Strategy(tensor=2, offload_optimizer=True), "offload"),
     (Strategy(offload_parameters=True), "offload")],
)  # fmt: skip
def test_the_kind_of_a_layout(strategy: Strategy, name: str) -> None:
    assert kind(strategy) == name
    worst = max((row for row in STEP_TIME if row[0] == name), key=lambda row: row[3])
    assert time_error(strategy) == (worst[3], f"the median error of {worst[2]} runs of {worst[1]}")
    assert 0 < memory_error(strategy)[0] < 1


def test_a_kind_without_runs_takes_the_nearest_that_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncertainty, "MEMORY", (("offload", "far", 3, 0.5), ("data", "near", 1, 0.1)))
    error, text = memory_error(Strategy(ulysses=2))
    assert error == 0.1
    assert (
        text
        == "the error of one run of near; no published run of this kind: the error is that of data-parallel runs, and may be "
        "several times as large"
    )
    assert memory_error(Strategy()) == (0.1, "the error of one run of near")
    monkeypatch.setattr(uncertainty, "MEMORY", (("offload", "far", 3, 0.5),))
    for degree in (1, 2):
        error, text = memory_error(Strategy(ulysses=degree))
        assert error == 0.5
        assert text.startswith(
            "the median error of 3 runs of far; no published run of this kind: the error is that of runs with o"
        )
    assert {row[0] for row in STEP_TIME} == set(KINDS)


def test_a_plan_shows_both_uncertainties() -> None:
    best = plan("llama-8b", gpus=8, tokens=131_072).best
    assert (best.error, best.memory_error) == (time_error(best.strategy)[0], memory_error(best.strategy)[0])
    text = " ".join(best.explain())
    assert f"+-{best.error:.0%}, {time_error(best.strategy)[1]})" in text
    assert f"+-{best.memory_error:.0%}, {memory_error(best.strategy)[1]})" in text

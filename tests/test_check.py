"""The verdict on law 1: it holds for every layout, and it fails where something is off."""

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from longspan import cli, collectives, launch
from longspan.commands import check
from longspan.config import Check

pytestmark = pytest.mark.usefixtures("launcher")

SMALL = Check(tokens=19, rows=3, layers=2)


def into_a_file(job: tuple[Check, str]) -> int:
    config, path = job
    with open(f"{path}{dist.get_rank()}", "w") as file, contextlib.redirect_stdout(file):
        return check.work(config)


def verdict(config: Check, tmp_path: Path, work: str = "into_a_file") -> tuple[int, dict[str, list[str]]]:
    """The exit code, and the words of each line of the table by its first two words."""
    code = launch.run(f"test_check:{work}", (config, str(tmp_path / "said")), config.local_ranks)
    lines = [line.split() for line in (tmp_path / "said0").read_text().splitlines()]
    return code, {" ".join(words[:-5]): words[-5:] for words in lines if words and words[-1] in ("holds", "FAILS")}


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, ranks=4),
        replace(SMALL, ulysses=4, heads=8, kv_heads=2),
        replace(SMALL, ring=2),
        replace(SMALL, ranks=3, ulysses=1, zero=3, dtype="fp32"),
        replace(SMALL, ranks=4, rows=1, dtype="fp32"),
        replace(SMALL, ulysses=3, dtype="bf16", tokens=64),
        replace(SMALL, ulysses=1),
    ],
    ids=["2x2", "1x4-gqa", "ring-2x2", "3x1-zero-3", "a-replica-without-a-row", "1x3-bf16", "one-rank"],
)
def test_the_law_holds(config: Check, tmp_path: Path) -> None:
    code, lines = verdict(config, tmp_path)
    assert {words[-1] for words in lines.values()} == {"holds"}
    assert code == 0
    if config.ring == 1:
        exchanges = "0" if config.ulysses == 1 else "2"
        assert {lines[f"collectives a layer, {way}"][0] for way in ("forward", "backward")} == {exchanges}
    for way in ("forward", "backward"):
        assert lines[f"bytes a layer, {way}"][0] == lines[f"bytes a layer, {way}"][1]


def one_gradient_is_off(job: Any) -> int:
    """A rank other than the lead scales one gradient a little."""
    parallelize = check.parallelize

    def off(model: Any, *args: Any) -> Any:
        if dist.get_rank() == 1:
            model.blocks[1].feed.up.weight.register_hook(lambda grad: grad * (1 + 1e-8))
        return parallelize(model, *args)

    check.parallelize = off
    return into_a_file(job)


def something_is_sent_twice(job: Any) -> int:
    send = collectives.CountingTransport.all_to_all

    def twice(*args: Any) -> Any:
        send(*args)
        return send(*args)

    collectives.CountingTransport.all_to_all = twice  # type: ignore[method-assign]
    return into_a_file(job)


def the_loss_of_one_rank_is_nan(job: Any) -> int:
    outcome = check._outcome
    if dist.get_rank() == 1:
        check._outcome = lambda *args: replace(outcome(*args), loss=math.nan)
    return into_a_file(job)


@pytest.mark.parametrize(
    ("work", "fails"),
    [
        ("one_gradient_is_off", ["worst gradient of 21: blocks.1.feed.up.weight"]),
        (
            "something_is_sent_twice",
            [f"{what} a layer, {way}" for way in ("forward", "backward") for what in ("collectives", "bytes")],
        ),
        ("the_loss_of_one_rank_is_nan", ["loss"]),
    ],
)
def test_a_fault_of_any_rank_fails_the_law(work: str, fails: list[str], tmp_path: Path) -> None:
    code, lines = verdict(SMALL, tmp_path, work)
    assert [what for what, words in lines.items() if words[-1] == "FAILS"] == fails
    assert code == 1
    assert "The law FAILS on this machine." in (tmp_path / "said0").read_text()


def test_the_smallest_batch_has_a_label(tmp_path: Path) -> None:
    code, lines = verdict(replace(SMALL, tokens=2, rows=1), tmp_path, "into_a_file")
    assert code == 0
    assert float(lines["loss"][0]) > 1


def test_a_layout_that_cannot_be_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--heads", "6", "--kv-heads", "4"]) == 2
    assert cli.main(["check", "--ulysses", "3", "--heads", "2"]) == 2
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("longspan: 6 query heads cannot share 4 key/value heads evenly; ")
    assert second.startswith("longspan: ulysses=3 exceeds the 2 query heads; ")

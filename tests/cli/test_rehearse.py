"""``longspan rehearse``: one rank of a large world, beside the plan; with real ranks, that its memory is theirs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan.cli.main import main
from longspan.cli.rehearse import RehearseSettings
from longspan.errors import RunError
from tests.helpers.ranks import on_ranks
from tests.helpers.rehearsals import command, real, rehearsed


def test_one_rank_of_64_is_measured_beside_the_plan(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    flags = f"--world 64 --ulysses 4 --zero 3 --tokens 1024 --steps 1 --hardware h100 --json {file}"
    code, text, errors = on_ranks(1, command, *flags.split(), tmp_path=tmp_path)[0]
    assert (code, errors) == (0, "")
    assert "64 = data 16 x ulysses 4, zero=3" in text
    assert "communication: ulysses" in text
    assert "buffers of communicators (NCCL)" in text
    found = json.loads(file.read_text())
    (one,) = found["measured"]
    assert (one["rank"], one["tokens"], one["parameters"]) == (0, 256, 22_548)
    assert one["seconds"] > 0
    assert sum(one["kinds"].values()) == one["peak_bytes"]
    assert found["plan"]["compute"] > 0


@pytest.mark.long
def test_a_rank_of_each_kind_of_stage_is_rehearsed(tmp_path: Path) -> None:
    flags = "--world 8 --model tiny --pipeline 2 --tensor 2 --zero 3 --tokens 256 --steps 1"
    code, text, errors = on_ranks(1, command, *flags.split(), tmp_path=tmp_path)[0]
    assert (code, errors) == (0, "")
    assert "rank 0, stage 1 of 2" in text
    assert "rank 4, stage 2 of 2" in text


@pytest.mark.parametrize(
    ("flags", "reason"),
    [("--world 6 --ulysses 4", "may be 1, 2, 3, 6"), ("--world 4 --rank 4", "legal are 0 to 3"),
     ("--world 4 --rows 3", "use a multiple of 4 rows"), ("--offload-parameters", "use --zero 2 or --zero 3"),
     ("--world 8 --ulysses 8", "exceeds the 4 query heads"), ("--tokens 1", "at least 2"), ("--model x", "is unknown"),
     ("--hardware h1", "the hardware 'h1' is unknown"), ("--json /nowhere/a.json", "does not exist")],
)  # fmt: skip
def test_bad_input_is_one_sentence(flags: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rehearse", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


LAYOUTS: dict[str, dict[str, Any]] = {
    "ulysses": {"ulysses": 4},
    "ulysses, zero 3": {"ulysses": 4, "zero": 3},
    "ring x ulysses, selective": {"ulysses": 2, "ring": 2, "recompute": "selective"},
    "tensor, zero 3": {"tensor": 2, "ulysses": 2, "zero": 3},
    "pipeline": {"pipeline": 2, "ulysses": 2},
}


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_memory_peak_is_that_of_four_real_ranks(name: str, tmp_path: Path) -> None:
    settings = RehearseSettings(world=4, tokens=8192, steps=1, **LAYOUTS[name])
    (tmp_path / "real").mkdir()
    measured = on_ranks(4, real, settings, tmp_path=tmp_path / "real")
    for rank, one in enumerate(measured):
        (tmp_path / str(rank)).mkdir()
        (alone,) = on_ranks(1, rehearsed, replace(settings, rank=rank), rank, tmp_path=tmp_path / str(rank))
        assert alone.parameters == one.parameters
        assert alone.peak_bytes == pytest.approx(one.peak_bytes, rel=0.05), f"rank {rank}: {alone.kinds} and {one.kinds}"


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    with pytest.raises(RunError, match=r"seed=1.* must be at least 0 and at most 9223372036854775807"):
        RehearseSettings(seed=10**20)

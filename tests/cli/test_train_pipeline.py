"""``longspan train`` and ``evaluate`` on pipeline stages: the numbers of one rank, other layouts in between, refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from longspan.cli import launch
from longspan.cli import main as cli
from longspan.cli.config import Evaluate
from tests.helpers.folders import write
from tests.helpers.runs import column, records, run, small, write_text

pytestmark = pytest.mark.usefixtures("launcher")
FEW = {"steps": 3, "rows_per_step": 4, "eval_every_steps": 0}
PIPELINE: dict[str, Any] = {"pipeline": 2, "ulysses": 1, "micro_batches": 4}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.mark.parametrize(
    "settings",
    [
        PIPELINE,
        pytest.param(
            PIPELINE | {"ulysses": 2, "zero": 3, "schedule": "gpipe", "recompute": "full", "micro_batches": 2},
            marks=pytest.mark.long,
        ),
        pytest.param(PIPELINE | {"tensor": 2, "micro_batches": 1, "dtype": "bf16"}, marks=pytest.mark.long),
        pytest.param(PIPELINE | {"ranks": 4, "eval_rows": 5, "micro_batches": 2}, marks=pytest.mark.long),
    ],
    ids=["1f1b", "gpipe, ulysses, zero-3", "tensor, bf16", "replicas"],
)
def test_a_pipeline_trains_as_one_rank(settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    config = small(text, tmp_path, **FEW | {"eval_rows": settings.get("eval_rows", 3)})
    one, found = (replace(config, run=name) for name in ("one", "found"))
    run(replace(one, ulysses=1, dtype=settings.get("dtype", "fp32")))
    run(replace(found, **settings))
    tolerance = 2e-2 if settings.get("dtype") == "bf16" else 1e-5
    for name in ("loss", "grad_norm"):
        assert column(records(found), name) == pytest.approx(column(records(one), name), rel=tolerance)
    assert held_out(found) == pytest.approx(held_out(one), rel=tolerance)


def held_out(config: Any) -> float:
    """The held-out loss of a run's last step."""
    lines = Path(config.runs_folder, config.run, "metrics.jsonl").read_text().splitlines()
    (last,) = [record["eval_loss"] for record in map(json.loads, lines) if "eval_loss" in record]
    return float(last)


def test_a_hugging_face_model_trains_on_stages_and_is_exported_whole(text: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "llama", tied=True, vocab_size=300)
    config = small(text, tmp_path, **FEW | {"model": f"hf:{folder}", "steps": 2, "optimizer": "sgd", "learning_rate": 0.1})
    one = run(replace(config, run="one", ulysses=1))
    two = run(replace(config, run="two", zero=3, **PIPELINE))
    assert column(two, "loss") == pytest.approx(column(one, "loss"), rel=1e-5)
    whole, gathered = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "export") for name in ("one", "two"))
    for (name, expected), found in zip(whole.named_parameters(), gathered.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.long  # every pair of layouts is in test_checkpoint_layouts.py
def test_a_run_goes_on_from_a_pipeline_on_one_rank_and_back(text: str, tmp_path: Path) -> None:
    config = small(text, tmp_path, **FEW | {"steps": 6, "eval_rows": 1})
    whole = run(replace(config, run="whole", ulysses=1))
    run(replace(config, run="moved", steps=2, decay_steps=6, **PIPELINE))
    for steps, flags in ((4, ["--pipeline", "1", "--micro-batches", "1"]), (6, ["--pipeline", "2", "--micro-batches", "2"])):
        moved = ["train", "--resume", "moved", "--runs-folder", str(tmp_path), "--steps", str(steps), "--ulysses", "1"]
        assert cli.main([*moved, *flags]) == 0
    for name in ("step", "loss", "grad_norm"):
        assert column(records(replace(config, run="moved")), name) == pytest.approx(column(whole, name), rel=1e-5)
    losses = []
    for pipeline in (1, 2):
        output = tmp_path / f"evaluated{pipeline}"
        asked = Evaluate(checkpoint="moved", runs_folder=str(tmp_path), documents=2, ranks=2, pipeline=pipeline)
        assert launch.run("tests.cli.test_evaluate:into_a_file", (asked, str(output)), 2) == 0
        (line,) = [line for line in Path(f"{output}0").read_text().splitlines() if line.startswith("all ")]
        losses.append(line.split()[-2:])
    assert losses[0] == losses[1]


def test_what_stages_cannot_do_is_refused_in_one_line(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = ["train", "--runs-folder", str(tmp_path / "runs"), "--tokens", "64", "--data", text, "--ulysses", "1"]
    two = ["--pipeline", "2"]
    for flags, sentence in [
        (["--schedule", "gpipe"], "needs a mesh with pipeline > 1"),
        (
            [*two, "--rows-per-step", "3", "--micro-batches", "2"],
            "rows_per_step=3 cannot be split into micro_batches=2 of ",
        ),
        (["--pipeline", "3"], "2 layers cannot be split into 3 pipeline stages; use up to 2"),
        ([*two, "--ranks", "4"], "4 ranks with ulysses=1, ring=1, tensor=1 and pipeline=2 are 2 data replicas, and rows_per_"),
    ]:
        capfd.readouterr()
        assert cli.main([*base, *flags]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert sentence in line
    assert not (tmp_path / "runs").exists()

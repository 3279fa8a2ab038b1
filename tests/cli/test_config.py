"""Settings: checked at birth, the same from flags, a file and a run's own record."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from longspan.cli.config import Check, Evaluate, Ranks, Train, compute_dtype
from longspan.cli.settings_file import as_json, known, read_file, settings_of_run
from longspan.errors import LongspanError, RunError

MODELS = "legal are tiny, small, llama-1b, llama-8b, llama-70b, and hf:FOLDER for a Hugging Face model"


@pytest.mark.parametrize(
    ("kind", "settings", "text"),
    [
        (Train, {"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        (Train, {"learning_rate": float("nan")}, "learning_rate=nan must be above 0"),
        (Train, {"learning_rate": float("inf")}, "learning_rate=inf must be finite"),
        (Train, {"weight_decay": float("inf")}, "weight_decay=inf must be finite"),
        (Train, {"epochs": float("inf")}, "epochs=inf must be finite"),
        (Train, {"seed": 2**63}, "seed=9223372036854775808 must be at most 9223372036854775807"),
        (Check, {"seed": 2**63}, "seed=9223372036854775808 must be at most 9223372036854775807"),
        (Train, {"timeout_seconds": 10**14}, "timeout_seconds=100000000000000 must be at most 1000000000"),
        (Train, {"tokens": 1}, "tokens=1 must be at least 2"),
        (Train, {"steps": 0}, "steps=0 must be at least 1"),
        (Train, {"ranks": 0}, "ranks=0 must be at least 1"),
        (
            Train,
            {"micro_batches": 3},
            "rows_per_step=1 is fewer than micro_batches=3; every micro-batch needs a row: use --micro-batches 1 or fewer",
        ),
        (Train, {"run": "a/b"}, "run='a/b' is not a plain name; put the folder of the runs into --runs-folder"),
        (Evaluate, {"documents": 0}, "documents=0 must be at least 1"),
        (Check, {"heads": 0}, "heads=0 must be at least 1"),
        (Check, {"tensor": 0}, "tensor=0 must be at least 1"),
        (Check, {"pipeline": 0}, "pipeline=0 must be at least 1"),
        (
            Train,
            {"pipeline": 2, "rows_per_step": 3, "micro_batches": 2},
            "rows_per_step=3 cannot be split into micro_batches=2 of one shape, which the stages of pipeline=2 need; use "
            "--rows-per-step 4, or another --micro-batches",
        ),
        (
            Check,
            {"json": "no/such/x"},
            "json='no/such/x' is in a folder that does not exist; make it first, or name another file",
        ),
        (Check, {"json": "/tmp"}, "json='/tmp' is a folder; name a file in it"),
    ],
)
def test_settings_are_checked_at_birth(kind: type[Ranks], settings: dict[str, object], text: str) -> None:
    with pytest.raises(RunError) as error:
        kind(**settings)  # type: ignore[arg-type]
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("config", "name", "value", "text"),
    [
        (Train(), "zero", 4, "zero=4 is unknown; legal are 0, 2, 3"),
        (Train(), "dtype", "fp16", "dtype='fp16' is unknown; legal are auto, fp32, bf16"),
        (Train(), "model", "huge", f"model='huge' is unknown; {MODELS}"),
        (Check(), "model", "hf", f"model='hf' is unknown; {MODELS}"),
        (Check(), "dtype", "fp8", "dtype='fp8' is unknown; legal are fp64, fp32, bf16"),
    ],
)
def test_choices_are_checked_at_birth(config: Ranks, name: str, value: object, text: str) -> None:
    object.__setattr__(config, name, value)  # past the type checks that the tests run under, and a user does not
    with pytest.raises(RunError) as error:
        config.__post_init__()
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"schedule": "gpipe"}, "needs a mesh with pipeline > 1; use"),
        ({"pipeline": 2, "stages_per_rank": 2}, "stages_per_rank=2 does not go with schedule='1f1b'"),
        (
            {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 2, "rows": 5, "micro_batches": 5},
            "interleaved stages need micro-batches in whole rounds of 2 ranks, and the step has 5; ",
        ),
    ],
)
def test_a_pipeline_s_schedule_is_checked_at_birth(settings: dict[str, object], text: str) -> None:
    with pytest.raises(LongspanError, match=re.escape(text)):
        Check(**settings)  # type: ignore[arg-type]


def test_one_sequence_decides_how_many_ranks_start() -> None:
    assert Train().local_ranks == 2
    assert Train(ulysses=4).local_ranks == 4
    assert Train(ulysses=2, ring=3).local_ranks == 6
    assert Train(ulysses=2, ring=3, tensor=2).local_ranks == 12
    assert Train(ulysses=2, pipeline=3, tensor=2).local_ranks == 12
    assert Train(ulysses=1, ranks=3).local_ranks == 3
    assert [Evaluate(tensor=tensor, pipeline=stages).local_ranks for tensor, stages in ((1, 1), (4, 1), (2, 3))] == [2, 4, 6]


def test_a_record_reads_back_as_it_was(tmp_path: Path) -> None:
    config = Train(data=("a", "b"), ranks=3, run="x")
    (tmp_path / "config.json").write_text(as_json(config))
    held = read_file(str(tmp_path / "config.json"))
    assert set(held) == {field.name for field in fields(Train)}
    assert Train(**held | {name: tuple(held[name]) for name in ("data", "log_to")}) == config


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('learning-rate = 1e-3\ndata = ["x"]\n')
    (tmp_path / "a.json").write_text('{"learning_rate": 1e-3, "data": ["x"]}')
    assert read_file(str(tmp_path / "a.toml")) == read_file(str(tmp_path / "a.json")) == {"learning_rate": 1e-3, "data": ["x"]}


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.json", "{", "is not valid JSON"),
        ("a.toml", "=", "is not valid TOML"),
        ("a.json", "[1]", "holds a list; it must hold names and values"),
        ("a.json", None, "cannot be read: No such file or directory"),
        ("a.json", b"\xff", "is not valid JSON"),
        ("a.yaml", "steps: 3", "is YAML; write the settings as TOML"),
        ("a.conf", "steps = 3", "is not valid JSON: .*; where it is TOML, end its name in .toml"),
        (
            "a.toml",
            "[train]\nsteps = 3",
            "has the table train; every setting is one value or a list: write the settings at the",
        ),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, name: str, content: str | bytes | None, text: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError, match=text):
        read_file(str(tmp_path / name))


def test_a_run_may_not_be_called_latest() -> None:
    with pytest.raises(RunError, match="run='latest' is not a plain name"):
        Train(run="latest")


def test_the_automatic_dtype_is_bf16_on_a_gpu() -> None:
    assert [compute_dtype("auto", kind) for kind in ("cpu", "cuda", "xpu")] == ["fp32", "bf16", "bf16"]
    assert (compute_dtype("fp32", "cuda"), compute_dtype("bf16", "cpu")) == ("fp32", "bf16")


def test_unknown_names_are_refused_by_name() -> None:
    with pytest.raises(
        RunError, match=r"x sets tokns, unknown to train \(did you mean tokens\?\); legal are ranks, timeout_seconds, debug, "
    ):
        known(Train, {"tokns": 1, "tokens": 2}, "the config x")


def test_runs_are_found_by_name_or_as_the_latest(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is none; start one with: longspan train"):
        settings_of_run(str(tmp_path), "latest")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"steps": 3}))
        (tmp_path / "latest").write_text(f"{name}\n")
    assert settings_of_run(str(tmp_path), "latest") == ("two", {"steps": 3})
    assert settings_of_run(str(tmp_path), "one") == ("one", {"steps": 3})
    with pytest.raises(RunError, match=r"no run 'three' in the folder .*: there are one, two"):
        settings_of_run(str(tmp_path), "three")
    (tmp_path / "latest").write_bytes(b"\xff")
    with pytest.raises(RunError, match=r"no run 'latest' in the folder .*: there are one, two"):
        settings_of_run(str(tmp_path), "latest")
    (tmp_path / "one" / "config.json").write_bytes(b"\xff")
    with pytest.raises(RunError, match=r"the config .*config\.json is not valid JSON"):
        settings_of_run(str(tmp_path), "one")

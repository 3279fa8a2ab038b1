"""Flags, files and records as settings; what wins over what; and one line for whatever is wrong."""

import json
import os
import re
import sys
import textwrap
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest

from longspan import __version__
from longspan.cli import launch
from longspan.cli import main as cli
from longspan.cli.config import Check, Evaluate, Train
from longspan.errors import RunError
from tests.helpers import processes

FLAGS = {
    "train": """
        ranks timeout_seconds debug ulysses ring tensor pipeline schedule stages_per_rank zero recompute tile_tokens
        head_chunks offload_activations chunked_loss
        model dtype data text_field tokenizer tokens rope_scaling rows_per_step micro_batches steps epochs optimizer
        learning_rate warmup_steps decay_steps weight_decay clip_norm eval_every_steps eval_rows
        checkpoint_every_steps keep_checkpoints seed run deterministic memory_report plan log_to runs_folder resume
    """,
    "evaluate": "ranks timeout_seconds debug checkpoint data text_field max_tokens documents tensor pipeline dtype runs_folder",
    "check": """
        ranks timeout_seconds debug ulysses ring tensor pipeline schedule stages_per_rank zero recompute tile_tokens
        head_chunks offload_activations chunked_loss dtype model layers heads kv_heads tokens rows micro_batches seed json
    """,
    "plan": """
        model compare hardware gpus tokens rows dtype price goal pipeline ring ulysses tensor zero recompute explain json html
        debug
    """,
    "probe": "ranks timeout_seconds debug out largest_mib repeats",
    "rehearse": """
        world model tokens rows micro_batches dtype pipeline ring ulysses tensor zero recompute tile_tokens head_chunks
        offload_activations offload_parameters chunked_loss rank steps hardware json seed debug
    """,
    "report": "runs runs_folder html watch debug",
}


def test_the_flags_are_pinned() -> None:
    assert {verb: [field.name for field in fields(cli.VERBS[verb].settings)] for verb in cli.VERBS} == {
        verb: names.split() for verb, names in FLAGS.items()
    }


def test_flags_become_settings() -> None:
    assert cli.parse("train", []) == Train()
    assert cli.parse("train", ["--data", "a", "b", "--ranks", "4", "--learning-rate", "1e-4", "--zero", "3"]) == Train(
        data=("a", "b"), ranks=4, learning_rate=1e-4, zero=3
    )
    assert cli.parse("evaluate", ["runs/x", "--max-tokens", "10"]) == Evaluate(checkpoint="runs/x", max_tokens=10)
    assert cli.parse("check", ["--kv-heads", "2", "--debug"]) == Check(kv_heads=2, debug=True)


@pytest.mark.parametrize(
    ("verb", "flags", "devices", "world", "ranks", "ulysses"),
    [
        ("train", [], 0, None, 2, 2),
        ("train", [], 1, None, 1, 1),  # one GPU: one rank
        ("check", ["--dtype", "fp32"], 3, None, 3, 3),
        ("train", [], 8, None, 4, 4),  # the smallest model has four heads
        ("train", ["--ulysses", "2"], 1, None, 2, 2),
        ("train", ["--tensor", "2"], 4, None, 4, 2),
        ("train", ["--tensor", "2"], 1, None, 2, 1),
        ("train", ["--tensor", "2"], 0, None, 4, 2),
        ("evaluate", ["--tensor", "2"], 4, None, 4, None),
        ("train", ["--tensor", "2", "--pipeline", "2"], 8, None, 4, 1),
        ("evaluate", ["--pipeline", "2"], 4, None, 4, None),
        ("train", ["--ranks=2"], 1, None, 2, 2),
        ("train", [], 8, "1", 1, 1),  # torchrun with one rank
        ("train", [], 8, "2", 2, 2),
        ("evaluate", [], 1, None, 1, None),
        ("evaluate", [], 0, None, 2, None),
    ],
)
def test_as_many_ranks_as_devices(
    verb: str,
    flags: list[str],
    devices: int,
    world: str | None,
    ranks: int,
    ulysses: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli.launch, "visible_devices", lambda work, ranks: devices)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
        if world is not None:
            monkeypatch.setenv(name, world)
    placed = cli._on_the_devices(cli.parse(verb, flags), flags, f"longspan.cli.{verb}:work")
    assert (placed.local_ranks, getattr(placed, "ulysses", None)) == (ranks, ulysses)


def test_flags_win_over_a_file_and_a_file_over_the_record_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    record = {"steps": 5, "tokens": 10, "seed": 7, "ranks": None, "data": ["x"], "debug": False, "run": "old"}
    (tmp_path / "old" / "config.json").write_text(json.dumps(record))
    (tmp_path / "latest").write_text("old\n")
    (tmp_path / "a.toml").write_text("steps = 6\ntokens = 20\n")
    flags = ["--config", str(tmp_path / "a.toml"), "--steps", "8", "--runs-folder", str(tmp_path)]
    assert cli.parse("train", flags) == Train(steps=8, tokens=20, runs_folder=str(tmp_path))
    expected = Train(
        steps=8, decay_steps=5, tokens=20, seed=7, data=("x",), run="old", runs_folder=str(tmp_path), resume="latest"
    )  # the learning rate keeps the schedule that the run was started with
    assert cli.parse("train", [*flags, "--resume"]) == expected
    named = cli.parse("train", ["--resume", "old", *flags, "--decay-steps", "9"])
    assert (named.run, named.decay_steps) == ("old", 9)


@pytest.mark.parametrize("resume", ["old", True])
def test_a_file_names_the_run_that_is_resumed_and_its_folder_too(tmp_path: Path, resume: str | bool) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps({"steps": 5, "tokens": 10, "run": "old"}))
    (tmp_path / "latest").write_text("old\n")
    (tmp_path / "a.json").write_text(json.dumps({"runs_folder": str(tmp_path), "steps": 6}))
    (tmp_path / "b.json").write_text(json.dumps({"runs_folder": str(tmp_path), "steps": 6, "resume": resume}))
    expected = Train(
        steps=6, decay_steps=5, tokens=10, run="old", runs_folder=str(tmp_path), resume="old" if resume == "old" else "latest"
    )
    flags = ["--resume", "old"] if resume == "old" else ["--resume"]
    assert cli.parse("train", [*flags, "--config", str(tmp_path / "a.json")]) == expected
    assert cli.parse("train", ["--config", str(tmp_path / "b.json")]) == expected


def test_a_file_names_the_checkpoint_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"checkpoint": "x", "documents": 2}')
    assert cli.parse("evaluate", ["--config", str(tmp_path / "a.json")]) == Evaluate(checkpoint="x", documents=2)
    assert cli.parse("evaluate", [f"--config={tmp_path / 'a.json'}"]) == Evaluate(checkpoint="x", documents=2)
    assert cli.parse("evaluate", ["y", "--config", str(tmp_path / "a.json")]) == Evaluate(checkpoint="y", documents=2)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            "trian",
            "'trian' is not a verb of longspan (did you mean train?); legal are train, evaluate, check, plan, probe, "
            "rehearse, report",
        ),
        ("train --qqq", "--qqq is not a flag of longspan train; see longspan train --help"),
        ("train --step 5", "--step is not a flag of longspan train (did you mean --steps?); see longspan train --help"),
        ("train --lr=1", "--lr is not a flag of longspan train (did you mean --learning-rate?); see "),
        ("check --batch-size 3", "--batch-size is not a flag of longspan check; see "),
        (
            "train --no-memory-reports",
            "--no-memory-reports is not a flag of longspan train (did you mean --no-memory-report?); see ",
        ),
        ("train --no-steps", "--no-steps is not a flag of longspan train"),
        ("train 5", "Unrecognized options: 5; see longspan train --help"),
        (f"train --runs-folder {__file__}", f"runs_folder='{__file__}' is a file; name a folder, which is made where it does "),
        (f"train --resume --runs-folder {__file__}", f"runs_folder='{__file__}' is a file; "),
        (f"evaluate --runs-folder {__file__}", f"runs_folder='{__file__}' is a file; "),
        ("train c.toml", "Unrecognized options: c.toml (did you mean --config c.toml?); see longspan train --help"),
        ("train --steps 5 run/c.json", "Unrecognized options: run/c.json (did you mean --config run/c.json?); see longspan tr"),
        ("train --tokens x", "Error parsing --tokens: invalid literal for int() with base 10: 'x'; see longspan train --help"),
        ("train --steps", "Missing value for argument '--steps'. Expected 1 values; see longspan train --help"),
        ("check --zero 4", "invalid choice '4' for argument '--zero'. Expected one of ('0', '2', '3'); see longspan check"),
        ("train --learning-rate -1", "learning_rate=-1.0 must be above 0"),
        ("train --steps 3 --epochs 1", "--steps and --epochs both say how long the run is; give one of them, and leave the "),
        ("train --epochs 0", "epochs=0.0 must be above 0"),
        ("train --config", "--config needs the name of a JSON or TOML file"),
        ("train --runs-folder /nowhere --resume", "no run 'latest' in the folder /nowhere: there is none; start one with: "),
    ],
)
def test_bad_flags_are_one_line(arguments: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments.split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"longspan: {line}")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"tokens": "x"}', "Error parsing --tokens: invalid literal for int()"),
        ('{"tokens": {"a": 1}}', "has the table tokens; every setting is one value or a list: write the settings at the top "),
        ('{"steps": 3, "epochs": 1}', "--steps and --epochs both say how long the run is; "),
        ('{"debug": "yes"}', 'sets debug to "yes", but debug is a switch: write true or false, without quotes'),
        ('{"chunked_loss": 1}', "sets chunked_loss to 1, but chunked_loss is a switch: "),
        ('{"steps": true}', "sets steps to true, but steps is no switch: write its value"),
        ('{"tokns": 3}', "sets tokns, unknown to train (did you mean tokens?); legal are ranks, "),
    ],
)
def test_bad_files_are_one_line(content: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(content)
    assert cli.main(["train", "--config", str(tmp_path / "a.json")]) == 2
    output = capsys.readouterr().err
    assert line in output
    assert output.count("\n") == 1


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_shows_a_real_call_and_every_flag(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    output = capsys.readouterr().out
    assert output.rstrip().endswith(textwrap.indent(cli.VERBS[verb].example, "  "))  # each line of it on a line of its own
    assert "(default: None)" not in output
    assert not re.search(r"(?i)default: [^)]*\)[.)]* *\(default", output)
    assert "{None}" not in output
    for field in fields(cli.VERBS[verb].settings):
        assert f"--{field.name.replace('_', '-')}" in output or field.name == "checkpoint"


def test_help_and_version_do_not_wait_for_torch() -> None:
    calls = "main.main([]), main.main(['train', '--help']), main.main(['--version'])"
    program = f"import sys; from longspan.cli import main; print({calls}); assert 'torch' not in sys.modules"
    done = processes.run([sys.executable, "-c", program])
    assert done.returncode == 0, done.stderr
    output = done.stdout
    assert f"longspan {__version__} (Python 3." in output
    assert f"torch {version('torch')}" in output
    assert output.endswith("0 0 0\n")
    for verb, (_, does, _) in cli.VERBS.items():
        assert f"longspan {verb}" in output
        assert does in output


def test_every_switch_can_be_turned_off_again(tmp_path: Path) -> None:
    switches = [field.name for field in fields(Train) if field.type is bool]
    assert "memory_report" in switches
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(dict.fromkeys(switches, True)))
    (tmp_path / "off.json").write_text(json.dumps(dict.fromkeys(switches, False)))
    resume = ["--resume", "old", "--runs-folder", str(tmp_path)]
    off = [f"--no-{name.replace('_', '-')}" for name in switches]
    for flags, expected in [
        (resume, True),
        ([*resume, *off], False),
        ([*resume, "--config", str(tmp_path / "off.json")], False),
        (["--config", str(tmp_path / "off.json")], False),
    ]:
        config = cli.parse("train", flags)
        assert {getattr(config, name) for name in switches} == {expected}


def test_a_dead_rank_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def dies(*_: object) -> int:
        raise launch.RankDied("rank 1 was ended by SIGKILL", "the traceback")

    monkeypatch.setattr(launch, "run", dies)
    assert cli.main(["train", "--runs-folder", "elsewhere"]) == 1
    assert cli.main(["train", "--run", "mine", "--debug"]) == 1
    assert cli.main(["check"]) == 1
    first, second, trace, third = capsys.readouterr().err.splitlines()
    died = "longspan: rank 1 was ended by SIGKILL"
    assert first == f"{died}; if it had made a checkpoint, go on from it with: longspan train --resume --runs-folder elsewhere"
    assert second == f"{died}; if it had made a checkpoint, go on from it with: longspan train --resume mine"
    assert trace == "the traceback"
    assert third == died


def test_under_a_launcher_every_rank_meets_an_error_and_one_says_it() -> None:
    flags = ["--local-addr=127.0.0.1", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "longspan.cli.main"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    found = processes.run([*torchrun, "check", "--heads", "1"], env=environment)
    (ours,) = [line for line in found.stderr.splitlines() if line.startswith("longspan: ")]
    assert ours.startswith("longspan: ulysses=2 exceeds the 1 query heads; ")


def test_an_unknown_verb_is_not_parsed() -> None:
    with pytest.raises(RunError, match="is not a verb"):
        cli.parse("plot", [])

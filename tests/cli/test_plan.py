"""``longspan plan``: the table, the sentences, the JSON, and exit code 2 with one sentence on bad input."""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest

from longspan.cli.main import VERBS, main
from longspan.planner.plan import choice, plan
from longspan.planner.strategy import Strategy

ROOT = Path(__file__).parents[2]


def test_the_table_names_the_best_layout_and_its_uncertainty(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "8", "--tokens", "131072", "--price", "2", "--explain"]) == 0
    text = capsys.readouterr().out
    assert "llama-8b, 8.03B parameters, on 8 H100: 1 x 131,072 tokens a step" in text
    numbers = [
        line.split() for line in text.splitlines() if line.startswith(("step ", "tokens a second", "memory of a", "price"))
    ]
    assert len(numbers) == 4
    assert "memory of a host" not in text
    assert all(sum(cell.startswith("+-") for cell in row) == 2 for row in numbers), "of the best and of the runner-up"
    assert "- Megatron sequence parallelism would send 4·N·h" in text


def test_a_page_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "llama-1b", "--gpus", "2", "--tokens", "4096", "--html", str(tmp_path / "a.html")]) == 0
    assert "llama-1b on H100" in (tmp_path / "a.html").read_text()
    assert "best " in capsys.readouterr().out
    assert main(["plan", "--gpus", "2", "--tokens", "4096", "--html", str(tmp_path / "no" / "a.html")]) == 2


def test_json_has_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "8", "--ulysses", "4", "--recompute", "full", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["best"]
    assert (best["strategy"]["ulysses"], best["strategy"]["recompute"]) == (4, "full")
    assert sum(best["time"].values()) == pytest.approx(best["seconds"])
    assert 1.01 * found["runner_up"]["seconds"] >= best["seconds"]


def test_a_config_of_hugging_face_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 1000,
              "intermediate_size": 1024, "max_position_embeddings": 4096}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", "--model", f"hf:{tmp_path}", "--tokens", "4096", "--goal", "speed"]) == 0
    assert "4,096 tokens a step" in capsys.readouterr().out
    assert main(["plan", "--model", f"hf:{tmp_path}", "--tokens", "5000"]) == 2
    assert "beyond the 4,096 positions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [("--price 0", "price=0 must be above 0"), ("--hardware h1", "the hardware 'h1' is unknown"), ("--gpus 0", "at least 1"),
     ("--goal length --tokens 5", "give one of them"), ("--goal cost", "needs --price"), ("--zero 1", "legal are 0, 2 and 3"),
     ("--model llama-9b", "model='llama-9b' is unknown"), ("--tensor 3", "legal are 1, 2, 4"),
     ("--tokens 99999999999", "tokens fit"), ("--tokens 128k", "--tokens takes a whole number, not '128k': 131072"),
     ("--tokens=1M", "--tokens takes a whole number, not '1M': 1048576"), ("llama-8b", "(did you mean --model llama-8b?)"),
     ("--html /nowhere/x.html", "html='/nowhere/x.html' is in a folder that does not exist"),
     ("--gpus 12 --ulysses 5", "use 1, 2, 3, 4, 6 or 12"), ("--ulysses 8 --ring 8", "ring=8 x ulysses=8 are 64 ranks"),
     ("--gpus 1 --zero 0 --tokens 1000000", "or leave out zero=0"),
     ("--tensor x", "see longspan plan --help"), ("--ranks 3", "is not a flag")],
)  # fmt: skip
def test_bad_input_is_one_sentence(flags: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_two_models_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 1000,
              "intermediate_size": 1024}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["plan", "--gpus", "8", "--tokens", "8192", "--compare", "llama-1b", f"hf:{tmp_path}"]
    assert main(flags) == 0
    text = capsys.readouterr().out
    assert "On 8 H100, the best layout of each" in text
    assert ["llama-1b", f"hf:{tmp_path}"] in [line.split() for line in text.splitlines()]
    (step,) = [line for line in text.splitlines() if line.startswith("step ")]
    assert step.count("+-") == 2
    assert main([*flags, "--json"]) == 0
    one, two = json.loads(capsys.readouterr().out)
    assert one["best"]["seconds"] > two["best"]["seconds"]
    for more, reason in (
        (["--explain"], "leave out --model, --explain and --html"),
        (["--compare", "llama-1b"], "takes two models"),
    ):
        assert main([*flags, *more]) == 2
        assert reason in capsys.readouterr().err


def _printed(flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", *flags.split()]) == 0
    return capsys.readouterr().out


def test_numbers_are_printed_in_units_that_people_read(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = _printed("--model tiny --gpus 1 --tokens 64", capsys)
    assert "tiny, 1.41M parameters" in tiny
    assert re.search(r"\nstep +[1-9][0-9.]* ms \+-", tiny)
    alone = _printed("--gpus 1 --tokens 600000", capsys)  # one layout fits: no column of a runner-up, but a host
    assert "runner-up" not in alone
    assert re.search(r"memory of a host +[1-9][0-9.]* GiB", alone)


def test_a_step_above_a_day_is_remarked_on(capsys: pytest.CaptureFixture[str]) -> None:
    text = _printed("--model llama-8b --gpus 512 --rows 512 --goal length", capsys)
    (unit,) = re.findall(r"A step of that length takes [0-9.,]+ (\w+); name --tokens, which --goal speed plans for", text)
    assert unit in ("days", "years")
    assert "A step of that length" not in _printed("--gpus 1 --goal length", capsys)


def test_what_a_layout_wastes_or_assumes_is_a_remark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        "With 1 micro-batch a replica, 7 of 8 pipeline stages wait at any time; use more rows a step, at least 8."
        in _printed("--pipeline 8 --rows 1 --tokens 4096", capsys)
    )
    assert "pipeline stages wait" not in _printed("--pipeline 8 --rows 8 --tokens 4096", capsys)
    config = {"num_hidden_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 1000, "intermediate_size": 64}
    for kind, assumed in (("of_tomorrow", True), ("llama", False), ("gpt2", False)):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        text = _printed(f"--model hf:{tmp_path} --tokens 512", capsys)
        assert ("is not known here: assumed are gated feed-forwards, 2 norms a layer" in text) is assumed


def test_tiles_alone_are_not_called_recomputation(capsys: pytest.CaptureFixture[str]) -> None:
    text = _printed("--gpus 8 --tokens 131072 --explain", capsys)
    assert "  time: tiles again" in text
    assert ", tiles again 4%" in text
    assert "recompute" not in text
    assert "  time: recompute, tiles again" in _printed("--gpus 8 --tokens 131072 --ulysses 8", capsys)
    assert "  time: recompute" in _printed("--gpus 8 --tokens 131072 --ulysses 8 --recompute full", capsys)


@pytest.mark.parametrize("verb", ["plan", "rehearse", "train", "check", "evaluate", "probe", "report"])
def test_no_line_of_a_flag_s_help_breaks_in_mid_sentence(verb: str) -> None:
    lines = ast.parse(inspect.getsource(VERBS[verb].settings)).body[0]
    assert isinstance(lines, ast.ClassDef)
    helps = [e.value.value for e in lines.body if isinstance(e, ast.Expr) and isinstance(e.value, ast.Constant)]
    assert [text for text in helps if "\n" in str(text)] == []


def test_fp8_is_marked_as_not_trained_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    assert "longspan does not train in it" in " ".join(re.sub(r"[│|]", " ", capsys.readouterr().out).split())


def test_a_layout_is_named_by_what_parallelize_takes() -> None:
    offloaded = Strategy(zero=3, offload_optimizer=True, offload_parameters=True)
    assert str(offloaded) == "one device, zero=3, offload_parameters"


def test_the_plans_that_help_and_readme_show_are_what_comes_out(capsys: pytest.CaptureFixture[str]) -> None:
    command, *shown = VERBS["plan"].example.splitlines()
    printed = [line.split() for line in _printed(command.partition("plan ")[2], capsys).splitlines()]
    assert [line for line in shown[:-1] if line.split() not in printed] == []
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `longspan plan --model")]
    found = re.search(r"`step (.*), memory of a GPU (.*), best: (.*), \.\.\.`", row)
    assert found is not None
    for name, figure in zip(("step", "memory of a GPU", "best"), found.groups()):
        assert any(" ".join(line).startswith(f"{name} {figure}") for line in printed), name


def test_the_cluster_page_s_prediction_is_that_of_its_layout() -> None:
    page = " ".join((ROOT / "docs" / "cluster.md").read_text().split())
    found = re.search(r"predicted ([0-9.]+) GiB of a GPU's memory, \+-(\d+)%, and ([0-9.]+) s a step", page)
    assert found is not None
    setting = plan("llama-8b", gpus=8, tokens=131_072).best.setting
    best = choice(setting, Strategy(ulysses=8, zero=3, recompute="selective"))
    assert found.groups() == (f"{best.bytes / 2**30:.1f}", f"{best.memory_error * 100:.0f}", f"{best.seconds:.1f}")

"""``longspan plan``: the table, the sentences, the JSON, and exit code 2 with one sentence on bad input."""

import json
from pathlib import Path

import pytest

from longspan.cli.main import main


def test_the_table_names_the_best_layout_and_its_uncertainty(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "8", "--tokens", "131072", "--price", "2", "--explain"]) == 0
    text = capsys.readouterr().out
    assert "llama-8b, 8.03B parameters, on 8 H100: 1 x 131,072 tokens a step" in text
    numbers = [
        line.split() for line in text.splitlines() if line.startswith(("step ", "tokens a second", "memory of a", "price"))
    ]
    assert len(numbers) == 5
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
     ("--tokens 99999999999", "tokens fit"), ("--tensor x", "see longspan plan --help"), ("--ranks 3", "is not a flag")],
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

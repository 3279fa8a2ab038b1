"""The verdict on guarantee 1: it holds for every layout, and it fails where something is wrong."""

import contextlib
import json
import math
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from longspan.cli import check, launch
from longspan.cli import main as cli
from longspan.cli.config import Check
from longspan.distributed import collectives
from longspan.errors import RunError
from longspan.models.decoder_config import PRESETS

pytestmark = pytest.mark.usefixtures("launcher")

SMALL = Check(tokens=19, rows=3, layers=2)


def into_a_file(job: tuple[Check, str]) -> int:
    config, path = job
    with open(f"{path}{dist.get_rank()}", "w") as file, contextlib.redirect_stdout(file):
        return check.work(config)


def verdict(config: Check, tmp_path: Path, work: str = "into_a_file") -> tuple[int, dict[str, list[str]]]:
    """The exit code, and the words of each line of the table by its first two words."""
    code = launch.run(f"{__name__}:{work}", (config, str(tmp_path / "output")), config.local_ranks)
    lines = [line.split() for line in (tmp_path / "output0").read_text().splitlines()]
    return code, {" ".join(words[:-5]): words[-5:] for words in lines if words and words[-1] in ("holds", "FAILS")}


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, ranks=4),
        pytest.param(replace(SMALL, ulysses=4, heads=8, kv_heads=2), marks=pytest.mark.long),
        replace(SMALL, ring=2),
        pytest.param(replace(SMALL, ranks=3, ulysses=1, zero=3, dtype="fp32"), marks=pytest.mark.long),
        replace(SMALL, ranks=4, rows=1, dtype="fp32"),
        pytest.param(replace(SMALL, ulysses=3, dtype="bf16", tokens=64), marks=pytest.mark.long),
        replace(SMALL, ulysses=1),
        pytest.param(replace(SMALL, tensor=2, heads=8, kv_heads=4, zero=3), marks=pytest.mark.long),
        pytest.param(replace(SMALL, tensor=2, ring=2, ulysses=1), marks=pytest.mark.long),
        pytest.param(replace(SMALL, tensor=2, ulysses=1, kv_heads=1, ranks=4, rows=1), marks=pytest.mark.long),
        pytest.param(
            replace(SMALL, pipeline=2, ulysses=1, rows=4, micro_batches=4, dtype="fp32", recompute="full"),
            marks=pytest.mark.long,
        ),
        replace(
            SMALL, pipeline=2, schedule="interleaved", stages_per_rank=2, layers=4, rows=4, micro_batches=2, tensor=2, zero=2
        ),
        pytest.param(replace(SMALL, pipeline=2, ring=2, rows=4, micro_batches=4, ulysses=1), marks=pytest.mark.long),
        pytest.param(replace(SMALL, pipeline=2, ranks=4, rows=1, ulysses=1), marks=pytest.mark.long),
        pytest.param(
            replace(SMALL, pipeline=2, ulysses=1, dtype="bf16", tokens=64, rows=4, micro_batches=2), marks=pytest.mark.long
        ),
        replace(SMALL, ulysses=2, rows=3, micro_batches=2),
    ],
    ids=[
        "2x2",
        "1x4-gqa",
        "ring-2x2",
        "3x1-zero-3",
        "a-replica-without-a-row",
        "1x3-bf16",
        "one-rank",
        "tensor-2x2-zero-3",
        "tensor-ring",
        "tensor-a-replica-without-a-row",
        "pipeline",
        "pipeline-interleaved-tensor-ulysses",
        "pipeline-ring",
        "pipeline-a-replica-without-a-row",
        "pipeline-bf16",
        "micro-batches",
    ],
)
def test_guarantee_1_holds(config: Check, tmp_path: Path) -> None:
    code, lines = verdict(config, tmp_path)
    assert {words[-1] for words in lines.values()} == {"holds"}
    assert code == 0
    axes = {what.partition(":")[0] for what in lines if re.match(r"[a-z]+: ", what)}
    assert axes == {axis for axis in ("pipeline", "ulysses", "ring", "tensor") if getattr(config, axis) > 1}
    calls = config.layers * config.micro_batches // config.pipeline
    if config.ulysses > 1:
        assert {lines[f"ulysses: collectives, {way}"][0] for way in ("forward", "backward")} == {str(2 * calls)}
    if config.tensor > 1:  # two regions a layer, the position ids of each stage, 2 for an embedding, 3 for a loss
        ends = config.stages_per_rank + (5 if config.pipeline == 1 else 3)
        assert lines["tensor: collectives, forward"][0] == str(4 * calls + ends * config.micro_batches)
        assert lines["tensor: bytes, forward"][0] != "0"
    assert lines["other axes: collectives"][0] == "0"


@pytest.mark.parametrize(
    "tools",
    [
        pytest.param({"recompute": "full"}, marks=pytest.mark.long),
        {"recompute": "selective", "ring": 2, "ranks": 4},
        {"head_chunks": 2, "heads": 8, "kv_heads": 2},
        pytest.param(
            {"head_chunks": 2, "heads": 8, "kv_heads": 4, "recompute": "full", "ring": 2, "ranks": 4}, marks=pytest.mark.long
        ),
        {"head_chunks": 2, "heads": 8, "kv_heads": 4, "recompute": "selective", "tile_tokens": 5, "zero": 3},
        pytest.param({"tensor": 2, "ranks": 4, "recompute": "full", "tokens": 21}, marks=pytest.mark.long),
        pytest.param(
            {"tensor": 2, "ranks": 4, "recompute": "selective", "head_chunks": 2, "heads": 8, "kv_heads": 4},
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"tensor": 2, "ranks": 2, "ulysses": 1, "head_chunks": 2, "heads": 8, "kv_heads": 4, "dtype": "bf16", "tokens": 64},
            marks=pytest.mark.long,
        ),
    ],
    ids=["full", "kept-ring", "chunks", "chunks-full-ring", "all", "tensor-full", "tensor-selective", "tensor-bf16"],
)
def test_the_traffic_is_that_of_the_tools(tools: dict[str, Any], tmp_path: Path) -> None:
    code, lines = verdict(replace(SMALL, **{"ranks": 2, "ulysses": 2} | tools), tmp_path)
    assert {words[-1] for words in lines.values()} == {"holds"}
    assert code == 0
    assert lines["ulysses: bytes, backward"][0] != "0" if "tensor" not in tools else "tensor: bytes, backward" in lines


def hugging_face(folder: Path, model: str, **more: Any) -> str:
    """A folder with a config alone."""
    settings: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 64, "model_type": model, **more,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    return f"hf:{folder}"


@pytest.mark.parametrize(
    ("model", "more", "settings", "parameters"),
    [
        ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}, {"layers": 2}, 21),
        pytest.param(
            "bert",
            {"architectures": ["BertForMaskedLM"]},
            {"zero": 3, "ranks": 4, "dtype": "fp32"},
            58,
            marks=pytest.mark.long,
        ),
        pytest.param(
            "llama", {"num_key_value_heads": 1}, {"dtype": "bf16", "tokens": 64, "layers": 1}, 0, marks=pytest.mark.long
        ),
    ],
)
def test_guarantee_1_holds_for_a_hugging_face_model(
    model: str, more: Any, settings: Any, parameters: int, tmp_path: Path
) -> None:
    config = replace(SMALL, layers=None, model=hugging_face(tmp_path / "model", model, **more))
    code, lines = verdict(replace(config, **settings), tmp_path)
    assert {words[-1] for words in lines.values()} == {"holds"}
    assert code == 0
    assert not parameters or any(what.startswith(f"worst gradient of {parameters}: ") for what in lines)
    assert len(lines) == (3 if parameters else 2)


def test_a_hugging_face_model_that_cannot_be_checked_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    llama = hugging_face(tmp_path / "llama", "llama")
    classifier = hugging_face(tmp_path / "classifier", "llama", architectures=["LlamaForSequenceClassification"])
    mamba = hugging_face(tmp_path / "mamba", "mamba", architectures=["MambaForCausalLM"])
    for flags, sentence in [
        ([llama, "--heads", "2"], "are those of its config.json; leave out --heads and --kv-heads"),
        ([llama, "--layers", "4"], "layers=4 is more than the 3 of "),
        ([llama, "--ulysses", "5"], "ulysses=5 exceeds the 4 query heads; "),
        ([classifier], "is a LlamaForSequenceClassification, which is no language model; name the folder of "),
        ([mamba], "mixes tokens outside attention"),
        ([f"hf:{tmp_path}"], "has no config.json; name one that a Hugging Face model's save_pretrained wrote"),
    ]:
        capfd.readouterr()
        assert cli.main(["check", "--tokens", "19", "--model", *flags]) == 2
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("longspan: ")]
        assert len(errors) == 1
        assert sentence in errors[0]


def one_gradient_is_off(job: Any) -> int:
    """A rank other than the lead scales one gradient a little."""
    parallelize = check.parallelize

    def off(model: Any, *args: Any, **tools: Any) -> Any:
        if dist.get_rank() == 1:
            model.blocks[1].feed.up.weight.register_hook(lambda grad: grad * (1 + 1e-8))
        return parallelize(model, *args, **tools)

    check.parallelize = off
    return into_a_file(job)


def something_is_sent_twice(job: Any) -> int:
    send = collectives.CountingTransport.all_to_all_into

    def twice(*args: Any) -> Any:
        send(*args).wait()
        return send(*args)

    collectives.CountingTransport.all_to_all_into = twice  # type: ignore[method-assign]
    return into_a_file(job)


def the_loss_of_one_rank_is_nan(job: Any) -> int:
    outcome = check._outcome
    if dist.get_rank() == 1:
        check._outcome = lambda *args: replace(outcome(*args), loss=math.nan)
    return into_a_file(job)


@pytest.mark.parametrize(
    ("work", "fails"),
    [
        ("one_gradient_is_off", ["worst gradient of 21: blocks.1.feed.up.weight", "norm of all gradients"]),
        (
            "something_is_sent_twice",
            [f"ulysses: {what}, {way}" for way in ("forward", "backward") for what in ("collectives", "bytes")],
        ),
        ("the_loss_of_one_rank_is_nan", ["loss"]),
    ],
)
def test_a_fault_of_any_rank_fails_guarantee_1(work: str, fails: list[str], tmp_path: Path) -> None:
    code, lines = verdict(SMALL, tmp_path, work)
    assert [what for what, words in lines.items() if words[-1] == "FAILS"] == fails
    assert code == 1
    assert "Guarantee 1 FAILS on this machine." in (tmp_path / "output0").read_text()


def test_the_certificate_says_what_was_compared(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    verdict(replace(SMALL, tensor=2, ulysses=2, json=str(path)), tmp_path)
    held = json.loads(path.read_text())
    assert held["holds"] is True
    assert len(held["hosts"]) == 4
    assert (held["model"]["name"], held["model"]["heads"], held["batch"]["tokens"]) == ("tiny", 4, 19)
    assert [held["layout"][name] for name in ("pipeline", "data", "ring", "ulysses", "tensor", "zero")] == [1, 1, 1, 2, 2, 0]
    assert held["versions"]["torch"] == version("torch")
    assert set(held["compared"]) == {"loss", "gradients", "norm"}
    assert 0 < held["compared"]["gradients"]["error"] < held["compared"]["gradients"]["bound"] == 1e-10
    counted = {line["what"]: (line["found"], line["expected"]) for line in held["traffic"]}
    assert len(counted) == 9
    assert counted["tensor: collectives, forward"] == (
        14,
        14,
    )  # 8 of two layers, 1 of position ids, 2 of the embedding, 3 of the loss
    assert all(found == expected for found, expected in counted.values())


def test_the_certificate_of_a_pipeline_counts_the_messages_between_stages(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    verdict(replace(SMALL, pipeline=2, ulysses=1, rows=4, micro_batches=4, json=str(path)), tmp_path)
    held = json.loads(path.read_text())
    assert (held["holds"], held["layout"]["pipeline"], held["layout"]["schedule"]) == (True, 2, "1f1b")
    counted = {line["what"]: (line["found"], line["expected"]) for line in held["traffic"]}
    sent = 4 * 19 * PRESETS["tiny"].hidden * 8  # four rows, fp64; the first stage sends all of it, the last one the gradients
    assert counted["pipeline: bytes, forward"] == (sent, sent)
    assert counted["pipeline: collectives, backward"] == (4, 4)
    assert counted["other axes: collectives"] == (0, 0)


def test_the_certificate_of_a_fault_is_legal_json_and_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    verdict(replace(SMALL, json=str(path)), tmp_path, "the_loss_of_one_rank_is_nan")
    held = json.loads(path.read_text())
    assert (held["holds"], held["compared"]["loss"]["holds"], held["compared"]["loss"]["error"]) == (False, False, "nan")


def test_a_certificate_that_cannot_be_written_is_refused_by_every_rank(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--tokens", "19", "--json", "/dev/full"]) == 2
    assert "cannot be written: No space left on device; name another file" in capfd.readouterr().err


def with_a_seed_of_its_own(job: tuple[Check, str]) -> int:
    return check.work(replace(job[0], seed=dist.get_rank()))


def test_ranks_with_other_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^seed is 0 on rank 0 and 1 on rank 1; start every rank with the same settings"):
        launch.run(f"{__name__}:with_a_seed_of_its_own", (SMALL, ""), 2)


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

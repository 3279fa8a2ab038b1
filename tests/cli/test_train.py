"""Training as a user starts it: the same numbers on two ranks, after a kill, in micro-batches; and what it refuses."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.filesystem as storage
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longspan.cli import checkpoint, launch, metrics, train
from longspan.cli import main as cli
from longspan.cli.config import Train
from longspan.cli.run_folder import LOCK
from longspan.distributed.layout import Heads
from longspan.distributed.traffic import attention_traffic
from longspan.errors import RunError
from longspan.models.decoder_config import PRESETS
from tests.helpers.runs import column, records, run, small, write_text

pytestmark = pytest.mark.usefixtures("launcher")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 documents of words that repeat, 24 kB."""
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


LONG = pytest.mark.long  # a gradient off by a factor shows with sgd in its first steps; 50 also show what adds up slowly


@pytest.mark.parametrize(
    ("optimizer", "steps"),
    [("sgd", 15), pytest.param("sgd", 50, marks=LONG), pytest.param("adamw", 50, marks=LONG)],
)
def test_steps_on_two_ranks_are_those_of_one(optimizer: str, steps: int, text: str, tmp_path: Path) -> None:
    rate = 0.1 if optimizer == "sgd" else 1e-3
    config = small(text, tmp_path, steps=steps, optimizer=optimizer, learning_rate=rate, tokens=33, rows_per_step=2)
    one = run(replace(config, ulysses=1, run="one"))
    two = run(replace(config, ulysses=2, run="two"))
    assert column(one, "step") == list(range(1, steps + 1))
    assert column(two, "loss") == pytest.approx(column(one, "loss"), rel=1e-4)
    assert column(two, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=1e-4)
    assert one[-1]["loss"] < one[0]["loss"] - 1  # a run that learns nothing agrees with anything


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {"micro_batches": 3, "zero": 2, "recompute": "selective", "tile_tokens": 10, "head_chunks": 2}, marks=LONG
        ),
        pytest.param({"zero": 3, "ranks": 4}, marks=LONG),
        pytest.param({"ranks": 4, "micro_batches": 2}, marks=LONG),
        pytest.param({"tensor": 2, "ulysses": 1}, marks=LONG),
        {"tensor": 2, "zero": 3, "micro_batches": 2, "recompute": "selective"},
    ],
    ids=["micro-batches and tools", "zero-3", "replicas", "tensor", "tensor and ulysses"],
)
def test_every_layout_trains_alike(settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    config = small(text, tmp_path, rows_per_step=3)
    reference, found = run(replace(config, run="a")), run(replace(config, run="b", **settings))
    for name in ("loss", "grad_norm"):
        assert column(found, name) == pytest.approx(column(reference, name), rel=1e-5)


def test_bf16_trains_beside_fp32(text: str, tmp_path: Path) -> None:
    config = small(text, tmp_path)
    single, half = run(replace(config, run="a")), run(replace(config, run="b", dtype="bf16"))
    assert column(half, "loss") == pytest.approx(column(single, "loss"), rel=1e-2)
    assert column(half, "loss") != column(single, "loss")
    assert half[0]["exchanged_bytes"] == single[0]["exchanged_bytes"] / 2


def into_a_file(config: Train) -> int:
    """Ranks of the tests' fork server do not write to the file that pytest captures."""
    with open(Path(config.runs_folder) / f"output{dist.get_rank()}", "a") as file, contextlib.redirect_stdout(file):
        return train.work(config)


def killed_at_step_6(config: Train) -> int:
    """The last rank is killed after the backward of step 6, when checkpoints of steps 2 and 4 are there."""
    calls, clip = [0], train.clip_grad_norm_

    def clip_or_die(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return clip(*args)

    train.clip_grad_norm_ = clip_or_die
    return train.work(config)


@pytest.mark.long  # test_checkpoint.py goes on bit by bit with both, and the next test kills a run
@pytest.mark.parametrize("zero", [0, 3])
def test_a_killed_run_goes_on_bit_by_bit(zero: int, text: str, tmp_path: Path) -> None:
    config = small(text, tmp_path, steps=9, checkpoint_every_steps=2, eval_every_steps=3, zero=zero)
    whole = run(replace(config, run="whole"))
    killed = replace(config, run="killed")
    with pytest.raises(launch.RankDied, match="rank 1 was ended by SIGKILL"):
        launch.run(f"{__name__}:killed_at_step_6", killed, 2)
    assert column(records(killed), "step") == [1, 2, 3, 4, 5]

    asked = cli.parse("train", ["--resume", "killed", "--runs-folder", str(tmp_path)])
    assert launch.run(f"{__name__}:into_a_file", asked, 2) == 0
    resumed = records(killed)
    for name in ("step", "loss", "grad_norm", "learning_rate"):
        assert column(resumed, name) == column(whole, name)
    output = (tmp_path / "output0").read_text()
    assert re.search(r"run +320 tokens, [\d.]+ epochs: 5 steps of 1 sequence; going on after step 4\n", output)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(text: str, tmp_path: Path) -> None:
    config = small(text, tmp_path, steps=7, checkpoint_every_steps=0, run="killed")
    with pytest.raises(launch.RankDied):
        launch.run(f"{__name__}:killed_at_step_6", config, 2)
    assert cli.main(["train", "--resume", "--runs-folder", str(tmp_path)]) == 0
    assert column(records(config), "step") == list(range(1, 8))


def test_a_run_leaves_what_it_says(text: str, tmp_path: Path) -> None:
    for _ in range(2):
        config = small(text, tmp_path, steps=5, checkpoint_every_steps=1, keep_checkpoints=2, memory_report=True)
        assert launch.run(f"{__name__}:into_a_file", config, 2) == 0
    output = (tmp_path / "output0").read_text()
    assert (tmp_path / "output1").read_text() == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "output0", "output1", "train-001", "train-002"]
    assert (tmp_path / "latest").read_text() == "train-002\n"
    folder = tmp_path / "train-002"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", "step-000004", "step-000005"]
    parts = ["checkpoints", "config", "events", "memory", "metrics"]
    assert [path.name.split(".")[0] for path in sorted(folder.iterdir()) if path.name != LOCK] == parts
    assert re.search(r"text   1 file \(1 \.jsonl\), 40 documents, [\d,]+ tokens to train on, [\d,]+ held out\n", output)
    assert re.search(r"run    320 tokens, 0\.01\d+ epochs: 5 steps of 1 sequence\n", output)
    assert "TensorBoard events, memory.html\n" in output
    page = (folder / "memory.html").read_text()
    assert "<title>train-002: memory of rank 0 of 2 in step 2</title>" in page
    assert "1 sequence of 64 tokens in 1 micro-batch" in page
    assert "zero=0, dtype=fp32, optimizer=adamw, recompute=none, " in page
    assert re.search(r"The \d+ MiB a rank of the progress line are the whole process at its peak: also Python", output)
    assert re.search(r"Memory of rank 0 at the peak of step 2: [\d.]+ MiB\n  parameters +[\d.]+ MiB", output)
    for name in ("loss, last 5 steps", "loss, held-out text", "byte frequencies alone"):
        assert re.search(rf"{name} +\d\.\d{{4}} nats a token +\d\.\d{{4}} bits a byte", output)
    assert f"evaluate train-002 --ranks 2 --runs-folder {tmp_path}" in output
    figures = r"loss \d\.\d{4}  [\d.]+k? tokens/s  \d+% of [\d.]+ [GT]FLOP/s  \d+ MiB a rank  \d+ KiB exchanged  0:00 left"
    assert re.search(f"train-002  step 5/5  {figures}", output)


def test_the_exchanged_bytes_are_the_formula_s(text: str, tmp_path: Path) -> None:
    (record, *_) = run(small(text, tmp_path, steps=1, rows_per_step=3))
    tiny = PRESETS["tiny"]
    heads = Heads(tiny.heads, tiny.kv_heads, ulysses=2)
    ways = attention_traffic(heads, (32, 32), (32, 32), 0, rows=3, qk_dim=tiny.head_dim, v_dim=tiny.head_dim, itemsize=4)
    assert record["exchanged_bytes"] == tiny.layers * sum(way.bytes for way in ways)


def refuses(capfd: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line that these flags are refused with."""
    capfd.readouterr()
    assert cli.main(["train", *flags]) == 2
    output = capfd.readouterr()
    (line,) = output.err.splitlines()
    return line.removeprefix("longspan: ")


def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("a few words")
    runs = tmp_path / "runs"
    base = ["--runs-folder", str(runs), "--tokens", "64", "--steps", "2"]
    refused = [
        (["--data", str(tmp_path / "none.txt")], "none.txt' does not exist; name a file, a folder or a glob of "),
        (["--data", str(tmp_path / "empty.txt")], "empty.txt' holds no text: 1 file, nothing in it; name files that hold some"),
        (["--data", str(tmp_path / "short.txt")], "tokens, fewer than one sequence of tokens=64; use --tokens "),
        (
            ["--data", str(tmp_path / "short.txt"), "--tokens", "8"],
            "the text has 12 tokens, and the twentieth that is held out ",
        ),
        (["--data", text, "--tokenizer", "klingon"], "klingon"),
        (["--data", text, "--ulysses", "3", "--ranks", "2"], "ulysses=3 x ring=1 does not divide the world of 2 ranks; "),
        (
            ["--data", text, "--ranks", "4"],
            "4 ranks with ulysses=2, ring=1 and tensor=1 are 2 data replicas, and rows_per_step=1 gives a micro-batch 1 row, "
            "so that a replica would never have one; use --rows-per-step 2 or more, or one replica: --ranks 2, or --ulysses, ",
        ),
        (["--data", text, "--rope-scaling", "yarn"], "rope_scaling='yarn' is for hf: models, which were trained on rows of "),
        (["--data", text, "--ulysses", "5"], "ulysses=5 exceeds the 4 query heads; "),
        (["--data", text, "--tokens", "3", "--ulysses", "4"], "tokens=3 is fewer than the 4 ranks of a sequence "),
        (["--data", text, "--tensor", "0"], "tensor=0 must be at least 1"),
        (["--data", text, "--tensor", "2", "--ranks", "3"], "ulysses=2 x ring=1 x tensor=2 x pipeline=1 does not divide "),
        (
            ["--data", text, "--tensor", "3", "--ulysses", "1"],
            "tensor=3 cannot divide 'blocks.0.attention.query.weight', which ",
        ),
        (["--data", text, "--tensor", "2", "--ulysses", "3"], "ulysses=3 exceeds the 2 query heads"),
        (["--data", text, "--tensor", "2", "--tile-tokens", "8"], "tile_tokens=8 does not work with tensor=2, whose ranks "),
    ]
    for flags, sentence in refused:
        assert sentence in refuses(capfd, *base, *flags)
    assert not runs.exists()


def test_debug_shows_the_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--data", str(tmp_path / "none.txt"), "--debug"]) == 2
    output = capfd.readouterr().err
    assert "in _find_one" in output
    assert output.splitlines()[-1].startswith("longspan: the data ")


def test_a_checkpoint_of_another_model_or_text_is_refused_by_field(
    text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(small(text, tmp_path, steps=2))
    resume = ["--resume", "--runs-folder", str(tmp_path), "--steps", "3"]
    kept = sorted(tmp_path.rglob("*"))
    assert re.search(
        r"step-000002 is of another model: layers is 2, not 12, hidden is 256, not 768, .*; ask for its own model, or start ",
        refuses(capfd, *resume, "--model", "small"),
    )
    assert "is of another text: seed is 0, not 1; ask for its own text" in refuses(capfd, *resume, "--seed", "1")
    assert "is of another optimizer: optimizer is adamw, not sgd; " in refuses(capfd, *resume, "--optimizer", "sgd")
    assert "has done its 2 steps; go further with --steps" in refuses(capfd, *resume[:-2])
    assert "exists; go on with --resume train-001" in refuses(capfd, *resume[1:], "--run", "train-001", "--data", text)
    assert sorted(tmp_path.rglob("*")) == kept
    assert cli.main(["train", *resume]) == 0
    assert column(records(small(text, tmp_path)), "step") == [1, 2, 3]


# ---- a Hugging Face model, from its folder and back


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with weights in several files."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    model.save_pretrained(path, max_shard_size="20KB")
    return path


LLAMA: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.long  # hf/test_weights.py reads and writes shares, checkpoints of a run are above
def test_a_hugging_face_model_trains_in_shares_goes_on_and_is_written_back(folder: Path, text: str, tmp_path: Path) -> None:
    config = small(text, tmp_path, model=f"hf:{folder}", steps=7, checkpoint_every_steps=2, learning_rate=1e-2)
    one = run(replace(config, run="one", ulysses=1))
    whole = run(replace(config, run="whole", zero=3))
    assert column(whole, "loss") == pytest.approx(column(one, "loss"), rel=1e-5)
    assert column(whole, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=1e-5)
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.5

    with pytest.raises(launch.RankDied):
        launch.run(f"{__name__}:killed_at_step_6", replace(config, run="killed", zero=3), 2)
    assert cli.main(["train", "--resume", "killed", "--runs-folder", str(tmp_path)]) == 0
    assert column(records(replace(config, run="killed")), "loss") == column(whole, "loss")

    newest = checkpoint.newest(tmp_path / "whole")
    assert newest is not None
    trained = LlamaForCausalLM(LlamaConfig(**LLAMA))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads, which is meant
        checkpoint.load(newest, trained)
    for name in ("whole", "killed"):
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / name / "export")
        for (what, mine), theirs in zip(exported.named_parameters(), trained.parameters(), strict=True):
            assert torch.equal(mine, theirs), what
    shutil.rmtree(tmp_path / "killed")
    assert cli.main(["evaluate", "whole", "--documents", "1", "--runs-folder", str(tmp_path), "--ranks", "2"]) == 0


def test_a_hugging_face_model_that_cannot_be_trained_is_refused(
    folder: Path, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def config(name: str, **fields: Any) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**LLAMA, "model_type": "llama", **fields}))
        return f"hf:{tmp_path / name}"

    runs = tmp_path / "runs"
    base = ["--runs-folder", str(runs), "--tokens", "64", "--data", text]
    for model, sentence in [
        ("hf:/nowhere", "the folder '/nowhere' does not exist; name one that"),
        (config("klingon", model_type="klingon"), "is of no model that Transformers "),
        (config("narrow", vocab_size=256), "the tokenizer bytes has 257 tokens, more than the 256 that LlamaForCausalLM "),
        (config("drops", attention_dropout=0.1), "would drop activations in training (config.attention_dropout), differently"),
        (
            config("short", max_position_embeddings=63),
            "tokens=64 is more than the 63 that the RoPE of LlamaForCausalLM reaches (max_position_embeddings in its "
            "config.json); use --tokens 63 or fewer, or --rope-scaling yarn, which the export has too",
        ),
        (config("bert", model_type="bert", architectures=["BertForMaskedLM"]), "BertForMaskedLM predicts masked tokens, and"),
    ]:
        assert sentence in refuses(capfd, *base, "--model", model)
    assert not runs.exists()


def diverges(config: Train) -> int:
    train.learning_rate = lambda step, config: 1e9
    return train.work(config)


def test_a_run_that_diverges_stops_with_a_sentence(text: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the run diverged at step \d: loss .*; start another run with a lower --learning-rate"):
        launch.run(f"{__name__}:diverges", small(text, tmp_path, optimizer="sgd", clip_norm=1e30), 2)


def checkpoints_on_a_full_disk(config: Train) -> int:
    """The last rank finds the disk full when it writes its share of the checkpoint of step 4."""
    write, saves, save = storage._write_item, [0], checkpoint.save_tensors

    def count(*args: Any, **kwargs: Any) -> Any:
        saves[0] += 1
        return save(*args, **kwargs)

    def write_or_fail(*args: Any) -> Any:
        if saves[0] == 2 and dist.get_rank() == dist.get_world_size() - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    checkpoint.save_tensors, storage._write_item = count, write_or_fail
    return train.work(config)


def test_a_full_disk_leaves_earlier_checkpoints_whole(text: str, tmp_path: Path) -> None:
    config = small(text, tmp_path, steps=6, checkpoint_every_steps=2)
    with pytest.raises(RunError) as error:
        launch.run(f"{__name__}:checkpoints_on_a_full_disk", config, 2)
    folder = tmp_path / "train-001" / "checkpoints"
    assert str(error.value) == (
        f"the checkpoint {folder / 'step-000004'} cannot be written: No space left on device; make room, or choose another "
        f"disk with --runs-folder; earlier checkpoints are whole"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000002"]
    assert cli.main(["train", "--resume", "--runs-folder", str(tmp_path)]) == 0
    assert column(records(config), "step") == [1, 2, 3, 4, 5, 6]


def writes_metrics_on_a_full_disk(config: Train) -> int:
    """The lead rank finds the disk full at step 3; the other ranks hear of it at the next agreement."""
    write = metrics._Events.write

    def write_or_fail(self: Any, record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, record)

    metrics._Events.write = write_or_fail  # type: ignore[method-assign]
    try:
        return train.work(config)
    except RunError as error:
        Path(config.runs_folder, f"rank{dist.get_rank()}").write_text(str(error))
        raise


def test_metrics_on_a_full_disk_stop_every_rank_with_one_text(text: str, tmp_path: Path) -> None:
    text_of_all = r"metrics of .* cannot be written: No space left on device; make room and go on"
    with pytest.raises(RunError, match=text_of_all) as error:
        launch.run(f"{__name__}:writes_metrics_on_a_full_disk", small(text, tmp_path), 2)
    assert {(tmp_path / f"rank{rank}").read_text() for rank in range(2)} == {str(error.value)}

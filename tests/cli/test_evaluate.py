"""Documents under a checkpoint: the losses of one device, whatever the ranks; and what is refused."""

import contextlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from longspan.cli import checkpoint, evaluate, launch
from longspan.cli import main as cli
from longspan.cli.config import Evaluate, Train
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig

pytestmark = [
    pytest.mark.usefixtures("launcher"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # a checkpoint read by one process, which is meant
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, _fork_server: None) -> Path:
    """A short run on 30 documents of 100 to 1,550 bytes."""
    folder = tmp_path_factory.mktemp("evaluate")
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(" ".join(str(k * number) for k in range(25 + 10 * number)))
    config = Train(data=(f"{folder}/*.txt",), runs_folder=str(folder / "runs"), tokens=128, steps=3, eval_rows=1)
    assert launch.run("longspan.cli.train:work", config, 2) == 0
    return folder / "runs" / "train-001"


def into_a_file(job: tuple[Evaluate, str]) -> int:
    config, path = job
    with open(f"{path}{dist.get_rank()}", "w") as file, contextlib.redirect_stdout(file):
        return evaluate.work(config)


def table(config: Evaluate, tmp_path: Path) -> list[list[str]]:
    """The words of each line: a document's number, how it begins, its tokens, loss and perplexity; the last line is of all."""
    assert launch.run(f"{__name__}:into_a_file", (config, str(tmp_path / "output")), config.local_ranks) == 0
    lines = (tmp_path / "output0").read_text().splitlines()
    return [line.split() for line in lines if line[:1].isdigit() or line.startswith("all ")]


def one_device(run: Path, text: bytes) -> float:
    path = checkpoint.newest(run)
    assert path is not None
    model = Decoder(DecoderConfig(**checkpoint.facts(path)["model"]))
    checkpoint.load(path, model)
    ids = torch.tensor([[*text, 256]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert loss is not None
    return float(loss)


@pytest.mark.parametrize(("ranks", "tensor"), [*(pytest.param(ranks, 1, marks=pytest.mark.long) for ranks in (1, 3)), (4, 2)])
def test_documents_have_the_loss_of_one_device(ranks: int, tensor: int, run: Path, tmp_path: Path) -> None:
    texts = sorted(run.parent.parent.glob("*.txt"))
    config = Evaluate(checkpoint=str(run), data=(f"{run.parent.parent}/*.txt",), ranks=ranks, tensor=tensor, documents=3)
    *documents, everything = table(config, tmp_path)
    tokens, losses = [], []
    for number, words in zip((29, 28, 27), documents):
        text = texts[number].read_bytes()
        assert words[0] == str(number)
        assert words[-3].replace(",", "") == str(len(text) + 1)
        assert float(words[-2]) == pytest.approx(one_device(run, text), abs=6e-5)
        assert float(words[-1].replace(",", "")) == pytest.approx(math.exp(float(words[-2])), rel=1e-3)
        tokens.append(len(text))
        losses.append(float(words[-2]))
    mean = sum(t * loss for t, loss in zip(tokens, losses)) / sum(tokens)
    assert float(everything[-2]) == pytest.approx(mean, abs=1e-4)


@pytest.mark.long
def test_a_long_document_is_cut_and_bf16_is_near(run: Path, tmp_path: Path) -> None:
    config = Evaluate(checkpoint=str(run), data=(f"{run.parent.parent}/29.txt",), max_tokens=101)
    (document, _) = table(config, tmp_path)
    expected = one_device(run, (run.parent.parent / "29.txt").read_bytes()[:100])
    assert document[-3] == "101"
    assert float(document[-2]) == pytest.approx(expected, rel=0.05)  # the reference ends with an end-of-document token
    (half, _) = table(replace(config, dtype="bf16"), tmp_path)
    assert float(half[-2]) == pytest.approx(float(document[-2]), rel=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose positions reach 900 tokens."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA, max_position_embeddings=900, attention_dropout=0.5)).save_pretrained(path)
    return path


LLAMA: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def test_a_hugging_face_folder_has_the_loss_of_transformers(run: Path, folder: Path, tmp_path: Path) -> None:
    """Whoever wrote it: save_pretrained, Trainer, or a run its export, which is evaluated on the text of the run."""
    data = f"{run.parent.parent}/*.txt"
    *documents, _ = table(Evaluate(checkpoint=f"hf:{folder}", data=(data,), documents=2), tmp_path)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    for number, words in zip((29, 28), documents, strict=True):
        text = (run.parent.parent / f"{number}.txt").read_bytes()
        ids = torch.tensor([[*text, 256]])[:, :900]  # of its positions, and no dropout
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        assert words[0] == str(number)
        assert words[-3] == str(ids.shape[1])
        assert float(words[-2]) == pytest.approx(float(loss), abs=6e-5)

    export = tmp_path / "train-001" / "export"
    shutil.copytree(folder, export)
    (tmp_path / "train-001" / "config.json").write_text(json.dumps({"data": [data]}))
    held_out = table(Evaluate(checkpoint=str(export), documents=1), tmp_path)
    assert held_out[0][:-3] == table(Evaluate(checkpoint=str(run), documents=1), tmp_path)[0][:-3]  # the same document


def test_a_checkpoint_is_found_by_name_folder_and_as_the_latest(run: Path, tmp_path: Path) -> None:
    newest = checkpoint.newest(run)
    assert newest is not None
    for name in ("latest", run.name, str(run), str(newest)):
        assert checkpoint.find(name, str(run.parent)) == newest
    assert len(table(Evaluate(runs_folder=str(run.parent), documents=2), tmp_path)) >= 2  # the held-out documents of the run


def test_bad_input_is_refused_in_one_line(run: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(**LLAMA).save_pretrained(tmp_path / "bare")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "empty" / "x").mkdir(parents=True)
    (tmp_path / "empty" / "x" / "config.json").write_text("{}")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "run.json").write_text("{")
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "run.json").write_text('{"step": 1, "model": {}}')
    refused: list[tuple[list[str], str]] = [
        ([str(run), "--data", str(tmp_path / "a.txt"), "--ranks", "3"], "document 0 has 2 tokens, fewer than the 3 that "),
        ([str(run), "--max-tokens", "2", "--ranks", "3"], "max_tokens=2 is too few for 3 ranks; use --max-tokens 3 or more"),
        ([str(run), "--ranks", "5"], "5 ranks cannot share the model's 4 query heads, and each document lies on all "),
        (["nowhere", "--runs-folder", str(run.parent)], "no run 'nowhere' in the folder"),
        (["x", "--runs-folder", str(tmp_path / "empty")], "x has no checkpoint yet; go on with it: longspan train --resume x"),
        (["hf:/nowhere"], "the folder '/nowhere' does not exist; name one that a Hugging Face model's save_pretrained wrote"),
        ([str(tmp_path / "bare")], "bare' holds no weights, only a config; name one that holds *.safetensors"),
        ([str(folder), "--max-tokens", "901"], "max_tokens=901 is more than the 900 that the model's RoPE reaches "),
        *(
            ([str(path)], "is damaged: its run.json cannot be read; use another one")
            for path in (damaged, tmp_path / "partial")
        ),
    ]
    for flags, sentence in refused:
        assert cli.main(["evaluate", *flags]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert sentence in line


def test_another_tokenizer_of_the_same_name_is_refused(run: Path, tmp_path: Path) -> None:
    path = checkpoint.newest(run)
    assert path is not None
    facts: dict[str, Any] = checkpoint.facts(path)
    facts["text"]["vocab"] = 300
    (tmp_path / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="the tokenizer bytes has 257 tokens now, and the checkpoint was trained with 300; "):
        launch.run("longspan.cli.evaluate:work", Evaluate(checkpoint=str(tmp_path)), 1)

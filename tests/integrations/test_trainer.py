"""Transformers' Trainer over a mesh against the stock one on one rank with the equal global batch: losses, weights, files.

The reference is the untouched library. 4 ranks are data 2 x ulysses 2 unless a test says otherwise.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from longspan import LongspanError, MemoryOptions, parallelize
from longspan.batch.shard import IGNORE
from longspan.integrations.trainer import LongTrainer
from tests.helpers.ranks import Ranks, mesh_of

transformers.logging.set_verbosity_error()

ROWS = 41
"""Of the dataset: its last batch has one row, none for the second replica; its last accumulated step, one batch."""


def model(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def dataset(rows: int = ROWS) -> list[dict[str, Tensor]]:
    """Rows of unequal lengths, whose first few tokens, unequally many, are not learned from."""
    random = torch.Generator().manual_seed(1)
    items = []
    for _ in range(rows):
        tokens, prompt = (int(torch.randint(*bounds, (), generator=random)) for bounds in ((6, 24), (0, 5)))
        ids = torch.randint(3, 97, (tokens,), generator=random)
        items.append({"input_ids": ids, "labels": torch.cat([torch.full((prompt,), IGNORE), ids[prompt:]])})
    return items


def pad(items: list[dict[str, Tensor]], left: bool = False) -> dict[str, Tensor]:
    longest = max(len(item["input_ids"]) for item in items)

    def side(row: Tensor, value: int) -> Tensor:
        empty = row.new_full((longest - len(row),), value)
        return torch.cat([empty, row] if left else [row, empty])

    return {
        "input_ids": torch.stack([side(item["input_ids"], 0) for item in items]),
        "labels": torch.stack([side(item["labels"], IGNORE) for item in items]),
        "attention_mask": torch.stack([side(torch.ones_like(item["input_ids"]), 0) for item in items]),
    }


def pad_left(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The first token of a row is not asked for: what stands before it would predict it, and padding sees nothing."""
    batch = pad(items, left=True)
    firsts = batch["attention_mask"].argmax(1)
    batch["labels"][torch.arange(len(items)), firsts] = IGNORE
    return batch


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder), "max_steps": 20, "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "dataloader_pin_memory": False,
        "logging_nan_inf_filter": False,
    }  # fmt: skip
    return TrainingArguments(**(settings | more))


def build(
    folder: Path, rows: int, mesh: dict[str, int] | None, settings: Mapping[str, Any], of: Mapping[str, Any], zero: int = 0
) -> Trainer:
    """Stock for ``mesh=None``; ``rows`` a device or a data replica."""
    given: dict[str, Any] = {"model": model(), "train_dataset": dataset(), "eval_dataset": dataset(11), "data_collator": pad}
    args = arguments(folder, per_device_train_batch_size=rows, per_device_eval_batch_size=rows, **settings)
    trainer = (
        Trainer(args=args, **(given | of))
        if mesh is None
        else LongTrainer(args=args, mesh=mesh_of(**mesh), zero=zero, **(given | of))
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


TIMES = ("runtime", "per_second", "total_flos")


def told(trainer: Trainer) -> list[dict[str, float]]:
    """What was logged, but for what depends on the clock."""
    return [{name: x for name, x in line.items() if not any(t in name for t in TIMES)} for line in trainer.state.log_history]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    held = trainer.model.state_dict()
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for name, x in held.items()}


def train(
    folder: Path, rows: int, mesh: dict[str, int] | None = None, settings: Mapping[str, Any] | None = None,
    of: Mapping[str, Any] | None = None, zero: int = 0, launched: bool = False,
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:  # fmt: skip
    with environment(launched):
        trainer = build(folder, rows, mesh, settings or {}, of or {}, zero)
        trainer.train()
        return told(trainer), weights(trainer)


class environment:
    """As torchrun sets it, so that accelerate knows of several processes; or as it is."""

    def __init__(self, launched: bool) -> None:
        rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
        self.names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "OMP_NUM_THREADS": "1"}
        self.names = self.names if launched else {}

    def __enter__(self) -> None:
        os.environ.update(self.names)

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            del os.environ[name]


def assert_equal(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    (lines, parameters), (their_lines, their_parameters) = one, other
    assert len(lines) == len(their_lines)
    for line, their_line in zip(lines, their_lines):
        assert their_line == pytest.approx(line, rel=tolerance, abs=tolerance)
    assert parameters.keys() == their_parameters.keys()
    for name, value in parameters.items():
        torch.testing.assert_close(their_parameters[name], value, rtol=tolerance, atol=tolerance, msg=name)


Pool = Callable[[int], Ranks]
HYBRID = {"ulysses": 2}
CASES = {
    "sgd": ({"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}, 0),
    "adamw, accumulated, clipped": ({"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}, 0),
    "adamw, sharded, over an epoch's end": ({"max_steps": 12}, 3),
}
"""Settings, 20 steps where they do not say so, and zero."""


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_are_those_of_one_device(case: str, pool: Pool, tmp_path: Path) -> None:
    settings, zero = CASES[case]
    (alone,) = pool(1).run(train, tmp_path / "one", 4, None, settings)
    assert len([line for line in alone[0] if "loss" in line]) == settings.get("max_steps", 20)
    tools = {"memory": MemoryOptions(recompute="selective", tile_tokens=7, head_chunks=2)} if zero else None
    for theirs in pool(4).run(train, tmp_path / "four", 2, HYBRID, settings, tools, zero, True):
        assert_equal(alone, theirs)


def accuracy(given: Any) -> dict[str, float]:
    """Asks for every logit of every row: the share of the tokens that are right, and a sum that tells rows and tokens apart."""
    predicted, labels = given.predictions[:, :-1], given.label_ids[:, 1:]
    right = (predicted.argmax(-1) == labels)[labels != IGNORE]
    there = torch.tensor(labels) != IGNORE
    places = there.cumsum(1) * torch.arange(1, len(there) + 1).unsqueeze(1)
    weighed = (torch.tensor(predicted).double().pow(2).sum(-1) * places)[there].sum() / places[there].sum()
    return {"accuracy": float(right.mean()), "weighed": float(weighed), "rows": float(len(labels))}


WITH_EVALUATION = {
    "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "include_num_input_tokens_seen": "non_padding",
    "train_sampling_strategy": "group_by_length", "activation_checkpointing": True,
}  # fmt: skip


def test_evaluation_is_that_of_one_device(pool: Pool, tmp_path: Path) -> None:
    """11 rows in batches of 4: Trainer's eval_loss weighs the mean of each batch by its rows, and so does this one."""
    of = {"compute_metrics": accuracy, "data_collator": pad_left}
    (alone,) = pool(1).run(train, tmp_path / "one", 4, None, WITH_EVALUATION, of)
    evaluated = [line for line in alone[0] if "eval_loss" in line]
    assert [line["eval_rows"] for line in evaluated] == [11, 11]
    assert alone[0][-1]["num_input_tokens_seen"] > 0
    for theirs in pool(4).run(train, tmp_path / "four", 2, HYBRID, WITH_EVALUATION, of):
        assert_equal(alone, theirs)
    for theirs in pool(4).run(train, tmp_path / "ring", 1, {"ring": 1}, WITH_EVALUATION, of, 3, True):  # four replicas
        assert_equal(alone, theirs)


SAVING = {
    "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "eval_strategy": "steps",
    "eval_steps": 3, "load_best_model_at_end": True,
}  # fmt: skip


def resume(
    folder: Path, rows: int, mesh: dict[str, int] | None, settings: Mapping[str, Any], zero: int = 0
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """From the checkpoint after 3 steps, in a trainer whose own weights are others."""
    trainer = build(folder, rows, mesh, settings, {}, zero)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.5)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return told(trainer)[:-1], weights(trainer)  # the last line is the mean loss of this call alone


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.long), 3])
def test_a_checkpoint_is_that_of_one_device(zero: int, pool: Pool, tmp_path: Path) -> None:
    """Four ranks go on from it, and so does one device; each as if nothing had happened."""
    (alone,) = pool(1).run(train, tmp_path / "one", 4, None, SAVING)
    for theirs in pool(4).run(train, tmp_path / "four", 2, HYBRID, SAVING, None, zero):
        assert_equal(alone, theirs)
    alone = (alone[0][:-1], alone[1])
    files = sorted(path.name for path in (tmp_path / "one" / "checkpoint-3").iterdir())
    assert sorted(path.name for path in (tmp_path / "four" / "checkpoint-3").iterdir()) == files
    assert_equal(alone, pool(1).run(resume, tmp_path / "four", 4, None, SAVING)[0])
    for theirs in pool(4).run(resume, tmp_path / "four", 2, HYBRID, SAVING, zero):
        assert_equal(alone, theirs)
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "four" / "checkpoint-6")
    assert saved.config._attn_implementation == "sdpa"
    assert "longspan" not in (tmp_path / "four" / "checkpoint-6" / "config.json").read_text()
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "one" / "checkpoint-6").state_dict()
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def translator() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def translations(rows: int = 21) -> list[dict[str, Tensor]]:
    """Sources, and labels of other lengths; what the decoder is given is made of them, by the model or for the ranks."""
    return [{"input_ids": item["input_ids"], "labels": item["input_ids"].flip(0)[:5]} for item in dataset(rows)]


def pad_pair(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    labels = [torch.cat([item["labels"], torch.full((6 - len(item["labels"]),), IGNORE)]) for item in items]
    padded = pad([item | {"labels": item["input_ids"]} for item in items])
    return padded | {"labels": torch.stack(labels)}


def predictions(given: Any) -> dict[str, float]:
    """Asks for every logit, of which those of labels count, and for the encoder's output, of which the first token's."""
    logits, encoded = given.predictions
    there = given.label_ids != IGNORE
    return {"logits": float((logits[there] ** 2).mean()), "encoded": float((encoded[:, 0] ** 2).mean())}


@pytest.mark.parametrize("zero", [0, 3])
def test_an_encoder_decoder_trains_and_predicts_as_on_one_device(zero: int, pool: Pool, tmp_path: Path) -> None:
    settings = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3}
    of = {"train_dataset": translations(), "eval_dataset": translations(5), "data_collator": pad_pair}
    (alone,) = pool(1).run(translate, tmp_path / "one", 4, None, settings, of, 0)
    assert sum("eval_logits" in line for line in alone[0]) == 2
    for theirs in pool(4).run(translate, tmp_path / "four", 2, HYBRID, settings, of, zero):
        assert_equal(alone, theirs)


def translate(
    folder: Path, rows: int, mesh: dict[str, int] | None, settings: Mapping[str, Any], of: Mapping[str, Any], zero: int
) -> Any:
    return train(folder, rows, mesh, settings, {**of, "model": translator(), "compute_metrics": predictions}, zero)


class Stream(IterableDataset[dict[str, Tensor]]):
    """Without a length: only its end says where it ends."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(dataset(21))


PACKED = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
"""Collates its rows into one, whose documents it tells three times."""


def fresh() -> LlamaForCausalLM:
    return model()


PLAIN = DataCollatorWithFlattening()
"""The same for the reference, which would hand a varlen kernel's keywords on to a model that runs without one."""
GIVEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "packed": ({"data_collator": PLAIN}, {"data_collator": PACKED}),
    "a stream": ({"train_dataset": Stream()}, {"train_dataset": Stream()}),
    "model_init": ({"model": None, "model_init": fresh}, {"model": None, "model_init": fresh}),
}


@pytest.mark.parametrize("what", GIVEN)
def test_other_data_and_models(what: str, pool: Pool, tmp_path: Path) -> None:
    settings = {"max_steps": 7, "include_num_input_tokens_seen": "all" if what == "packed" else "no"}
    alone, mine = GIVEN[what]
    (expected,) = pool(1).run(train, tmp_path, 4, None, settings, alone)
    for theirs in pool(4).run(train, tmp_path, 2, HYBRID, settings, mine):
        assert_equal(expected, theirs)


def draw(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Masks at random, as collators for masked language models do."""
    batch = pad(items)
    batch["labels"][torch.rand(batch["labels"].shape) < 0.5] = IGNORE
    return batch


def draw_beside_dropout(folder: Path) -> list[dict[str, float]]:
    torch.manual_seed(0)
    config = Starcoder2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, residual_dropout=0.1,
    )  # fmt: skip
    of = {"model": Starcoder2ForCausalLM(config), "data_collator": draw}
    return train(folder, 2, {"ulysses": 2}, {"max_steps": 3}, of)[0]


def test_what_is_drawn_for_the_data_is_drawn_alike_whatever_dropout_draws(pool: Pool, tmp_path: Path) -> None:
    first, second = pool(2).run(draw_beside_dropout, tmp_path)
    assert first == second


class Half(Trainer):
    """Stands for trainers of other libraries that compute their loss from logits."""

    def compute_loss(self, *args: Any, **keywords: Any) -> Any:
        raise AssertionError("these are the logits of one rank")


class SFTTrainer(Trainer):
    """As TRL's: it forms the plain cross-entropy by itself."""

    def compute_loss(self, *args: Any, **keywords: Any) -> Any:
        raise AssertionError("these are the logits of one rank")

    def training_step(self, *args: Any, **keywords: Any) -> Tensor:
        self.stepped = True
        return super().training_step(*args, **keywords)


class LongSFT(LongTrainer, SFTTrainer):
    pass


class Penalised(LongTrainer):
    """A loss of one's own stands in front."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = loss + 0.01 * sum(parameter.square().sum() for parameter in model.parameters())
        return (loss, outputs) if return_outputs else loss


def class_chain(folder: Path, kind: type[LongTrainer]) -> list[dict[str, float]]:
    args = arguments(folder, max_steps=2, per_device_train_batch_size=4)
    trainer = kind(model=model(), args=args, train_dataset=dataset(), data_collator=pad, mesh=mesh_of(2))
    trainer.train()
    assert getattr(trainer, "stepped", True)
    return told(trainer)


def test_it_stands_in_front_of_another_trainer_and_behind_a_loss_of_one_s_own(pool: Pool, tmp_path: Path) -> None:
    (alone,) = pool(1).run(train, tmp_path, 4, None, {"max_steps": 2})
    for theirs in pool(2).run(class_chain, tmp_path, LongSFT):
        assert theirs[0] == pytest.approx(alone[0][0], rel=1e-5)
    penalised = pool(2).run(class_chain, tmp_path, Penalised)
    assert penalised[0] == penalised[1]
    assert penalised[0][0]["loss"] > alone[0][0]["loss"] + 0.01


class Broken(list[Any]):
    """A row cannot be read on one rank."""

    def __getitem__(self, index: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def what_stops(folder: Path, what: str) -> str:
    """The one sentence that a rank stops with."""
    settings: dict[str, Any] = {"max_steps": 1}
    of: dict[str, Any] = {}
    if what == "a row":
        of["train_dataset"] = Broken(dataset())
    if what == "the disk":
        settings |= {"save_strategy": "steps", "save_steps": 1}
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / "checkpoint-1").write_text("in the way")
    try:
        trainer = build(folder / "out", 2, {"ulysses": 2}, settings, of)
        trainer.train(resume_from_checkpoint=str(folder / str(dist.get_rank())) if what == "the checkpoint" else None)
    except LongspanError as error:
        return str(error)
    return "nothing"


STOPS = {
    "a row": "OSError: the disk is gone",
    "the disk": "writing the model to .*checkpoint-1 failed: ",
    "the checkpoint": "the checkpoint to resume from differs between ranks: .*; let every rank read the same folder",
}


@pytest.mark.parametrize("what", STOPS)
def test_what_fails_on_one_rank_stops_all_with_one_sentence(what: str, pool: Pool, tmp_path: Path) -> None:
    first, second = pool(2).run(what_stops, tmp_path, what)
    assert first == second
    assert re.search(STOPS[what], first)


REFUSED: dict[str, dict[str, Any]] = {
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "bf16_full_eval": {"bf16_full_eval": True},
    "torch_compile": {"torch_compile": True},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "use_liger_kernel": {"use_liger_kernel": True},
    "eval_use_gather_object": {"eval_use_gather_object": True},
    "optim='lomo'": {"optim": "lomo"},
    "split_batches": {"accelerator_config": {"split_batches": True}},
    "include_for_metrics": {"include_for_metrics": ["inputs"]},
}


def refusals(folder: Path) -> dict[str, str]:
    mesh = mesh_of()

    def said(kind: type[LongTrainer] = LongTrainer, settings: Mapping[str, Any] | None = None, **of: Any) -> str:
        try:
            kind(**({"model": model(), "args": arguments(folder, **(settings or {})), "mesh": mesh} | of))
        except LongspanError as error:
            return str(error)
        return "nothing"

    class LongHalf(LongTrainer, Half):
        pass

    found = {name: said(settings=settings) for name, settings in REFUSED.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(transformers.Trainer, "store_flos")
        found["no Trainer.store_flos; install"] = said()
        patch.setattr("longspan.integrations.trainer.transformers.__version__", "5.22.2")
        found["5.22.2 saves on one rank alone"] = said()
    optimizer = torch.optim.SGD(model().parameters(), lr=0.1)
    return found | {
        "Half.compute_loss": said(LongHalf),
        "compute_loss_func": said(compute_loss_func=lambda *_: None),
        "optimizers=": said(optimizers=(optimizer, None), zero=3),
        "args=TrainingArguments": said(args=None),
        "parallel already": said(model=parallelize(model(), mesh)),
    }


def test_what_does_not_go_with_a_mesh_is_refused_by_name(pool: Pool, tmp_path: Path) -> None:
    (found,) = pool(1).run(refusals, tmp_path)
    for name, text in found.items():
        assert name in text

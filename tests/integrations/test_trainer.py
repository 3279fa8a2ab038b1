"""LongTrainer against stock Trainer on one rank with the equal global batch: losses, weights, data, classes around it.

The reference is the untouched library. 4 ranks are data 2 x ulysses 2 unless a test says otherwise.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorWithFlattening,
    LlamaForCausalLM,
    Trainer,
)

from longspan import MemoryOptions
from longspan.batch.labels import IGNORE
from longspan.integrations.trainer import LongTrainer
from tests.helpers.ranks import mesh_of
from tests.helpers.trainers import HYBRID, Logged, Pool, arguments, assert_equal, dataset, llama, logged, pad, train

CASES = {
    "sgd": ({"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}, 0, HYBRID),
    "adamw, accumulated, clipped": ({"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}, 0, HYBRID),
    "adamw, sharded, over an epoch's end": ({"max_steps": 12}, 3, HYBRID),
    "tensor": ({"max_steps": 12, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}, 0, {"tensor": 2}),
    "tensor, sharded": ({"max_steps": 6}, 2, {"tensor": 2}),
}
"""Settings, 20 steps where they do not say so, zero, and the mesh of 4 ranks with data 2."""


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.long) if case == "tensor" else case for case in CASES])
def test_twenty_steps_are_those_of_one_device(case: str, pool: Pool, tmp_path: Path) -> None:
    settings, zero, mesh = CASES[case]
    (alone,) = pool(1).run(train, tmp_path / "one", 4, None, settings)
    assert len([line for line in alone[0] if "loss" in line]) == settings.get("max_steps", 20)
    tools = {"memory": MemoryOptions(recompute="selective", tile_tokens=7, head_chunks=2)} if zero == 3 else None
    for theirs in pool(4).run(train, tmp_path / "four", 2, mesh, settings, tools, zero, True):
        assert_equal(alone, theirs)


class Stream(IterableDataset[dict[str, Tensor]]):
    """Without a length: only its end says where it ends."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(dataset(21))


PACKED = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
"""Collates its rows into one, and gives the documents three times."""


def fresh() -> LlamaForCausalLM:
    return llama()


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


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.long), 3])
def test_an_encoder_decoder_trains_and_predicts_as_on_one_device(zero: int, pool: Pool, tmp_path: Path) -> None:
    settings = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3}
    given = {"train_dataset": translations(), "eval_dataset": translations(5), "data_collator": pad_pair}
    (alone,) = pool(1).run(translate, tmp_path / "one", 4, None, settings, given, 0)
    assert sum("eval_logits" in line for line in alone[0]) == 2
    for theirs in pool(4).run(translate, tmp_path / "four", 2, HYBRID, settings, given, zero):
        assert_equal(alone, theirs)


def translate(
    folder: Path, rows: int, mesh: dict[str, int] | None, settings: Mapping[str, Any], given: Mapping[str, Any], zero: int
) -> Any:
    return train(folder, rows, mesh, settings, {**given, "model": translator(), "compute_metrics": predictions}, zero)


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


def class_chain(folder: Path, kind: type[LongTrainer]) -> Logged:
    args = arguments(folder, max_steps=2, per_device_train_batch_size=4)
    trainer = kind(model=llama(), args=args, train_dataset=dataset(), data_collator=pad, mesh=mesh_of(2))
    trainer.train()
    assert getattr(trainer, "stepped", True)
    return logged(trainer)


def test_it_stands_in_front_of_another_trainer_and_behind_a_loss_of_one_s_own(pool: Pool, tmp_path: Path) -> None:
    (alone,) = pool(1).run(train, tmp_path, 4, None, {"max_steps": 2})
    for theirs in pool(2).run(class_chain, tmp_path, LongSFT):
        assert theirs[0] == pytest.approx(alone[0][0], rel=1e-5)
    penalised = pool(2).run(class_chain, tmp_path, Penalised)
    assert penalised[0] == penalised[1]
    assert penalised[0][0]["loss"] > alone[0][0]["loss"] + 0.01

"""Builds Transformers' Trainer on one rank and LongTrainer on a mesh with the same arguments, and compares their results.

The model is tiny, the rows have unequal lengths. The reference is the unchanged Trainer with the same global batch.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from longspan.batch.labels import IGNORE
from longspan.integrations.trainer import LongTrainer
from tests.helpers.ranks import Ranks, mesh_of

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]

Pool = Callable[[int], Ranks]
Logged = list[dict[str, float]]
HYBRID = {"ulysses": 2}
"""The degrees of ParallelMesh; on 4 ranks the mesh is data 2 x ulysses 2."""
ROWS = 41
"""Rows of the dataset. Its last batch has one row, so none for the second replica; its last step has one micro-batch."""


def llama(**more: Any) -> LlamaForCausalLM:
    """A tiny llama with the same random weights in every call; ``more``: further settings of its config."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def dataset(rows: int = ROWS) -> list[dict[str, Tensor]]:
    """``rows`` random items {input_ids, labels} of 6 to 23 tokens; the first 0 to 4 labels of each are -100."""
    random = torch.Generator().manual_seed(1)
    items = []
    for _ in range(rows):
        tokens, prompt = (int(torch.randint(*bounds, (), generator=random)) for bounds in ((6, 24), (0, 5)))
        ids = torch.randint(3, 97, (tokens,), generator=random)
        items.append({"input_ids": ids, "labels": torch.cat([torch.full((prompt,), IGNORE), ids[prompt:]])})
    return items


def pad(items: list[dict[str, Tensor]], left: bool = False) -> dict[str, Tensor]:
    """A collator: pads the items to the longest, on the right or the left, and adds an attention_mask."""
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
    """``pad`` on the left, with label -100 for each row's first token, which the padding before it would predict."""
    batch = pad(items, left=True)
    firsts = batch["attention_mask"].argmax(1)
    batch["labels"][torch.arange(len(items)), firsts] = IGNORE
    return batch


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    """TrainingArguments of 20 steps on the CPU that write to ``folder`` and log every step; ``more`` overrides them."""
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 20, "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none",
        "adam_epsilon": 1e-6,  # with 1e-8 Adam turns the rounding of a gradient of that size into a whole step
        "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "dataloader_pin_memory": False,
        "logging_nan_inf_filter": False,
    }  # fmt: skip
    return TrainingArguments(**(settings | more))


def build(
    folder: Path, rows: int, mesh: dict[str, int] | None, settings: Mapping[str, Any], given: Mapping[str, Any], zero: int = 0
) -> Any:
    """Transformers' Trainer if ``mesh`` is None, else a LongTrainer over a mesh of these degrees.

    Args:
        folder: the output folder.
        rows: the batch size of a device or of a data replica.
        mesh: degrees of ParallelMesh.
        settings: TrainingArguments, beside those of ``arguments``.
        given: keywords of the trainer, which replace the tiny llama, the datasets and the collator.
        zero: the ZeRO stage of LongTrainer.
    """
    everything: dict[str, Any] = {
        "model": llama(), "train_dataset": dataset(), "eval_dataset": dataset(11), "data_collator": pad, **given
    }  # fmt: skip
    everything["args"] = arguments(folder, per_device_train_batch_size=rows, per_device_eval_batch_size=rows, **settings)
    trainer = Trainer(**everything) if mesh is None else LongTrainer(**everything, mesh=mesh_of(**mesh), zero=zero)
    trainer.remove_callback(PrinterCallback)
    return trainer


TIMES = ("runtime", "per_second", "total_flos")


def logged(trainer: Trainer) -> Logged:
    """The log history without the entries of TIMES, which depend on the clock."""
    return [{name: x for name, x in line.items() if not any(t in name for t in TIMES)} for line in trainer.state.log_history]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of the model's state dict, with sharded tensors gathered: every rank must call it."""
    assert trainer.model is not None
    held = trainer.model.state_dict()
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for name, x in held.items()}


def train(
    folder: Path, rows: int, mesh: dict[str, int] | None = None, settings: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None, zero: int = 0, launched: bool = False,
) -> tuple[Logged, dict[str, Tensor]]:  # fmt: skip
    """``build`` a trainer and train it: (what it logged, its weights). ``launched``: as under torchrun, see environment."""
    with environment(launched):
        trainer = build(folder, rows, mesh, settings or {}, given or {}, zero)
        trainer.train()
        return logged(trainer), weights(trainer)


class environment:
    """Context manager: if ``launched``, set the environment variables of torchrun for this rank, and delete them on exit.

    With them accelerate sees several processes, as it does in a real launch.
    """

    def __init__(self, launched: bool) -> None:
        rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
        self.names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "OMP_NUM_THREADS": "1"}
        self.names = self.names if launched else {}

    def __enter__(self) -> None:
        os.environ.update(self.names)

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            del os.environ[name]


def assert_lines_equal(one: Logged, other: Logged, tolerance: float = 1e-5) -> None:
    """Assert that two logs have the same lines with the same names, and values within ``tolerance``; NaN equals NaN."""
    assert len(one) == len(other)
    for line, their_line in zip(one, other):
        assert their_line == pytest.approx(line, rel=tolerance, abs=tolerance, nan_ok=True)


def assert_equal(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    """Assert that two results of ``train`` have equal logs and equal weights, within ``tolerance``."""
    (lines, parameters), (their_lines, their_parameters) = one, other
    assert_lines_equal(lines, their_lines, tolerance)
    assert parameters.keys() == their_parameters.keys()
    for name, value in parameters.items():
        torch.testing.assert_close(their_parameters[name], value, rtol=tolerance, atol=tolerance, msg=name)

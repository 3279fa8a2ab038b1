"""Dropout in LongTrainer: other places on every rank, the same again in recomputation, and equal weights on all ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from longspan import MemoryOptions
from longspan.batch.labels import IGNORE
from tests.helpers.trainers import Pool, build, logged, pad, weights

TOKENS = 24


def draw(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Random labels, as collators for masked language models draw them."""
    batch = pad(items)
    batch["labels"][torch.rand(batch["labels"].shape) < 0.5] = IGNORE
    return batch


def drop_out(folder: Path, recompute: str, zero: int = 0) -> tuple[Any, dict[str, Tensor], float]:
    """Three steps with dropout on 2 ranks, and which part of the places is dropped alike on both."""
    torch.manual_seed(0)
    config = Starcoder2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, residual_dropout=0.5,
    )  # fmt: skip
    model = Starcoder2ForCausalLM(config)
    dropped: list[Tensor] = []
    hidden = torch.nn.functional.dropout

    def record(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        out = hidden(x, p, training, inplace)
        if training and p and x.ndim == 3 and x.shape[1] == TOKENS // 2:
            dropped.append((out == 0).float())
        return out

    data = [{"input_ids": ids, "labels": ids.clone()} for ids in torch.randint(3, 97, (16, TOKENS))]
    given = {"model": model, "data_collator": draw, "memory": MemoryOptions(recompute=recompute), "train_dataset": data}
    with pytest.MonkeyPatch.context() as patch:
        trainer = build(folder, 2, {"ulysses": 2}, {"max_steps": 3}, given, zero)
        patch.setattr(torch.nn.functional, "dropout", record)
        trainer.train()
    both = [torch.empty_like(dropped[0]) for _ in range(2)]
    dist.all_gather(both, dropped[0])
    return logged(trainer), weights(trainer), float((both[0] == both[1]).float().mean())


@pytest.mark.parametrize("zero", [0, 3])
def test_each_rank_drops_other_places_and_recomputation_drops_them_again(zero: int, pool: Pool, tmp_path: Path) -> None:
    (lines, first, alike), (other_lines, second, _) = pool(2).run(drop_out, tmp_path, "none", zero)
    assert 0.4 < alike < 0.6
    assert lines == other_lines
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0)
    _, again, _ = pool(2).run(drop_out, tmp_path, "full", zero)[0]
    for name, value in first.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6)

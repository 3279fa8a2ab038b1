"""Checkpoints of LongTrainer: the files of one device, whatever the mesh; and what stops one rank stops all."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaForCausalLM

from longspan import AutoMemory, LongspanError, parallel_state
from tests.helpers.trainers import HYBRID, Logged, Pool, assert_equal, build, dataset, logged, train, weights

SAVING = {
    "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "eval_strategy": "steps",
    "eval_steps": 3, "load_best_model_at_end": True,
}  # fmt: skip


def resume(
    folder: Path, rows: int, mesh: dict[str, int] | None, settings: Mapping[str, Any], zero: int = 0
) -> tuple[Logged, dict[str, Tensor]]:
    """From the checkpoint after 3 steps, in a trainer whose own weights are others."""
    trainer = build(folder, rows, mesh, settings, {}, zero)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.5)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return logged(trainer)[:-1], weights(trainer)  # the last line is the mean loss of this call alone


def test_every_rank_names_the_best_checkpoint_that_rank_0_has_written(pool: Pool, tmp_path: Path) -> None:
    """Rank 0 writes it while the others look whether its folder is there."""
    assert pool(2).run(best_checkpoint, tmp_path) == ["checkpoint-6", "checkpoint-6"]


def best_checkpoint(folder: Path) -> str:
    trainer = build(folder, 4, HYBRID, SAVING, {})
    write = trainer._save

    def slowly(*args: Any, **keywords: Any) -> None:
        time.sleep(0.5)
        write(*args, **keywords)

    trainer._save = slowly
    trainer.train()
    return Path(trainer.state.best_model_checkpoint).name


@pytest.mark.parametrize(
    ("zero", "mesh"),
    [
        pytest.param(0, HYBRID, marks=pytest.mark.long), (3, HYBRID), (0, {"tensor": 2}),
        pytest.param(3, {"tensor": 2}, marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_a_checkpoint_is_that_of_one_device(zero: int, mesh: dict[str, int], pool: Pool, tmp_path: Path) -> None:
    """Four ranks go on from it, and so does one device; each as if nothing had happened."""
    (alone,) = pool(1).run(train, tmp_path / "one", 4, None, SAVING)
    for theirs in pool(4).run(train, tmp_path / "four", 2, mesh, SAVING, None, zero):
        assert_equal(alone, theirs)
    alone = (alone[0][:-1], alone[1])
    files = sorted(path.name for path in (tmp_path / "one" / "checkpoint-3").iterdir())
    assert sorted(path.name for path in (tmp_path / "four" / "checkpoint-3").iterdir()) == files
    assert_equal(alone, pool(1).run(resume, tmp_path / "four", 4, None, SAVING)[0])
    for theirs in pool(4).run(resume, tmp_path / "four", 2, mesh, SAVING, zero):
        assert_equal(alone, theirs)
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "four" / "checkpoint-6")
    assert saved.config._attn_implementation == "sdpa"
    assert "longspan" not in (tmp_path / "four" / "checkpoint-6" / "config.json").read_text()
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "one" / "checkpoint-6").state_dict()
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


class Broken(list[Any]):
    """A row cannot be read on one rank."""

    def __getitem__(self, index: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def what_stops(folder: Path, what: str) -> str:
    """The one sentence that a rank stops with."""
    settings: dict[str, Any] = {"max_steps": 1}
    given: dict[str, Any] = {}
    if what == "a row":
        given["train_dataset"] = Broken(dataset())
    if what == "the disk":
        settings |= {"save_strategy": "steps", "save_steps": 1}
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / "checkpoint-1").write_text("in the way")
    try:
        trainer = build(folder / "out", 2, {"ulysses": 2}, settings, given)
        trainer.train(resume_from_checkpoint=str(folder / str(dist.get_rank())) if what == "the checkpoint" else None)
    except LongspanError as error:
        return str(error)
    return "nothing"


STOPS = {
    "a row": "OSError: the disk is gone",
    "the disk": "writing checkpoint 1 to .* failed: ",
    "the checkpoint": "the checkpoint to resume from differs between ranks: .*; let every rank read the same folder",
}


@pytest.mark.parametrize("what", STOPS)
def test_what_fails_on_one_rank_stops_all_with_one_sentence(what: str, pool: Pool, tmp_path: Path) -> None:
    first, second = pool(2).run(what_stops, tmp_path, what)
    assert first == second
    assert re.search(STOPS[what], first)


def save_alone(folder: Path, zero: int, mesh: dict[str, int]) -> str:
    """Rank 0 saves, the other one does not; then both train on, and both save."""
    trainer = build(folder, 2, mesh, {"max_steps": 1}, {}, zero)
    found = "nothing"
    if trainer.is_world_process_zero():
        try:
            trainer.save_model(str(folder / "saved"))
        except LongspanError as error:
            found = str(error)
    trainer.train()
    trainer.save_model(str(folder / "together"))
    return found


@pytest.mark.parametrize(
    ("zero", "mesh"), [(0, {"ulysses": 2}), (3, {"ulysses": 2}), pytest.param(0, {"tensor": 2}, marks=pytest.mark.long)]
)
def test_one_rank_saves_alone_or_is_refused_without_a_collective(
    zero: int, mesh: dict[str, int], pool: Pool, tmp_path: Path
) -> None:
    first, second = pool(2).run(save_alone, tmp_path, zero, mesh)
    is_whole = zero == 0 and "tensor" not in mesh
    assert second == "nothing"
    assert (tmp_path / "saved" / "model.safetensors").exists() is is_whole
    text = f"save_model was not called on rank 1 within 10 s, and with zero={zero} and tensor={mesh.get('tensor', 1)} each"
    assert is_whole or text in first
    assert (tmp_path / "together" / "model.safetensors").exists()


TIGHT = AutoMemory(budget_gib=0.0004, tokens=64)
"""A budget into which only sharded parameters and a loss without logits fit."""


def scores(given: Any) -> dict[str, float]:
    return {"square": float(torch.as_tensor(given.predictions)[torch.as_tensor(given.label_ids) != -100].square().mean())}


def saved_by_auto(folder: Path, mesh: dict[str, int] | None) -> tuple[Logged, dict[str, Tensor]]:
    """What is logged, also by an evaluation that needs the logits, and the weights that the saved folder holds."""
    given: dict[str, Any] = {"compute_metrics": scores} | ({} if mesh is None else {"memory": TIGHT})
    trainer = build(folder, 4, mesh, {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}, given)
    if mesh is not None:
        state = parallel_state(trainer.model)
        assert state is not None
        assert state.zero > 0
        assert state.memory.chunked_loss
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    if mesh is not None:
        dist.barrier()
    return logged(trainer), LlamaForCausalLM.from_pretrained(folder / "saved").state_dict()


def test_options_that_auto_memory_chooses_are_those_of_the_trainer(pool: Pool, tmp_path: Path) -> None:
    (alone,) = pool(1).run(saved_by_auto, tmp_path / "one", None)
    assert sum("eval_square" in line for line in alone[0]) == 2
    for theirs in pool(2).run(saved_by_auto, tmp_path / "two", {"ulysses": 2}):
        assert_equal(alone, theirs)

"""Decisions of a callback of one rank alone, against stock Trainer on one rank with the same callback."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from tests.helpers.trainers import Logged, Pool, assert_equal, train


class LastRank(TrainerCallback):
    """Sets ``decision`` of the control on the last rank alone, at ``event`` within or behind the third step."""

    def __init__(self, event: str, decision: str) -> None:
        self.decision = decision
        setattr(self, event, self.decide)

    def decide(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if dist.get_rank() == dist.get_world_size() - 1 and state.global_step == 3:
            setattr(control, self.decision, True)


def decided(
    folder: Path, mesh: dict[str, int] | None, event: str, decision: str
) -> tuple[Logged, dict[str, Tensor], list[str]]:
    """What is logged, the weights, and the names of the checkpoints."""
    settings = {"max_steps": 5, "gradient_accumulation_steps": 2}
    result = train(folder, 4, mesh, settings, {"callbacks": [LastRank(event, decision)]})
    return *result, sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("event", "decision"),
    [
        ("on_step_end", "should_training_stop"), ("on_substep_end", "should_training_stop"),
        ("on_log", "should_training_stop"), ("on_step_end", "should_evaluate"), ("on_step_end", "should_save"),
    ],
)  # fmt: skip
def test_what_a_callback_decides_on_one_rank_all_ranks_do(event: str, decision: str, pool: Pool, tmp_path: Path) -> None:
    (alone,) = pool(1).run(decided, tmp_path / "one", None, event, decision)
    stopped, steps = decision == "should_training_stop", [line["step"] for line in alone[0] if "loss" in line]
    assert steps == [1.0, 2.0, 3.0] if stopped else steps == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert any("eval_loss" in line for line in alone[0]) is (decision == "should_evaluate")
    assert alone[2] == ["checkpoint-3"] * (decision == "should_save")
    for theirs in pool(2).run(decided, tmp_path / "two", {"ulysses": 2}, event, decision):
        assert_equal(alone[:2], theirs[:2])
        assert theirs[2] == alone[2]

"""What LongTrainer refuses before it builds anything: arguments, keywords, versions and losses of other classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Trainer

from longspan import LongspanError, parallelize
from longspan.integrations.trainer import LongTrainer
from tests.helpers.ranks import mesh_of
from tests.helpers.trainers import Pool, arguments, llama


class Half(Trainer):
    """Stands for trainers of other libraries that compute their loss from logits."""

    def compute_loss(self, *args: Any, **keywords: Any) -> Any:
        raise AssertionError("these are the logits of one rank")


REFUSED: dict[str, dict[str, Any]] = {
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "bf16_full_eval": {"bf16_full_eval": True},
    "torch_compile": {"torch_compile": True},
    "neftune_noise_alpha=5.0": {"neftune_noise_alpha": 5.0},
    "neftune_noise_alpha=0.0": {"neftune_noise_alpha": 0.0},
    "use_liger_kernel": {"use_liger_kernel": True},
    "eval_use_gather_object": {"eval_use_gather_object": True},
    "optim='lomo'": {"optim": "lomo"},
    "split_batches": {"accelerator_config": {"split_batches": True}},
    "include_for_metrics": {"include_for_metrics": ["inputs"]},
}


def refusals(folder: Path) -> dict[str, str]:
    mesh = mesh_of()

    def refusal(kind: type[LongTrainer] = LongTrainer, settings: Mapping[str, Any] | None = None, **given: Any) -> str:
        try:
            kind(**({"model": llama(), "args": arguments(folder, **(settings or {})), "mesh": mesh} | given))
        except LongspanError as error:
            return str(error)
        return "nothing"

    class LongHalf(LongTrainer, Half):
        pass

    found = {name: refusal(settings=settings) for name, settings in REFUSED.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(transformers.Trainer, "store_flos")
        found["no Trainer.store_flos; install"] = refusal()
        patch.setattr("longspan.integrations.arguments.transformers.__version__", "5.22.2")
        found["5.22.2 saves on one rank only"] = refusal()
    optimizer = torch.optim.SGD(llama().parameters(), lr=0.1)
    return found | {
        "Half.compute_loss": refusal(LongHalf),
        "compute_loss_func": refusal(compute_loss_func=lambda *_: None),
        "optimizers=": refusal(optimizers=(optimizer, None), zero=3),
        "args=TrainingArguments": refusal(args=None),
        "parallel already": refusal(model=parallelize(llama(), mesh)),
    }


def test_what_does_not_go_with_a_mesh_is_refused_by_name(pool: Pool, tmp_path: Path) -> None:
    (found,) = pool(1).run(refusals, tmp_path)
    for name, text in found.items():
        assert name in text


def refusals_of_tensor(folder: Path) -> list[str]:
    mesh, found = mesh_of(tensor=2), []
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for settings, given in (({"gradient_checkpointing": True}, {}), ({}, {"optimizers": (optimizer, None)})):
        try:
            LongTrainer(model=model, args=arguments(folder, **settings), mesh=mesh, **given)
        except LongspanError as error:
            found.append(str(error))
    return found


def test_what_does_not_go_with_tensor_ranks_is_refused_by_name(pool: Pool, tmp_path: Path) -> None:
    for checkpointing, optimizers in pool(2).run(refusals_of_tensor, tmp_path):
        assert "checkpointing=True) would compute layers again without their tensor ranks; pass memory=Memory" in checkpointing
        assert "optimizers= were built before zero=0 and tensor=2 shard the parameters" in optimizers

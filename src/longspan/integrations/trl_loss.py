"""The loss of TRL's SFTTrainer behind LongTrainer: whether it is there, and its weight of the experts' balance loss.

    class LongSFT(LongTrainer, SFTTrainer)      Transformers' loss  +  (TRL's weight - Transformers') * balance loss

TRL divides the balance loss by the micro-batches of a step and takes its weight from the trainer; Transformers does neither.
Independent of TRL, which is not imported, and of ranks.
"""

from typing import Any

from torch import Tensor
from transformers import Trainer


def is_behind(trainer: type, front: type) -> bool:
    """Whether the class after ``front`` that computes the loss of ``trainer`` is TRL's SFTTrainer.

    Args:
        trainer: the class of the trainer.
        front: LongTrainer, a base of it. Behind it no class but Trainer and SFTTrainer may compute the loss (arguments.py).

    Returns:
        False if Trainer computes it.
    """
    behind = trainer.__mro__[trainer.__mro__.index(front) + 1 :]
    return next(kind for kind in behind if "compute_loss" in vars(kind)) is not Trainer


def average_balance_loss(trainer: Any, loss: Tensor, outputs: Any) -> Tensor:
    """``loss`` with the weight of the experts' balance loss in it changed from Transformers' to TRL's.

    Transformers' is ``model.router_aux_loss_coef``, TRL's ``trainer.router_aux_loss_coef``, in training divided by the number
    of micro-batches of the step.

    Args:
        trainer: an SFTTrainer behind LongTrainer.
        loss: the loss that Transformers' Trainer has computed, a scalar.
        outputs: of the model; without a balance loss in them, ``loss`` itself is returned.
    """
    aux_loss = outputs.get("aux_loss") if getattr(trainer, "aux_loss_enabled", False) else None
    if aux_loss is None:
        return loss
    steps = trainer.current_gradient_accumulation_steps if trainer.model.training else 1
    weight: float = trainer.router_aux_loss_coef / steps - trainer.model.router_aux_loss_coef
    averaged: Tensor = loss + weight * aux_loss
    return averaged

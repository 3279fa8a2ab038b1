"""Decisions of Trainer's callbacks, followed by all ranks: to stop, log, evaluate or save.

rank 0   on_step_end: -               ->
rank 1   on_step_end: stop (a clock)  ->   one control all-reduce   ->   stop on both

Every rank has callbacks of its own. A rank that stopped, evaluated or saved by itself would leave the others waiting in a step.
"""

from typing import Any

from transformers import TrainerControl
from transformers.trainer_callback import CallbackHandler

from longspan.distributed.consensus import largest_integers
from longspan.distributed.mesh import ParallelMesh

DECISIONS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")
"""The attributes of TrainerControl, each a bool, by which callbacks tell Trainer what to do."""
DECIDING = ("on_step_end", "on_substep_end", "on_epoch_end")
"""The events after which Trainer reads them; every rank has these, where others may be a rank's own (``on_log``)."""


def follow(control: TrainerControl, mesh: ParallelMesh) -> None:
    """Set every decision in ``control`` that any rank of ``mesh`` has set. Every rank must call it: one control all-reduce."""
    mine = [int(getattr(control, name)) for name in DECISIONS]
    hint = "Every rank must take as many steps; a rank whose callback raised, or whose data set ended, takes none."
    for name, value in zip(DECISIONS, largest_integers(mine, mesh.loss_control_group, hint)):
        setattr(control, name, bool(value))


class SharedDecisions(CallbackHandler):
    """A CallbackHandler whose callbacks decide for all ranks.

    Args:
        handler: whose callbacks it takes over, before training.
        mesh: the ranks, all of which have the same events.
    """

    def __init__(self, handler: CallbackHandler, mesh: ParallelMesh) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            handler.callbacks, handler.model, handler.processing_class, handler.optimizer, handler.lr_scheduler
        )
        self.mesh = mesh

    def call_event(self, event: str, args: Any, state: Any, control: TrainerControl, **keywords: Any) -> Any:
        control = super().call_event(event, args, state, control, **keywords)  # type: ignore[no-untyped-call]
        if event in DECIDING:
            follow(control, self.mesh)
        return control

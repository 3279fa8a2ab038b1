"""The protocol by which ``parallelize`` reads and changes a kind of model, and what it records on the model.

    Decoder, or a model like it       --DecoderAdapter-->   |
    a Hugging Face model              --hf/adapter.py-->    |   parallelize: prove, install, shard, checkpoint
                                                            |   unparallelize: undo

A new kind of model is one class with these methods. Independent of the kind of model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from longspan.distributed.consensus import raise_together
from longspan.distributed.fsdp import refuse_gradient_hooks
from longspan.distributed.grad_sync import MeanGradients
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.pipeline_parallel import PipelineParallel, PipelinePlan
from longspan.distributed.tensor_parallel import TensorPlan
from longspan.memory.options import MemoryOptions
from longspan.models.unchanged import Snapshot

STATE = "_longspan"
"""The attribute of a parallel model that holds its ``ParallelState``."""
UNREAD = "_longspan_unread"
"""The attribute of a model on the meta device that holds its ``UnreadWeights``."""


@runtime_checkable
class ModelAdapter(Protocol):
    """The interface by which ``parallelize`` reads and changes one kind of model, such as the Decoder or Hugging Face models.

    ``parallelize`` calls ``prove`` and then ``install``; ``unparallelize`` calls ``undo``. The other methods describe the
    model.
    """

    def computes_loss(self) -> bool:
        """Whether the model's forward returns the loss over the global batch when it is given labels.

        False means that the caller computes the loss from the logits.
        """
        ...

    def blocks(self) -> Sequence[nn.Module]:
        """The layers of the model in the order of the forward. Each is sharded by FSDP2 and checkpointed as one unit."""
        ...

    def token_wise(self) -> Sequence[nn.Module]:
        """The modules that compute each token independently of the others, so that they can be tiled: feed-forwards and
        norms."""
        ...

    def tensor_plan(self) -> TensorPlan:
        """Which weights are cut over the tensor axis, by name.

        Raises:
            ModelError: the model has no such plan.
        """
        ...

    def pipeline_plan(self) -> PipelinePlan:
        """Which modules are on which pipeline stage, by name.

        Raises:
            ModelError: the model cannot be split.
        """
        ...

    def prove(self, mesh: ParallelMesh, memory: MemoryOptions) -> None:
        """Raise a LongspanError if the model cannot run on ``mesh`` with ``memory``; otherwise return.

        The model is not changed, and nothing is communicated. What was found out is kept for ``install``.
        """
        ...

    def install(self, mesh: ParallelMesh, memory: MemoryOptions) -> None:
        """Replace the model's attention and loss by those over ``mesh``, with the options ``memory``, in place; after
        ``prove``."""
        ...

    def refuse_call(self, keywords: Mapping[str, Any]) -> None:
        """Raise the LongspanError with which the installed model refuses a call with these keywords; return if it accepts them.

        ``forward_backward`` calls it on every rank before a pipeline's schedule, in which one stage alone would raise.
        """
        ...

    def undo(self) -> None:
        """Restore the attention and the loss that the model had before ``install``."""
        ...


@runtime_checkable
class UnreadWeights(Protocol):
    """The source of the weights of a model on the meta device, from which ``parallelize`` reads them after sharding: files,
    or a seed."""

    def facts(self, model: Any) -> dict[str, str]:
        """What must be equal on all ranks for them to read the same weights: {name: text}, which ``parallelize`` compares.

        Raises:
            ModelError: the weights do not fit the model.
        """
        ...

    def read_into(self, model: Any, device: torch.device) -> None:
        """Move ``model``, whose parameters may be sharded, to ``device`` and fill it with its weights. Every rank calls it."""
        ...


@dataclass
class ParallelState:
    """What ``parallelize`` did to a model; ``parallel_state(model)`` returns it."""

    mesh: ParallelMesh
    """The mesh that the model was made parallel over."""
    zero: int
    """The ZeRO stage: 0, 2 or 3."""
    memory: MemoryOptions
    """The memory options, those that were chosen where the caller passed an ``AutoMemory``."""
    adapter: ModelAdapter
    """The adapter of this kind of model."""
    replaced: Sequence[tuple[nn.Module, Any]] = ()
    """Modules whose forward was replaced, each with the forward that its instance had before, or None."""
    pipeline: PipelineParallel | None = None
    """The pipeline stages of this rank; None for a whole model."""
    gradients: MeanGradients | None = None
    """What averages the gradients after each backward at zero=0; None where FSDP2 does."""
    snapshot: Snapshot | None = None
    """The record of the model by which a change since is refused."""
    snapshot_hooks: list[RemovableHandle] = field(default_factory=list)
    """The hooks that refuse a model that was changed since."""

    def refuse_step(self, model: nn.Module, parts: Sequence[Mapping[str, Any]]) -> None:
        """Raise, on every rank alike, what a pipeline's step over ``parts`` would raise on one stage while others wait for it.

        Args:
            model: the parallel model.
            parts: this rank's micro-batches of the step.

        Raises:
            LongspanError: of the first rank that has one.
        """
        with raise_together(self.mesh.world_group):
            if self.pipeline is not None:
                self.pipeline.refuse_other_dtypes()
            if self.snapshot is not None:
                self.snapshot.refuse_changes()
            if self.pipeline is not None:
                self.pipeline.refuse_hooks(() if self.gradients is None else self.gradients.handles)
                self.pipeline.refuse_parts(parts)
            if self.gradients is not None:
                self.gradients.refuse_what_changed()
            else:
                refuse_gradient_hooks(model, model.named_parameters())
            for part in parts:
                self.adapter.refuse_call(part)


def parallel_state(model: nn.Module) -> ParallelState | None:
    """What ``parallelize`` did to ``model``.

    Args:
        model: any module.

    Returns:
        Its mesh, ZeRO stage, memory options and adapter; None for a model that is not parallel.
    """
    state = vars(model).get(STATE)
    return state if isinstance(state, ParallelState) else None

"""Pipeline parallel: a model's layers split in place into stages, and the schedule that runs a step's micro-batches over them.

    stage 0   embedding, layers 0-3      ids ----> hidden states --send-->
    stage 1   layers 4-8                           hidden states --send-->
    stage 2   layers 9-11, norm, head              hidden states ----> the loss of the micro-batch

The modules of other stages are replaced by ones that pass their input through, so that every stage runs the model's own
forward, and names of parameters stay. PyTorch's schedules (GPipe, 1F1B, interleaved 1F1B) send hidden states and their
gradients. Every loss is divided by the labels of the whole step, so gradients are not scaled. A weight that embedding and head
share is a copy on the first and on the last stage, whose gradients are summed once a step.

Sees names of modules and opaque keywords; knows nothing of models or batches. Source: GPipe, arXiv:1811.06965; 1F1B and
interleaved stages, arXiv:2104.04473.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.utils.hooks import RemovableHandle

from longspan import _compat
from longspan.distributed.collectives import CountingTransport
from longspan.distributed.deferred_hooks import refuse_hooks_of_copies
from longspan.distributed.fake_world import fake_stage, is_fake
from longspan.distributed.grad_norm import STAGES, StageNorm, local_part
from longspan.distributed.grad_sync import sum_over
from longspan.distributed.groups import new_group_of
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.pipeline_options import PipelineOptions, split_layers
from longspan.distributed.traffic import Traffic
from longspan.errors import BatchError, LongspanError, ModelError

PLAIN = (bool, int, float, str)
LABELS = frozenset({"labels", "shift_labels"})


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """Which modules of a model are on which stage, by their names; the model's adapter makes it.

    Attributes:
        blocks: the layers, in the order in which they are computed.
        first, last: modules that only the first stage (embedding) or only the last stage (norm) has.
        heads: modules of the last stage that work on the hidden states behind the layers; no other stage needs their output.
        hidden: the size of a hidden state.
        body: the module whose output holds the hidden states behind the layers; "" is the model.
        hidden_of: called with its output, returns these hidden states.
        tied: (parameter of the first stage, parameter of the last) where they are one weight; None: there is none.
    """

    blocks: tuple[str, ...]
    first: tuple[str, ...]
    last: tuple[str, ...]
    heads: tuple[str, ...]
    hidden: int
    hidden_of: Callable[[Any], Tensor]
    body: str = ""
    tied: tuple[str, str] | None = None


class Skipped(nn.Module):
    """In place of a module of another stage: returns its first argument, the hidden states. Keeps its attributes of type
    ``PLAIN``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        plain = {name: value for name, value in vars(module).items() if type(value) in PLAIN and not name.startswith("_")}
        vars(self).update(plain | {"training": module.training})

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        return x


class SkippedHead(Skipped):
    """In place of a head of the last stage: returns a zero, because no logits are needed."""

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        return x.new_zeros(())


def stage_modules(model: nn.Module, plan: PipelinePlan, stages: int) -> dict[str, int]:
    """{name of a module in ``plan``: the index of the stage that has it}, with layers split by their numbers of parameters."""
    sizes = [float(sum(p.numel() for p in model.get_submodule(name).parameters())) for name in plan.blocks]
    last_cost = float(sum(p.numel() for name in (*plan.last, *plan.heads) for p in model.get_submodule(name).parameters()))
    runs = split_layers(sizes, stages, last_cost=last_cost)
    of_block = {plan.blocks[layer]: stage for stage, run in enumerate(runs) for layer in run}
    return dict.fromkeys(plan.first, 0) | of_block | dict.fromkeys((*plan.last, *plan.heads), stages - 1)


@contextmanager
def skipping(model: nn.Module, plan: PipelinePlan, names: Iterable[str]) -> Iterator[None]:
    """Context manager: inside, the modules called ``names`` in ``model`` only return their input (``Skipped``)."""
    held = {name: (*_parent(model, name), model.get_submodule(name)) for name in names}
    for name, (parent, leaf, module) in held.items():
        setattr(parent, leaf, _skipped(plan, name, module))
    try:
        yield
    finally:
        for parent, leaf, module in held.values():
            setattr(parent, leaf, module)


class PipelineParallel:
    """The stages of one model on this rank, and the step over them; ``parallelize`` makes it for pipeline > 1.

    Args:
        model: the whole model; its modules of other ranks' stages are replaced, and lose their memory.
        plan: which modules are on which stage.
        mesh: the ranks; stages are over its pipeline axis.
        options: the schedule.
        dtype: the dtype of the hidden states that are sent.

    Raises:
        LayoutError: fewer layers than stages.
        ModelError: later, for a call of the model that is not part of ``step``.
    """

    def __init__(
        self, model: nn.Module, plan: PipelinePlan, mesh: ParallelMesh, options: PipelineOptions, dtype: torch.dtype
    ) -> None:
        self._model, self._plan, self._mesh, self._options, self._dtype = model, plan, mesh, options, dtype
        self._loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        ranks, rank = mesh.coordinate.pipeline, mesh.coordinate.pipeline_rank
        self._count = ranks * options.stages_per_rank
        self._mine = range(rank, self._count, ranks)
        holders = stage_modules(model, plan, self._count)
        for name, stage in holders.items():
            if stage not in self._mine:
                parent, leaf = _parent(model, name)
                gone = model.get_submodule(name)
                setattr(parent, leaf, _skipped(plan, name, gone))
                gone.to_empty(device="meta")  # the model's adapter may still hold it
        self._others = {
            stage: [name for name, other in holders.items() if other in self._mine and other != stage] for stage in self._mine
        }  # fmt: skip
        self._running: int | None = None
        self._autocast: torch.dtype | None = None
        self._hidden: Tensor | None = None
        self._schedules: dict[tuple[object, ...], tuple[Any, list[PipelineStage]]] = {}
        self._copies = None if plan.tied is None else _Copies(model, plan.tied, mesh)
        self._dtypes = [parameter.dtype for parameter in model.parameters()]
        vars(model)[STAGES] = StageNorm(mesh.pipeline_group, None if self._copies is None else self._copies.second)
        self._skipped = ExitStack()
        model.register_forward_pre_hook(self._refuse_direct_calls, prepend=True)
        model.register_forward_pre_hook(self._skip_others)  # behind every hook that looks at the model's modules
        model.register_forward_hook(lambda *_: self._skipped.close(), always_call=True)
        model.get_submodule(plan.body).register_forward_hook(self._note_hidden)

    def step(self, parts: Sequence[Mapping[str, Any]]) -> Tensor:
        """Forward and, where gradients are enabled, backward of all micro-batches of a step, over all stages.

        Args:
            parts: this rank's micro-batches, all of one shape; every stage has the same tokens of the same rows.

        Returns:
            The sum of the micro-batches' losses, a detached scalar, equal on every stage.

        Raises:
            ModelError: a part without labels.
            LongspanError: what the model's forward raises.
        """
        losses, trains, kind = list[Tensor](), torch.is_grad_enabled(), self._mesh.device.type
        inputs = [self._inputs(part) for part in parts]
        schedule, stages = self._schedule(parts, trains)
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        try:
            with torch.autocast(kind, enabled=False):  # of the forwards alone, see run
                _compat.run_pipeline(schedule, stages, [(x,) for x, _ in inputs], [more for _, more in inputs], losses, trains)
        except RuntimeError as error:
            if isinstance(error.__cause__, LongspanError):
                raise error.__cause__ from None
            raise
        nothing = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        total = sum((loss.detach() for loss in losses), nothing)
        dist.all_reduce(total, group=self._mesh.pipeline_group)  # only the last stage has losses
        return total.to(self._loss_dtype)

    @property
    def layers(self) -> int:
        """The number of layers that this rank has."""
        return sum(not isinstance(self._model.get_submodule(name), Skipped) for name in self._plan.blocks)

    @property
    def copy_names(self) -> dict[str, str]:
        """{name of the copy of a tied weight on this rank: its name on the first stage}; empty except on the last stage."""
        second = None if self._copies is None else self._copies.second
        return {} if second is None or self._plan.tied is None else {second: self._plan.tied[0]}

    def refuse_other_dtypes(self) -> None:
        """Raise ModelError if a parameter has another dtype than at ``parallelize``, which made the buffers between stages."""
        for (name, parameter), dtype in zip(self._model.named_parameters(), self._dtypes):
            if parameter.dtype != dtype:
                raise ModelError(
                    f"parameter {name!r} was {dtype} when the model was split into stages and is {parameter.dtype} now; build "
                    f"the model in {parameter.dtype}, then parallelize it"
                )

    def refuse_parts(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Raise ModelError if ``parts``, a step's micro-batches on this rank, cannot be run: one has no labels, no ids, or
        embeddings that require a gradient, or interleaved stages are given a number of them that is no whole rounds of the
        pipeline's ranks. BatchError for micro-batches of different shapes: stages receive into buffers of one shape."""
        for number, part in enumerate(parts):
            if (kind := _kind(part)) != (first := _kind(parts[0])):
                raise BatchError(
                    f"micro-batch 0 has {first} on this rank and micro-batch {number} has {kind}; on "
                    f"pipeline={self._mesh.coordinate.pipeline} all micro-batches of a step have one shape: pad them alike, "
                    f"with labels -100"
                )
            if not any(part.get(label) is not None for label in LABELS):
                raise ModelError("a pipeline computes a loss only; put labels into the batch before shard_batch")
            if any(isinstance(x, Tensor) and x.requires_grad for x in part.values()):
                raise ModelError(
                    "inputs_embeds come from a module outside the pipeline, whose gradient only the first stage would have; "
                    "use input_ids, or pipeline=1"
                )
        self._options.refuse_broken_rounds(self._mesh.coordinate.pipeline, len(parts))

    def refuse_hooks(self, ours: Iterable[RemovableHandle]) -> None:
        """Raise ModelError for a hook on the gradient of a weight that the first and the last stage both have, other than those
        of the handles ``ours``."""
        if self._copies is not None:
            refuse_hooks_of_copies(self._copies.held(), ours)

    @contextmanager
    def summing_copies(self) -> Iterator[None]:
        """Context manager around a step and its averages: what they add to the gradient of a weight that the first and the
        last stage both have is the sum of both stages' gradients. If the block raises, its ``.grad`` is the earlier one."""
        with nullcontext() if self._copies is None else self._copies.summing():
            yield

    def _inputs(self, part: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The ids (or embeddings) of a part, and the keywords of the model's call on this rank's stages."""
        name = _fed(part)
        is_last = self._count - 1 in self._mine
        dropped = {name} | (set() if is_last else LABELS)
        return part[name], {key: value for key, value in part.items() if key not in dropped}

    def _schedule(self, parts: Sequence[Mapping[str, Any]], trains: bool) -> tuple[Any, list[PipelineStage]]:
        """PyTorch's schedule for micro-batches of this number and shape, with a backward if ``trains``, and its stages on
        this rank. Made once for each."""
        ids: Tensor = parts[0][_fed(parts[0])]
        key = (len(parts), ids.shape[:2], ids.dtype, trains)
        if key not in self._schedules:
            # a schedule keeps its buffers, so only the last one of training and of evaluation is kept
            self._schedules = {other: made for other, made in self._schedules.items() if other[-1] != trains}
            few = self._options.schedule == "1f1b" and len(parts) < self._count  # 1F1B is then GPipe, and PyTorch refuses it
            stages = [self._stage(index, ids, trains) for index in self._mine]
            kind = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe, "interleaved": ScheduleInterleaved1F1B}[
                "gpipe" if few else self._options.schedule
            ]
            given: Any = stages if self._options.schedule == "interleaved" else stages[0]
            loss = (lambda output, _: output) if trains else None
            self._schedules[key] = (kind(given, len(parts), loss_fn=loss, scale_grads=False), stages)
        return self._schedules[key]

    def _stage(self, index: int, ids: Tensor, trains: bool) -> PipelineStage:
        """PyTorch's PipelineStage number ``index``, for ids of the shape of ``ids``."""
        state = torch.empty(*ids.shape[:2], self._plan.hidden, dtype=self._dtype, device="meta", requires_grad=trains)
        loss = torch.empty((), dtype=self._loss_dtype, device="meta", requires_grad=trains)
        stage = _CountedStage(
            self._mesh, _StageModule(self, index), index, self._count, self._mesh.device, group=self._mesh.pipeline_group,
            input_args=(ids.to("meta") if index == 0 else state,), output_args=(loss if index == self._count - 1 else state,),
        )  # fmt: skip
        if is_fake():
            fake_stage(stage)
        return stage

    def run(self, stage: int, x: Tensor, given: Mapping[str, Any]) -> Tensor:
        """The forward of one stage of this rank, called by ``_StageModule``: ``x`` is ids (stage 0) or hidden states,
        ``given`` the other keywords of the model's call; returns hidden states, or on the last stage the loss."""
        is_last, name = stage == self._count - 1, "inputs_embeds" if x.is_floating_point() else "input_ids"
        more = given if is_last else {key: value for key, value in given.items() if key not in LABELS}
        self._running = stage
        try:
            with torch.autocast(self._mesh.device.type, self._autocast, enabled=self._autocast is not None):
                output = self._model(**{name: x}, **more)
        finally:
            self._running = None
        result, self._hidden = output.loss if is_last else self._hidden, None
        if not isinstance(result, Tensor):
            raise ModelError(f"{type(self._model).__name__} returned no loss; put labels into the batch before shard_batch")
        return result

    def _refuse_direct_calls(self, model: nn.Module, *_: Any) -> None:
        if self._running is None:
            raise ModelError(
                f"a model on pipeline={self._mesh.coordinate.pipeline} has some of its layers on each rank and cannot be "
                f"called; use forward_backward(model, parts), under torch.no_grad() for an evaluation"
            )

    def _skip_others(self, model: nn.Module, *_: Any) -> None:
        """A pre-hook: the modules of this rank's other stages pass their input through until the forward ends."""
        assert self._running is not None
        self._skipped.enter_context(skipping(model, self._plan, self._others[self._running]))

    def _note_hidden(self, body: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the body: keep its hidden states for the end of the stage."""
        self._hidden = self._plan.hidden_of(output)


class _CountedStage(PipelineStage):
    """A stage whose messages to other stages a ``CountingTransport`` of the mesh counts: they do not go through a Transport."""

    def __init__(self, mesh: ParallelMesh, *stage: Any, **more: Any) -> None:
        super().__init__(*stage, **more)
        self._mesh = mesh

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._count(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._count(super().get_bwd_send_ops(bwd_chunk_id))

    def _count(self, sends: list[dist.P2POp]) -> list[dist.P2POp]:
        if isinstance(self._mesh.transport, CountingTransport):
            for send in sends:
                self._mesh.transport.count(self._mesh.pipeline_group, Traffic(1, send.tensor.nbytes))
        return sends


class _StageModule(nn.Module):
    """One stage as the module that PyTorch's schedules call. The model is no submodule of it: FSDP2 and others have wrapped
    that."""

    def __init__(self, pipeline: PipelineParallel, stage: int) -> None:
        super().__init__()
        self._pipeline, self._stage = pipeline, stage

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        return self._pipeline.run(self._stage, x, given)


class _Copies:
    """A weight that the first and the last stage both have: its gradients are summed once a step, and counted once in the norm.

    Args:
        model: the model on this rank, without the modules of other stages.
        names: the parameter's name on the first and on the last stage.
        mesh: the ranks.
    """

    def __init__(self, model: nn.Module, names: tuple[str, str], mesh: ParallelMesh) -> None:
        self._model, at = model, mesh.coordinate
        ends = {0: names[0], at.pipeline - 1: names[1]}
        self._name = ends.get(at.pipeline_rank)
        self.second = names[1] if at.pipeline_rank == at.pipeline - 1 else None
        ranks = [dist.get_global_rank(mesh.pipeline_group, rank) for rank in (ends if self._name else [at.pipeline_rank])]
        self._group = new_group_of(ranks, mesh.world_group, backend="", timeout=mesh.timeout)

    def held(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of the copy on this rank, if it has one."""
        return [] if self._name is None else [(self._name, self._model.get_parameter(self._name))]

    @contextmanager
    def summing(self) -> Iterator[None]:
        """Context manager: add the sum of both copies' gradients of this block, in fp32 (fp64 for fp64), to the ``.grad`` from
        before, which is summed already. Ranks without a copy do nothing."""
        trained = [parameter for _, parameter in self.held() if parameter.requires_grad]
        earlier = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        try:
            yield
            for parameter, grad in zip(trained, earlier):
                sum_over(parameter, self._group)
                if grad is not None and parameter.grad is not None:
                    local_part(grad).add_(local_part(parameter.grad))
        finally:
            for parameter, grad in zip(trained, earlier):
                parameter.grad = parameter.grad if grad is None else grad


def _fed(part: Mapping[str, Any]) -> str:
    """The name of the tensor in ``part`` that the first stage is called with."""
    return "input_ids" if "input_ids" in part else "inputs_embeds"


def _kind(part: Mapping[str, Any]) -> str:
    """Name, rows, tokens and dtype of what the first stage is called with, as text. Raises ModelError if it is no tensor."""
    x = part.get(_fed(part))
    if not isinstance(x, Tensor):
        raise ModelError("a pipeline's first stage needs input_ids or inputs_embeds, and a micro-batch has neither")
    return f"{_fed(part)} {list(x.shape[:2])} of {x.dtype}"


def _skipped(plan: PipelinePlan, name: str, module: nn.Module) -> Skipped:
    """What takes the place of ``module``, called ``name`` in ``plan``, on other stages."""
    return (SkippedHead if name in plan.heads else Skipped)(module)


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """(the module that holds the module ``name``, its name in it)."""
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf

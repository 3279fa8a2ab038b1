"""Make a model parallel from outside: attention and loss over the mesh, averaged or sharded gradients, memory options.

    what the model has             what parallelize does with it
    attention, cross_entropy       replaced by attention and cross-entropy over the mesh (for a Hugging Face model by
                                   hf/adapter.py, after a proof on one rank)
    parameters                     zero=0  every rank keeps all; gradients are averaged after every backward (grad_sync.py)
                                   zero=2  each rank keeps 1/P of gradients and optimizer states (fsdp.py)
                                   zero=3  and 1/P of the parameters: a block's are gathered while it computes
    blocks                         activation checkpointing, offload
    feed-forwards, norms           tiles

All ranks first compare facts about their model in one small exchange, because a model that differs on one rank would train with
wrong results on all of them.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longspan.batch.dummy_rows import fill_empty_parts
from longspan.distributed.deferred_hooks import refuse_hooks_of_copies
from longspan.distributed.fsdp import FSDPOptions, is_sharded, refuse_optimizers_at_first_step, refuse_options, shard_parameters
from longspan.distributed.grad_norm import mark_stage
from longspan.distributed.grad_sync import MeanGradients
from longspan.distributed.mesh import ParallelMesh, refuse_no_mesh
from longspan.distributed.pipeline_options import PipelineOptions
from longspan.distributed.pipeline_parallel import PipelineParallel
from longspan.distributed.tensor_parallel import TensorParallel
from longspan.errors import ModelError
from longspan.hf import adapter_for
from longspan.kernels.protocol import Kernel
from longspan.kernels.user_function import KernelFunction
from longspan.memory.auto import Choice, choose
from longspan.memory.checkpointing import checkpoint_block
from longspan.memory.offload import offload_activations
from longspan.memory.options import AutoMemory, MemoryOptions
from longspan.memory.tiling import refuse_to_tile, tiled
from longspan.models.adapter import STATE, UNREAD, ModelAdapter, ParallelState, UnreadWeights, parallel_state
from longspan.models.decoder_adapter import DecoderAdapter, SeededWeights
from longspan.models.fingerprint import agree, fingerprints, refuse_other_arguments
from longspan.models.unchanged import Snapshot

Model = TypeVar("Model", bound=nn.Module)
COPYING = ("__deepcopy__", "__reduce_ex__")
"""The methods of an object by which Python copies and pickles it."""


def parallelize(
    model: Model,
    mesh: ParallelMesh,
    *,
    zero: int = 0,
    dtype: torch.dtype | None = None,
    offload_parameters: bool = False,
    fsdp_ranks: int | None = None,
    memory: MemoryOptions | AutoMemory = MemoryOptions(),  # noqa: B008 - frozen
    kernel: str | Kernel | KernelFunction = "auto",
    pipeline: PipelineOptions = PipelineOptions(),  # noqa: B008 - frozen
) -> Model:
    """Change ``model`` in place so that its loss and gradients on ``mesh`` are those of one device (guarantee 1).

    Every rank calls it, with equal parameters (the same seed, or the same checkpoint), before it builds its optimizer; then
    each calls ``model(**shard_batch(batch, mesh))``. A model whose weights are still on disk (``longspan.hf.load``), or a
    Decoder on the meta device, is sharded first; then each rank reads or draws its own shards (with tensor > 1: all weights, of
    which it then keeps its shards).

    Args:
        model: a Hugging Face model, the Decoder, or a model with the attributes that ``models/decoder_adapter.py`` names.
        mesh: the ranks, by axis.
        zero: what each rank keeps. 0: everything. 2: a shard of gradients and optimizer states, and all parameters from their
            first use in a step to its end (1 is the same: FSDP2 has no smaller step). 3: a shard of the parameters too (ZeRO,
            arXiv:1910.02054).
        dtype: for zero=2 and 3, what blocks compute in; parameters and their gradients keep their own dtype.
        offload_parameters: for zero=2 and 3, keep parameter shards and optimizer states in host memory.
        fsdp_ranks: for zero=2 and 3, shard over so many neighbouring ranks (a node's) and replicate beyond them (default: all).
        memory: how activations are saved, or an ``AutoMemory``, which chooses ``zero`` and these. None changes a result.
        kernel: what computes attention: a name, a Kernel, or a function. A Hugging Face model can use one of Transformers'
            registry, on the whole sequence for this rank's heads: "hf:sdpa", "hf:eager", "hf:flash_attention_2" (never run), a
            hub kernel or one that you registered.
        pipeline: the schedule, where the mesh has pipeline > 1; the model is then called by ``forward_backward`` only.

    Returns:
        The model, the same object.

    Raises:
        KernelError: a kernel that is unknown, or that the model or a ring cannot use.
        LayoutError: ``mesh`` is no ParallelMesh; fewer heads than ulysses ranks.
        ModelError: a model that has no attention to replace, is on another device than the mesh, is parallel already, or
            differs between ranks; an optimizer that was built before; an option that the model cannot have; a budget that
            nothing fits into.
    """
    refuse_no_mesh(mesh)
    fsdp = FSDPOptions(zero, dtype, offload_parameters, fsdp_ranks)
    arguments = vars(fsdp) | {"memory": memory, "kernel": _name(kernel), "pipeline": pipeline}
    refuse_other_arguments(mesh, {name: str(value) for name, value in arguments.items()})
    fsdp, options = _options(model, mesh, fsdp, memory)
    adapter = adapter_of(model, kernel)
    job = _Job(model, mesh, adapter, fsdp, options, pipeline)
    unread = _unread(model)
    if unread is not None:
        agree(mesh, partial(_facts_of_unread, job, unread))
        _read(job, unread)
    agree(mesh, partial(_prove, job, read_alike=unread is not None))
    stages = _split(job)
    adapter.install(mesh, options)
    if mesh.coordinate.tensor > 1:
        TensorParallel(
            model, adapter.blocks(), adapter.tensor_plan().within(model), mesh, partial(_tokens_of_tensor_ranks, mesh)
        )
        refuse_optimizers_at_first_step(model)
    replaced = _apply_options(adapter, options)
    stage = 2 if fsdp.zero == 1 else fsdp.zero  # FSDP2 shards gradients too
    state = ParallelState(mesh, stage, options, adapter, replaced, stages)
    if fsdp.zero == 0:
        state.gradients = MeanGradients(model, mesh)
    elif not is_sharded(model):
        shard_parameters(model, adapter.blocks(), mesh, fsdp)
    state.snapshot = Snapshot(model)
    if stages is not None:
        mark_stage(model)
    state.snapshot_hooks = state.snapshot.watch(model, None if state.gradients is None else state.gradients.refuse_what_changed)
    vars(model).update({STATE: state, **dict.fromkeys(COPYING, _refuse_a_copy)})
    return model


def unparallelize(model: Model) -> Model:
    """Undo ``parallelize(model, mesh, zero=0)`` in place: the model computes on one device again and keeps its weights.

    Args:
        model: a model that ``parallelize`` changed.

    Returns:
        The model, the same object.

    Raises:
        ModelError: a model that is not parallel, or whose parameters are sharded (zero=2 and 3).
    """
    state = parallel_state(model)
    if state is None:
        raise ModelError("unparallelize was given a model that is not parallel; call parallelize(model, mesh) first")
    if state.mesh.coordinate.tensor > 1 or state.pipeline is not None:
        raise ModelError(
            "a model that is cut over tensor ranks or pipeline stages cannot be made whole in place; build the model "
            "again and load a checkpoint of this one"
        )
    if state.gradients is None:
        raise ModelError(
            "a model with sharded parameters cannot be made whole in place: FSDP2 does not undo it; build the model again and "
            "load a checkpoint of this one"
        )
    state.gradients.remove()
    for hook in state.snapshot_hooks:
        hook.remove()
    for module, forward in state.replaced:
        vars(module).pop("forward", None)
        if forward is not None:
            vars(module)["forward"] = forward
    state.adapter.undo()
    for name in (STATE, *COPYING):
        del vars(model)[name]
    return model


def forward_backward(model: nn.Module, parts: Sequence[Mapping[str, Any]]) -> Tensor:
    """Forward and backward of all micro-batches of a step; under ``torch.no_grad()`` the forward alone.

    Equals the loop ``for part in parts: model(**part).loss.backward()``: gradients are added to ``.grad``. At zero=0 they are
    averaged over the ranks once, after the last backward, where the loop averages them after each. Every rank calls it with
    equally many parts. Under ``torch.autocast`` the forwards compute in its dtype, and the backwards run outside of it.

    Args:
        model: a parallel model.
        parts: this rank's micro-batches, as ``shard_batch`` of a list returns them: their labels are counted over the step.

    Returns:
        The step's global loss, a detached scalar that is equal on every rank.

    Raises:
        ModelError: a model that is not parallel, no micro-batch at all, or a model that returns no loss.
        BatchError: on pipeline > 1, on every rank alike, for micro-batches of different shapes.
    """
    state = parallel_state(model)
    if state is None:
        raise ModelError("forward_backward was given a model that is not parallel; call parallelize(model, mesh) first")
    if isinstance(parts, Mapping) or not parts:
        raise ModelError(
            "forward_backward takes the micro-batches of a step as a list of at least one; pass shard_batch([batch, ...], mesh)"
        )
    trains = torch.is_grad_enabled()
    several = len(parts) > 1 or state.pipeline is not None
    if state.pipeline is not None:
        parts = fill_empty_parts(parts)  # before the stages make buffers for what the model's layers send
        state.refuse_step(model, parts)
    with ExitStack() as stack:
        if state.pipeline is not None and trains:
            stack.enter_context(state.pipeline.summing_copies())
        if state.gradients is not None and trains and several:
            stack.enter_context(state.gradients.once())  # inside: the copies' means are summed
        return _one_after_the_other(model, parts, state.mesh) if state.pipeline is None else state.pipeline.step(parts)


def _one_after_the_other(model: nn.Module, parts: Sequence[Mapping[str, Any]], mesh: ParallelMesh) -> Tensor:
    """``forward_backward`` of a model without stages."""
    losses = []
    for part in parts:
        loss = getattr(model(**part), "loss", None)
        if loss is None:
            raise ModelError(
                f"{type(model).__name__} returned no loss; put labels into the batch before shard_batch, and leave out "
                f"return_dict=False"
            )
        if torch.is_grad_enabled():
            with torch.autocast(mesh.device.type, enabled=False):
                loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).double().sum().to(losses[0].dtype)


def _refuse_a_copy(*_: object) -> None:
    """Raise ModelError; the instance's method by which ``copy.deepcopy``, ``pickle`` and ``torch.save`` would copy a model."""
    raise ModelError(
        "a parallel model cannot be copied or pickled: the gradients of the copy would not be averaged; copy it before "
        "parallelize, or load its state_dict into a model that was built again (longspan.hf.save writes it to a folder)"
    )


def _split(job: "_Job") -> PipelineParallel | None:
    """Split the model into pipeline stages in place; None for one stage."""
    if job.mesh.coordinate.pipeline == 1:
        return None
    dtype = job.fsdp.dtype or next(p.dtype for p in job.model.parameters() if p.is_floating_point())
    return PipelineParallel(job.model, job.adapter.pipeline_plan(), job.mesh, job.pipeline, dtype)


def _tokens_of_tensor_ranks(mesh: ParallelMesh, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """For each tensor rank, the tokens of a row that it holds, from the BatchInfo among the keywords of the model's call."""
    step = kwargs.get("longspan")
    if step is None:
        raise ModelError(
            "the tokens of this model lie on several tensor ranks, but the batch was not cut; call "
            "model(**shard_batch(batch, mesh))"
        )
    return mesh.coordinate.tensor_sizes(step.tokens)


@dataclass(frozen=True)
class _Job:
    """The arguments of one ``parallelize`` call, with an AutoMemory resolved; data only, passed between its steps."""

    model: nn.Module
    mesh: ParallelMesh
    adapter: ModelAdapter
    fsdp: FSDPOptions
    memory: MemoryOptions
    pipeline: PipelineOptions


def _options(
    model: nn.Module, mesh: ParallelMesh, fsdp: FSDPOptions, memory: MemoryOptions | AutoMemory
) -> tuple[FSDPOptions, MemoryOptions]:
    """The options of a ``parallelize`` call after an ``AutoMemory`` has chosen: (``fsdp``, ``MemoryOptions``).

    They are equal on every rank. Given MemoryOptions, both are returned as they are. Given an AutoMemory, the ZeRO stage and
    the memory options are those that it chooses, and the first rank logs the reason.

    Raises:
        ModelError: on every rank alike: nothing fits into the budget, the choice differs between ranks, or ``fsdp.zero`` is set
            beside an AutoMemory.
    """
    if isinstance(memory, MemoryOptions):
        return fsdp, memory
    chosen: list[tuple[Choice, str]] = []
    itemsize = (fsdp.dtype or next((parameter.dtype for parameter in model.parameters()), torch.float32)).itemsize

    def look() -> dict[str, str]:
        if mesh.coordinate.tensor > 1:
            raise ModelError("AutoMemory does not model tensor > 1; pass MemoryOptions and zero instead")
        if fsdp.zero:
            raise ModelError(f"AutoMemory chooses zero, which was given as {fsdp.zero}; leave zero out, or pass MemoryOptions")
        ranks, sharded = mesh.coordinate.sequence_ranks, fsdp != FSDPOptions(0)
        found = choose(model, memory, ranks=ranks, itemsize=itemsize, sharded=sharded, fsdp_ranks=fsdp.fsdp_ranks)
        chosen.append(found)
        return {"memory": found[1]}

    agree(mesh, look)
    ((choice, why),) = chosen
    if mesh.loss_group.rank() == 0:
        logging.getLogger(__name__).info("AutoMemory chooses %s", why)
    return replace(fsdp, zero=choice.zero), choice.memory


def _apply_options(adapter: ModelAdapter, memory: MemoryOptions) -> list[tuple[nn.Module, Any]]:
    """Tile, checkpoint and offload the model's modules as ``memory`` says, in place.

    Returns:
        Each changed module with the forward that its instance had before, or None if it had none of its own.
    """
    blocks = adapter.blocks()
    before = [(module, vars(module).get("forward")) for module in (*adapter.token_wise(), *blocks)]
    if memory.tile_tokens is not None:
        for module in adapter.token_wise():
            tiled(module, memory.tile_tokens)
    for block in blocks:
        checkpoint_block(block, memory.recompute)
    if memory.offload_activations:
        offload_activations(blocks[:-1])  # the last block's backward comes first
    return [(module, forward) for module, forward in before if vars(module).get("forward") is not forward]


def adapter_of(model: nn.Module, kernel: str | Kernel | KernelFunction = "auto") -> ModelAdapter:
    """The adapter of a model, which ``parallelize`` reads and changes it through."""
    return adapter_for(model, kernel) or DecoderAdapter(model, kernel)


def _name(kernel: str | Kernel | KernelFunction) -> str:
    """The text by which ranks compare their kernels: the string itself, or the name of the kernel object, function or class."""
    if isinstance(kernel, str):
        return kernel
    return str(getattr(kernel, "name", getattr(kernel, "__name__", type(kernel).__name__)))


def _refuse_options(job: _Job) -> None:
    """Raise the error of an option that model or mesh cannot have; otherwise return."""
    job.pipeline.refuse_without_stages(job.mesh.coordinate.pipeline)
    if any(parallel_state(module) is not None for module in job.model.modules()):
        raise ModelError("the model or a part of it is parallel already; call unparallelize(model) first, or build another one")
    refuse_options(job.fsdp, job.model, job.mesh)
    _refuse_another_device(job)
    if job.mesh.coordinate.tensor > 1 and job.memory.tile_tokens is not None:
        raise ModelError(
            f"tile_tokens={job.memory.tile_tokens} does not work with tensor={job.mesh.coordinate.tensor}, whose ranks "
            f"exchange all tokens of a feed-forward at once; leave it out (recompute and head_chunks work), or use tensor=1"
        )


def _refuse_another_device(job: _Job) -> None:
    """Raise ModelError for a parameter or buffer on another device than the mesh; FSDP2 moves those of zero=2 and 3 itself."""
    if job.fsdp.zero:
        return
    for name, held in (*job.model.named_parameters(), *job.model.named_buffers()):
        if held.device != job.mesh.device and not held.is_meta:
            raise ModelError(
                f"{name} is on {held.device} and the mesh on {job.mesh.device}; call parallelize(model.to(mesh.device), mesh)"
            )


def _prove(job: _Job, read_alike: bool) -> dict[str, str]:
    """Raise the error of an option or a model that cannot be made parallel; otherwise return what must be equal on all ranks.

    Returns:
        The hash of each parameter, as text by name; nothing if ``read_alike`` says that all ranks read their weights from the
        same source.
    """
    _refuse_options(job)
    job.adapter.prove(job.mesh, job.memory)
    if job.mesh.coordinate.pipeline > 1 and (tied := job.adapter.pipeline_plan().tied) is not None:
        refuse_hooks_of_copies([(tied[0], job.model.get_parameter(tied[0]))])
    if job.memory.tile_tokens is not None:
        _refuse_to_tile(job.adapter.token_wise(), job.memory.tile_tokens)
    return {} if read_alike else fingerprints(job.model)


def _facts_of_unread(job: _Job, unread: UnreadWeights) -> dict[str, str]:
    """Raise the error of an option that cannot be had; otherwise return what must be equal to read the same weights."""
    _refuse_options(job)
    return unread.facts(job.model)


def _refuse_to_tile(modules: Sequence[nn.Module], tile_tokens: int) -> None:
    if not modules:
        raise ModelError(
            f"tile_tokens={tile_tokens} finds no feed-forward or norm that takes one tensor and works token by token "
            f"(experts do not); leave it out, or change modules of your own by longspan.tiled(module, tile_tokens)"
        )
    for module in modules:
        refuse_to_tile(module, tile_tokens)


def _unread(model: nn.Module) -> UnreadWeights | None:
    """The object that will read or draw the weights of a model on the meta device; None for a model that has its weights."""
    waiting: UnreadWeights | None = vars(model).get(UNREAD)
    if waiting is None and hasattr(model, "initialize") and any(parameter.is_meta for parameter in model.parameters()):
        return SeededWeights()
    return waiting


def _read(job: _Job, unread: UnreadWeights) -> None:
    """Shard a model on the meta device if ``job`` asks for it, then let ``unread`` fill each rank's part with its weights."""
    vars(job.model).pop(UNREAD, None)
    # With tensor or pipeline > 1 each rank reads the whole model, then cuts it.
    if job.fsdp.zero and job.mesh.coordinate.tensor == job.mesh.coordinate.pipeline == 1:
        shard_parameters(job.model, job.adapter.blocks(), job.mesh, job.fsdp)
    unread.read_into(job.model, job.mesh.device)

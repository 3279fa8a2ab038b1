"""ZeRO stages 2 and 3 by PyTorch's FSDP2: each rank keeps a shard of parameters, gradients and optimizer states.

                        zero=2                                 zero=3
    forward of a block  all-gather its parameters              all-gather its parameters
    after it            keep them for the backward             free them; all-gather again in the backward
    backward            reduce-scatter: the mean of the ranks' gradients, in fp32        (both)
    optimizer           updates this rank's shards                                       (both)

Every rank's loss is the global loss, so FSDP2's mean over all ranks is the gradient of one device. Independent of attention.
Source: ZeRO, arXiv:1910.02054.
"""

import gc
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from longspan import _compat
from longspan.distributed.cpu_reduce_scatter import CPUReduceScatter
from longspan.distributed.deferred_hooks import refuse_hooks_of_shards, tensors_in
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.whole_tensors import load_whole_tensors
from longspan.errors import ModelError

UNSHARDABLE = {
    "torch.optim.Adafactor", "torch.optim.lbfgs.LBFGS", "torch.optim.rprop.Rprop", "transformers.optimization.Adafactor",
}  # fmt: skip
""""module.name" of optimizers whose step fails half-way on sharded parameters; tried with torch 2.13, transformers 5.23."""

HSDP = ("replicas", "shards")
"""The dims of a mesh over which each shard is replicated."""


@dataclass(frozen=True)
class FSDPOptions:
    """The options of ``parallelize`` that concern sharding, in one object.

    Attributes:
        zero: the ZeRO stage, 0 to 3; 0 shards nothing.
        dtype: the dtype in which gathered parameters compute, as FSDP2's mixed precision; None: the parameters' own.
        offload_parameters: keep the shards in host memory, and the optimizer step on the CPU.
        fsdp_ranks: shard over this many neighbouring ranks and replicate beyond them (HSDP); None: over all of them.
    """

    zero: int
    dtype: torch.dtype | None = None
    offload_parameters: bool = False
    fsdp_ranks: int | None = None


def refuse_options(options: FSDPOptions, model: nn.Module, mesh: ParallelMesh) -> None:
    """Raise ModelError if the sharding options are not legal for this model and mesh; otherwise return. Nothing is changed.

    Raises:
        ModelError: ``zero`` is not 0 to 3; another option is set although zero=0; ``fsdp_ranks`` does not divide the number of
            ranks; ``dtype`` is not a floating-point dtype; a parameter is quantised, so it cannot be sharded; an optimizer
            already holds the model's parameters.
    """
    if options.zero not in (0, 1, 2, 3):
        raise ModelError(
            f"zero={options.zero} is not supported; legal are 0 (every rank keeps all), 2 (each keeps a shard of gradients and "
            f"optimizer states) and 3 (of parameters too)"
        )
    if options.zero == 0:
        asked = {
            "dtype": options.dtype,
            "offload_parameters": options.offload_parameters or None,
            "fsdp_ranks": options.fsdp_ranks,
        }
        for name, value in asked.items():
            if value is not None:
                instead = "torch.autocast, or " if name == "dtype" else ""
                raise ModelError(f"{name}={value} is for sharded parameters; use {instead}zero=2 or zero=3")
        if mesh.coordinate.tensor > 1:
            refuse_hooks_of_shards(model.named_parameters(), to_be_sharded=True)
            _refuse_earlier_optimizers(model)
        return
    for name, parameter in model.named_parameters():
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise ModelError(
                f"zero={options.zero} would shard {name!r} of {parameter.dtype}, a quantised weight that its layer unpacks "
                f"whole; use zero=0"
            )
    refuse_hooks_of_shards(model.named_parameters(), to_be_sharded=True)
    if options.dtype is not None and not options.dtype.is_floating_point:
        raise ModelError(f"dtype={options.dtype} is nothing to compute in; use torch.bfloat16, or leave it out")
    degree = mesh.fsdp_group.size()
    if options.fsdp_ranks is not None and (options.fsdp_ranks < 1 or degree % options.fsdp_ranks):
        legal = ", ".join(str(ranks) for ranks in range(1, degree + 1) if degree % ranks == 0)
        raise ModelError(f"fsdp_ranks={options.fsdp_ranks} does not divide the {degree} ranks; use {legal}")
    _refuse_earlier_optimizers(model)


def shard_parameters(model: nn.Module, blocks: Sequence[nn.Module], mesh: ParallelMesh, options: FSDPOptions) -> None:
    """Shard the parameters of a model in place, with FSDP2: every block is one unit, the remaining parameters are another.

    A parameter that a rank does not use has a zero gradient there; ``model.load_state_dict`` takes whole tensors too.

    Args:
        model: the model; its parameters become DTensors.
        blocks: its layers, in the order in which they are computed.
        mesh: the parameters are sharded over ``mesh.fsdp_mesh``, or over ``options.fsdp_ranks`` ranks of it.
        options: sharding options with ``zero`` of 1, 2 or 3.
    """
    if options.zero == 1:
        logging.getLogger(__name__).info("zero=1 is what FSDP2 does with zero=2: gradients are sharded too")
    exact = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    policy = MixedPrecisionPolicy(options.dtype, None if exact else torch.float32)
    offload = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if options.offload_parameters else OffloadPolicy()
    device_mesh = _sharding_mesh(mesh, options.fsdp_ranks)
    for module in (*blocks, model):
        reshard = options.zero == 3 and module is not model  # the backward begins outside the blocks: keep these parameters
        unit: Any = fully_shard(
            module, mesh=device_mesh, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload
        )
        if mesh.device.type == "cpu":
            unit.set_custom_reduce_scatter(CPUReduceScatter())
    _compat.fsdp_fill_unused_gradients(model)
    model.register_forward_pre_hook(_refuse_after_a_failed_backward)
    shards = [(name, parameter, parameter.dtype) for name, parameter in model.named_parameters()]
    model.register_forward_pre_hook(partial(_refuse_changed_shards, shards), prepend=True)  # before FSDP2 gathers them
    model.register_forward_hook(partial(_look_again_in_the_backward, shards), prepend=True)  # before FSDP2's part of it begins
    vars(model)["zero_grad"] = partial(_zero_grad, model, shards)
    refuse_optimizers_at_first_step(model)
    load_whole_tensors(model)
    model.register_forward_hook(_reshard_without_a_backward)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the parameters of ``model`` (by ``shard_parameters``, or by another caller of ``fully_shard``)."""
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Context manager in which the parameters of ``model`` that are in no block are whole, if FSDP2 shards them.

    Every rank must enter it.
    """
    if isinstance(model, FSDPModule):
        model.unshard()
    try:
        yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()


def _refuse_after_a_failed_backward(model: Any, *_: object) -> None:
    """Forward pre-hook: raise ModelError if an earlier backward of the model ended with an exception.

    FSDP2's callback at the end of that backward did not run, and would not run in later ones either.
    """
    within_a_backward = _compat.backward_id() != -1  # a checkpoint around the model computes it again
    if not within_a_backward and _compat.fsdp_backward_is_unfinished(model):
        raise ModelError(
            "an earlier backward of this model failed: FSDP2 would no longer form the mean of the gradients, and an optimizer "
            "would train nothing; build the model again and load a checkpoint, or use zero=0"
        )


Shards = Sequence[tuple[str, nn.Parameter, torch.dtype]]
"""The name of each sharded parameter, the parameter itself, and its dtype when it was sharded."""


def _zero_grad(model: nn.Module, shards: Shards, set_to_none: bool = True) -> None:
    """``model.zero_grad`` that clears the gradients of the shards too.

    Between a forward and its backward ``model.parameters()`` are those that FSDP2 has gathered, so that the class's own would
    keep the gradients of earlier steps.
    """
    type(model).zero_grad(model, set_to_none)
    for _, shard, _ in shards:
        if set_to_none:
            shard.grad = None
        elif shard.grad is not None:
            shard.grad.zero_()


def _refuse_changed_shards(shards: Shards, model: nn.Module, *_: object) -> None:
    """Forward pre-hook: raise ModelError for a parameter that has got a hook on its gradient, or another dtype than FSDP2 has
    made its buffers for."""
    refuse_gradient_hooks(model, [(name, parameter) for name, parameter, _ in shards])
    for name, parameter, dtype in shards:
        if parameter.dtype != dtype:
            raise ModelError(
                f"parameter {name!r} was {dtype} when it was sharded and is {parameter.dtype} now; convert the model before "
                f"parallelize, or let blocks compute in another dtype by parallelize(dtype=...) or torch.autocast"
            )


def _look_again_in_the_backward(shards: Shards, model: nn.Module, _: object, output: Any) -> None:
    """Forward hook: the backward first looks for hooks on gradients that were registered since the forward."""
    named = [(name, parameter) for name, parameter, _ in shards]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        for each in tensors_in(output):
            if each.requires_grad:
                each.register_hook(lambda _: refuse_gradient_hooks(model, named))


@partial(torch.compiler.disable, reason="it reads the hooks of each parameter, and would be compiled for each shape")
def refuse_gradient_hooks(model: nn.Module, shards: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise ModelError for a hook on the gradient of a shard, or of the whole parameter that FSDP2 gathers from it.

    Args:
        model: a model that FSDP2 shards, or a module without shards.
        shards: its parameters with their names.
    """
    refuse_hooks_of_shards(shards)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            refuse_hooks_of_shards(_compat.fsdp_gathered_parameters(part), to_be_sharded=True)


def _reshard_without_a_backward(model: nn.Module, *_: object) -> None:
    """Forward hook: when gradients are disabled, reshard all FSDP modules of the model.

    FSDP2 keeps some parameters gathered until the backward, and after a forward under ``no_grad`` there is none. An optimizer
    that is built while parameters are gathered would hold the gathered copies.
    """
    if not torch.is_grad_enabled():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _sharding_mesh(mesh: ParallelMesh, ranks: int | None) -> DeviceMesh:
    """The DeviceMesh for ``fully_shard``: ``mesh.fsdp_mesh`` if ``ranks`` is None or all of its ranks.

    Else a mesh (replicas, shards) of the fsdp set, with shards over ``ranks`` neighbours in it, each shard replicated beyond
    them (HSDP). It is cut out of a mesh of all ranks, because each stage and each tensor rank has an fsdp set of its own.
    """
    if ranks is None or ranks == mesh.fsdp_group.size():
        return mesh.fsdp_mesh
    around = mesh.coordinate
    sizes = {"stages": around.pipeline, "replicas": mesh.fsdp_group.size() // ranks, "shards": ranks, "parts": around.tensor}
    kept = {name: size for name, size in sizes.items() if size > 1 or name in HSDP}
    return init_device_mesh(mesh.device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))[HSDP]


def _refuse_earlier_optimizers(model: nn.Module) -> None:
    """Raise ModelError if an optimizer in this process holds parameters of ``model``.

    Sharding would replace the parameters by new ones, and the optimizer would update the old ones.
    """
    for optimizer in _optimizers_of(model):
        raise ModelError(
            f"{type(optimizer).__name__} was built before the parameters are sharded, and would train nothing; call "
            f"parallelize first, then build the optimizer"
        )


def refuse_optimizers_at_first_step(model: nn.Module) -> None:
    """Make the first forward of ``model`` with gradients raise ModelError for an optimizer that cannot update sharded
    parameters.

    Such an optimizer is one of a class in ``UNSHARDABLE`` that holds parameters of the model. A forward pre-hook looks for it
    once, then removes itself: by that time the optimizer has been built.
    """

    def refuse(module: nn.Module, *_: object) -> None:
        if not torch.is_grad_enabled():
            return
        handle.remove()
        for optimizer in _optimizers_of(module):
            kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(optimizer).__mro__}
            if kinds & UNSHARDABLE:
                raise ModelError(
                    f"{type(optimizer).__name__} cannot update sharded parameters (PyTorch's DTensor lacks its operators); use "
                    f"AdamW, SGD or another optimizer that works element by element, or zero=0"
                )

    handle = model.register_forward_pre_hook(refuse)


def _optimizers_of(model: nn.Module) -> Iterator[torch.optim.Optimizer]:
    """Yield the optimizers of this process that hold a parameter of ``model``; found among all Python objects."""
    mine = {id(parameter) for parameter in model.parameters()}
    for found in gc.get_objects():
        if issubclass(type(found), torch.optim.Optimizer):
            held = (parameter for group in found.param_groups for parameter in group["params"])
            if any(id(parameter) in mine for parameter in held):
                yield found

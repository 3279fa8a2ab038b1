"""Each rank keeps a share of parameters, gradients and optimizer states: ZeRO, by PyTorch's FSDP2. Knows nothing of attention.

                     zero=2                                    zero=3
    a block's turn   gather its parameters                     gather its parameters
    after it         keep them for the backward                let them go, gather again in the backward
    its backward     mean of the ranks' gradients, to each its share, in fp32            (both)
    the optimizer    my shares alone                                                     (both)

Every rank's loss is the global one, so FSDP2's mean over all ranks is the gradient of one device.
Source: ZeRO, arXiv:1910.02054.
"""

import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from longspan import _compat
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError

UNSHARDABLE = {
    "torch.optim.Adafactor", "torch.optim.lbfgs.LBFGS", "torch.optim.rprop.Rprop", "transformers.optimization.Adafactor",
}  # fmt: skip
"""Optimizers whose step fails half-way on sharded parameters, by module and name: tried with torch 2.13, transformers 5.23."""


@dataclass(frozen=True)
class FSDPOptions:
    """The arguments of ``parallelize`` that FSDP2 implements; see there."""

    zero: int
    dtype: torch.dtype | None = None
    offload_parameters: bool = False
    fsdp_ranks: int | None = None


def refuse_options(options: FSDPOptions, model: nn.Module, mesh: ParallelMesh) -> None:
    """Raise ModelError for shares that FSDP2 or this mesh cannot give, and for an optimizer that would train nothing."""
    if options.zero not in (0, 1, 2, 3):
        raise ModelError(
            f"zero={options.zero} is not supported; legal are 0 (every rank keeps all), 2 (a share of gradients and optimizer "
            f"states) and 3 (of parameters too)"
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
        return
    for name, parameter in model.named_parameters():
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise ModelError(
                f"zero={options.zero} would shard {name!r} of {parameter.dtype}, a quantised weight that its layer unpacks "
                f"whole; use zero=0"
            )
    if options.dtype is not None and not options.dtype.is_floating_point:
        raise ModelError(f"dtype={options.dtype} is nothing to compute in; use torch.bfloat16, or leave it out")
    degree = mesh.fsdp_group.size()
    if options.fsdp_ranks is not None and (options.fsdp_ranks < 1 or degree % options.fsdp_ranks):
        legal = ", ".join(str(ranks) for ranks in range(1, degree + 1) if degree % ranks == 0)
        raise ModelError(f"fsdp_ranks={options.fsdp_ranks} does not divide the {degree} ranks; use {legal}")
    _refuse_earlier_optimizers(model)


def shard_parameters(model: nn.Module, blocks: Sequence[nn.Module], mesh: ParallelMesh, options: FSDPOptions) -> None:
    """Shard every block, then what is left, in place. A parameter that a rank does not use counts as zero there."""
    if options.zero == 1:
        logging.getLogger(__name__).info("zero=1 is what FSDP2 does with zero=2: gradients are sharded too")
    exact = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    policy = MixedPrecisionPolicy(options.dtype, None if exact else torch.float32)
    offload = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if options.offload_parameters else OffloadPolicy()
    where = _where(mesh, options.fsdp_ranks)
    for module in (*blocks, model):
        again = options.zero == 3 and module is not model  # what is outside the blocks begins the backward: it stays
        fully_shard(module, mesh=where, reshard_after_forward=again, mp_policy=policy, offload_policy=offload)
    assert isinstance(model, FSDPModule)
    model.set_reduce_scatter_unused_params(True)
    model.register_forward_pre_hook(_refuse_after_a_failed_backward)
    _refuse_optimizers_at_first_step(model)
    model.register_forward_hook(_reshard_without_a_backward)


def _refuse_after_a_failed_backward(model: Any, *_: object) -> None:
    """FSDP2 ends a backward by a callback. One that an exception kept from it is never ended, nor any after it."""
    within_a_backward = _compat.backward_id() != -1  # a checkpoint around the model computes it again
    if not within_a_backward and _compat.fsdp_backward_is_unfinished(model):
        raise ModelError(
            "an earlier backward of this model failed: FSDP2 would no longer form the mean of the gradients, and an optimizer "
            "would train nothing; build the model anew and load a checkpoint, or use zero=0"
        )


def _reshard_without_a_backward(model: nn.Module, *_: object) -> None:
    """No backward will: gathered parameters would go stale, and an optimizer that is built now would take them."""
    if not torch.is_grad_enabled():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _where(mesh: ParallelMesh, ranks: int | None) -> DeviceMesh:
    """Over all ranks, or over each ``ranks`` neighbours with a copy in every such group."""
    if ranks is None or ranks == mesh.fsdp_group.size():
        return mesh.fsdp_mesh
    return init_device_mesh(mesh.device.type, (mesh.fsdp_group.size() // ranks, ranks), mesh_dim_names=("copies", "shares"))


def _refuse_earlier_optimizers(model: nn.Module) -> None:
    """Sharding puts new parameters in the place of the old, which an optimizer would go on to update, to no effect."""
    for optimizer in _optimizers_of(model):
        raise ModelError(
            f"{type(optimizer).__name__} was built before the parameters are sharded, and would train nothing; call "
            f"parallelize first, then build the optimizer"
        )


def _refuse_optimizers_at_first_step(model: nn.Module) -> None:
    """Refuse, at the first forward with gradients, an optimizer that would fail when it has updated some of the parameters."""

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
    """The optimizers of this process that hold a parameter of ``model``."""
    mine = {id(parameter) for parameter in model.parameters()}
    for found in gc.get_objects():
        if issubclass(type(found), torch.optim.Optimizer):
            held = (parameter for group in found.param_groups for parameter in group["params"])
            if any(id(parameter) in mine for parameter in held):
                yield found

"""The gradient norm over shards, copies and pipeline stages, and clipping to it.

    norm = sqrt(sum over elements of grad^2)      each element once: shards are summed over the axes that they are sharded over,
                                                  a replicated gradient counts once, a pipeline's stages are summed

Formed in fp64, because torch's fp32 norm on a CPU can be 1e-4 too low. Independent of what the gradients are of.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from longspan.errors import ModelError

STAGES = "_longspan_stages"
"""The attribute of a model that is split into pipeline stages; it holds its ``StageNorm``."""
OF_STAGE = "_longspan_of_stage"
"""The attribute, True, of the parameters of a pipeline stage."""


@torch.no_grad()
def grad_norm(parameters: Iterable[Tensor]) -> Float[Tensor, ""]:
    """The 2-norm of all gradients together, over all shards of sharded parameters. Every rank must call it.

    Args:
        parameters: parameters with whole gradients, or with gradients (DTensor) sharded over axes of a mesh. Those without a
            gradient are skipped; if none has one, the norm is 0.

    Returns:
        An fp64 scalar, equal on every rank. It equals ``torch.nn.utils.get_total_norm`` of one device's gradients in fp64;
        torch's fp32 norm on a CPU can be 1e-4 too low.

    Raises:
        ModelError: a gradient is a partial sum.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    held_by_axes: dict[tuple[tuple[DeviceMesh, int], ...], list[Tensor]] = {}
    for grad in grads:
        held_by_axes.setdefault(_sharded_axes(grad), []).append(local_part(grad))
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device)
    for axes, held in held_by_axes.items():
        part = _square(held)
        for mesh, axis in axes:
            dist.all_reduce(part, group=mesh.get_group(axis))
        total = total + part
    return total.sqrt()


@dataclass(frozen=True)
class StageNorm:
    """The gradient norm of a model whose layers are on several pipeline stages; ``clip_grad_norm_`` finds it on the model.

    Attributes:
        group: the ranks of all stages that differ from this rank in the pipeline axis only.
        copy: the name of a parameter of this stage (the copy of a tied weight) that another stage counts; None: there is none.
    """

    group: dist.ProcessGroup
    copy: str | None

    def norm(self, model: nn.Module) -> Float[Tensor, ""]:
        """The 2-norm of the gradients of all stages together, an fp64 scalar. ``model`` is this rank's stages.

        It is collective: every rank of ``group`` must call it.
        """
        square = grad_norm(p for name, p in model.named_parameters() if name != self.copy).square()
        device = next(model.parameters()).device
        square = square.to(device)
        dist.all_reduce(square, group=self.group)
        return square.sqrt()


def mark_stage(model: nn.Module) -> None:
    """Set the attribute ``OF_STAGE`` on each parameter of ``model``, a pipeline stage.

    ``clip_grad_norm_`` given these parameters in place of the model then refuses, because it would miss the other stages.
    """
    for parameter in model.parameters():
        setattr(parameter, OF_STAGE, True)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module | Iterable[Tensor], max_norm: float) -> Float[Tensor, ""]:
    """Scale all gradients in place so that their norm over all ranks is at most ``max_norm``. Every rank must call it.

    Args:
        model: a module, or its parameters (an iterable of tensors, or one); their gradients may be sharded. Parameters
            without a gradient are skipped. On a pipeline pass the module: the norm is over the parameters of all stages.
        max_norm: the largest 2-norm of all gradients together.

    Returns:
        The norm before scaling, fp64, equal on every rank; where it is NaN, all gradients are NaN afterwards. It is exact
        against fp64 arithmetic, also where one device's ``torch.nn.utils.clip_grad_norm_`` is not: torch's fp32 norm on a CPU
        can be 1e-4 too low for large gradients.

    Raises:
        ModelError: the parameters of a pipeline stage in place of the model, or a gradient that is a partial sum.
    """
    members: list[Tensor]
    if isinstance(model, nn.Module):
        members, stages = list(model.parameters()), vars(model).get(STAGES)
        before = grad_norm(members) if stages is None else stages.norm(model)
    else:
        members = [model] if isinstance(model, Tensor) else list(model)
        if any(hasattr(parameter, OF_STAGE) for parameter in members):
            raise ModelError(
                "clip_grad_norm_ was given the parameters of one pipeline stage, whose norm is not that of the model; pass the "
                "model: clip_grad_norm_(model, max_norm)"
            )
        before = grad_norm(members)
    grads = [local_part(parameter.grad) for parameter in members if parameter.grad is not None]
    scale = (max_norm / (before + 1e-6)).clamp(max=1.0)  # NaN stays NaN
    if before.device.type == "cpu" and scale == 1.0:  # an accelerator would be waited for
        return before
    for grad in grads:
        grad.mul_(scale)
    return before


def local_part(x: Tensor) -> Tensor:
    """The shard of ``x`` that this rank holds, detached, if ``x`` is a DTensor; ``x`` itself otherwise. It shares memory
    with ``x``."""
    if not isinstance(x, DTensor):
        return x
    with torch.no_grad():
        return x.to_local()


def _square(held: list[Tensor]) -> Tensor:
    """The sum of the squares of all elements of the tensors in ``held``, which are on one device; an fp64 scalar on it."""
    return torch.stack(list(map(_square_on_cpu, held))).sum() if held[0].device.type == "cpu" else _square_on_gpu(held)


def _square_on_cpu(local: Tensor) -> Tensor:
    """The sum of the squares of the elements of one CPU tensor, an fp64 scalar."""
    # in fp64, in pieces: an fp32 sum of 50 million squares is 0.4% off, and one fp64 copy has twice the size of the gradient
    pieces = torch.split(local.flatten(), 2**20)
    return torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]).square().sum()


def _square_on_gpu(held: list[Tensor]) -> Tensor:
    """The sum of the squares of all elements of tensors on an accelerator, an fp64 scalar."""
    # one launch for many tensors, in fp32: a GPU sums in trees, which keeps that exact to its rounding
    norms = [get_total_norm(wide)] if (wide := [x for x in held if x.dtype.itemsize > 2]) else []
    norms += [torch.linalg.vector_norm(x, dtype=torch.float32) for x in held if x.dtype.itemsize == 2]
    return torch.stack([norm.double().square() for norm in norms]).sum()


def _sharded_axes(grad: Tensor) -> tuple[tuple[DeviceMesh, int], ...]:
    """(DeviceMesh, index of a dim of it) for each mesh dim over which ``grad`` is sharded; () if this rank has the whole
    gradient.

    Raises:
        ModelError: the gradient is a partial sum.
    """
    if not isinstance(grad, DTensor):
        return ()
    if any(placement.is_partial() for placement in grad.placements):
        raise ModelError(f"the norm of a gradient placed as {grad.placements}, a partial sum, is not defined; redistribute it")
    return tuple((grad.device_mesh, axis) for axis, placement in enumerate(grad.placements) if not placement.is_replicate())

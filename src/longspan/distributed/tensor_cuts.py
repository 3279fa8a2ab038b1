"""How a parameter is cut over the tensor ranks, and the plain tensor with which a rank computes.

    stored      DTensor on the tensor mesh, Shard(d)   where each rank computes with one piece of equal size
                DTensor on the tensor mesh, Replicate  everything else: norms, shared key/value heads, uneven vocabularies
    computed    own_part       this rank's pieces, a plain tensor
                every_part     all rows, gathered where they are stored in pieces

The gradient of a parameter is finished here, at its use: every rank starts backward from the same global loss and every
collective has its true adjoint, so the gradient of an element is the sum over the ranks that hold a copy, divided by the number
of ranks of the loss. A cut parameter's gradient is divided by the tensor degree; a replicated one's is the mean over the tensor
ranks. The mean over the other ranks is formed by FSDP2, or by grad_sync.py. Independent of modules and models.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from longspan.distributed.collectives import all_gather
from longspan.distributed.layout import consecutive, split
from longspan.distributed.mesh import ParallelMesh


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a parameter is divided over the tensor ranks along ``dim``: an entry of ``TensorPlan.cuts``.

    Attributes:
        dim: the dim that is cut.
        units: indivisible parts of that dim: heads, or single rows.
        packed: matrices that lie one after another in that dim and are cut one by one, as gate and up in one weight.
        replicable: whether one unit may be held by several ranks, as a key/value head may.
        uneven: whether ranks may compute with unequally many units, as with rows of a vocabulary.
    """

    dim: int
    units: int
    packed: int = 1
    replicable: bool = False
    uneven: bool = False

    def is_even(self, ranks: int) -> bool:
        """Whether each of ``ranks`` ranks computes with one contiguous piece of its own, so that it stores only that
        (``Shard``)."""
        return self.packed == 1 and self.units % ranks == 0

    def divides(self, ranks: int) -> bool:
        """Whether ``ranks`` ranks get equally many units, or each unit is held by equally many ranks where that is allowed, or
        each rank gets a unit where they may be unequally many."""
        fits = self.uneven and ranks <= self.units
        return fits or self.units % ranks == 0 or (self.replicable and ranks % self.units == 0)

    def pieces(self, size: int, ranks: int, rank: int) -> tuple[range, ...]:
        """The indices in ``dim`` with which rank ``rank`` of ``ranks`` computes: one range for each packed matrix.

        With fewer units than ranks, ranks / units neighbouring ranks compute with the same unit. Uneven parts differ by one
        unit at most, and the larger ones come first.

        Args:
            size: the size of the whole parameter in ``dim``.
            ranks: the tensor degree.
            rank: the tensor rank.
        """
        unit, whole = size // self.packed // self.units, size // self.packed
        if self.units % ranks == 0:
            first, count = rank * (self.units // ranks), self.units // ranks
        elif self.uneven:
            part = consecutive(split(self.units, ranks))[rank]
            first, count = part.start, len(part)
        else:
            first, count = rank * self.units // ranks, 1
        start = first * unit
        return tuple(range(part * whole + start, part * whole + start + count * unit) for part in range(self.packed))


def own_part(parameter: Tensor, cut: Cut | None, mesh: ParallelMesh) -> Tensor:
    """The plain tensor with which this rank computes: its pieces of a cut parameter, the whole of a replicated one.

    In the backward its gradient becomes that of all tensor ranks.

    Args:
        parameter: a DTensor on the tensor axis of ``mesh``.
        cut: how it is divided; None: it is replicated.
        mesh: the ranks.
    """
    assert isinstance(parameter, DTensor)
    group, (placement,) = mesh.tensor_group, parameter.placements
    held = parameter.to_local(grad_placements=[placement])
    finished: Tensor = _FinishGradient.apply(  # type: ignore[no-untyped-call]
        held, None if placement.is_replicate() else group.size(), group
    )
    if cut is None or placement.is_shard():
        return finished
    pieces = cut.pieces(finished.shape[cut.dim], group.size(), group.rank())
    return torch.cat([finished.narrow(cut.dim, piece.start, len(piece)) for piece in pieces], cut.dim)


def every_part(parameter: Tensor, cut: Cut, mesh: ParallelMesh) -> Tensor:
    """The whole of a parameter that ``cut`` divides into one piece per rank, on every rank, as a plain tensor.

    What is stored in pieces is gathered through the Transport, and its gradient reduce-scattered. Every tensor rank calls it.
    """
    assert isinstance(parameter, DTensor)
    (placement,) = parameter.placements
    if placement.is_replicate():
        return own_part(parameter, None, mesh)
    size = parameter.shape[cut.dim] // mesh.tensor_group.size()
    held = own_part(parameter, cut, mesh)
    return all_gather(held, mesh.tensor_group, mesh.transport, cut.dim, [size] * mesh.tensor_group.size()).contiguous()


class _FinishGradient(torch.autograd.Function):
    """Autograd function: the forward returns its input; the backward makes this rank's gradient that of all tensor ranks.

    The gradient of a cut parameter is divided by ``degree``, the number of tensor ranks. With ``degree`` None (a replicated
    parameter) it is the mean over ``group``, formed in fp32 (fp64 for fp64).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, degree: int | None, group: dist.ProcessGroup) -> Tensor:
        ctx.degree, ctx.group = degree, group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.degree is not None:
            return grad / ctx.degree, None, None
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.div_(ctx.group.size()).to(grad.dtype), None, None

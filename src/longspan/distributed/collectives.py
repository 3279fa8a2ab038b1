"""The few collectives that longspan needs, each with its true adjoint, and the Transport that a user can replace.

    all_reduce_sum     forward: the sum over ranks         backward: the sum over ranks
    all_gather         forward: every rank's piece         backward: my piece of the sum over ranks
    Transport          one all-to-all with split sizes: the exchange, the ring and ``all_gather`` all go through it

Every rank computes the same global loss, so the adjoint of a sum over ranks is the sum of what the ranks send back, not a
copy of what one sends: anything else is off by a factor that depends on the layout. Knows groups, not meshes or models.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Num, Shaped
from torch import Tensor

from longspan import _compat
from longspan.distributed.traffic import Traffic
from longspan.tuning import SCRATCH_BYTES


@runtime_checkable
class Arrival(Protocol):
    """What is on its way: ``wait()`` returns the received elements, and may be called once."""

    def wait(self) -> Shaped[Tensor, " received"]: ...


@runtime_checkable
class Transport(Protocol):
    """Moves bytes between the ranks of a group. Replace it to use NVLink or symmetric-memory libraries.

    ``send`` is flat and contiguous; rank p gets the next ``send_splits[p]`` elements of it, and what arrives holds
    ``recv_splits[p]`` elements from each rank p, in rank order. The call starts the exchange and may return before it is
    done, so that a kernel can work meanwhile. It is called from the backward pass too.
    """

    def all_to_all(
        self,
        send: Shaped[Tensor, " sent"],
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Arrival: ...


class TorchTransport:
    """PyTorch's own ``all_to_all_single``: gloo, NCCL, or whatever backend the group has."""

    def all_to_all(
        self,
        send: Shaped[Tensor, " sent"],
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Arrival:
        received = send.new_empty(sum(recv_splits))
        work = dist.all_to_all_single(received, send, list(recv_splits), list(send_splits), group=group, async_op=True)
        return _Receiving(send, received, work)


class Scratch:
    """Memory that an exchange packs into and no longer needs once it is done: kept for the next one.

    On a CPU touching fresh pages costs more than the copy into them (four times at 256 MiB); a GPU's caching allocator
    would keep the block all the same. It holds as much as the largest exchange sends, and no more than ``SCRATCH_BYTES``:
    what is larger would lie idle in the way of the kernels, whose work on so many tokens hides what pages cost.
    """

    def __init__(self) -> None:
        self._free: dict[torch.device, Tensor] = {}

    @contextmanager
    def lend(self, elements: int, like: Tensor) -> Iterator[Shaped[Tensor, " elements"]]:
        """A flat buffer of ``elements`` of the dtype and device of ``like``, to be given back when the block ends."""
        needed = elements * like.element_size()
        buffer = self._free.pop(like.device, None)
        if buffer is None or buffer.numel() < needed:
            buffer = torch.empty(needed, dtype=torch.uint8, device=like.device)
        yield buffer[:needed].view(like.dtype)
        if buffer.numel() <= SCRATCH_BYTES:
            self._free[like.device] = buffer


class _Receiving:
    def __init__(self, send: Tensor, received: Tensor, work: dist.Work) -> None:
        self.send, self.received, self.work = send, received, work  # send must live until the work is done

    def wait(self) -> Tensor:
        self.work.wait()
        return self.received


class CountingTransport:
    """Counts what passes through another transport: ``traffic`` is the collectives and the bytes sent to *other* ranks."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.traffic = Traffic()

    def all_to_all(
        self,
        send: Shaped[Tensor, " sent"],
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Arrival:
        others = sum(send_splits) - send_splits[group.rank()]
        self.traffic = self.traffic + Traffic(1, others * send.element_size())
        return self.inner.all_to_all(send, send_splits, recv_splits, group)


def all_reduce_sum(x: Num[Tensor, "*shape"], group: dist.ProcessGroup) -> Num[Tensor, "*shape"]:
    """The sum of ``x`` over the ranks of ``group``, on every rank. Its adjoint is itself."""
    if group.size() == 1:
        return x
    total: Num[Tensor, "*shape"] = _compat.functional_all_reduce(x, group)
    return total


def all_gather(
    x: Num[Tensor, "*shape"], group: dist.ProcessGroup, transport: Transport, dim: int, sizes: Sequence[int]
) -> Num[Tensor, "*whole"]:
    """Every rank's ``x`` side by side along ``dim``, in rank order; rank p brings ``sizes[p]`` there.

    Equals ``torch.cat([x of rank 0, x of rank 1, ...], dim)``. Adjoint: my piece of the gradients of all ranks, summed.
    """
    if group.size() == 1:
        return x
    gathered: Num[Tensor, "*whole"] = _AllGather.apply(  # type: ignore[no-untyped-call]
        x, group, transport, dim, tuple(sizes)
    )
    return gathered


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, transport: Transport, dim: int, sizes: tuple[int, ...]
    ) -> Tensor:
        ctx.group, ctx.transport, ctx.dim, ctx.sizes = group, transport, dim, sizes
        first = x.movedim(dim, 0)
        row = first.shape[1:].numel()
        send = first.expand(group.size(), *first.shape).reshape(-1).contiguous()
        received = transport.all_to_all(send, [first.numel()] * group.size(), [size * row for size in sizes], group).wait()
        return received.view(sum(sizes), *first.shape[1:]).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        first = grad.movedim(ctx.dim, 0)
        mine = ctx.sizes[ctx.group.rank()]
        row = first.shape[1:].numel()
        received = ctx.transport.all_to_all(
            first.reshape(-1).contiguous(), [size * row for size in ctx.sizes], [mine * row] * ctx.group.size(), ctx.group
        ).wait()
        pieces = received.view(ctx.group.size(), mine, *first.shape[1:])
        return pieces.sum(0).movedim(0, ctx.dim), None, None, None, None

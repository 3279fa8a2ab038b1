"""Differentiable collectives, and Transport, the all-to-all that a user can replace.

    all_reduce_sum     forward: sum over ranks                        backward: sum of the gradients over ranks
    all_gather         forward: concatenate the ranks' tensors        backward: this rank's piece of the summed gradients
    reduce_scatter     forward: this rank's piece of the summed       backward: concatenate the ranks' gradients
                       tensors
    Transport          one all-to-all with split sizes; Ulysses, the ring, ``all_gather`` and ``reduce_scatter`` use it

Every rank computes the same global loss, so each collective has its true adjoint: that of a sum over ranks is a sum over
ranks. Anything else gives gradients that are off by a factor which depends on the layout. Independent of meshes and models.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Num, Shaped
from torch import Tensor

from longspan import _compat
from longspan.distributed.scratch import Scratch
from longspan.distributed.traffic import Traffic


@runtime_checkable
class Arrival(Protocol):
    """The handle of an all-to-all that has been started and may still be running: what ``Transport.all_to_all`` returns."""

    def wait(self) -> Shaped[Tensor, " received"]:
        """Wait until the all-to-all has ended; return the received elements, flat and in rank order. The caller calls it
        once."""
        ...


@runtime_checkable
class Transport(Protocol):
    """The protocol of an all-to-all, which Ulysses, the ring, ``all_gather`` and ``reduce_scatter`` call.

    The default is ``TorchTransport``. Pass another one to ``ParallelMesh(transport=)``, for example over symmetric memory.
    """

    def all_to_all(
        self,
        send: Shaped[Tensor, " sent"],
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Arrival:
        """Start an all-to-all; it may return before the exchange ends, so that a kernel can run meanwhile.

        It is called in the forward and in the backward pass, in the same order on every rank.

        Args:
            send: a flat contiguous tensor; rank p gets the next ``send_splits[p]`` elements of it.
            send_splits: elements for each rank, in rank order.
            recv_splits: elements from each rank, in rank order.
            group: the ranks.

        Returns:
            A handle whose ``wait`` returns the received elements, flat and in rank order.
        """
        ...


class TorchTransport:
    """The default ``Transport`` of a mesh: PyTorch's ``all_to_all_single`` on the backend of the group (gloo, NCCL, ...).

    On a CPU it receives into memory that it used before, once no tensor refers to it any more.

    Attributes:
        memory: what it keeps for that.
    """

    def __init__(self) -> None:
        self.memory = Scratch()

    def all_to_all(
        self,
        send: Shaped[Tensor, " sent"],
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Arrival:
        """Start ``all_to_all_single`` on ``group`` and return at once.

        Args:
            send: a flat contiguous tensor; rank p gets the next ``send_splits[p]`` elements of it.
            send_splits, recv_splits: elements for each rank, and from each rank, in rank order.
            group: the ranks.

        Returns:
            A handle whose ``wait`` returns the received elements, flat and in rank order.
        """
        return self.all_to_all_into(self.memory.take(sum(recv_splits), send), send, send_splits, recv_splits, group)

    def all_to_all_into(
        self,
        received: Shaped[Tensor, " received"],
        send: Shaped[Tensor, " sent"],
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Arrival:
        """As ``all_to_all``, into ``received``, a flat contiguous tensor that the caller gives."""
        work = dist.all_to_all_single(received, send, list(recv_splits), list(send_splits), group=group, async_op=True)
        return _Receiving(send, received, work)


def all_to_all_into(
    transport: Transport,
    received: Shaped[Tensor, " received"],
    send: Shaped[Tensor, " sent"],
    send_splits: Sequence[int],
    recv_splits: Sequence[int],
    *,
    group: dist.ProcessGroup,
) -> Callable[[], object]:
    """Start an all-to-all into memory that the caller gives.

    A transport may have a method ``all_to_all_into(received, send, send_splits, recv_splits, group) -> Arrival`` for it; what
    any other receives is copied.

    Args:
        transport: the all-to-all that is used.
        received: a flat contiguous tensor of as many elements as ``recv_splits`` in sum.
        send, send_splits, recv_splits, group: as in ``Transport.all_to_all``.

    Returns:
        A function, to be called once, that waits until ``received`` is written.
    """
    into = getattr(transport, "all_to_all_into", None)
    if into is not None:
        wait: Callable[[], object] = into(received, send, send_splits, recv_splits, group).wait
        return wait
    arrival = transport.all_to_all(send, send_splits, recv_splits, group)
    return lambda: received.copy_(arrival.wait())


class _Receiving:
    """The ``Arrival`` of ``TorchTransport``: the tensor that is being received, and PyTorch's handle of the running
    collective."""

    def __init__(self, send: Tensor, received: Tensor, work: dist.Work) -> None:
        self.send, self.received, self.work = send, received, work  # send must live until the work is done

    def wait(self) -> Tensor:
        self.work.wait()
        return self.received


class _Into:
    """An ``Arrival`` in memory that the caller gave."""

    def __init__(self, received: Tensor, wait: Callable[[], object]) -> None:
        self.received, self._wait = received, wait

    def wait(self) -> Tensor:
        self._wait()
        return self.received


class CountingTransport:
    """A transport for tests and measurements: it passes every call on to ``inner`` and counts what this rank sends.

    Attributes:
        inner: the transport that does the exchange.
        traffic: the number of all-to-alls so far, and the bytes that this rank sent to *other* ranks.
    """

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.traffic = Traffic()
        self._by_group: dict[str, Traffic] = {}

    def sent_over(self, group: dist.ProcessGroup) -> Traffic:
        """The part of ``traffic`` that went over ``group``: collectives and bytes that this rank has sent so far; zero if
        none."""
        return self._by_group.get(group.group_name, Traffic())

    def count(self, group: dist.ProcessGroup, sent: Traffic) -> None:
        """Add ``sent``, which went over ``group`` without a transport: messages between pipeline stages."""
        self.traffic, self._by_group[group.group_name] = self.traffic + sent, self.sent_over(group) + sent

    def all_to_all(
        self,
        send: Shaped[Tensor, " sent"],
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Arrival:
        """Count the call and its bytes, then let ``inner`` do it; arguments and result are those of
        ``Transport.all_to_all``."""
        self._count(send, send_splits, group)
        return self.inner.all_to_all(send, send_splits, recv_splits, group)

    def all_to_all_into(
        self,
        received: Shaped[Tensor, " received"],
        send: Shaped[Tensor, " sent"],
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Arrival:
        """Count what ``send`` holds for other ranks, and pass the call on to ``inner``."""
        self._count(send, send_splits, group)
        return _Into(received, all_to_all_into(self.inner, received, send, send_splits, recv_splits, group=group))

    def _count(self, send: Tensor, send_splits: Sequence[int], group: dist.ProcessGroup) -> None:
        others = sum(send_splits) - send_splits[group.rank()]
        self.count(group, Traffic(1, others * send.element_size()))


def all_reduce_sum(x: Num[Tensor, "*shape"], group: dist.ProcessGroup) -> Num[Tensor, "*shape"]:
    """The sum of ``x`` over the ranks of ``group``, as a new tensor on every rank. Every rank must call it.

    Differentiable: the gradient of a rank's ``x`` is the sum over the ranks of the gradients of the result.
    """
    if group.size() == 1:
        return x
    total: Num[Tensor, "*shape"] = _compat.functional_all_reduce(x, group)
    return total


def all_gather(
    x: Num[Tensor, "*shape"], group: dist.ProcessGroup, transport: Transport, dim: int, sizes: Sequence[int]
) -> Num[Tensor, "*whole"]:
    """Concatenate the ranks' tensors: ``torch.cat([x of rank 0, x of rank 1, ...], dim)`` on every rank.

    Differentiable: the gradient of a rank's ``x`` is the sum over ranks of the gradients of its piece.

    Args:
        x: this rank's tensor; the ranks' shapes may differ in ``dim`` only.
        group: the ranks, each of which must call this.
        transport: the all-to-all that is used.
        dim: the dim to concatenate along.
        sizes: for each rank, the size of its ``x`` in ``dim``.

    Returns:
        The concatenation, of size ``sum(sizes)`` in ``dim``; ``x`` itself for a group of one rank.
    """
    if group.size() == 1:
        return x
    gathered: Num[Tensor, "*whole"] = _AllGather.apply(  # type: ignore[no-untyped-call]
        x, group, transport, dim, tuple(sizes)
    )
    return gathered


def reduce_scatter(
    x: Num[Tensor, "*whole"], group: dist.ProcessGroup, transport: Transport, dim: int, sizes: Sequence[int]
) -> Num[Tensor, "*shape"]:
    """This rank's piece of the sum of the ranks' tensors, cut along ``dim``: the adjoint of ``all_gather``.

    Differentiable: the gradient of every rank's ``x`` is the concatenation of the ranks' gradients.

    Args:
        x: a tensor of the same shape on every rank.
        group: the ranks, each of which must call this.
        transport: the all-to-all that is used.
        dim: the dim to cut along.
        sizes: for each rank, the size of its piece in ``dim``; their sum is that of ``x``.

    Returns:
        A tensor like ``x`` with this rank's size in ``dim``. bf16 and fp16 are summed in fp32 and rounded once. ``x`` itself
        for a group of one rank.
    """
    if group.size() == 1:
        return x
    piece: Num[Tensor, "*shape"] = _ReduceScatter.apply(  # type: ignore[no-untyped-call]
        x, group, transport, dim, tuple(sizes)
    )
    return piece


class _AllGather(torch.autograd.Function):
    """Autograd function of ``all_gather``: its backward is a reduce-scatter."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, transport: Transport, dim: int, sizes: tuple[int, ...]
    ) -> Tensor:
        ctx.group, ctx.transport, ctx.dim, ctx.sizes = group, transport, dim, sizes
        return _gather(x, group, transport, dim, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _sum_pieces(grad, ctx.group, ctx.transport, ctx.dim, ctx.sizes), None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    """Autograd function of ``reduce_scatter``: its backward is an all-gather."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, transport: Transport, dim: int, sizes: tuple[int, ...]
    ) -> Tensor:
        ctx.group, ctx.transport, ctx.dim, ctx.sizes = group, transport, dim, sizes
        return _sum_pieces(x, group, transport, dim, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _gather(grad, ctx.group, ctx.transport, ctx.dim, ctx.sizes), None, None, None, None


def _gather(x: Tensor, group: dist.ProcessGroup, transport: Transport, dim: int, sizes: Sequence[int]) -> Tensor:
    """The ranks' tensors concatenated along ``dim``: the forward of ``all_gather``, the backward of ``reduce_scatter``.

    ``sizes`` has each rank's size of ``x`` in ``dim``.
    """
    first = x.movedim(dim, 0)
    row = first.shape[1:].numel()
    send = first.expand(group.size(), *first.shape).reshape(-1).contiguous()
    received = transport.all_to_all(send, [first.numel()] * group.size(), [size * row for size in sizes], group).wait()
    return received.view(sum(sizes), *first.shape[1:]).movedim(0, dim)


def _sum_pieces(x: Tensor, group: dist.ProcessGroup, transport: Transport, dim: int, sizes: Sequence[int]) -> Tensor:
    """This rank's piece of the sum of the ranks' ``x``: the forward of ``reduce_scatter``, the backward of ``all_gather``.

    ``sizes`` has the size in ``dim`` of each rank's piece.
    """
    first, mine = x.movedim(dim, 0), sizes[group.rank()]
    row = first.shape[1:].numel()
    send, splits = first.reshape(-1).contiguous(), [size * row for size in sizes]
    received = transport.all_to_all(send, splits, [mine * row] * group.size(), group).wait()
    return received.view(group.size(), mine, *first.shape[1:]).sum(0).movedim(0, dim)

"""A world of which one rank alone exists: PyTorch's fake process group, and a transport that returns without sending.

    with fake_world(rank=5, world=64):          every group that is made inside is fake: collectives return at once
        mesh = ParallelMesh(8, transport=FakeTransport())
                                                 all-to-all      a buffer of the right size, filled from what was to be sent
                                                 all-gather      this rank's own part, once for each rank
                                                 reduce-scatter  this rank's own part, not summed
                                                 receive         (pipeline) values of N(0, 1), drawn once a buffer

Kernels, allocations and shapes are those of that rank; values are not, but they are finite. What a network adds (time of the
collectives, waiting for other ranks, the buffers of a communicator) is absent. Used by ``longspan rehearse`` only.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan import _compat
from longspan.distributed.scratch import Scratch
from longspan.errors import RunError

FAKE = "fake"


def is_fake(group: dist.ProcessGroup | None = None) -> bool:
    """Whether ``group`` (None: the world's) is one whose other ranks do not exist."""
    return str(dist.get_backend(group)) == FAKE


@contextmanager
def fake_world(rank: int, world: int) -> Iterator[None]:
    """Context manager: this process is rank ``rank`` of ``world`` ranks, of which no other exists.

    Args:
        rank: from 0.
        world: the number of ranks.

    Raises:
        RunError: this process has a process group already.
    """
    if dist.is_initialized():
        raise RunError("a fake world needs a process without a process group; call destroy_process_group() first")
    _compat.register_fake_backend()
    dist.init_process_group(FAKE, store=_compat.hash_store(), rank=rank, world_size=world)
    try:
        with nullcontext() if _is_filled(world) else reduce_scatter_filled():
            yield
    finally:
        dist.destroy_process_group()


class FakeTransport:
    """A transport that sends nothing: what it returns is filled with the elements that were to be sent, over and over.

    Attributes:
        seconds: the time in which this process filled buffers so far, by its own thread's clock; a real rank does not spend it.
        memory: what it receives into, kept as ``TorchTransport`` keeps it.
    """

    def __init__(self) -> None:
        self.seconds, self.memory = 0.0, Scratch()

    def all_to_all(
        self, send: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], group: dist.ProcessGroup
    ) -> "_Filled":
        """``Transport.all_to_all``, without sending."""
        return self.all_to_all_into(self.memory.take(sum(recv_splits), send), send, send_splits, recv_splits, group)

    def all_to_all_into(
        self, received: Tensor, send: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], group: dist.ProcessGroup
    ) -> "_Filled":
        """As ``all_to_all``, into ``received``, a flat tensor that the caller gives."""
        begin = time.thread_time()
        rest = received if send.numel() else received.zero_()[:0]
        while rest.numel():
            count = min(rest.numel(), send.numel())
            rest[:count].copy_(send[:count])
            rest = rest[count:]
        self.seconds += time.thread_time() - begin
        return _Filled(received)


class _Filled:
    def __init__(self, received: Tensor) -> None:
        self.received = received

    def wait(self) -> Tensor:
        return self.received


def fake_stage(stage: Any) -> None:
    """Let a pipeline stage take hidden states and gradients of N(0, 1), drawn once a buffer, for what others would send.

    Args:
        stage: one of ``torch.distributed.pipelining``, changed in place.
    """
    _compat.vote_for_all_stages(stage)
    drawn: set[int] = set()

    def filling(receive: Callable[[int], list[dist.P2POp]], chunk: int) -> list[dist.P2POp]:
        operations = receive(chunk)
        for operation in operations:
            if id(operation.tensor) not in drawn:
                drawn.add(id(operation.tensor))
                operation.tensor.detach().normal_()
        return operations

    stage.get_fwd_recv_ops = partial(filling, stage.get_fwd_recv_ops)
    stage.get_bwd_recv_ops = partial(filling, stage.get_bwd_recv_ops)


def _is_filled(world: int) -> bool:
    """Whether a reduce-scatter of the fake group of this PyTorch writes its output."""
    received = torch.full((1,), torch.nan, device="cpu")
    dist.reduce_scatter(received, list(torch.zeros(world, 1, device="cpu")))
    return bool(received.isfinite().all())


@contextmanager
def reduce_scatter_filled() -> Iterator[None]:
    """Context manager under which ``dist.reduce_scatter_tensor`` writes this rank's own part.

    FSDP2 reduces gradients with it in PyTorch before 2.13, whose fake group leaves the output as it was: memory of any content.
    """
    unfilled = dist.reduce_scatter_tensor

    def filling(output: Any, input: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: Any = False) -> Any:
        work = unfilled(output, input, op, group, async_op)
        output.copy_(input.flatten().chunk(dist.get_world_size(group))[dist.get_rank(group)].view_as(output))
        return work

    dist.reduce_scatter_tensor = filling
    try:
        yield
    finally:
        dist.reduce_scatter_tensor = unfilled

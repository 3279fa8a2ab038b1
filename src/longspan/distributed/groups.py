"""Process groups beside those of a DeviceMesh: of all ranks, or of some of them.

    new_group()             all ranks
    new_group_of([0, 3])    ranks 0 and 3, while ranks 1 and 2 call it with the ranks of their own groups

In a fake world (distributed/fake_world.py) they are fake. Independent of what is sent in them.
"""

import atexit
import time
from collections.abc import Iterable
from datetime import timedelta
from functools import cache

import torch.distributed as dist

from longspan import _compat
from longspan.distributed.consensus import gather
from longspan.distributed.fake_world import FAKE, is_fake

SECONDS_TO_FREE = 0.05
"""How long a process that has made a process group waits before its interpreter ends."""


def new_group(*, backend: str = "gloo", timeout: timedelta | None = None) -> dist.ProcessGroup:
    """A process group of all ranks; in a fake world (distributed/fake_world.py) a fake one.

    Args:
        backend: "gloo" for control traffic; "" for that of the world.
        timeout: of its collectives; None for PyTorch's.
    """
    if not is_fake():
        _wait_at_exit()
    group: dist.ProcessGroup = dist.new_group(backend=FAKE if is_fake() else backend or None, timeout=timeout)
    return group


def new_group_of(
    ranks: list[int], world_group: dist.ProcessGroup, *, backend: str = "gloo", timeout: timedelta | None = None
) -> dist.ProcessGroup:
    """A process group of some ranks. Every group beside a DeviceMesh's is made by this function or by ``new_group``.

    Every rank must call it at once, each with the ranks of its own group: NCCL splits them off the group of all ranks together.

    Args:
        ranks: global ranks, this one among them.
        world_group: all ranks, on gloo.
        backend, timeout: as in ``new_group``.
    """
    if is_fake():
        backend = FAKE
    else:
        _join_as_many_groups(world_group)
    group: dist.ProcessGroup = dist.new_group(ranks, timeout, backend or None, use_local_synchronization=True)
    return group


def set_timeout(groups: Iterable[dist.ProcessGroup], timeout: timedelta | None) -> None:
    """Set how long collectives of ``groups`` wait for other ranks before they fail; with None nothing changes.

    It is needed because the groups of a DeviceMesh do not inherit the timeout of the world's group.
    """
    if timeout is not None:
        for group in groups:
            _compat.set_group_timeout(group, timeout)


def _join_as_many_groups(world_group: dist.ProcessGroup) -> None:
    """Let this rank count as many groups as the rank that counts most, by groups of this rank alone. Every rank must call it.

    PyTorch names a group of some ranks by these and by a number of groups that each rank counts for itself. Ranks that count
    differently, because other code made groups of some ranks, would name it differently and wait for each other.
    """
    counts = gather(_compat.number_of_groups(), world_group)
    for _ in range(max(counts) - counts[world_group.rank()]):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


@cache
def _wait_at_exit() -> None:
    """Let this process wait ``SECONDS_TO_FREE`` before its interpreter ends, also where the groups are destroyed before.

    Gloo's threads free the tensors of a collective a moment after this rank's own thread has gone on, and take the GIL for it.
    In an interpreter that ends that aborts the process, whatever it has reached ("terminate called without an active
    exception"; pytorch/pytorch#190489).
    """
    atexit.register(time.sleep, SECONDS_TO_FREE)

"""Random numbers of a run on several ranks: equal ones for the data, independent ones for dropout.

sampler, collator     state of rank 0 on every rank          all ranks of a sequence must draw the same rows and masks
forward, backward     a stream a rank, step, micro-batch     each token's dropout is independent of every other token's
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from longspan.distributed.mesh import ParallelMesh


def synchronize(mesh: ParallelMesh) -> None:
    """Give every rank the random state of rank 0's CPU. Every rank must call it."""
    if mesh.world_group.size() > 1:
        state = torch.get_rng_state()
        dist.broadcast(state, group=mesh.world_group, group_src=0)
        torch.set_rng_state(state)


@contextmanager
def stream_of_this_rank(mesh: ParallelMesh, *key: int) -> Iterator[None]:
    """Draw random numbers in the block that differ between ranks and keys, and that the same key repeats.

    The state before is restored after the block. On a single rank nothing changes: it draws as without this library.

    Args:
        mesh: the ranks, of which each draws others.
        key: what names the block in a run, like the seed, the step and the micro-batch.
    """
    if mesh.world_group.size() == 1:
        yield
        return
    name = repr((key, mesh.world_group.rank()))
    with torch.random.fork_rng([mesh.device] if mesh.device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big"))
        yield

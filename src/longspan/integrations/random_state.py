"""Random numbers of a run on several ranks: equal ones for the data, independent ones for dropout.

sampler, collator     state of rank 0 on every rank               all ranks of a sequence must draw the same rows and masks
forward, backward     a seed per rank, step and micro-batch       each token's dropout is independent of every other token's
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from longspan.distributed.mesh import ParallelMesh


def synchronize(mesh: ParallelMesh) -> None:
    """Broadcast the state of torch's CPU generator from rank 0 to all ranks of ``mesh``. Every rank must call it."""
    if mesh.world_group.size() > 1:
        state = torch.get_rng_state()
        dist.broadcast(state, group=mesh.world_group, group_src=0)
        torch.set_rng_state(state)


@contextmanager
def stream_of_this_rank(mesh: ParallelMesh, *key: int) -> Iterator[None]:
    """Context manager: seed torch's generators with a hash of (``key``, this rank), and restore their state on exit.

    On a mesh of one rank it does nothing. The generators are the CPU's and, on a GPU mesh, the device's.

    Args:
        mesh: the ranks, each of which gets another seed.
        key: integers that identify the block in a run, such as seed, step and micro-batch; equal keys give equal numbers.
    """
    if mesh.world_group.size() == 1:
        yield
        return
    name = repr((key, mesh.world_group.rank()))
    with torch.random.fork_rng([mesh.device] if mesh.device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big"))
        yield

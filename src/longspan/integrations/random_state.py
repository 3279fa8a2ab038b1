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
    """Set the state of torch's CPU generator on every rank of ``mesh`` to that of rank 0. Every rank must call it.

    Samplers and collators then draw the same rows and masks on all ranks of a sequence.
    """
    if mesh.world_group.size() > 1:
        state = torch.get_rng_state()
        dist.broadcast(state, group=mesh.world_group, group_src=0)
        torch.set_rng_state(state)


@contextmanager
def stream_of_this_rank(mesh: ParallelMesh, *key: int) -> Iterator[None]:
    """Context manager: inside, this rank draws random numbers of its own, so that dropout is independent between ranks.

    torch's generators (the CPU's and, on a GPU mesh, the device's) are seeded with a hash of (``key``, this rank), and their
    state is restored on exit. On a mesh of one rank it does nothing.

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

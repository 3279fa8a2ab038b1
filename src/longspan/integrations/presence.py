"""Whether every rank calls a function, found out within a few seconds and without a collective that would wait for the others.

rank 0   calls   ->  writes its key, waits for all keys  ->  "all"           the first rank that knows writes the verdict,
rank 1   calls   ->  writes its key, waits for all keys  ->  "all"           and all ranks follow it, late ones too
"""

from datetime import timedelta

from longspan.distributed.mesh import ParallelMesh

ALL = "all"


def absent_ranks(call: str, mesh: ParallelMesh, seconds: float) -> str:
    """The ranks of ``mesh`` that do not make ``call`` within ``seconds``, as a text for an error; "" where all do.

    Every rank that makes the call gets the same answer. It is kept in the store of the process group, not by a collective: a
    collective that times out would leave the group unusable.

    Args:
        call: the name of the call; the n-th call of this name on one rank meets the n-th on the others.
        mesh: the ranks that must make it.
        seconds: how long to wait for them.
    """
    store, mine = mesh.world_group.get_group_store(), mesh.world_group.rank()
    number = store.add(f"{call} by rank {mine}", 1)
    keys = [f"{call} {number} on rank {rank}" for rank in range(mesh.world_group.size())]
    store.set(keys[mine], "here")
    try:
        store.wait(keys, timedelta(seconds=seconds))
        found = ALL
    except RuntimeError:  # which torch raises for a time-out of any store
        found = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key])) or "unknown"
    verdict: str = store.compare_set(f"{call} {number} verdict", "", found).decode()
    return "" if verdict == ALL else verdict

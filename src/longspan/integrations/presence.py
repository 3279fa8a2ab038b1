"""Tests within a time limit whether every rank calls a function, without a collective, which would wait for absent ranks.

rank 0   calls   ->  writes its key, waits for all keys  ->  "all"           the first rank whose wait ends writes the result,
rank 1   calls   ->  writes its key, waits for all keys  ->  "all"           and all ranks that wait return it
"""

from datetime import timedelta

from longspan.distributed.mesh import ParallelMesh

ALL = "all"


def absent_ranks(call: str, mesh: ParallelMesh, seconds: float) -> str:
    """The ranks of ``mesh`` that do not make this call within ``seconds``.

    It uses keys in the store of the process group, not a collective: a collective that times out would leave the group
    unusable.

    Args:
        call: the name of the call. The n-th call with this name on one rank is compared with the n-th on the others, where
            a rank does not count those that have ended without it.
        mesh: the ranks that must make the call.
        seconds: how long to wait for them.

    Returns:
        The numbers of the absent ranks as text, ``"1, 3"``; ``""`` if none is absent; ``"unknown"`` if the last one arrived
        just after the wait. Every rank that makes the call in time gets the same text.
    """
    store, mine = mesh.world_group.get_group_store(), mesh.world_group.rank()
    number = store.add(f"{call} by rank {mine}", 1)
    while store.check([f"{call} {number} verdict"]):  # the others have been refused, because this rank was absent
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

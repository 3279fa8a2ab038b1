"""What one rank alone can know, on every rank: facts in one small all-reduce, and the first error raised by all of them.

    rank 0   (0, facts ...)     each fills its own row of zeros,      table of every rank's facts, and where a first column
    rank 1   (1, facts ...)     the sum brings all everywhere         is 1 the text of the first such rank, raised by all

So no rank waits for one that has failed. Knows nothing of batches or models.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError, LongspanError

FACTS = 16
"""How many a rank brings at most: in one all-reduce, one rank may bring its error where the others bring facts of a step."""


@contextmanager
def together(mesh: ParallelMesh) -> Iterator[None]:
    """What fails in the block on one rank is raised on every rank, with the text of the first. The block has no collective."""
    error: LongspanError | None = None
    try:
        yield
    except LongspanError as found:
        error = found
    agree_on_error(error, mesh)


def agree_on_error(error: LongspanError | None, mesh: ParallelMesh) -> None:
    """Raise on every rank what any rank brings: the text of the first one that has an error. Every rank must call it."""
    raise_the_first_error(exchange_facts((int(error is not None),), mesh), error, mesh)


def refuse_difference(what: str, mine: str, mesh: ParallelMesh, remedy: str) -> None:
    """Raise on every rank alike where ``mine`` is not the same text on all of them. Every rank must call it."""
    found = [mine] * mesh.degree
    if mesh.degree > 1:
        dist.all_gather_object(found, mine, group=mesh.agreement_group)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise BatchError(f"{what} differs between ranks: {found[0]} on rank 0 and {other} on rank {rank}; {remedy}")


def exchange_facts(mine: Sequence[int], mesh: ParallelMesh) -> list[list[int]]:
    """Every rank's facts, a row a rank: each fills its own row of zeros, and the sum brings all of them everywhere."""
    table = torch.zeros(mesh.degree, FACTS, dtype=torch.int64)
    table[mesh.agreement_group.rank(), : len(mine)] = torch.tensor(mine)
    if mesh.degree > 1:
        dist.all_reduce(table, group=mesh.agreement_group)
    facts: list[list[int]] = table.tolist()
    return facts


def raise_the_first_error(table: Sequence[Sequence[int]], mine: LongspanError | None, mesh: ParallelMesh) -> None:
    """Raise on every rank the error of the first whose facts begin with 1; ``mine`` is this rank's, or None."""
    failing = [rank for rank, row in enumerate(table) if row[0]]
    if not failing:
        return
    box: list[LongspanError | None] = [mine]
    if mesh.degree > 1:
        dist.broadcast_object_list(box, group=mesh.agreement_group, group_src=failing[0])
    assert box[0] is not None
    raise box[0]

"""Consensus over ranks: gather facts, refuse facts that differ, and raise an error of one rank on all ranks.

    gather                    every rank's fact, on every rank
    refuse_difference         raise on every rank where a fact differs
    raise_together            an error of one rank in a block is raised by all; optionally what the block wrote is removed
    largest_integers          the largest of every rank's integers, place by place, by one all-reduce
    exchange_integers         a row of integers of every rank, by one all-reduce:

    rank 0   (0, facts ...)     each rank fills its own row of zeros,      the table of every rank's facts; where a first
    rank 1   (1, facts ...)     the sum has all rows everywhere            column is 1, all ranks raise that rank's error

So no rank waits for one that failed. The groups are for control traffic, on gloo. Independent of meshes and models.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from longspan.distributed.fake_world import is_fake
from longspan.errors import BatchError, LongspanError, LostRankError, RunError

Fact = TypeVar("Fact")

SILENT_SECONDS = 60.0
"""How many seconds a rank waits for the others before it logs a warning."""

logger = logging.getLogger(__name__)


def gather(fact: Fact, group: dist.ProcessGroup) -> list[Fact]:
    """The ``fact`` of every rank of ``group``, in rank order, on every rank. Facts are pickled. Every rank must call it."""
    facts: list[Any] = [fact] * group.size()
    if group.size() > 1:
        dist.all_gather_object(facts, fact, group=group)
    return facts


def gather_or_raise(find: Callable[[], Fact], group: dist.ProcessGroup) -> list[Fact]:
    """Call ``find`` on every rank and gather the results.

    Args:
        find: called without arguments; its result is pickled.
        group: every rank of it must call this function.

    Returns:
        The results in rank order.

    Raises:
        LongspanError: on every rank alike, the error of the first rank whose ``find`` raised one. Other exceptions are raised
            on their own rank only.
    """
    error: LongspanError | None = None
    fact: Any = None
    try:
        fact = find()
    except LongspanError as found:
        error = found
    everyone = gather((error, fact), group)
    for first, _ in everyone:
        if first is not None:
            raise first
    return [fact for _, fact in everyone]


class Difference(NamedTuple):
    """A fact that differs between ranks, as ``first_difference`` finds it.

    Attributes:
        name: the name of the fact.
        first: its value on rank 0.
        rank: a rank where its value is another one.
        other: the value on that rank.
    """

    name: str
    first: str
    rank: int
    other: str


def first_difference(facts: Sequence[Mapping[str, str]]) -> Difference | None:
    """The first named fact whose value on some rank differs from that on rank 0.

    Args:
        facts: for each rank, {name of a fact: its value as text}. A fact that a rank lacks has the value "nothing" there.

    Returns:
        The difference of the lowest rank that has one, there of a fact that one of the two ranks lacks before others, and then
        by name. None if all ranks have the same facts.
    """
    for rank, held in enumerate(facts):
        names = {**facts[0], **held}
        # A name that one of them lacks comes first: it explains why the rest differs.
        for name in sorted(names, key=lambda name: name in facts[0] and name in held):
            first, other = facts[0].get(name, "nothing"), held.get(name, "nothing")
            if first != other:
                return Difference(name, first, rank, other)
    return None


def refuse_difference(what: str, mine: str, group: dist.ProcessGroup, remedy: str) -> None:
    """Raise BatchError on every rank if the text ``mine`` is not the same on all ranks of ``group``. Every rank must call it.

    Args:
        what: the name of the compared fact, for the error.
        mine: this rank's value of it.
        group: the ranks, on gloo.
        remedy: the end of the error: what the user can do.
    """
    difference = first_difference([{what: text} for text in gather(mine, group)])
    if difference is not None:
        _, first, rank, other = difference
        raise BatchError(f"{what} differs between ranks: {first} on rank 0 and {other} on rank {rank}; {remedy}")


def refuse_other_settings(mine: Mapping[str, str], group: dist.ProcessGroup) -> None:
    """Raise RunError on every rank where a setting has not the same value on all of them. Every rank must call it."""
    difference = first_difference(gather(mine, group))
    if difference is not None:
        name, first, rank, other = difference
        raise RunError(f"{name} is {first} on rank 0 and {other} on rank {rank}; start every rank with the same settings")


def own_error(found: BaseException) -> LongspanError | None:
    """``found`` itself if it is a LongspanError, else None: the default ``convert`` of ``raise_together``.

    Other exceptions are defects of a program, and are not raised on other ranks.
    """
    return found if isinstance(found, LongspanError) else None


@contextmanager
def raise_together(
    group: dist.ProcessGroup,
    convert: Callable[[BaseException], LongspanError | None] = own_error,
    undo: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Context manager: an error in the block on one rank is raised on every rank, after the block.

    Args:
        group: every rank of it must enter the block. The block may hold collectives only if they cannot fail on one rank.
        convert: called with an exception of the block, returns the LongspanError to raise on every rank; or None, with which
            the exception is raised on its own rank only, and the other ranks wait for it until the timeout of the group.
        undo: called on every rank before the error is raised, to remove what the block has written; None: nothing to remove.

    Raises:
        LongspanError: on every rank, the converted error of the first rank that has one; there the exception is its cause.
    """
    error: LongspanError | None = None
    try:
        yield
    except BaseException as found:  # a CheckpointException of torch is no Exception
        error = convert(found)
        if error is None:
            raise
        if error is not found:
            error.__cause__ = found
    try:
        raise_first_error(error, group)
    except LongspanError:
        if undo is not None:
            undo()
            exchange_integers((0,), group)  # a rank that ended before the others have removed theirs would end them too
        raise


def raise_first_error(error: LongspanError | None, group: dist.ProcessGroup) -> None:
    """Raise on every rank the error of the lowest rank that has one; return if none has. It makes one all-reduce.

    Every rank of ``group`` must call it, with its own ``error``, or None where it has none.
    """
    raise_failed(exchange_integers((int(error is not None),), group), error, group)


def exchange_integers(mine: Sequence[int], group: dist.ProcessGroup, hint: str = "") -> list[list[int]]:
    """The integers of every rank, as a list with one row for each rank, by one all-reduce.

    Args:
        mine: the integers of this rank; all ranks must pass equally many.
        group: the ranks, on gloo.
        hint: a sentence for the user that is logged if other ranks do not call this within ``SILENT_SECONDS``.

    Raises:
        LostRankError: a rank has ended, or did not call this within the timeout of the group.
    """
    if is_fake(group):
        return [list(mine) for _ in range(group.size())]  # the other ranks would have passed the same
    table = torch.zeros(group.size(), len(mine), dtype=torch.int64, device="cpu")
    table[group.rank()] = torch.tensor(mine, device="cpu")
    if group.size() > 1:
        work = dist.all_reduce(table, group=group, async_op=True)
        assert work is not None  # None on ranks outside the group only
        _wait(work, group.rank(), hint)
    rows: list[list[int]] = table.tolist()
    return rows


def largest_integers(mine: Sequence[int], group: dist.ProcessGroup, hint: str = "") -> list[int]:
    """For each place of ``mine`` the largest integer that any rank has there, by one all-reduce.

    Args:
        mine, group, hint: as in ``exchange_integers``; the message does not grow with the number of ranks.

    Raises:
        LostRankError: as in ``exchange_integers``.
    """
    row = torch.tensor(mine, dtype=torch.int64, device="cpu")
    if group.size() > 1:
        work = dist.all_reduce(row, op=dist.ReduceOp.MAX, group=group, async_op=True)
        assert work is not None  # None on ranks outside the group only
        _wait(work, group.rank(), hint)
    largest: list[int] = row.tolist()
    return largest


def _wait(work: dist.Work, rank: int, hint: str) -> None:
    """Wait until the collective ``work`` of this ``rank`` has ended; after ``SILENT_SECONDS`` log ``hint`` once and go on
    waiting.

    Raises:
        LostRankError: the collective failed, because another rank has ended, or does not take part within the group's timeout.
    """
    try:
        try:
            work.wait(timedelta(seconds=SILENT_SECONDS))
        except RuntimeError:
            if work.is_completed():
                raise
            logger.warning("rank %d has waited %g s for the other ranks. %s", rank, SILENT_SECONDS, hint)
            work.wait()
    except RuntimeError as error:
        raise LostRankError(
            f"rank {rank} waited for the other ranks, and one has ended or did not come ({str(error).splitlines()[0]}); "
            f"its own message has the reason, if it failed. {hint}"
        ) from error


def raise_failed(table: Sequence[Sequence[int]], error: LongspanError | None, group: dist.ProcessGroup) -> None:
    """Raise on every rank the error of the lowest rank that has failed; return if none has. Called behind
    ``exchange_integers``.

    Args:
        table: the result of ``exchange_integers``: for each rank its row, whose first integer is 1 if the rank has failed, else
            0.
        error: this rank's error; None where its row begins with 0. The first failed rank sends its own to all others.
        group: the ranks, each of which must call this.
    """
    failed = [rank for rank, row in enumerate(table) if row[0]]
    if not failed:
        return
    box: list[LongspanError | None] = [error]
    if group.size() > 1 and not is_fake(group):
        dist.broadcast_object_list(box, group=group, group_src=failed[0])
    assert box[0] is not None
    raise box[0]

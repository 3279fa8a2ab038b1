"""Consensus: facts are compared, errors of one rank are raised by all with one text, and what was written is removed."""

import logging
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from longspan.distributed import consensus
from longspan.distributed.consensus import (
    Difference,
    exchange_integers,
    first_difference,
    gather,
    gather_or_raise,
    raise_first_error,
    raise_together,
    refuse_difference,
    refuse_other_settings,
)
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError, LongspanError, RunError
from tests.helpers.ranks import on_ranks


def test_a_difference_names_what_a_rank_lacks_first() -> None:
    facts = [{"a": "1", "z": "2"}, {"a": "1", "z": "2"}, {"a": "9"}]
    assert first_difference(facts) == Difference("z", "2", 2, "nothing")
    assert first_difference(facts[:2]) is None
    assert first_difference([{}, {"b": "1"}]) == Difference("b", "nothing", 1, "1")


def test_facts_and_errors_of_one_rank_reach_all(tmp_path: Path) -> None:
    texts = on_ranks(3, _everything, tmp_path, tmp_path=tmp_path)
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] == [
        "the text differs between ranks: a on rank 0 and b on rank 2; load one",
        "steps is 3 on rank 0 and 4 on rank 1; start every rank with the same settings",
        "BatchError rank 1 has no fact",
        "BatchError rank 1 failed",
        "RunError disk 1 is full",
        "RunError disk 1 is full",
    ]
    assert not list(tmp_path.glob("draft*"))


def _everything(folder: Path) -> list[str]:
    group, rank = ParallelMesh().world_group, dist.get_rank()
    assert gather({"rank": rank}, group) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert exchange_integers((0, rank, -rank), group) == [[0, 0, 0], [0, 1, -1], [0, 2, -2]]
    assert gather_or_raise(lambda: rank, group) == [0, 1, 2]
    raise_first_error(None, group)
    refuse_difference("the text", "a", group, "load one")
    with raise_together(group):
        pass
    texts = []
    with pytest.raises(BatchError) as caught:
        refuse_difference("the text", "aab"[rank], group, "load one")
    texts.append(str(caught.value))
    refuse_other_settings({"steps": "3"}, group)
    with pytest.raises(RunError) as other:
        refuse_other_settings({"seed": "0", "steps": str(3 + min(rank, 1))}, group)
    texts.append(str(other.value))

    def find() -> int:
        if rank:
            raise BatchError(f"rank {rank} has no fact")
        return rank

    with pytest.raises(LongspanError) as found:
        gather_or_raise(find, group)
    texts.append(f"{type(found.value).__name__} {found.value}")

    def fail_but_on_the_first() -> None:
        with raise_together(group):
            if rank:
                raise BatchError(f"rank {rank} failed")

    with pytest.raises(LongspanError) as found:
        fail_but_on_the_first()
    texts.append(f"{type(found.value).__name__} {found.value}")
    draft = folder / f"draft{rank}"

    def convert(error: BaseException) -> LongspanError | None:
        return RunError(f"disk {rank} is full") if isinstance(error, OSError) else None

    def undo() -> None:
        time.sleep(0.3 * (rank == 0))
        draft.unlink()

    def write() -> None:
        with raise_together(group, convert, undo):
            draft.touch()
            dist.barrier(group)
            if rank:
                raise OSError("no space left")

    with pytest.raises(LongspanError) as found:
        write()
    assert not (folder / "draft0").exists()  # no rank goes on, and perhaps ends the others, before all have undone
    assert isinstance(found.value.__cause__, OSError) == (rank == 1)  # rank 1 failed first, and its error is raised by all
    texts.append(f"{type(found.value).__name__} {found.value}")
    with pytest.raises(LongspanError) as found:
        raise_first_error(RunError(f"disk {rank} is full") if rank else None, group)
    texts.append(f"{type(found.value).__name__} {found.value}")
    return texts


def test_an_exception_that_is_not_converted_passes_on_as_it_is(tmp_path: Path) -> None:
    on_ranks(1, _a_defect, tmp_path=tmp_path)


def _a_defect() -> None:
    with pytest.raises(ZeroDivisionError), raise_together(ParallelMesh().world_group):
        _ = 1 / 0


def test_a_rank_that_waits_long_says_so_once_and_goes_on(tmp_path: Path) -> None:
    waited, late = on_ranks(2, _one_is_late, tmp_path=tmp_path)
    assert waited == ["rank 0 has waited 0.2 s for the other ranks. Call it on every rank"]
    assert late == []


def _one_is_late() -> list[str]:
    group, rank, logged = ParallelMesh().world_group, dist.get_rank(), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    consensus.logger.addHandler(handler)
    consensus.SILENT_SECONDS = 0.2
    if rank:
        time.sleep(1)
    assert exchange_integers((rank,), group, "Call it on every rank") == [[0], [1]]
    return logged

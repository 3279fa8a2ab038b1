"""Dummy rows take the place of a part without rows, and of nothing else."""

import torch

from longspan.batch.context import Part
from longspan.batch.dummy_rows import fill_empty_parts, with_dummy_rows
from longspan.batch.shard import shard_local
from longspan.distributed.coordinate import MeshCoordinate


def part_of(rows: int) -> Part:
    ids = torch.ones(rows, 7, dtype=torch.long)
    return shard_local({"input_ids": ids, "labels": ids, "attention_mask": ids}, MeshCoordinate(ulysses=2))


def test_a_part_without_rows_gets_rows_that_nobody_learns_from() -> None:
    filled, whole = with_dummy_rows(part_of(0), 3), part_of(3)
    assert {name: x.shape for name, x in filled.items() if name != "longspan"} == {
        name: x.shape for name, x in whole.items() if name != "longspan"
    }
    assert filled["labels"].eq(-100).all()
    assert filled["shift_labels"].eq(-100).all()
    assert filled["input_ids"].eq(0).all()
    assert (filled["longspan"].rows, filled["longspan"].is_dummy, filled["longspan"].is_plain) == (3, True, True)


def test_parts_with_rows_and_calls_without_a_batch_info_stay() -> None:
    part = part_of(2)
    assert with_dummy_rows(part) == part
    assert with_dummy_rows({"input_ids": part_of(0)["input_ids"]})["input_ids"].shape == (0, 4)


def test_the_micro_batches_of_a_step_have_as_many_rows() -> None:
    assert [part["longspan"].rows for part in fill_empty_parts([part_of(0), part_of(2)])] == [2, 2]
    assert [part["longspan"].rows for part in fill_empty_parts([part_of(0), part_of(0)])] == [1, 1]

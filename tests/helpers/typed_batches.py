"""Checked by mypy, not run: ``shard_batch`` of a mapping has the type Part, of a sequence the type list[Part]."""

from typing import assert_type

from torch import Tensor

from longspan import ParallelMesh, shard_batch
from longspan.batch.context import Part


def part_and_parts(batch: dict[str, Tensor], mesh: ParallelMesh) -> tuple[Part, list[Part]]:
    """(part of the batch, parts of the batch twice); ``assert_type`` fails in mypy if a type differs."""
    part = assert_type(shard_batch(batch, mesh), Part)
    parts = assert_type(shard_batch((batch, batch), mesh), list[Part])
    return part, parts

"""The types of ``shard_batch``, which mypy checks here: a mapping gives a part, a sequence gives a list of parts."""

from typing import assert_type

from torch import Tensor

from longspan import ParallelMesh, shard_batch
from longspan.batch.context import Part


def part_and_parts(batch: dict[str, Tensor], mesh: ParallelMesh) -> tuple[Part, list[Part]]:
    """The part of a batch, and the parts of two."""
    part = assert_type(shard_batch(batch, mesh), Part)
    parts = assert_type(shard_batch((batch, batch), mesh), list[Part])
    return part, parts

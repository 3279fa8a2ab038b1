"""Padding and documents of a batch, read from its own tensors."""

import pytest
import torch

from longspan import BatchError, ParallelMesh, shard_batch


def test_a_row_of_positions_that_only_some_models_take_for_documents_is_refused() -> None:
    positions = torch.cat([torch.arange(5), torch.arange(8)]).expand(4, 1, 13)
    with pytest.raises(BatchError, match=r"begin anew in their first row.*mask=Documents"):
        shard_batch({"input_ids": torch.ones(1, 13, dtype=torch.long), "position_ids": positions}, ParallelMesh())

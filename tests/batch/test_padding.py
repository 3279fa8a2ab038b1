"""Padding and documents of a batch, read from its own tensors."""

import pytest
import torch

from longspan import BatchError, ParallelMesh, shard_batch
from longspan.batch.padding import documents_of, padding_of, restarts_of
from longspan.masks.constructors import Documents, Span


def test_a_row_of_positions_that_only_some_models_take_for_documents_is_refused() -> None:
    positions = torch.cat([torch.arange(5), torch.arange(8)]).expand(4, 1, 13)
    with pytest.raises(BatchError, match=r"begin anew in their first row.*mask=Documents"):
        shard_batch({"input_ids": torch.ones(1, 13, dtype=torch.long), "position_ids": positions}, ParallelMesh())


def test_padding_is_the_run_of_real_tokens_of_each_row() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0]])
    assert padding_of(mask, 3, 5) == (Span(2, 5), Span(0, 3), Span(1, 3))
    assert padding_of(torch.ones(3, 5), 3, 5) is None
    assert padding_of(None, 3, 5) is None


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        ([[1, 0, 1]], "a hole in row 0: its 2 tokens are not one run"),
        ([[1, 2, 1]], r"of shape \[1, 3\] must be \[1, 3\] like input_ids, 1 for a token and 0 for padding"),
        ([[1, 1, 1, 1]], r"of shape \[1, 4\] must be \[1, 3\]"),
    ],
)
def test_a_mask_that_is_no_padding_is_refused(mask: list[list[int]], text: str) -> None:
    with pytest.raises(BatchError, match=text):
        padding_of(torch.tensor(mask), 1, 3)


def test_positions_that_begin_anew_are_documents() -> None:
    two, three = [0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 0]
    assert restarts_of(torch.tensor([two, three]), 2, 6) == (Documents([4, 2]), Documents([2, 3, 1]))
    assert restarts_of(torch.tensor([two]), 2, 6) == (Documents([4, 2]), Documents([4, 2])), "one row of positions is for all"
    assert restarts_of(torch.arange(6).expand(2, 6), 2, 6) is None
    assert restarts_of(None, 2, 6) is None


LENGTHS = torch.tensor([0, 2, 2, 6])
RESTARTING = torch.tensor([[0, 1, 0, 1, 2, 3]])


def test_documents_of_keywords_are_read_from_any_of_them() -> None:
    expected = (Documents([2, 4]),)
    assert documents_of({"cu_seq_lens_q": LENGTHS, "cu_seq_lens_k": LENGTHS, "position_ids": RESTARTING}, 1, 6) == expected
    assert documents_of({"seq_idx": torch.tensor([[4, 4, 7, 7, 7, 7]])}, 1, 6) == expected
    assert documents_of({"input_ids": RESTARTING}, 1, 6) is None


@pytest.mark.parametrize(
    "batch",
    [
        {"cu_seq_lens_q": LENGTHS, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
        {"cu_seq_lens_q": LENGTHS, "cu_seq_lens_k": torch.tensor([0, 3, 6])},
        {"cu_seq_lens_q": torch.tensor([0, 2, 5])},
        {"cu_seq_lens_q": torch.tensor([0, 4, 2, 6])},
    ],
)
def test_keywords_that_disagree_are_refused(batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(BatchError, match="the same beginnings of documents in one row, from 0 to its 6 tokens"):
        documents_of(batch, 1, 6)

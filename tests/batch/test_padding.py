"""Padding and documents of a batch, read from its own tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from longspan import BatchError, ParallelMesh, shard_batch, shard_local
from longspan.batch.padding import documents_by_position, documents_of_batch, padding_of, restarts_beside_mask
from longspan.distributed.coordinate import MeshCoordinate
from longspan.masks.constructors import Documents, Full, Span
from tests.helpers.one_device import assert_as_one_device
from tests.helpers.ranks import on_ranks


def test_a_row_of_positions_that_only_some_models_take_for_documents_is_refused() -> None:
    positions = torch.cat([torch.arange(5), torch.arange(8)]).expand(4, 1, 13)
    with pytest.raises(BatchError, match=r"restart in their first row.*mask=Documents"):
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
    assert documents_by_position(torch.tensor([two, three]), 2, 6) == (Documents([4, 2]), Documents([2, 3, 1]))
    assert documents_by_position(torch.tensor([two]), 2, 6) == (Documents([4, 2]), Documents([4, 2])), (
        "one row of positions is for all"
    )
    assert documents_by_position(torch.arange(6).expand(2, 6), 2, 6) is None
    assert documents_by_position(None, 2, 6) is None


LENGTHS = torch.tensor([0, 2, 2, 6])
RESTARTING = torch.tensor([[0, 1, 0, 1, 2, 3]])


def test_documents_of_keywords_are_read_from_any_of_them() -> None:
    expected = (Documents([2, 4]),)
    assert (
        documents_of_batch({"cu_seq_lens_q": LENGTHS, "cu_seq_lens_k": LENGTHS, "position_ids": RESTARTING}, 1, 6) == expected
    )
    assert documents_of_batch({"seq_idx": torch.tensor([[4, 4, 7, 7, 7, 7]])}, 1, 6) == expected
    assert documents_of_batch({"input_ids": RESTARTING}, 1, 6) is None


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
        documents_of_batch(batch, 1, 6)


IDS = torch.zeros(2, 8, dtype=torch.long)
VARLEN = {"cu_seq_lens_q": torch.tensor([0, 3, 3, 8]), "cu_seq_lens_k": torch.tensor([0, 3, 3, 8]), "max_length_q": 5}


def test_documents_are_read_from_the_keywords_of_varlen_kernels() -> None:
    numbers = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    part = shard_local({"input_ids": IDS[:1], **VARLEN, "seq_idx": numbers}, MeshCoordinate(ulysses=2))
    assert part["longspan"].mask_for(Full()) == (Full() & Documents((3, 5)),)
    assert part["longspan"].restarts is None
    assert set(part) == {"input_ids", "position_ids", "longspan"}


def test_beside_a_mask_positions_that_go_back_begin_a_document_and_those_of_padding_do_not() -> None:
    positions = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 2, 3, 1, 1]])
    padding = (Span(2, 6), Span(0, 4))
    assert restarts_beside_mask(padding, positions, 2, 6) == (Documents((4, 2)), Documents((6,)))
    assert restarts_beside_mask(padding, positions[1:].expand(2, 6), 2, 6) == (Documents((4, 1, 1)), Documents((6,)))
    assert restarts_beside_mask(padding[1:], positions[1:], 1, 6) is None
    assert restarts_beside_mask(None, torch.tensor([[0, 1, 2, 7, 8, 9]]), 1, 6) is None
    assert restarts_beside_mask(None, None, 1, 6) is None
    assert restarts_beside_mask(None, positions[:1].expand(3, 1, 6), 1, 6) is None
    with pytest.raises(BatchError, match=r"restart in their first row"):
        restarts_beside_mask(None, positions[:1].expand(4, 1, 6), 1, 6)


def test_a_mask_of_ones_leaves_the_documents_of_the_positions() -> None:
    batch = {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)}
    for ones in ({}, {"attention_mask": torch.ones_like(IDS)}):
        assert shard_local(batch | ones, MeshCoordinate(ulysses=2))["longspan"].restarts == (Documents((3, 5)),) * 2
    assert shard_local(batch, MeshCoordinate(ulysses=2), mask=Full())["longspan"].restarts is None


def test_no_document_is_read_of_a_batch_without_rows() -> None:
    assert documents_of_batch(VARLEN, 0, 8) is None


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"input_ids": IDS, "attention_mask": 1 - torch.eye(8)[3:5]}, r"attention_mask has a hole in row 0"),
        ({"input_ids": IDS, **VARLEN}, r"the same beginnings of documents in one row, from 0 to its 8 tokens"),
        ({"input_ids": IDS[:1], **VARLEN, "cu_seq_lens_k": torch.tensor([0, 8])}, r"the same beginnings"),
        ({"input_ids": IDS[:1], **VARLEN, "seq_idx": torch.arange(8).view(1, 8) // 4}, r"the same beginnings"),
        ({"input_ids": IDS[:1], **VARLEN, "position_ids": torch.arange(8).view(1, 8) % 4}, r"the same beginn"),
        ({"input_ids": IDS[:1, :7], **VARLEN}, r"the same beginnings of documents .* its 7 tokens"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 8, 8)}, r"must be \[2, 8\] like input_ids"),
        ({"input_ids": IDS, "attention_mask": torch.arange(8).expand(2, 8)}, r"1 for a token and 0 for pad"),
    ],
)
def test_refusals_name_what_is_legal(batch: Any, text: str) -> None:
    with pytest.raises(BatchError, match=text):
        shard_local(batch, MeshCoordinate(ulysses=2))


def test_documents_beside_a_mask_of_ones_or_of_padding_equal_one_device(tmp_path: Path) -> None:
    on_ranks(2, _packed, tmp_path=tmp_path)


def _packed() -> None:
    ids, positions = torch.arange(5, 18).view(1, 13), torch.cat([torch.arange(6), torch.arange(7)]).view(1, 13)
    apart = {"input_ids": ids, "labels": ids, "position_ids": positions}  # without a mask, documents to Transformers too
    ones = torch.ones_like(ids)
    padded = {
        "input_ids": F.pad(ids, (0, 2), value=3), "labels": F.pad(ids, (0, 2), value=-100),
        "position_ids": F.pad(positions, (0, 2), value=1), "attention_mask": F.pad(ones, (0, 2)),
    }  # fmt: skip
    for mesh in (ParallelMesh(2), ParallelMesh(ring=2)):
        assert_as_one_device(mesh, apart | {"attention_mask": ones}, apart)
        assert_as_one_device(mesh, padded, apart)

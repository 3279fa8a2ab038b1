"""A row shorter than the ranks of its sequence is lengthened by padding, with the loss and gradients of one device."""

from pathlib import Path

import pytest
import torch

from longspan.batch.labels import IGNORE
from longspan.batch.shard import shard_local
from longspan.batch.short_rows import lengthen, lengthen_mask
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.mesh import ParallelMesh
from longspan.masks.constructors import BlockSparse, Causal, Documents, Mask, Span, Window
from tests.helpers.one_device import assert_as_one_device
from tests.helpers.ranks import on_ranks

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def test_a_tensor_is_lengthened_behind_its_last_token() -> None:
    assert lengthen(IDS, 1, 2, 9).tolist() == [[5, 6, 7, 9, 9], [8, 9, 10, 9, 9]]
    assert lengthen(IDS[:0], 1, 2, 9).shape == (0, 5)


@pytest.mark.parametrize(
    "mask",
    [Causal(), Window(1) & Documents((2, 1)), Documents((1, 2)) | Causal(), BlockSparse(1, torch.ones(3, 3).tril().tolist())],
)
def test_a_mask_lets_the_given_tokens_see_what_they_saw(mask: Mask) -> None:
    longer = (lengthen_mask(mask, 3, 2) & Span(0, 3)).bands(5, 5)
    assert {band for band in longer if band.q_start < 3} == set((mask & Span(0, 3)).bands(3, 3))


@pytest.mark.parametrize(("ulysses", "ring"), [(4, 1), (2, 2), (1, 5)])
def test_every_rank_holds_a_token_and_nobody_learns_from_those_added(ulysses: int, ring: int) -> None:
    ranks = [
        MeshCoordinate(ring=ring, ulysses=ulysses, ring_rank=r, ulysses_rank=u, zigzag=ring > 1)
        for r in range(ring)
        for u in range(ulysses)
    ]
    parts = [shard_local({"input_ids": IDS, "labels": IDS}, rank) for rank in ranks]
    assert all(part["input_ids"].shape == (2, 1) for part in parts)
    learned = sorted(int(label) for part in parts for label in part["shift_labels"].flatten() if label != IGNORE)
    assert learned == [6, 7, 9, 10]
    info = parts[0]["longspan"]
    assert (info.tokens, info.given_tokens, info.num_labels) == (ulysses * ring, 3, 4)
    assert info.padding == (Span(0, 3),) * 2
    assert info.last_counted_position == 2


def test_short_rows_equal_one_device(tmp_path: Path) -> None:
    on_ranks(4, _trained, tmp_path=tmp_path)


def _trained() -> None:
    packed = {"position_ids": torch.tensor([[0, 0, 1]]), "labels": torch.tensor([[5, IGNORE, 7]])}
    whole = {"input_ids": IDS, "labels": IDS}
    for mesh in (ParallelMesh(4), ParallelMesh(2, 2)):
        assert_as_one_device(mesh, whole, whole)
        assert_as_one_device(mesh, {"input_ids": IDS[:1], **packed}, {"input_ids": IDS[:1], **packed})
        apart = whole | {"position_ids": packed["position_ids"].expand(2, 3)}  # which means documents to Transformers
        assert_as_one_device(mesh, whole, apart, mask=Documents((1, 2)) & Causal())

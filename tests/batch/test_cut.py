"""Tensors are cut where their dimension of tokens is declared; the parts of all ranks are the whole."""

from typing import Any

import pytest
import torch

from longspan.batch.cut import content_hash
from longspan.batch.labels import IGNORE
from longspan.batch.shard import shard_local
from longspan.distributed.coordinate import MeshCoordinate
from longspan.errors import BatchError, LongspanError, MaskError
from longspan.masks.constructors import Causal, Documents

LAYOUTS = [(1, 1, False), (2, 1, False), (3, 1, False), (1, 2, True), (2, 2, True), (2, 2, False)]


@pytest.mark.parametrize(("ulysses", "ring", "zigzag"), LAYOUTS)
@pytest.mark.parametrize("tokens", [4, 9, 16, 31])
def test_the_parts_of_all_ranks_are_the_whole(ulysses: int, ring: int, zigzag: bool, tokens: int) -> None:
    ids = torch.arange(2 * tokens).view(2, tokens)
    batch = {"input_ids": ids, "labels": ids, "inputs_embeds": torch.randn(2, tokens, 3), "name": "kept as it is"}
    places = [
        MeshCoordinate(ring=ring, ulysses=ulysses, ring_rank=r, ulysses_rank=u, zigzag=zigzag)
        for r in range(ring)
        for u in range(ulysses)
    ]
    parts = [shard_local(batch, coordinate) for coordinate in places]
    positions = torch.cat([part["position_ids"] for part in parts], 1)
    order = positions[0].argsort()
    assert torch.equal(positions[0].sort().values, torch.arange(tokens))
    for name in ("input_ids", "labels", "inputs_embeds"):
        assert torch.equal(torch.cat([part[name] for part in parts], 1)[:, order], batch[name])
    shifted = torch.cat([part["shift_labels"] for part in parts], 1)[:, order]
    assert torch.equal(shifted[:, :-1], ids[:, 1:])  # a rank's last token predicts the next rank's first
    assert (shifted[:, -1] == IGNORE).all()
    assert all(part["longspan"].num_labels == 2 * (tokens - 1) and part["name"] == "kept as it is" for part in parts)
    assert all(part["input_ids"].is_contiguous() for part in parts)


def test_other_tensors_are_cut_where_their_dimension_is_declared() -> None:
    mrope = torch.arange(3 * 8).view(3, 1, 8)
    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.long), "grid": mrope}
    part = shard_local(batch, MeshCoordinate(ulysses=2, ulysses_rank=1), dims={"grid": 2})
    assert torch.equal(part["grid"], mrope[:, :, 4:])


IDS = torch.zeros(2, 8, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "keywords", "error", "text"),
    [
        ({"labels": IDS}, {}, BatchError, r"no input_ids of shape \[batch, tokens\]"),
        ({"input_ids": IDS, "pixels": IDS}, {}, BatchError, r"tensor 'pixels' of shape \[2, 8\] is unknown; .* dims="),
        ({"input_ids": IDS, "token_type_ids": torch.zeros(2, 7)}, {}, BatchError, r"does not have the row's 8 tokens in dim 1"),
        ({"input_ids": IDS[0]}, {}, BatchError, r"no input_ids of shape \[batch, tokens\] but of \[8\] .* dims="),
        ({"input_ids": IDS[:, :0]}, {}, BatchError, r"a row of the batch has no tokens, its shape is \[2, 0\]"),
        ({"input_ids": IDS}, {"mask": Documents((3, 4))}, MaskError, r"7"),
        ({"input_ids": IDS}, {"mask": "causal"}, MaskError, r"mask=str is no mask; pass one of longspan's, like Causal\(\)"),
        ({"input_ids": IDS}, {"mask": [Causal(), IDS]}, MaskError, r"mask=Tensor is no mask"),
        ({"input_ids": IDS.double()}, {}, BatchError, r"input_ids are torch.float64, and must be integers; use input_ids.long"),
        ({"input_ids": IDS, "position_ids": IDS.float()}, {}, BatchError, r"position_ids are torch.float32, and must be int"),
        ({"input_ids": IDS, "attention_mask": {"full_attention": IDS}}, {}, BatchError, r"is a dict; pass a tensor \[2, 8\]"),
    ],
)
def test_refusals_name_what_is_legal(batch: Any, keywords: Any, error: type[LongspanError], text: str) -> None:
    with pytest.raises(error, match=text):
        shard_local(batch, MeshCoordinate(ulysses=2), **keywords)


def test_rows_and_tokens_come_from_the_declared_dims_where_there_are_no_ids() -> None:
    frames, grid = torch.randn(2, 8, 3), torch.randn(5, 2, 8)
    part = shard_local({"grid": grid, "frames": frames}, MeshCoordinate(ulysses=2), dims={"grid": 2, "frames": 1})
    assert torch.equal(part["frames"], frames[:, :4])
    assert torch.equal(part["grid"], grid[:, :, :4])
    assert (part["longspan"].rows, part["longspan"].tokens, part["position_ids"].tolist()) == (2, 8, [[0, 1, 2, 3]] * 2)
    alone = shard_local({"frames": frames[0]}, MeshCoordinate(ulysses=2), dims={"frames": 0})
    assert torch.equal(alone["frames"], frames[0, :4])
    assert (alone["longspan"].rows, alone["longspan"].tokens) == (1, 8)


def test_positions_are_counted_anew_in_documents_of_the_mask() -> None:
    part = shard_local({"input_ids": IDS}, MeshCoordinate(ulysses=2, ulysses_rank=1), mask=Documents((6, 2)))
    assert part["position_ids"].tolist() == [[4, 5, 0, 1]] * 2
    assert part["longspan"].last_position == 5


def test_the_digest_differs_where_content_shape_or_arguments_differ() -> None:
    batches: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"input_ids": IDS}, {}),
        ({"input_ids": IDS + 1}, {}),
        ({"input_ids": IDS.view(1, 16)}, {}),
        ({"input_ids": IDS, "labels": IDS}, {}),
        ({"input_ids": IDS, "labels": IDS}, {"shift": False}),
        ({"input_ids": IDS}, {"mask": Documents((4, 4))}),
    ]
    digests = [shard_local(batch, MeshCoordinate(), **keywords)["longspan"].digest for batch, keywords in batches]
    assert len(set(digests)) == len(batches)
    assert min(digests) >= 0
    assert max(digests) < 2**56
    assert content_hash(b"a row") == content_hash(b"a row") != content_hash(b"another")

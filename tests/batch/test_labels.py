"""Labels are shifted on the whole row, counted once, and refused where nothing could learn them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from longspan.batch.labels import IGNORE, largest_ids, token_labels
from longspan.batch.shard import shard_batch, shard_local
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError
from longspan.masks.constructors import Span
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig
from longspan.parallelize import parallelize
from tests.helpers.ranks import Ranks

IDS = torch.zeros(2, 8, dtype=torch.long)
SHIFTED = torch.tensor([[IGNORE, IGNORE, 3, 4, 5, 6, 7, IGNORE]]).repeat(2, 1)


def test_labels_are_shifted_before_they_are_cut() -> None:
    batch = {"labels": torch.tensor([[3, 4, 5]])}
    assert token_labels(batch, 1, 3, shift=True)["shift_labels"].tolist() == [[4, 5, IGNORE]]
    assert list(batch) == list(token_labels(batch, 1, 3, shift=False)) == ["labels"]
    assert token_labels({}, 1, 3, shift=True) == {}


def test_models_that_predict_in_place_keep_their_labels() -> None:
    ids = torch.arange(8).view(1, 8)
    part = shard_local({"input_ids": ids, "labels": ids}, MeshCoordinate(ulysses=2, ulysses_rank=1), shift=False)
    assert part["labels"].tolist() == [[4, 5, 6, 7]]
    assert "shift_labels" not in part
    assert part["longspan"].num_labels == 8


def test_shifted_labels_of_the_batch_are_cut_and_counted_as_they_are() -> None:
    ids, given = torch.arange(8).view(1, 8), torch.tensor([[IGNORE, IGNORE, 3, 4, 5, 6, 7, IGNORE]])
    for shift in (True, False):
        batch = {"input_ids": ids, "labels": ids.int(), "shift_labels": given.int()}
        part = shard_local(batch, MeshCoordinate(ulysses=2, ulysses_rank=1), shift=shift)
        assert part["shift_labels"].tolist() == [[5, 6, 7, IGNORE]]
        assert part["shift_labels"].dtype == part["labels"].dtype == torch.int64
        assert part["longspan"].num_labels == 5
        assert part["longspan"].num_local_labels == 3


def test_labels_that_are_shifted_already_are_learned_without_any_others(pool: Callable[[int], Ranks]) -> None:
    alone = _decoder()(IDS, shift_labels=SHIFTED).loss.item()
    assert pool(2).run(_learned_from_shifted_alone) == pytest.approx([alone] * 2, rel=1e-12)


def _decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(vocab=13, layers=1, hidden=12, heads=2, kv_heads=2, head_dim=6, ffn=20)).double()


def _learned_from_shifted_alone() -> float:
    mesh = ParallelMesh(2)
    part = shard_batch({"input_ids": IDS, "shift_labels": SHIFTED}, mesh)
    loss: float = parallelize(_decoder(), mesh)(**part).loss.item()
    return loss


@pytest.mark.parametrize(
    ("labels", "dim"),
    [(torch.rand(2, 8), 1), (torch.rand(2, 8) > 0.5, 1), (torch.rand(2, 3, 8), 2), (torch.rand(2, 8, 3), -2), (IDS[0], 0)],
    ids=["fractions", "flags", "the tokens last", "a dim from the end", "one row"],
)
@pytest.mark.parametrize("shift", [True, False])
def test_declared_labels_of_a_loss_of_one_s_own_are_cut_as_they_are(labels: torch.Tensor, dim: int, shift: bool) -> None:
    coordinate = MeshCoordinate(ulysses=2, ulysses_rank=1)
    part = shard_local({"input_ids": IDS, "labels": labels}, coordinate, shift=shift, dims={"labels": dim})
    assert torch.equal(part["labels"], labels.narrow(dim, 4, 4))
    assert part["longspan"].num_labels == 0
    assert "shift_labels" not in part


def test_the_largest_ids_do_not_count_labels_that_are_not_learned_from() -> None:
    assert largest_ids({"input_ids": IDS + 4}, torch.tensor([[IGNORE, 3]])) == (4, 3)
    assert largest_ids({"input_ids": IDS}, torch.tensor([[9, 3]])) == (9, 9)
    assert largest_ids({}, None) == (-1, -1)


@pytest.mark.parametrize(
    ("batch", "keywords", "text"),
    [
        ({"input_ids": IDS, "labels": IDS}, {"mask": Span(0, 4)}, r"token 4 of row 0.* set labels\[0, 5\]"),
        (
            {"input_ids": IDS, "labels": IDS, "attention_mask": (torch.arange(8) > 1).repeat(2, 1)},
            {},
            r"token 0 of row 0 is asked for a prediction, but sees nothing",
        ),
        ({"input_ids": IDS, "labels": IDS - 3}, {}, r"labels holds -3; tokens are 0 or more, and labels too, or -100"),
        ({"input_ids": IDS - 1}, {}, r"input_ids holds -1"),
        ({"input_ids": IDS, "labels": IDS, "shift_labels": IDS[:, 1:]}, {}, r"shift_labels of shape \[2, 7\] do not stand"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, {}, r"\[2, 7\] do not stand beside .*\[2, 8\], but are one token shorter"),
        (
            {"input_ids": IDS[:1], "labels": IDS},
            {},
            r"labels of shape \[2, 8\] do not stand beside input_ids of shape \[1, 8\]",
        ),
        (
            {"input_ids": IDS, "labels": torch.tensor(3)},
            {},
            r"labels of shape \[\] do not stand .* or each row one, of shape \[2\]",
        ),
        ({"input_ids": IDS, "labels": IDS[0]}, {}, r"labels of shape \[8\] do not stand beside"),
        ({"input_ids": IDS, "labels": IDS.unsqueeze(2)}, {}, r"labels of shape \[2, 8, 1\] do not stand beside"),
        ({"input_ids": IDS, "labels": IDS.float()}, {}, r"are torch.float32, and the label of a token is an integer"),
        ({"input_ids": IDS, "labels": IDS > 0}, {}, r"are torch.bool, and the label of a token is an integer; use labels.long"),
        ({"input_ids": IDS, "labels": IDS.tolist()}, {}, r"labels is a list; pass a tensor of integers \[2, 8\]"),
    ],
)
def test_labels_that_nothing_can_learn_are_refused(batch: Any, keywords: Any, text: str) -> None:
    with pytest.raises(BatchError, match=text):
        shard_local(batch, MeshCoordinate(ulysses=2), **keywords)


@pytest.mark.parametrize("labels", [torch.tensor([1, 0]), torch.tensor([0.5, 1.5]), torch.zeros(2, 3), None])
def test_labels_of_rows_are_neither_cut_nor_counted(labels: Any) -> None:
    part = shard_local({"input_ids": IDS, "labels": labels}, MeshCoordinate(ulysses=2))
    assert part["labels"] is labels
    assert part["longspan"].num_labels == 0
    assert "shift_labels" not in part

"""Labels are shifted on the whole row, counted once, and refused where nothing could learn them."""

from typing import Any

import pytest
import torch

from longspan.batch.labels import IGNORE, largest_ids, token_labels
from longspan.batch.shard import shard_local
from longspan.distributed.mesh import MeshCoordinate
from longspan.errors import BatchError
from longspan.masks.constructors import Span

IDS = torch.zeros(2, 8, dtype=torch.long)


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

"""An encoder-decoder's batch has two rows of tokens, each cut by its own length."""

from typing import Any

import pytest
import torch

from longspan.batch.encoder_decoder import has_two_rows, shift_right
from longspan.batch.labels import IGNORE
from longspan.batch.shard import shard_local
from longspan.distributed.coordinate import MeshCoordinate
from longspan.errors import BatchError
from longspan.masks.constructors import Causal

IDS, FEW = torch.full((2, 8), 5), torch.full((2, 4), 5)
PAIR = {"input_ids": IDS, "decoder_input_ids": FEW, "labels": FEW}
EMPTY = torch.ones_like(IDS).index_fill(0, torch.tensor([1]), 0)


@pytest.mark.parametrize(
    ("batch", "keywords", "text"),
    [
        (PAIR, {"shift": True}, r"labels of an encoder-decoder stand where they are predicted.*shift=False"),
        (PAIR, {"mask": Causal()}, r"mask= says who may look at whom in one row of tokens, and an encoder-decoder has two"),
        (PAIR, {"dims": {"labels": 3}}, r"of the decoder's tensors .*'labels' of shape"),
        (PAIR | {"decoder_input_ids": FEW[:1], "labels": FEW[:1]}, {}, r"the encoder was given 2 rows and the decoder 1"),
        (PAIR | {"attention_mask": EMPTY}, {}, r"row 1 is padding alone.* set them to -100"),
        (PAIR | {"decoder_attention_mask": torch.ones(2, 5)}, {}, r"of the decoder's tensors .*must be \[2, 4\]"),
        (PAIR | {"decoder_grid": FEW}, {}, r"of the decoder's tensors .*tensor 'grid' of shape \[2, 4\] is unknown"),
        (PAIR | {"labels": IDS}, {}, r"of the decoder's tensors .*labels of shape \[2, 8\] do not stand beside .*\[2, 4\]"),
    ],
)
def test_refusals_name_what_is_legal(batch: Any, keywords: Any, text: str) -> None:
    with pytest.raises(BatchError, match=text):
        shard_local(batch, MeshCoordinate(ulysses=2), **{"shift": False} | keywords)


def test_each_row_is_cut_by_its_own_length() -> None:
    assert has_two_rows(PAIR)
    assert not has_two_rows({"input_ids": IDS, "labels": FEW})
    part = shard_local(PAIR, MeshCoordinate(ulysses=2, ulysses_rank=1), shift=False)
    shapes = {name: list(value.shape) for name, value in part.items() if name != "longspan"}
    assert shapes == {
        "input_ids": [2, 4], "position_ids": [2, 4], "decoder_input_ids": [2, 2], "decoder_position_ids": [2, 2],
        "labels": [2, 2],
    }  # fmt: skip
    info = part["longspan"]
    assert (info.tokens, info.target.tokens, info.num_labels, info.largest_label) == (8, 4, 8, 5)
    assert info.target.positions == (range(2, 4),)


def test_the_decoder_is_given_what_comes_before_each_label() -> None:
    labels = torch.tensor([[7, 8, 9, IGNORE], [4, 5, IGNORE, IGNORE]])
    assert shift_right(labels, 2, 1).tolist() == [[2, 7, 8, 9], [2, 4, 5, 1]]

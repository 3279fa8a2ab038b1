"""Positional arguments of a call are honoured or refused as keywords are."""

import pytest
import torch

from longspan import ModelError, ParallelMesh, parallelize, shard_batch
from tests.helpers.hf_models import build

IDS = torch.arange(3, 15).unsqueeze(0)


def test_a_positional_mask_is_refused_and_positional_tokens_are_honoured() -> None:
    model = parallelize(build("llama"), mesh := ParallelMesh())
    part = shard_batch({"input_ids": IDS, "labels": IDS}, mesh)
    expected = model(**part).loss
    ids = part.pop("input_ids")
    assert model(ids, **part).loss == expected
    with pytest.raises(ModelError, match="attention_mask= means the whole sequence"):
        model(ids, torch.ones_like(ids), **part)
    with pytest.raises(TypeError, match="multiple values"):
        model(ids, input_ids=ids, **part)

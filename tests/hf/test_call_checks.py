"""Calls that mean the whole sequence are refused."""

import pytest
import torch

from longspan import ModelError, ParallelMesh, parallelize, shard_batch
from tests.helpers.hf_models import build


def test_calls_that_mean_the_whole_sequence_are_refused() -> None:
    mesh = ParallelMesh()
    model = parallelize(build("llama"), mesh)
    part = shard_batch({"input_ids": torch.ones(1, 8, dtype=torch.long)}, mesh)
    for call, text in [
        (lambda: model(input_ids=part["input_ids"]), r"call model\(\*\*shard_batch\(batch, mesh\)\)"),
        (lambda: model.generate(part["input_ids"], max_new_tokens=1), r"to generate, unparallelize\(model\) first"),
        (lambda: model(**part, use_cache=True), "use_cache= means the whole sequence"),
        (lambda: model(**part, logits_to_keep=1), "logits_to_keep= means the whole sequence"),
        (lambda: model(**part, output_attentions=True), "output_attentions= means the whole sequence"),
    ]:
        with pytest.raises(ModelError, match=text):
            call()

"""What BatchInfo refuses when a model meets a step: tokens and labels that it does not know."""

from collections.abc import Callable

import pytest
import torch

from longspan import BatchError, parallelize, shard_batch
from tests.helpers.memory_models import model_of
from tests.helpers.ranks import Ranks, mesh_of


def test_a_token_or_label_that_the_model_does_not_know_is_refused_by_every_rank(pool: Callable[[int], Ranks]) -> None:
    first, second = pool(2).run(unknown_tokens)
    assert first == second
    assert first == [
        "the step holds token or label 97, and Decoder knows 0 to 96; use the model's own tokenizer",
        "the step holds token or label 200, and LlamaForCausalLM knows 0 to 96; use the model's own tokenizer",
        "labels holds -1; tokens are 0 or more, and labels too, or -100",
    ]


def unknown_tokens() -> list[str]:
    """Two replicas: the second alone has the token, the label, and what is negative."""
    mesh, texts = mesh_of(1, 1), []
    for name, key, wrong in (("decoder", "input_ids", 97), ("llama", "labels", 200), ("llama", "labels", -1)):
        model = parallelize(model_of(name), mesh)
        batch = {"input_ids": torch.full((1, 9), 5), "labels": torch.full((1, 9), 5)}
        batch[key][0, 4] = wrong if mesh.coordinate.data_rank else 5
        with pytest.raises(BatchError) as error:
            model(**shard_batch(batch, mesh))
        texts.append(str(error.value))
    return texts

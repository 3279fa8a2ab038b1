"""The relative bias of the T5 family, by distance; another bias is refused."""

from collections.abc import Callable
from copy import deepcopy
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor

from longspan import parallelize, shard_batch, unshard
from tests.helpers.encoder_decoders import TINY_T5, build_pair, refused_pair
from tests.helpers.hf_models import assert_gradients
from tests.helpers.ranks import Ranks, mesh_of


def test_a_t5_encoder_alone(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(encoder_alone)


def encoder_alone() -> None:
    mesh = mesh_of(2)
    reference = transformers.T5EncoderModel(transformers.T5Config(**TINY_T5)).train()
    model = parallelize(deepcopy(reference), mesh)
    ids = torch.randint(4, 97, (2, 23), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    weight = torch.randn(2, 23, 32, generator=torch.Generator().manual_seed(2)) * mask.unsqueeze(2)
    (reference(input_ids=ids, attention_mask=mask).last_hidden_state * weight).sum().backward()
    found = model(**shard_batch({"input_ids": ids, "attention_mask": mask}, mesh)).last_hidden_state
    (unshard(found, mesh, tokens=23) * weight).sum().backward()
    assert_gradients(model, reference, 1e-5)


def test_a_bias_that_is_not_of_distances_is_refused(pool: Callable[[int], Ranks]) -> None:
    (message,) = pool(1).run(refused_places)
    assert "adds a bias that is not of distances alone" in message


def refused_places() -> str:
    """Of a T5 whose bias knows where a key stands, not only how far away."""
    model = build_pair("t5")
    for module in model.modules():
        if getattr(module, "has_relative_attention_bias", False):
            module.compute_bias = MethodType(compute_bias_of_places, module)
    return refused_pair(model)


def compute_bias_of_places(
    self: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: int = 0
) -> Tensor:
    own = type(self).compute_bias(self, query_length, key_length, device, past_seen_tokens)
    return own + torch.arange(key_length).to(own)

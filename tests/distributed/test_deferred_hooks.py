"""Hooks of the user on gradients: called with the mean over the ranks, as on one device, or refused on shards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import LongspanError, forward_backward, parallelize, shard_batch, unparallelize
from tests.helpers.hf_models import build
from tests.helpers.ranks import Ranks, mesh_of

IDS = torch.randint(3, 97, (2, 23), generator=torch.Generator().manual_seed(1))
BATCHES = [{"input_ids": IDS[row : row + 1], "labels": IDS[row : row + 1]} for row in range(2)]
LIMIT = 1e-3
"""A gradient is clamped to it: not linear, so that the clamped parts of ranks do not add up to the clamped mean."""


def clamp_after(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.clamp_(-LIMIT, LIMIT)


def hooked(model: Any) -> list[Any]:
    feed = model.model.layers[0].mlp
    return [
        feed.down_proj.weight.register_hook(lambda grad: grad.clamp(-LIMIT, LIMIT)),
        feed.down_proj.weight.register_hook(lambda grad: grad * 2),
        feed.up_proj.weight.register_post_accumulate_grad_hook(clamp_after),
    ]


def step(model: Any, parts: Any) -> dict[str, Tensor]:
    """Gradients of two backwards."""
    model.zero_grad()
    for part in parts:
        model(**part).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(grad.norm().item() for grad in expected.values())
    for name, grad in expected.items():
        assert (found[name] - grad).norm().item() <= 1e-5 * max(grad.norm().item(), 1e-3 * largest), name


@pytest.mark.parametrize("before", [False, True])
def test_hooks_on_gradients_are_those_of_one_device(before: bool, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(gradients_with_hooks, before)


def gradients_with_hooks(before: bool) -> None:
    mesh = mesh_of(2)
    reference, model = build("llama"), build("llama")
    free = step(reference, BATCHES)
    handles = hooked(model) if before else []
    model = parallelize(model, mesh)
    parts = [shard_batch(batch, mesh) for batch in BATCHES]
    step(model, parts) if before else assert_equal(step(model, parts), free)
    handles = handles or hooked(model)
    hooked(reference)
    expected = step(reference, BATCHES)
    assert (expected["model.layers.0.mlp.down_proj.weight"] - free["model.layers.0.mlp.down_proj.weight"]).norm() > LIMIT
    model.zero_grad()
    forward_backward(model, parts)  # the first call that meets the hooks
    assert_equal({name: parameter.grad for name, parameter in model.named_parameters()}, expected)
    assert_equal(step(model, parts), expected)
    for handle in handles:
        handle.remove()
    assert_equal(step(model, parts), free)
    hooked(model)
    model(**parts[0])
    assert_equal(step(unparallelize(model), BATCHES), expected)


@pytest.mark.parametrize("degree", [{"zero": 2}, {"zero": 3}, {"tensor": 2}])
def test_hooks_on_shards_are_refused_by_name(degree: dict[str, int], pool: Callable[[int], Ranks]) -> None:
    pool(2).run(hooks_on_shards, degree.get("zero", 0), degree.get("tensor", 1))


def hooks_on_shards(zero: int, tensor: int) -> None:
    mesh = mesh_of(2 // tensor, tensor=tensor)
    part, text = shard_batch(BATCHES[0], mesh), r"parameter '[a-z0-9_.]*_proj.weight' has a hook on its gradient"
    model = build("llama")
    hooked(model)
    with pytest.raises(LongspanError, match=text):
        parallelize(model, mesh, zero=zero)
    model = parallelize(build("llama"), mesh, zero=zero)
    model(**part).loss.backward()
    handles = hooked(model)
    with pytest.raises(LongspanError, match=text):
        model(**part)
    for handle in handles:
        handle.remove()
    model(**part).loss.backward()


@pytest.mark.parametrize("zero", [2, 3])
def test_a_sharded_model_of_another_dtype_is_refused(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(converted, zero)


def converted(zero: int) -> None:
    mesh = mesh_of(2)
    model = parallelize(build("llama"), mesh, zero=zero).float()
    with pytest.raises(LongspanError, match=r"was torch.float64 when it was sharded and is torch.float32 now"):
        model(**shard_batch(BATCHES[0], mesh))

"""Hooks of the user on gradients: called with the mean over the ranks, as on one device, or refused on shards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from longspan import LongspanError, ModelError, forward_backward, parallelize, shard_batch, unparallelize
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


def full(x: Tensor) -> Tensor:
    whole: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return whole


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


def test_a_hook_between_forward_and_backward_gets_the_mean_or_is_refused(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(late_hooks)


def late_hooks() -> None:
    """Autograd has copied the hooks of the head, whose gradient is the first, before any code of longspan runs."""
    mesh, reference = mesh_of(2), build("llama")
    hooked(reference)
    model = parallelize(build("llama"), mesh)
    part = shard_batch(BATCHES[0], mesh)
    seen: list[Tensor] = []
    loss = model(**part).loss
    handle = model.lm_head.weight.register_hook(seen.append)
    with pytest.raises(ModelError, match=r"parameter 'lm_head.weight' got a hook on its gradient after the forward.*register"):
        loss.backward()
    handle.remove()
    assert not seen
    loss = model(**part).loss
    hooked(model)
    loss.backward()
    expected = step(reference, BATCHES[:1])
    assert_equal({name: parameter.grad for name, parameter in model.named_parameters()}, expected)
    model = parallelize(build("llama"), mesh)
    inside: list[Any] = []
    model.model.layers[1].mlp.register_full_backward_hook(lambda *_: inside.extend(hooked(model) if not inside else []))
    assert_equal(step(model, [part]), expected)


def test_a_hook_that_one_rank_alone_has_is_no_reason_to_average_more_often(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(a_logger_on_one_rank)


def a_logger_on_one_rank() -> None:
    mesh, reference, model = mesh_of(2), build("llama"), build("llama")
    expected, seen = step(reference, BATCHES), list[Tensor]()
    model = parallelize(model, mesh)
    if mesh.fsdp_group.rank() == 0:
        model.lm_head.weight.register_hook(seen.append)
    forward_backward(model, shard_batch(BATCHES, mesh))
    scale = {name: grad / 2 for name, grad in expected.items()}
    assert_equal({name: parameter.grad for name, parameter in model.named_parameters()}, scale)
    assert len(seen) == (2 if mesh.fsdp_group.rank() == 0 else 0)


def test_a_hook_that_is_registered_between_micro_batches_is_refused(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(hook_between_micro_batches)


def hook_between_micro_batches() -> None:
    mesh = mesh_of(2)
    model = parallelize(build("llama"), mesh)
    handles: list[Any] = []
    model.model.norm.register_forward_hook(lambda *_: handles.extend(hooked(model) if not handles else []))
    with pytest.raises(ModelError, match=r"was registered inside forward_backward.*register it before"):
        forward_backward(model, shard_batch(BATCHES, mesh))


def test_a_gradient_that_a_hook_keeps_stays_as_it_is(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(kept_gradients)


def kept_gradients() -> None:
    mesh, seen, copies = mesh_of(2), list[Tensor](), list[Tensor]()
    model = parallelize(build("llama"), mesh)
    model.lm_head.weight.register_hook(seen.append)
    model.lm_head.weight.register_hook(lambda grad: copies.append(grad.clone()))
    for part in [shard_batch(batch, mesh) for batch in BATCHES]:
        model(**part).loss.backward()
    assert len(seen) == 2
    assert all(map(torch.equal, seen, copies))


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


@pytest.mark.parametrize("degree", [{"zero": 2}, {"zero": 3}, {"tensor": 2}])
def test_hooks_on_shards_after_the_forward_are_refused(degree: dict[str, int], pool: Callable[[int], Ranks]) -> None:
    pool(2).run(hooks_after_the_forward, degree.get("zero", 0), degree.get("tensor", 1))


def hooks_after_the_forward(zero: int, tensor: int) -> None:
    """On the parameters that the model has then (gathered ones at zero=2), and on those that an optimizer has."""
    mesh = mesh_of(2 // tensor, tensor=tensor)
    model = parallelize(build("llama"), mesh, zero=zero)
    part = shard_batch(BATCHES[0], mesh)
    free = step(model, [part])
    held = dict(model.named_parameters())
    for late in (lambda name: model.get_parameter(name), lambda name: held[name]):
        for register in ("register_hook", "register_post_accumulate_grad_hook"):
            loss = model(**part).loss
            parameter = late("model.layers.0.mlp.down_proj.weight")
            if zero and register != "register_hook" and isinstance(parameter, DTensor):
                continue  # FSDP2 calls it with the mean
            handle = getattr(parameter, register)(lambda _: pytest.fail("called with one rank's part"))
            with pytest.raises(ModelError, match=r"parameter 'model.layers.0.mlp.down_proj.weight' has a hook on its gradient"):
                loss.backward()
            with pytest.raises(ModelError, match=r"parameter 'model.layers.0.mlp.down_proj.weight' has a hook on its gradient"):
                model(**part)
            handle.remove()
    for parameter in held.values():
        parameter.grad = None  # model.zero_grad() does so to gathered ones
    for name, grad in step(model, [part]).items():
        torch.testing.assert_close(full(grad), full(free[name]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_model_of_another_dtype_is_refused(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(converted, zero)


def converted(zero: int) -> None:
    mesh = mesh_of(2)
    model = parallelize(build("llama"), mesh, zero=zero).float()
    with pytest.raises(LongspanError, match=r"was torch.float64 when [a-z ]* and is torch.float32 now"):
        model(**shard_batch(BATCHES[0], mesh))

"""bf16, autocast and fp16 with a scaler: as exact as one device, and a step skipped by all ranks or by none."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from longspan import parallelize, shard_batch
from tests.helpers.hf_models import batches, build, forward_alone, forward_cut, squared_error
from tests.helpers.ranks import Ranks, mesh_of


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_as_exact_as_one_device(autocast: bool, pool: Callable[[int], Ranks]) -> None:
    for ours, theirs in pool(2).run(half_errors, autocast):
        assert (ours / theirs) ** 0.5 <= 1.2


def half_errors(autocast: bool) -> tuple[float, float]:
    """Squared errors against fp64 of two ranks and of one device, over 8 seeds and all parameters."""
    mesh, ours, theirs = mesh_of(2, 1), 0.0, 0.0
    for seed in range(8):
        exact = build("llama")
        ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(seed))
        whole = {"input_ids": ids, "labels": ids}
        half = deepcopy(exact).float() if autocast else deepcopy(exact).bfloat16()
        model = parallelize(deepcopy(half), mesh)
        forward_alone(exact, whole, False)[0].backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            alone, found = forward_alone(half, whole, False)[0], forward_cut(model, whole, False, mesh, True)[0]
        alone.backward()
        found.backward()
        ours, theirs = ours + squared_error(model, exact), theirs + squared_error(half, exact)
    return ours, theirs


@pytest.mark.parametrize("zero", [0, 3])
def test_all_ranks_skip_a_step_whose_gradient_is_infinite_on_one(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(scaled, zero)


def scaled(zero: int) -> None:
    """fp16 autocast: two steps as on one device, then one with an infinite gradient, which rank 1 alone may hold."""
    mesh, whole, reference = mesh_of(2, 1), batches("even", False), build("llama").float()
    model = parallelize(deepcopy(reference), mesh, zero=zero)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (reference, model)]
    for step in range(3):
        before = [local(p).clone() for p in model.parameters()]
        with torch.autocast("cpu", torch.float16):
            losses = [forward_alone(reference, whole, False)[0], model(**shard_batch(whole, mesh)).loss]
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-3)
        for scaler, loss, optimizer in zip(scalers, losses, optimizers):
            scaler.scale(loss).backward()
            if step == 2:
                spoiled = local(optimizer.param_groups[0]["params"][-1].grad)
                spoiled.fill_(float("inf") if scaler is scalers[0] or zero == 0 or dist.get_rank() == 1 else 0.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale() == (2.0**9 if step == 2 else 2.0**10)
        assert all(torch.equal(local(p), was) for p, was in zip(model.parameters(), before)) is (step == 2)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

"""Pipeline parallel: the decoder on every schedule and beside the other axes is one device's; splits are integers."""

import gc
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longspan import (
    BatchError,
    MemoryOptions,
    ModelError,
    ParallelMesh,
    PipelineOptions,
    clip_grad_norm_,
    forward_backward,
    parallelize,
    shard_batch,
    unparallelize,
)
from longspan.distributed import grad_norm, pipeline_parallel
from longspan.distributed.pipeline_parallel import PipelinePlan, Skipped, SkippedHead, skipping
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig
from tests.helpers.ranks import Ranks

SHAPE = DecoderConfig(vocab=97, layers=5, hidden=32, heads=12, kv_heads=4, head_dim=4, ffn=24)
ROWS, TOKENS, MICRO_BATCHES = 2, 23, 4
INTERLEAVED = PipelineOptions("interleaved", stages_per_rank=2)
PLAIN = MemoryOptions()
HOOK_AFTER = "register_post_accumulate_grad_hook"


def test_what_is_skipped_passes_its_input_and_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 7))
    plan = PipelinePlan(blocks=("0", "1"), first=(), last=(), heads=("2",), hidden=3, hidden_of=lambda output: output)
    before, x = list(model), torch.ones(2, 3)
    with skipping(model, plan, ["0", "2"]):
        assert [type(module) for module in model] == [Skipped, nn.Linear, SkippedHead]
        assert torch.equal(model[:2](x), before[1](x))
        assert model(x).shape == ()
    assert list(model) == before


CASES: list[tuple[int, dict[str, int], PipelineOptions]] = [
    (2, {"pipeline": 2}, PipelineOptions()),
    (2, {"pipeline": 2}, INTERLEAVED),
    (4, {"pipeline": 2, "ulysses": 2}, PipelineOptions("gpipe")),
]
MORE: list[tuple[int, dict[str, int], PipelineOptions]] = [
    (4, {"pipeline": 2}, PipelineOptions()), (4, {"pipeline": 4}, PipelineOptions()),
    (4, {"pipeline": 2, "ring": 2}, INTERLEAVED),
    (4, {"pipeline": 2, "tensor": 2}, PipelineOptions()), (8, {"pipeline": 2, "tensor": 2, "ulysses": 2}, INTERLEAVED),
    (8, {"pipeline": 2, "tensor": 2, "ring": 2}, PipelineOptions()), (8, {"pipeline": 2, "ulysses": 2}, PipelineOptions()),
    (8, {"pipeline": 4, "ulysses": 2}, PipelineOptions()), (8, {"pipeline": 2, "tensor": 2}, PipelineOptions()),
    (8, {"pipeline": 2, "ulysses": 2, "ring": 2}, PipelineOptions()), (8, {"pipeline": 2, "ring": 2}, PipelineOptions("gpipe")),
    (4, {"pipeline": 4}, INTERLEAVED),
]  # fmt: skip


@pytest.mark.parametrize(("zero", "tied"), [(0, True), (3, False)])
@pytest.mark.parametrize(("ranks", "degrees", "options"), CASES, ids=str)
def test_it_is_one_device(
    ranks: int, degrees: dict[str, int], options: PipelineOptions, zero: int, tied: bool, pool: Callable[[int], Ranks]
) -> None:
    pool(ranks).run(equals_one_device, degrees, options, zero, tied, MemoryOptions(recompute="full") if zero else PLAIN)


def test_eight_ranks_of_three_axes(pool: Callable[[int], Ranks]) -> None:
    pool(8).run(equals_one_device, {"pipeline": 2, "tensor": 2, "ulysses": 2}, PipelineOptions(), 3, True, PLAIN)


def test_every_rank_of_a_stage_may_have_a_copy_of_its_parameters(pool: Callable[[int], Ranks]) -> None:
    pool(4).run(equals_one_device, {"pipeline": 2, "ulysses": 2}, PipelineOptions(), 3, True, PLAIN, 1)


@pytest.mark.long
def test_shards_over_half_of_the_ranks_of_a_stage(pool: Callable[[int], Ranks]) -> None:
    pool(8).run(equals_one_device, {"pipeline": 2}, PipelineOptions(), 3, True, PLAIN, 2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("tied", "memory"),  # make test has a tied model without options
    [(False, PLAIN), (True, MemoryOptions(recompute="selective", head_chunks=2))],
    ids=["plain", "tied, options"],
)
@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize(("ranks", "degrees", "options"), CASES + MORE, ids=str)
def test_it_is_one_device_with_every_option(
    ranks: int, degrees: dict[str, int], options: PipelineOptions, zero: int, tied: bool, memory: MemoryOptions,
    pool: Callable[[int], Ranks],
) -> None:  # fmt: skip
    pool(ranks).run(equals_one_device, degrees, options, zero, tied, memory)


def model_of(tied: bool = False, **changes: Any) -> Decoder:
    model = Decoder(DecoderConfig(**(vars(SHAPE) | {"tied": tied} | changes))).double()
    for parameter in model.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)  # else attention is uniform
    return model


def batches_of(mesh: ParallelMesh, count: int = MICRO_BATCHES) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """All rows of a step for one device, and the micro-batches of this replica; one of its rows has no labels."""
    data, at = mesh.coordinate.data, mesh.coordinate.data_rank
    ids = torch.randint(0, SHAPE.vocab, (count, data, ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, 0, 0, :9] = labels[-1, -1, 1] = -100
    whole = {name: x.flatten(0, 2) for name, x in {"input_ids": ids, "labels": labels}.items()}
    return whole, [{"input_ids": i[at], "labels": one[at]} for i, one in zip(ids, labels, strict=True)]


def full(x: Tensor) -> Tensor:
    whole: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return whole


def equals_one_device(
    degrees: Mapping[str, int], options: PipelineOptions, zero: int, tied: bool, memory: MemoryOptions,
    fsdp_ranks: int | None = None,
) -> None:  # fmt: skip
    mesh = ParallelMesh(**degrees)
    reference = model_of(tied, layers=max(SHAPE.layers, mesh.coordinate.pipeline * options.stages_per_rank))
    model = parallelize(deepcopy(reference), mesh, zero=zero, memory=memory, fsdp_ranks=fsdp_ranks, pipeline=options)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, reference)]
    whole, mine = batches_of(mesh)
    for step in range(3):
        loss = reference(**whole).loss
        loss.backward()
        parts = shard_batch(mine, mesh)
        if step == 1:  # an evaluation between steps of training
            with torch.no_grad():
                torch.testing.assert_close(forward_backward(model, parts), loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(forward_backward(model, parts), loss.detach(), rtol=1e-12, atol=0)
        assert_gradients_and_norm(model, reference)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def assert_gradients_and_norm(model: Decoder, reference: Decoder) -> None:
    named = dict(reference.named_parameters(remove_duplicate=False))
    total = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
    for name, parameter in model.named_parameters():
        wanted = named[name].grad
        assert wanted is not None
        assert parameter.grad is not None, name
        error = (full(parameter.grad) - wanted).norm()
        assert error <= 1e-10 * max(wanted.norm(), 1e-3 * total), f"{name} is off by {error:.1e}"
    norm = clip_grad_norm_(model, 1e9)
    assert abs(norm - total) <= 1e-10 * total, f"the norm is off by {norm - total:.1e}"


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_steps_add_to_the_gradients_from_before(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(accumulated, zero)


def accumulated(zero: int) -> None:
    """Two calls without zero_grad, on gradients that were there before the first."""
    mesh, reference = ParallelMesh(pipeline=2), model_of(True)
    model = parallelize(deepcopy(reference), mesh, zero=zero)
    whole, mine = batches_of(mesh, 2)
    for each in (model, reference):
        for parameter in each.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
    for _ in range(2):
        reference(**whole).loss.backward()
        forward_backward(model, shard_batch(mine, mesh))
        with pytest.raises(ModelError, match="put labels into the batch"):
            forward_backward(model, shard_batch([{"input_ids": mine[0]["input_ids"]}], mesh))
    assert_gradients_and_norm(model, reference)


def test_buffers_of_earlier_shapes_are_freed(pool: Callable[[int], Ranks]) -> None:
    least, most = pool(2).run(buffers)[1]
    assert most <= least


def buffers() -> tuple[int, int]:
    mesh, counts = ParallelMesh(pipeline=2), list[int]()
    model = parallelize(model_of(), mesh)
    for tokens in (24, 25, 26, 27, 24):
        ids = torch.ones(1, tokens, dtype=torch.long)
        forward_backward(model, shard_batch([{"input_ids": ids, "labels": ids}] * 2, mesh))
        gc.collect()
        counts.append(sum(isinstance(held, Tensor) for held in gc.get_objects()))
    return counts[1], counts[-1]


def test_a_replica_without_rows_in_some_micro_batches(pool: Callable[[int], Ranks]) -> None:
    pool(4).run(rows_of_one_replica)


def rows_of_one_replica() -> None:
    mesh, reference = ParallelMesh(pipeline=2), model_of()
    model = parallelize(deepcopy(reference), mesh)
    whole, mine = batches_of(mesh, 2)
    last = slice(3 * ROWS) if mesh.coordinate.data_rank == 0 else slice(0)  # of the second replica's second micro-batch
    mine[1] = {name: x[last] for name, x in mine[1].items()}
    reference(**{name: x[: 3 * ROWS] for name, x in whole.items()}).loss.backward()
    forward_backward(model, shard_batch(mine, mesh))
    named = dict(reference.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-10, atol=1e-12)


def test_a_frozen_tied_weight_is_not_summed(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(frozen_tied)


def frozen_tied() -> None:
    mesh, reference = ParallelMesh(pipeline=2), model_of(True)
    reference.embed.requires_grad_(False)
    model = parallelize(deepcopy(reference), mesh)
    whole, mine = batches_of(mesh)
    reference(**whole).loss.backward()
    forward_backward(model, shard_batch(mine, mesh))
    named = dict(reference.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-10, atol=1e-12)
        assert (parameter.grad is None) == (name in ("embed.weight", "head.weight")), name


def test_each_rank_holds_its_layers_under_their_own_names(pool: Callable[[int], Ranks]) -> None:
    first, last = pool(2).run(held)
    assert {name.split(".")[1] for name in first if "blocks" in name} == {"0", "1", "2"}
    assert {name.split(".")[1] for name in last if "blocks" in name} == {"3", "4"}
    assert "embed.weight" in first
    assert {"norm.weight", "head.weight"} < set(last)


def held() -> list[str]:
    model = parallelize(model_of(), ParallelMesh(pipeline=2))
    return [name for name, _ in model.named_parameters()]


def test_what_a_pipeline_cannot_do_is_refused(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(refused)


def refused() -> None:
    mesh = ParallelMesh(pipeline=2)
    model = parallelize(model_of(), mesh)
    _, mine = batches_of(mesh)
    with pytest.raises(ModelError, match=r"needs a mesh with pipeline > 1"):
        parallelize(model_of(), ParallelMesh(), pipeline=PipelineOptions("gpipe"))
    with pytest.raises(ModelError, match=r"the arguments of parallelize differ between ranks: pipeline is "):
        parallelize(model_of(), mesh, pipeline=PipelineOptions("gpipe" if mesh.coordinate.pipeline_rank else "1f1b"))
    with pytest.raises(ModelError, match=r"has some of its layers on each rank and cannot be called; use forward_backward"):
        model(**shard_batch(mine[0], mesh))
    with pytest.raises(ModelError, match="cut over tensor ranks or pipeline stages cannot be made whole"):
        unparallelize(model)
    shorter = {name: x[:, :-1] for name, x in mine[0].items()}
    for parts in (shard_batch([mine[0], shorter], mesh), [shard_batch(one, mesh) for one in (mine[0], shorter)]):
        with pytest.raises(
            BatchError, match=r"0 has input_ids \[2, 23\] of torch.int64 on this rank and micro-batch 1 has input_ids \[2, 22\]"
        ):
            forward_backward(model, parts)
    named = {"named": mine[0]["input_ids"].double(), "labels": mine[0]["labels"]}
    with pytest.raises(ModelError, match="needs input_ids or inputs_embeds, and a micro-batch has neither"):
        forward_backward(model, shard_batch([named], mesh, dims={"named": 1}))
    unknown = {"input_ids": mine[0]["input_ids"] + SHAPE.vocab, "labels": mine[0]["labels"]}
    with pytest.raises(BatchError, match=r"the step holds token or label \d+, and Decoder knows 0 to 96"):
        forward_backward(model, shard_batch([unknown], mesh))
    unlabelled = {"input_ids": mine[0]["input_ids"]}
    with pytest.raises(ModelError, match="a pipeline computes a loss only; put labels into the batch"):
        forward_backward(model, shard_batch([unlabelled], mesh))
    made = {"inputs_embeds": torch.zeros(ROWS, TOKENS, SHAPE.hidden, dtype=torch.float64), "labels": mine[0]["labels"]}
    parts = shard_batch([made], mesh)
    parts[0]["inputs_embeds"].requires_grad_()
    with pytest.raises(ModelError, match="inputs_embeds come from a module outside the pipeline"):
        forward_backward(model, parts)
    with pytest.raises(ModelError, match=r"was given the parameters of one pipeline stage.*pass the model"):
        clip_grad_norm_(model.parameters(), 1.0)
    assert forward_backward(model, shard_batch(mine[:1], mesh)) > 0  # fewer micro-batches than stages
    model.to(torch.float32)
    with pytest.raises(ModelError, match=r"was torch.float64 when the model was split into stages and is torch.float32 now"):
        forward_backward(model, shard_batch(mine[:1], mesh))
    model.to(torch.float64)
    other = mine[mesh.coordinate.pipeline_rank]
    with pytest.raises(BatchError, match="ranks 0 and 1 share a sequence but were given different batches"):
        shard_batch([other], mesh)
    with pytest.raises(
        ModelError, match="interleaved stages need micro-batches in whole rounds of 2 ranks, and the step has 5"
    ):
        forward_backward(parallelize(model_of(), mesh, pipeline=INTERLEAVED), shard_batch(batches_of(mesh, 5)[1], mesh))


def test_what_one_stage_alone_has_is_refused_on_every_stage(pool: Callable[[int], Ranks]) -> None:
    for texts in zip(*pool(2).run(refused_of_one_stage), strict=True):
        assert len(set(texts)) == 1


def refused_of_one_stage() -> list[str]:
    """Hooks on the copy of a tied weight, hooks on shards, and a parameter that was frozen, all of the last stage."""
    mesh, texts = ParallelMesh(pipeline=2), list[str]()
    parts, last = shard_batch(batches_of(mesh)[1], mesh), mesh.coordinate.pipeline_rank == 1

    def refuse(model: Any, text: str) -> None:
        with pytest.raises(ModelError, match=text) as found:
            forward_backward(model, parts)
        texts.append(str(found.value))

    tied = model_of(True)
    handle = tied.head.weight.register_hook(lambda grad: grad.clamp(-1e-2, 1e-2))
    with pytest.raises(
        ModelError, match=r"parameter 'embed.weight' has a hook on its gradient, and is one weight with another"
    ):
        parallelize(tied, mesh)
    handle.remove()
    for zero, register in ((0, "register_hook"), (0, HOOK_AFTER), (3, HOOK_AFTER)):
        model = parallelize(model_of(True), mesh, zero=zero)
        if last:
            getattr(model.head.weight, register)(lambda _: None)
        refuse(model, r"parameter 'head.weight' has a hook on its gradient, and is one weight with another")
    model = parallelize(model_of(), mesh, zero=3)
    if last:
        model.norm.weight.register_hook(lambda _: None)
    refuse(model, r"parameter 'norm.weight' has a hook on its gradient")
    frozen = model_of()
    frozen.norm.weight.requires_grad_(False)
    model = parallelize(frozen, mesh)
    forward_backward(model, parts)
    if last:
        model.norm.weight.requires_grad_()
    refuse(model, r"parameter 'norm.weight' was unfrozen or replaced after parallelize")
    return texts


FAULTS = ["a tied weight averaged", "a stage's norm left out", "a tied weight not summed"]


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, pool: Callable[[int], Ranks]) -> None:
    with pytest.raises(AssertionError, match=r"is off by|not close"):
        pool(2).run(planted, fault)


def planted(fault: str) -> None:
    right_sum, right_norm = pipeline_parallel.sum_over, grad_norm.StageNorm.norm

    def averaged(parameter: Tensor, group: Any) -> None:
        right_sum(parameter, group)
        assert parameter.grad is not None
        parameter.grad.div_(2)

    if fault == FAULTS[0]:
        pipeline_parallel.sum_over = averaged
    elif fault == FAULTS[1]:
        grad_norm.StageNorm.norm = lambda self, model: grad_norm.grad_norm(model.parameters())  # type: ignore[method-assign]
    else:
        pipeline_parallel.sum_over = lambda parameter, group: None
    try:
        equals_one_device({"pipeline": 2}, PipelineOptions(), 0, True, PLAIN)
    finally:
        pipeline_parallel.sum_over = right_sum
        grad_norm.StageNorm.norm = right_norm  # type: ignore[method-assign]

"""Tensor parallel: the decoder on every mix with the other axes is one device's; its cuts are integers; faults are seen."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from longspan import (
    AutoMemory,
    LayoutError,
    MemoryOptions,
    ModelError,
    ParallelMesh,
    clip_grad_norm_,
    parallelize,
    shard_batch,
    unparallelize,
    unshard,
)
from longspan.batch import agreement
from longspan.distributed import scratch, tensor_cuts, tensor_parallel
from longspan.distributed.collectives import CountingTransport, TorchTransport, all_gather, reduce_scatter
from longspan.distributed.deferred_hooks import DeferredHooks
from longspan.distributed.layout import Heads
from longspan.distributed.tensor_cuts import Cut
from longspan.distributed.tensor_parallel import TensorPlan, refuse_plan
from longspan.distributed.traffic import (
    Traffic,
    attention_traffic,
    embedding_traffic,
    recomputable_attention_traffic,
    tensor_region_traffic,
    vocabulary_loss_traffic,
)
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig
from tests.helpers.ranks import Ranks

SHAPE = DecoderConfig(vocab=97, layers=2, hidden=32, heads=12, kv_heads=4, head_dim=4, ffn=24)
TOKENS, ROWS = 23, 2
ALL = MemoryOptions(recompute="selective", head_chunks=2, offload_activations=True)


@pytest.mark.parametrize(("cut", "ranks"), [(Cut(dim=0, units=4), 3), (Cut(dim=0, units=2), 4), (Cut(dim=0, units=4), 8)])
def test_heads_that_do_not_divide_are_refused_with_the_legal_degrees(cut: Cut, ranks: int) -> None:
    plan = TensorPlan(regions=(), exits=(), cuts={"query.weight": cut})
    with pytest.raises(LayoutError, match=rf"tensor={ranks} cannot divide 'query.weight'.*legal are 1, 2(, 4)? "):
        refuse_plan(plan, ranks)


def test_a_reduce_scatter_is_the_adjoint_of_an_all_gather(pool: Callable[[int], Ranks]) -> None:
    pool(3).run(adjoint)


def adjoint() -> None:
    mesh, sizes = mesh_of(tensor=3), (3, 2, 1)
    rank = mesh.tensor_group.rank()
    generator = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(2, n, 5, dtype=torch.float64, generator=generator, requires_grad=True) for n in (sizes[rank], 6))
    over = (mesh.tensor_group, mesh.transport, 1, sizes)
    weight = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    mine = weight.split(sizes, 1)[rank]
    (all_gather(x, *over) * (rank + 1) * weight).sum().backward()
    torch.testing.assert_close(x.grad, 6 * mine)  # 1 + 2 + 3 ranks ask for it
    (reduce_scatter(y, *over) * mine).sum().backward()
    torch.testing.assert_close(y.grad, weight)
    whole = sum(all_gather(y.detach(), mesh.tensor_group, mesh.transport, 0, (2, 2, 2)).split(2))
    assert isinstance(whole, Tensor)
    torch.testing.assert_close(reduce_scatter(y, *over).detach(), whole.split(sizes, 1)[rank])


MESHES: list[tuple[int, dict[str, int]]] = [
    (2, {"tensor": 2}), (4, {"tensor": 2, "ulysses": 2}), (4, {"tensor": 2, "ring": 2}),
]  # fmt: skip
MORE: list[tuple[int, dict[str, int]]] = [
    (4, {"tensor": 4}), (4, {"tensor": 2}), (6, {"tensor": 2, "ulysses": 3}), (8, {"tensor": 2, "ulysses": 2, "ring": 2}),
    (8, {"tensor": 2, "ulysses": 2}), (8, {"tensor": 2, "ring": 2}),
]  # fmt: skip


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize(("ranks", "degrees"), MESHES, ids=str)
def test_it_is_one_device(ranks: int, degrees: dict[str, int], zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(ranks).run(equals_one_device, degrees, zero, ALL if zero == 3 else MemoryOptions(), {"tied": zero == 2})


@pytest.mark.long  # make test has three axes on eight ranks in test_pipeline_parallel.py
def test_eight_ranks_of_three_axes(pool: Callable[[int], Ranks]) -> None:
    pool(8).run(equals_one_device, {"tensor": 2, "ulysses": 2}, 3, MemoryOptions(), {})


@pytest.mark.parametrize("zero", [2, 3])
def test_every_rank_that_holds_a_tensor_shard_may_have_a_copy_of_it(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(4).run(equals_one_device, {"tensor": 2}, zero, MemoryOptions(), {}, 1)


@pytest.mark.long
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_eight_ranks_without_tensor_parallelism(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(8).run(equals_one_device, {"ulysses": 2, "ring": 2}, zero, MemoryOptions(), {})


@pytest.mark.long
def test_shards_over_half_of_the_ranks_that_hold_a_tensor_shard(pool: Callable[[int], Ranks]) -> None:
    pool(8).run(equals_one_device, {"tensor": 2, "ulysses": 2}, 3, MemoryOptions(), {}, 2)


@pytest.mark.long
@pytest.mark.parametrize("memory", [MemoryOptions(recompute="full"), ALL], ids=["full", "all"])  # make test has plain ones
@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize(("ranks", "degrees"), MESHES + MORE, ids=str)
def test_it_is_one_device_with_every_option(
    ranks: int, degrees: dict[str, int], zero: int, memory: MemoryOptions, pool: Callable[[int], Ranks]
) -> None:
    if degrees["tensor"] == 4 and memory.head_chunks == 2:
        memory = MemoryOptions(recompute="selective", head_chunks=3, offload_activations=True)
    pool(ranks).run(equals_one_device, degrees, zero, memory, {"tied": True})


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_key_value_heads_that_several_ranks_hold(kv_heads: int, pool: Callable[[int], Ranks]) -> None:
    pool(4).run(equals_one_device, {"tensor": 4}, 0, MemoryOptions(), {"kv_heads": kv_heads})


def mesh_of(**degrees: int) -> ParallelMesh:
    return ParallelMesh(**degrees)


def model_of(**changes: Any) -> Decoder:
    model = Decoder(DecoderConfig(**(vars(SHAPE) | changes))).double()
    for parameter in model.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)  # else attention is uniform
    return model


def batch_of(data: int) -> dict[str, Tensor]:
    """``ROWS`` rows a replica, with unequal numbers of labels."""
    ids = torch.randint(0, SHAPE.vocab, (ROWS * data, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :9] = labels[-1, 15:] = -100
    return {"input_ids": ids, "labels": labels}


def penalty(model: Decoder) -> Tensor:
    """A weight penalty on cut and on replicated parameters, of whole weights."""
    named = model.named_parameters()
    squares = [full(p).square().sum() for name, p in named if "norm" in name or "out" in name or "gate" in name]
    return 0.01 * torch.stack(squares).sum()


def full(x: Tensor) -> Tensor:
    whole: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return whole


def equals_one_device(
    degrees: Mapping[str, int], zero: int, memory: MemoryOptions, changes: Mapping[str, Any], fsdp_ranks: int | None = None
) -> None:
    mesh, reference = mesh_of(**degrees), model_of(**changes)
    whole = batch_of(mesh.coordinate.data)
    mine = {name: x.split(ROWS)[mesh.coordinate.data_rank] for name, x in whole.items()}
    model = parallelize(deepcopy(reference), mesh, zero=zero, memory=memory, fsdp_ranks=fsdp_ranks)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, reference)]
    for _ in range(3):
        loss = reference(**whole).loss
        (loss + penalty(reference)).backward()
        my_loss = model(**shard_batch(mine, mesh)).loss
        (my_loss + penalty(model)).backward()
        torch.testing.assert_close(my_loss, loss, rtol=1e-12, atol=0)
        assert_gradients_and_norm(model, reference)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def assert_gradients_and_norm(model: Decoder, reference: Decoder) -> None:
    norms = [p.grad.norm() for p in reference.parameters() if p.grad is not None]
    total = torch.stack(norms).norm()
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters()):
        assert mine.grad is not None, name
        assert theirs.grad is not None, name
        error = (full(mine.grad) - theirs.grad).norm()
        assert error <= 1e-10 * max(theirs.grad.norm(), 1e-3 * total), f"{name} is off by {error:.1e}"
    torch.testing.assert_close(clip_grad_norm_(model, 1e9), total, rtol=1e-10, atol=0)


@pytest.mark.parametrize("smallest", [16, 5_700])
def test_memory_that_is_used_again_in_a_selective_checkpoint(smallest: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(memory_used_again, smallest)


def memory_used_again(smallest: int) -> None:
    """One row. Every received tensor is kept, or all but that of a reduce-scatter to 11 tokens."""
    mesh, reference, whole = mesh_of(tensor=2), model_of(layers=3), {name: x[:1] for name, x in batch_of(1).items()}
    model = parallelize(deepcopy(reference), mesh, memory=MemoryOptions(recompute="selective"))
    reference(**whole).loss.backward()
    with patch.object(scratch, "SMALLEST_KEPT_BYTES", smallest):
        for _ in range(2):
            model.zero_grad()
            model(**shard_batch(whole, mesh)).loss.backward()
            assert_gradients_and_norm(model, reference)


def test_logits_and_a_sum_of_them(pool: Callable[[int], Ranks]) -> None:
    pool(4).run(logits_equal)


def logits_equal() -> None:
    mesh, reference = mesh_of(tensor=2, ulysses=2), model_of()
    whole, model = batch_of(1), parallelize(deepcopy(reference), mesh, zero=0)
    weight = torch.randn(ROWS, TOKENS, SHAPE.vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    wanted = reference(**whole).logits
    (wanted * weight).sum().backward()
    part = shard_batch(whole, mesh)
    logits = unshard(model(**part).logits, mesh, tokens=TOKENS)
    torch.testing.assert_close(logits, wanted, rtol=1e-11, atol=1e-11)
    (logits * weight).sum().backward()
    assert_gradients_and_norm(model, reference)


def test_what_a_rank_stores(pool: Callable[[int], Ranks]) -> None:
    pool(4).run(stores)


def stores() -> None:
    model = parallelize(model_of(kv_heads=2), mesh_of(tensor=4))
    placed = {name: p.placements[0] for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert placed["blocks.0.attention.query.weight"] == placed["blocks.1.feed.up.weight"] == Shard(0)
    assert placed["blocks.0.attention.out.weight"] == placed["blocks.1.feed.down.weight"] == Shard(1)
    assert placed["blocks.0.attention.key.weight"] == placed["blocks.0.attention_norm.weight"] == Replicate()
    assert len(placed) == len(list(model.parameters()))


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_the_traffic_is_the_formula(recompute: Any, pool: Callable[[int], Ranks]) -> None:
    for forward, whole, expected_forward, expected in pool(4).run(traffic, recompute):
        assert forward == expected_forward
        assert whole == expected


def traffic(recompute: Any) -> tuple[Traffic, Traffic, Traffic, Traffic]:
    """(forward, step) counted at the transport, and by the closed forms: 2 regions a layer, attention, the position ids, the
    embedding and the loss."""
    mesh = mesh_of(tensor=2, ulysses=2)
    mesh.transport = transport = CountingTransport(TorchTransport())
    at, memory = mesh.coordinate, MemoryOptions(recompute=recompute)
    model = parallelize(model_of(), mesh, memory=memory)
    part = shard_batch(batch_of(1), mesh)
    transport.traffic = Traffic()
    loss = model(**part).loss
    forward = transport.traffic
    loss.backward()
    shares, sizes = at.tensor_sizes(TOKENS), at.layout(TOKENS).sizes(at.ring_rank)
    region = tensor_region_traffic(shares, at.tensor_rank, rows=ROWS, hidden=SHAPE.hidden, itemsize=8)
    positions = Traffic(1, ROWS * shares[at.tensor_rank] * 8)
    heads = Heads(SHAPE.heads // 2, SHAPE.kv_heads // 2, 2)
    attention = recomputable_attention_traffic if recompute == "selective" else attention_traffic
    dim = SHAPE.head_dim
    mixed = attention(heads, sizes, sizes, at.ulysses_rank, rows=ROWS, qk_dim=dim, v_dim=dim, itemsize=8)
    one = [times(2 * SHAPE.layers, region[p]) + times(SHAPE.layers, mixed[p]) for p in (0, 1)]
    unneeded = times(SHAPE.layers, Traffic(1, ROWS * (sum(shares) - shares[at.tensor_rank]) * SHAPE.hidden * 8))
    again = {"none": Traffic(), "full": one[0], "selective": times(2 * SHAPE.layers, region[0])}[recompute]
    in_rank = {"rows": ROWS, "hidden": SHAPE.hidden, "itemsize": 8}
    embedding, words = (of(shares, at.tensor_rank, **in_rank) for of in (embedding_traffic, vocabulary_loss_traffic))
    outside = [embedding[way] + words[way] for way in (0, 1)]
    step = one[0] + positions + outside[0] + again + one[1] + outside[1]
    if recompute != "none":  # a checkpoint stops before the last reduce-scatter of a layer
        step = Traffic(step.collectives - unneeded.collectives, step.bytes - unneeded.bytes)
    return forward, transport.traffic, one[0] + positions + outside[0], step


def times(count: int, each: Traffic) -> Traffic:
    return Traffic(count * each.collectives, count * each.bytes)


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        ({"kv_heads": 3, "heads": 9}, {}, r"tensor=2 cannot divide 'blocks.0.attention.query.weight', which has 9 heads"),
        ({"ffn": 25}, {}, r"tensor=2 cannot divide 'blocks.0.feed.gate.weight', which has 25 heads or hidden units"),
        ({}, {"memory": MemoryOptions(tile_tokens=4)}, "tile_tokens=4 does not work with tensor=2"),
        ({}, {"memory": AutoMemory(budget_gib=1, tokens=64)}, "AutoMemory does not model tensor > 1"),
    ],
)
def test_what_tensor_parallel_cannot_do_is_refused(
    change: dict[str, Any], options: dict[str, Any], text: str, pool: Callable[[int], Ranks]
) -> None:
    pool(2).run(refused, change, options, text)


def refused(change: dict[str, Any], options: dict[str, Any], text: str) -> None:
    with pytest.raises((LayoutError, ModelError), match=text):
        parallelize(model_of(**change), mesh_of(tensor=2), **options)


def test_calls_without_a_cut_batch_and_unparallelize_are_refused(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(refused_later)


def refused_later() -> None:
    mesh, whole = mesh_of(tensor=2), batch_of(1)
    model = parallelize(model_of(), mesh)
    with pytest.raises(ModelError, match="the batch was not cut"):
        model(**whole)
    ids, hidden = whole["input_ids"][:, :12], torch.zeros(1, 12, SHAPE.hidden, dtype=torch.float64)
    for name, given in (("embed", ids), ("blocks.0.feed", hidden)):
        with pytest.raises(ModelError, match=f"'{name}' was called outside of a call of its model"):
            model.get_submodule(name)(given)
    with pytest.raises(ModelError, match="cut over tensor ranks or pipeline stages cannot be made whole in place"):
        unparallelize(model)
    unshared = model_of()
    optimizer = torch.optim.SGD(unshared.parameters(), lr=0.1)
    with pytest.raises(ModelError, match=f"{type(optimizer).__name__} was built before the parameters are sharded"):
        parallelize(unshared, mesh)
    with pytest.raises(LayoutError, match=r"tokens=1 is fewer than the 2 ranks of a sequence .*tensor=2"):
        mesh.coordinate.layout(1)


FAULTS = [
    "the gradient of a norm left partial",
    "a cut gradient not divided",
    "copies of a key/value head not summed",
    "a weight penalty divided",
    "a loss counted per tensor rank",
]


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, pool: Callable[[int], Ranks]) -> None:
    changes = {"kv_heads": 1} if "copies" in fault else {}
    with pytest.raises(AssertionError, match="not close" if "loss" in fault else "is off by"):
        pool(2).run(planted, fault, changes)


def planted(fault: str, changes: Mapping[str, Any]) -> None:
    right, distribute, agreed = tensor_cuts._FinishGradient.backward, tensor_parallel._distribute, agreement._agreed

    def wrong(ctx: Any, grad: Tensor) -> Any:
        is_cut = ctx.degree is not None
        return (grad, None, None) if is_cut == (fault in FAULTS[1::2]) else right(ctx, grad)

    def divided_later(model: Any, *args: Any) -> None:
        """A cut parameter's gradient is divided when it is finished, when the penalty's part is in it."""
        distribute(model, *args)
        for parameter in model.parameters():
            if isinstance(parameter, DTensor) and parameter.placements[0].is_shard():
                parameter.register_hook(lambda grad: grad / 2)

    def counted_twice(info: Any, most: Any, num_labels: int) -> Any:
        return agreed(info, most, 2 * num_labels)

    if fault == FAULTS[4]:
        agreement._agreed = counted_twice
    else:
        tensor_cuts._FinishGradient.backward = staticmethod(wrong)  # type: ignore[method-assign]
    if fault == FAULTS[3]:
        tensor_parallel._distribute = divided_later
    try:
        with patch.object(DeferredHooks, "find"):  # which would refuse the hook of a fault
            equals_one_device({"tensor": 2}, 0, MemoryOptions(), changes)
    finally:
        tensor_cuts._FinishGradient.backward = right  # type: ignore[method-assign]
        tensor_parallel._distribute, agreement._agreed = distribute, agreed

import io
import pickle
from copy import deepcopy
from itertools import permutations
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from longspan.batch.shard import shard_batch
from longspan.distributed import grad_norm as gradients
from longspan.distributed.grad_sync import gradient_reductions
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import LayoutError, ModelError
from longspan.memory.options import AutoMemory, MemoryOptions
from longspan.models.adapter import parallel_state
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig
from longspan.parallelize import forward_backward, parallelize, unparallelize
from tests.helpers.ranks import on_ranks

CONFIG = DecoderConfig(vocab=11, layers=2, hidden=12, heads=4, kv_heads=2, head_dim=4, ffn=16)


def _decoder(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> Decoder:
    return Decoder(DecoderConfig(**{**vars(CONFIG), **changes}), seed=seed).to(dtype)


def _holds_a_parallel_model(mesh: ParallelMesh) -> Decoder:
    whole = _decoder()
    whole.add_module("other", parallelize(_decoder(), mesh))
    return whole


def _batch(step: int = 0, rows: int = 4, tokens: int = 10) -> dict[str, torch.Tensor]:
    ids = torch.randint(CONFIG.vocab, (rows, tokens), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def _mine(batch: dict[str, torch.Tensor], mesh: ParallelMesh) -> dict[str, torch.Tensor]:
    return {name: value.tensor_split(mesh.coordinate.data)[mesh.coordinate.data_rank] for name, value in batch.items()}


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()
        for name, weight in model.named_parameters()
    }


def _train(model: nn.Module, mesh: ParallelMesh | None, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    norms = []
    for step in range(steps):
        part = _batch(step) if mesh is None else shard_batch(_mine(_batch(step), mesh), mesh)
        model(**part).loss.backward()
        norms.append(gradients.clip_grad_norm_(model.parameters(), 0.3).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("zero", [0, 3])
def test_training_gives_the_weights_of_one_device_on_every_rank(zero, tmp_path):
    reference = _decoder()
    norms = _train(reference, None)
    (_, first), *others = found = on_ranks(4, _trained, zero, tmp_path=tmp_path)
    for mine, weights in found:
        assert mine == pytest.approx(norms, rel=1e-11)
        torch.testing.assert_close(weights, _weights(reference), rtol=1e-11, atol=1e-12)
    for _, weights in others:
        torch.testing.assert_close(weights, first, rtol=0, atol=0)


def _trained(zero):
    mesh = ParallelMesh(ulysses=2)
    model = parallelize(_decoder(), mesh, zero=zero)
    return _train(model, mesh), _weights(model)


def test_zero_3_keeps_a_share_of_every_parameter(tmp_path):
    held = on_ranks(3, _held, tmp_path=tmp_path)
    assert sum(held) == CONFIG.parameters
    assert max(held) < CONFIG.parameters / 2


def _held():
    model = parallelize(_decoder(), ParallelMesh(), zero=3)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return sum(parameter.to_local().numel() for parameter in model.parameters())


class Scaled(nn.Module):
    """What parallelize needs of a model, around parameters whose gradient is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.attention, self.cross_entropy = CONFIG, max, max
        self.blocks = nn.ModuleList(_Scale() for _ in range(2))

    def forward(self, x):
        return self.blocks[0](x).sum() + self.blocks[1](x).sum()


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(24, dtype=torch.bfloat16))

    def forward(self, x):
        return self.weight * x


@pytest.mark.parametrize("zero", [0, 3])
def test_half_gradients_are_averaged_in_fp32(zero, tmp_path):
    for grads in on_ranks(4, _half_means, zero, tmp_path=tmp_path):
        for grad in grads:
            assert grad.dtype == torch.bfloat16
            assert grad.tolist() == [0.5] * 24  # in bf16 256 + 1 is 256: in any order of a sum, some would be lost


def _half_means(zero):
    mesh = ParallelMesh()
    model = parallelize(Scaled(), mesh, zero=zero)
    mine = [order[mesh.coordinate.data_rank] for order in permutations((256.0, 1.0, 1.0, -256.0))]
    model(torch.tensor(mine, dtype=torch.bfloat16)).backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]


def test_two_layouts_and_a_reference_live_in_one_process(tmp_path):
    on_ranks(4, _two_layouts, tmp_path=tmp_path)


def _two_layouts():
    reference = _decoder()
    attention, batch = reference.attention, _batch()
    meshes = [ParallelMesh(ulysses=2), ParallelMesh(ulysses=4), ParallelMesh()]
    models = [parallelize(deepcopy(reference), mesh, zero=zero) for mesh, zero in zip(meshes, (0, 3, 0))]
    expected = reference(**batch).loss
    losses = [model(**shard_batch(_mine(batch, mesh), mesh)).loss for model, mesh in zip(models, meshes)]
    for loss in losses:  # every forward before any backward
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for loss in [expected, *losses]:
        loss.backward()
    for model in models:
        for name, parameter in model.named_parameters():
            grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            torch.testing.assert_close(grad, reference.get_parameter(name).grad, rtol=1e-10, atol=1e-13)
    assert reference.attention is attention


def test_unparallelize_gives_back_the_model_of_one_device(tmp_path):
    on_ranks(2, _there_and_back, tmp_path=tmp_path)


def _there_and_back():
    reference, mesh = _decoder(), ParallelMesh(ulysses=2)
    model = unparallelize(parallelize(deepcopy(reference), mesh))
    for each in (model, reference):
        loss = each(**_batch()).loss * (1 + torch.distributed.get_rank())  # another loss on each rank: nothing is averaged
        loss.backward()
    for mine, theirs in zip(model.parameters(), reference.parameters()):
        assert torch.equal(mine.grad, theirs.grad)
    assert parallelize(model, mesh) is model
    with pytest.raises(ModelError, match="not parallel"):
        unparallelize(reference)
    with pytest.raises(ModelError, match="sharded parameters cannot be made whole"):
        unparallelize(parallelize(reference, mesh, zero=3))


REFUSALS = {
    "zero=4 is not supported; legal are 0": (ModelError, lambda mesh: parallelize(_decoder(), mesh, zero=4)),
    "ulysses=4 exceeds the 3 query heads": (LayoutError, lambda mesh: parallelize(_decoder(heads=3, kv_heads=3), mesh)),
    "a part of it is parallel already": (ModelError, lambda mesh: parallelize(_holds_a_parallel_model(mesh), mesh)),
    "parallel already": (ModelError, lambda mesh: parallelize(parallelize(_decoder(), mesh), mesh)),
    "Linear offers no attention, cross_entropy, blocks, config": (
        ModelError,
        lambda mesh: parallelize(nn.Linear(2, 2), mesh),
    ),
    "the batch was not cut": (ModelError, lambda mesh: parallelize(_decoder(), mesh)(**_batch())),
    # What one rank alone can know is raised by all.
    r"embed\.weight is .* on rank 0 and .* on rank 2; build it with the same config and seed": (
        ModelError,
        lambda mesh: parallelize(_decoder(seed=mesh.coordinate.ulysses_rank // 2), mesh),
    ),
    "zero is 3 on rank 0 and 0 on rank 1": (
        ModelError,
        lambda mesh: parallelize(_decoder(), mesh, zero=0 if mesh.coordinate.ulysses_rank else 3),
    ),
    "blocks.1.attention_norm.weight is nothing on rank 0": (
        ModelError,
        lambda mesh: parallelize(_decoder(layers=2 if mesh.coordinate.ulysses_rank == 3 else 1), mesh),
    ),
    "zero is 0 on rank 0 and 5 on rank 1": (
        ModelError,
        lambda mesh: parallelize(_decoder(), mesh, zero=5 if mesh.coordinate.ulysses_rank == 1 else 0),
    ),
    "zero=5 is not supported": (ModelError, lambda mesh: parallelize(_decoder(), mesh, zero=5)),
    r"memory is MemoryOptions\(recompute='full', .* on rank 0 and MemoryOptions\(recompute='none', .* on rank 1": (
        ModelError,
        lambda mesh: parallelize(_decoder(), mesh, memory=MemoryOptions("none" if mesh.coordinate.ulysses_rank else "full")),
    ),
}


def test_what_cannot_be_is_refused_on_every_rank_with_one_text(tmp_path):
    first, *others = on_ranks(4, _refusals, tmp_path=tmp_path)
    assert all(texts == first for texts in others)


def _refusals():
    mesh, texts = ParallelMesh(ulysses=4), []
    for text, (error, attempt) in REFUSALS.items():
        with pytest.raises(error, match=text) as refused:
            attempt(mesh)
        texts.append(str(refused.value))
    return texts


def test_other_arguments_on_one_rank_are_no_other_model(tmp_path):
    one, other = on_ranks(2, _other_arguments, tmp_path=tmp_path)
    assert one == other
    ends = "on rank 1; pass the same on every rank"
    assert one == [
        f"the arguments of parallelize differ between ranks: {text} {ends}"
        for text in (
            "zero is 0 on rank 0 and 3", "dtype is None on rank 0 and torch.bfloat16",
            "kernel is auto on rank 0 and online", f"memory is {MemoryOptions()} on rank 0 and {AutoMemory(9.0, 64)}",
        )
    ]  # fmt: skip


def _other_arguments():
    mesh, texts = ParallelMesh(ulysses=2), []
    second = mesh.coordinate.ulysses_rank == 1
    for given in ({"zero": 3}, {"dtype": torch.bfloat16}, {"kernel": "online"}, {"memory": AutoMemory(9.0, 64)}):
        with pytest.raises(ModelError) as refused:
            parallelize(_decoder(), mesh, **given if second else {})
        texts.append(str(refused.value))
    return texts


def test_a_refused_model_is_left_as_it_was(tmp_path):
    on_ranks(2, _left_alone, tmp_path=tmp_path)


def _left_alone():
    mesh, model = ParallelMesh(ulysses=2), _decoder(seed=torch.distributed.get_rank())
    before = model.attention
    with pytest.raises(ModelError, match="differs between ranks"):
        parallelize(model, mesh)
    assert model.attention is before
    assert parallel_state(model) is None
    assert model(**_batch()).loss.isfinite()


def test_forward_backward_is_the_loop_over_micro_batches_and_one_device(tmp_path):
    for zero in (0, 3):
        (tmp_path / str(zero)).mkdir()
        on_ranks(4, _forward_backward, zero, tmp_path=tmp_path / str(zero))


def _forward_backward(zero):
    mesh, reference = ParallelMesh(ulysses=2), _decoder()
    model, loop = (parallelize(deepcopy(reference), mesh, zero=zero) for _ in range(2))
    wholes = [_batch(step) for step in range(3)]
    wholes[1]["labels"] = wholes[1]["labels"].clone()
    wholes[1]["labels"][:, 4:] = -100  # unequally many labels: the mean is over all of the step
    parts = shard_batch([_mine(whole, mesh) for whole in wholes], mesh)
    found, expected = forward_backward(model, parts), 0.0
    for part in parts:
        loss = loop(**part).loss
        loss.backward()
        expected += loss.item()
    assert not found.requires_grad
    assert found.item() == expected
    counts = [int((whole["labels"][:, 1:] >= 0).sum()) for whole in wholes]
    weighted = sum(reference(**whole).loss * count / sum(counts) for whole, count in zip(wholes, counts))
    weighted.backward()
    assert found.item() == pytest.approx(weighted.item(), rel=1e-12)
    pairs = zip(model.parameters(), loop.parameters(), reference.parameters())
    for mine, theirs, one in pairs:
        grads = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in (mine.grad, theirs.grad)]
        torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(grads[0], one.grad, rtol=1e-10, atol=1e-13)


def test_several_micro_batches_cost_one_average_of_the_gradients(tmp_path):
    for one, three, loop in on_ranks(2, _averages, tmp_path=tmp_path):
        assert one == three == loop // 3 > 0


def _averages():
    mesh = ParallelMesh(ulysses=2)
    model = parallelize(_decoder(), mesh)
    sent, reduce = [], dist.all_reduce

    def noted(x, *args, group=None, **named):
        if group is gradient_reductions(mesh).group:
            sent.append(x.numel())
        return reduce(x, *args, group=group, **named)

    parts = shard_batch([_batch(step) for step in range(3)], mesh)
    sums = []
    with patch.object(dist, "all_reduce", noted):
        for step in (lambda: forward_backward(model, parts[:1]), lambda: forward_backward(model, parts)):
            step()
            sums.append(sum(sent))
            sent.clear()
        for part in parts:
            model(**part).loss.backward()
    return *sums, sum(sent)


def test_forward_backward_under_autocast_and_without_gradients():
    mesh, plain = ParallelMesh(), _decoder(dtype=torch.float32)
    model, loop = (parallelize(deepcopy(plain), mesh) for _ in range(2))
    parts = shard_batch([_batch()], mesh)
    with torch.no_grad():
        unlearned = forward_backward(model, parts)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert forward_backward(model, parts).item() == unlearned.item()
    model.zero_grad()
    inside = []
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: inside.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        forward_backward(model, parts)
        loss = loop(**parts[0]).loss
    loss.backward()
    assert inside
    assert not any(inside)  # the backward of a loop stands outside of autocast, and its gradients are the same
    for mine, theirs in zip(model.parameters(), loop.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_forward_backward_refuses_what_is_no_list_of_micro_batches():
    with pytest.raises(ModelError, match="a list of at least one"):
        forward_backward(parallelize(_decoder(), ParallelMesh()), [])
    with pytest.raises(ModelError, match="not parallel"):
        forward_backward(_decoder(), [_batch()])
    with pytest.raises(ModelError, match="returned no loss; put labels"):
        forward_backward(parallelize(_decoder(), ParallelMesh()), [{"input_ids": _batch()["input_ids"]}])


def test_parallel_state_is_what_parallelize_was_given():
    mesh, model = ParallelMesh(), _decoder()
    assert parallel_state(model) is None
    state = parallel_state(parallelize(model, mesh, zero=1, memory=MemoryOptions(tile_tokens=4)))
    assert state is not None
    assert (state.mesh, state.zero, state.memory) == (mesh, 2, MemoryOptions(tile_tokens=4))
    assert state.adapter.computes_loss()


def test_a_model_on_another_device_than_the_mesh_is_refused(tmp_path):
    on_ranks(2, _on_another_device, tmp_path=tmp_path)


def _on_another_device():
    mesh = ParallelMesh()
    mesh.device = torch.device("cuda", torch.distributed.get_rank())
    with pytest.raises(
        ModelError, match=r"embed.* is on cpu and the mesh on cuda:0; call parallelize\(model.to\(mesh.device\)"
    ):
        parallelize(_decoder(), mesh)


@pytest.mark.parametrize("zero", [0, 3])
def test_a_parallel_model_is_neither_copied_nor_pickled(zero, tmp_path):
    on_ranks(2, _copies, zero, tmp_path=tmp_path)


def _copies(zero):
    model = parallelize(_decoder(), ParallelMesh(ulysses=2), zero=zero)
    for copied in (deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO()), AveragedModel):
        with pytest.raises(ModelError, match="a parallel model cannot be copied or pickled"):
            copied(model)
    if not zero:
        deepcopy(unparallelize(model))

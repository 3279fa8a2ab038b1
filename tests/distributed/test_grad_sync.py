from itertools import permutations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from longspan.distributed import grad_buckets
from longspan.distributed.collectives import all_reduce_sum
from longspan.distributed.grad_sync import MeanGradients, average_gradients, gradient_reductions
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError
from tests.helpers.ranks import on_ranks

ROWS, TOKENS = 3, 5  # of one rank


class Toy(nn.Module):
    """Tied weights, checkpointed layers, and parameters that some ranks, or all, do not use."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.odd = nn.Linear(6, 6)  # used by odd ranks
        self.never = nn.Linear(6, 6)
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.to(dtype)

    def score(self, ids: torch.Tensor, rank: int) -> torch.Tensor:
        """The sum over tokens of what a rank can compute alone."""
        x = self.embed(ids) * self.frozen
        order = (self.first, self.second) if rank % 2 else (self.second, self.first)
        for layer in order:
            x = checkpoint(lambda y, layer=layer: layer(y).tanh(), x, use_reentrant=False)
        if rank % 2:
            x = self.odd(x)
        return (x @ self.embed.weight.T).tanh().sum()

    def penalty(self) -> torch.Tensor:
        return self.first.weight.square().sum() + self.embed.weight.exp().sum()


def _ids(rank: int, step: int) -> torch.Tensor:
    return torch.randint(7, (ROWS, TOKENS), generator=torch.Generator().manual_seed(10 * rank + step))


def _one_device(ranks: int, steps: int, dtype: torch.dtype = torch.float64) -> Toy:
    toy = Toy(dtype)
    for step in range(steps):
        loss = sum(toy.score(_ids(rank, step), rank) for rank in range(ranks)) + toy.penalty()
        loss.backward()
    return toy


def _grads(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("bucket_bytes", [1, 500, 2**20])
def test_every_gradient_is_that_of_one_device(ranks, bucket_bytes, tmp_path):
    expected = _grads(_one_device(ranks, 3))
    for found in on_ranks(ranks, _three_backwards, bucket_bytes, tmp_path=tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


def test_two_models_in_one_backward_are_reduced_one_after_the_other(tmp_path):
    """Each rank leaves out the last layer of another model, so that the ranks fill other buckets before the end."""
    models = _two_models()
    sum(_score_of_both(*models, rank) for rank in range(2)).backward()
    expected = list(map(_grads, models))
    for found in on_ranks(2, _one_backward_of_two_models, tmp_path=tmp_path, seconds=30):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


def _one_backward_of_two_models():
    grad_buckets.BUCKET_BYTES = 1
    mesh, models = ParallelMesh(), _two_models()
    for model in models:
        MeanGradients(model, mesh)
    all_reduce_sum(_score_of_both(*models, mesh.coordinate.data_rank), mesh.loss_group).backward()
    return list(map(_grads, models))


def _two_models() -> list[nn.Sequential]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double() for _ in range(2)]


def _score_of_both(one: nn.Sequential, other: nn.Sequential, rank: int) -> torch.Tensor:
    x, weights = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    return ((one[: 1 + rank](x) + other[: 2 - rank](x)) * weights).sum()


def _three_backwards(bucket_bytes=grad_buckets.BUCKET_BYTES):
    grad_buckets.BUCKET_BYTES = bucket_bytes
    toy, mesh = Toy(), ParallelMesh()
    MeanGradients(toy, mesh)
    rank = mesh.coordinate.data_rank
    for step in range(3):
        (all_reduce_sum(toy.score(_ids(rank, step), rank), mesh.loss_group) + toy.penalty()).backward()
    return _grads(toy)


def test_what_no_rank_used_has_no_gradient_and_what_some_used_is_equal_on_all(tmp_path):
    first, second = on_ranks(2, _three_backwards, tmp_path=tmp_path)
    assert first["never.weight"] is None
    assert first["frozen"] is None
    assert torch.equal(first["odd.weight"], second["odd.weight"])


def test_a_reentrant_backward_inside_a_backward_is_averaged_too(tmp_path):
    expected = [_reentrant(Toy(), ids) for ids in (_ids(0, 0), _ids(1, 0))]
    for found in on_ranks(2, _reentrant_on_ranks, tmp_path=tmp_path):
        for name, grad in found.items():
            if grad is not None:
                torch.testing.assert_close(grad, (expected[0][name] + expected[1][name]) / 2, rtol=1e-13, atol=1e-14)


def _reentrant(toy, ids):
    """The embedding is used outside the checkpoint and inside: two backwards, one in the other, bring its gradient."""
    x = checkpoint(lambda y: toy.first(y) @ toy.embed.weight.T, toy.embed(ids), use_reentrant=True)
    (toy.second(x[..., :6]).tanh().sum()).backward()
    return _grads(toy)


def _reentrant_on_ranks():
    toy, mesh = Toy(), ParallelMesh()
    MeanGradients(toy, mesh)
    return _reentrant(toy, _ids(mesh.coordinate.data_rank, 0))


def test_half_gradients_are_averaged_in_fp32(tmp_path):
    for found in on_ranks(4, _half_mean, tmp_path=tmp_path):
        assert found.dtype == torch.bfloat16
        assert found.tolist() == [0.5] * 24  # in bf16 256 + 1 is 256: whatever the order of a sum, some of them would be lost


def _half_mean():
    model, mesh = nn.ParameterList([nn.Parameter(torch.ones(24, dtype=torch.bfloat16))]), ParallelMesh()
    MeanGradients(model, mesh)
    mine = [order[mesh.coordinate.data_rank] for order in permutations((256.0, 1.0, 1.0, -256.0))]
    (model[0] * torch.tensor(mine, dtype=torch.bfloat16)).sum().backward()
    return model[0].grad


def test_a_backward_that_failed_leaves_nothing_for_the_next(tmp_path):
    expected = _grads(_one_device(2, 1))
    for found in on_ranks(2, _fail_then_succeed, tmp_path=tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


def _fail_then_succeed():
    toy, mesh = Toy(), ParallelMesh()
    MeanGradients(toy, mesh)
    rank = mesh.coordinate.data_rank
    x = toy.embed(_ids(rank, 0))
    x.register_hook(_raise)
    with pytest.raises(MemoryError):
        (toy.first(x) @ toy.embed.weight.T).sum().backward()
    (all_reduce_sum(toy.score(_ids(rank, 0), rank), mesh.loss_group) + toy.penalty()).backward()
    return _grads(toy)


def _raise(grad):
    raise MemoryError


def test_remove_gives_back_the_ranks_own_gradient(tmp_path):
    for rank, found in enumerate(on_ranks(2, _without, tmp_path=tmp_path)):
        toy = Toy()
        toy.score(_ids(rank, 0), rank).backward()
        torch.testing.assert_close(found, _grads(toy))


def _without():
    toy, mesh = Toy(), ParallelMesh()
    MeanGradients(toy, mesh).remove()
    toy.score(_ids(mesh.coordinate.data_rank, 0), mesh.coordinate.data_rank).backward()
    return _grads(toy)


def test_what_cannot_be_averaged_is_refused(tmp_path):
    on_ranks(2, _refusals, tmp_path=tmp_path)


def _refusals():
    toy, mesh = Toy(), ParallelMesh()
    MeanGradients(toy, mesh)
    with pytest.raises(ModelError, match=r"read \.grad"):
        torch.autograd.grad(toy.penalty(), toy.first.weight)
    with pytest.raises(ModelError, match=r"read \.grad"):
        toy.penalty().backward(create_graph=True)
    toy.frozen.requires_grad_()
    with pytest.raises(ModelError, match="'frozen' was unfrozen or replaced"):
        toy.penalty().backward()
    decoder = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    MeanGradients(decoder, mesh)
    decoder[0].requires_grad_(False)
    decoder[1].requires_grad_()
    with pytest.raises(ModelError, match=r"'1.weight' was unfrozen or replaced"):
        decoder(torch.ones(1, 2))


@pytest.mark.parametrize(("ranks", "tensor"), [(3, 1), (2, 2), (4, 2)])
def test_a_module_outside_the_parallel_model_gets_the_gradients_of_one_device(ranks, tensor, tmp_path):
    """Three micro-batches, averaged after each or once at the end; ``odd`` has a gradient on odd ranks alone."""
    expected = _grads(_one_device(ranks, 3))
    for after_each, once in on_ranks(ranks, _averaged_outside, tensor, tmp_path=tmp_path):
        torch.testing.assert_close(after_each, expected, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(once, expected, rtol=1e-13, atol=1e-14)


def _averaged_outside(tensor):
    mesh = ParallelMesh(tensor=tensor)
    found = []
    for after_each in (True, False):
        toy, rank = Toy(), mesh.loss_group.rank()
        for step in range(3):
            (all_reduce_sum(toy.score(_ids(rank, step), rank), mesh.loss_group) + toy.penalty()).backward()
            if after_each:
                average_gradients(toy, mesh)
        average_gradients(toy, mesh)
        found.append(_grads(toy))
    return found


def test_the_mean_of_a_half_precision_module_is_formed_in_fp32(tmp_path):
    """256 + 1 is 256 in bf16, so that a sum in bf16 would depend on the order of the ranks."""
    assert on_ranks(4, _averaged_in_bf16, tmp_path=tmp_path) == [0.5] * 4


def _averaged_in_bf16():
    mesh = ParallelMesh()
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    module.weight.grad = torch.full_like(module.weight, (256.0, 1.0, 1.0, -256.0)[mesh.coordinate.data_rank])
    average_gradients(module, mesh)
    return module.weight.grad.item()


def test_what_cannot_be_averaged_is_refused_on_every_rank(tmp_path):
    on_ranks(2, _not_averaged, tmp_path=tmp_path)


def _not_averaged():
    mesh = ParallelMesh()
    with pytest.raises(
        ModelError, match=r"parameter weight is \[1, 2\] torch.float32 on rank 0 and \[1, 3\] .* on rank 1; pass"
    ):
        average_gradients(nn.Linear(2 + mesh.coordinate.data_rank, 1), mesh)
    with pytest.raises(ModelError, match=r"average_gradients was given 'weight', a sharded parameter"):
        average_gradients(fully_shard(nn.Linear(4, 4), mesh=mesh.fsdp_mesh), mesh)


def test_meshes_of_one_device_mesh_reduce_gradients_in_groups_of_their_own(tmp_path):
    for rank, found in enumerate(on_ranks(4, _groups_of_three_views, tmp_path=tmp_path)):
        by_row, by_column = [rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1]
        assert found == ([by_row, by_column, by_row], 3)


def _groups_of_three_views():
    device_mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("rows", "columns", "gradients"))
    views = [
        ParallelMesh.from_device_mesh(device_mesh, ulysses=None, data="rows", tensor="columns"),
        ParallelMesh.from_device_mesh(device_mesh, ulysses="columns", data=None, pipeline="rows"),
        ParallelMesh.from_device_mesh(device_mesh, ulysses="rows", data=None, tensor="columns"),
    ]
    groups = [gradient_reductions(mesh).group for mesh in views]
    return [dist.get_process_group_ranks(group) for group in groups], len(set(map(id, groups)))

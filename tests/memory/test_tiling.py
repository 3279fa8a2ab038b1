"""A module tile by tile is the module: values, gradients, autocast, FSDP2, DDP, checkpoints, tied and frozen weights."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from longspan import ModelError, ParallelMesh, tiled
from longspan.memory.tiling import untiled
from longspan.models.block import FeedForward
from longspan.models.decoder_config import DecoderConfig
from tests.helpers.ranks import on_ranks

SHAPE = DecoderConfig(vocab=11, layers=1, hidden=6, heads=2, kv_heads=1, head_dim=4, ffn=10)


def feed(dtype: torch.dtype = torch.float64) -> FeedForward:
    torch.manual_seed(0)
    return FeedForward(SHAPE).to(dtype)


def rows(tokens: int = 17, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def outcome(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What it gives, and the gradients of x and the parameters of a random sum."""
    y = module(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in module.parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("tokens", [1, 5, 34, 100])
def test_tiles_are_the_module(tokens: int) -> None:
    expected, found = outcome(feed(), rows()), outcome(tiled(feed(), tokens), rows())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    module = untiled(tiled(feed(), tokens))
    assert "forward" not in vars(module)
    assert torch.equal(outcome(module, rows())[0], expected[0])


def test_frozen_and_tied_weights_keep_their_meaning() -> None:
    def build() -> FeedForward:
        module = feed()
        module.gate.weight.requires_grad_(False)
        module.up.weight = module.gate.weight
        module.down.weight = nn.Parameter(module.down.weight.detach().clone())
        return module

    torch.testing.assert_close(outcome(tiled(build(), 4), rows()), outcome(build(), rows()), rtol=1e-12, atol=1e-14)
    tied = feed()
    tied.up.weight = tied.gate.weight
    expected = outcome(copy.deepcopy(tied), rows())
    torch.testing.assert_close(outcome(tiled(tied, 4), rows()), expected, rtol=1e-12, atol=1e-14)


def test_no_rows_and_an_x_without_gradient() -> None:
    assert tiled(feed(), 4)(rows(0)).shape == (2, 0, 6)
    module, plain, x = tiled(feed(), 4), feed(), rows().detach()
    for one in (module, plain):
        one(x).square().sum().backward()
    found, expected = ([parameter.grad for parameter in one.parameters()] for one in (module, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_checkpoint_around_it_and_autocast() -> None:
    found, expected = tiled(feed(torch.float32), 4), feed(torch.float32)
    results = []
    for module in (found, expected):
        x = rows(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(module, x, use_reentrant=False)
        y.float().square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in module.parameters())])
    assert [x.dtype for x in results[0]] == [x.dtype for x in results[1]]
    torch.testing.assert_close(*results, rtol=3e-2, atol=3e-2)
    assert torch.equal(results[0][0], results[1][0])


def test_a_checkpoint_around_it_computes_no_tile_more_than_without() -> None:
    """Once forward and once in the backward: between them a checkpoint wants what tiles keep, not what they give."""
    for one in (lambda x, y: x + y(x), lambda x, y: y(x)):
        counts = []
        for around in (False, True):
            module = feed()
            calls: list[int] = []
            module.down.register_forward_hook(lambda _, inputs, out, calls=calls: calls.append(out.shape[1]))
            tiled(module, 5)
            x = rows()
            (checkpoint(one, x, module, use_reentrant=False) if around else one(x, module)).square().sum().backward()
            counts.append(calls)
        assert counts[0] == counts[1] == 2 * [5, 5, 5, 5, 5, 5, 4]


def test_half_precision_gradients_are_summed_in_fp32() -> None:
    """Over 250 tiles: at most 1.5 times the error of the module at once."""
    exact = outcome(feed(), rows(1000))
    whole = outcome(feed(torch.bfloat16), rows(1000, torch.bfloat16))
    tile = outcome(tiled(feed(torch.bfloat16), 8), rows(1000, torch.bfloat16))
    for true, one, mine in zip(exact[2:], whole[2:], tile[2:]):
        assert (mine.double() - true).norm() <= 1.5 * (one.double() - true).norm()


def test_dropout_draws_the_same_numbers_again() -> None:
    torch.manual_seed(3)
    x = torch.ones(1, 64, 4, requires_grad=True)
    y = tiled(nn.Dropout(0.5), 5)(x)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(torch.get_rng_state(), before)
    assert 0 < int((y == 0).sum()) < y.numel()


@pytest.mark.parametrize("wrapper", ["fsdp", "ddp"])
def test_under_fsdp_and_ddp_ranks_may_have_other_numbers_of_tiles(wrapper: str, tmp_path) -> None:
    expected = []
    for rank in range(2):
        module = feed()
        outcome(module, rows(9 + 14 * rank, seed=rank))
        expected.append([parameter.grad for parameter in module.parameters()])
    mean = [(a + b) / 2 for a, b in zip(*expected)]
    for grads in on_ranks(2, wrapped, wrapper, tmp_path=tmp_path):
        torch.testing.assert_close(grads, mean, rtol=1e-12, atol=1e-14)


def wrapped(wrapper: str) -> list[torch.Tensor]:
    mesh = ParallelMesh()
    inner = tiled(feed(), 5)
    module = DistributedDataParallel(inner) if wrapper == "ddp" else fully_shard(inner, mesh=mesh.fsdp_mesh)
    outcome(module, rows(9 + 14 * mesh.coordinate.data_rank, seed=mesh.coordinate.data_rank))
    return [p.grad if wrapper == "ddp" else p.grad.full_tensor() for p in module.parameters()]


class Table(nn.Module):
    """Integers in, and a table that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[x] ** 2


def test_an_input_of_integers_has_no_gradient_and_the_parameters_have() -> None:
    x, grads = torch.arange(66).view(2, 11, 3) % 5, []
    for module in (Table(), tiled(Table(), 4)):
        (module(x) * torch.linspace(-1, 2, 66, dtype=torch.float64).view(x.shape)).sum().backward()
        grads.append(module.table.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList()


class Pool(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def test_what_is_not_token_by_token_is_refused() -> None:
    with pytest.raises(ModelError, match="routes tokens to experts"):
        tiled(Experts(), 4)
    with pytest.raises(ModelError, match="at least 1"):
        tiled(feed(), 0)
    with pytest.raises(ModelError, match="cannot be tiled: it does not give one tensor with a row"):
        tiled(Pool(), 4)(rows())
    with pytest.raises(ModelError, match="it takes one tensor"):
        tiled(feed(), 4)(rows(), 3)

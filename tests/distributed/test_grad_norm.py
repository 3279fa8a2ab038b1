"""The gradient norm and clipping: exact in fp64, over shards, and those of torch on one device."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from longspan.distributed.grad_norm import _square, _square_on_gpu, clip_grad_norm_, grad_norm
from longspan.distributed.mesh import ParallelMesh
from tests.helpers.ranks import on_ranks


def test_on_one_rank_norm_and_clip_are_torchs():
    ours, theirs = _with_gradients(), _with_gradients()
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    torch.testing.assert_close(grad_norm(ours.parameters()), expected)
    torch.testing.assert_close(clip_grad_norm_(ours.parameters(), 0.5), expected)
    torch.testing.assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    torch.testing.assert_close(clip_grad_norm_(ours.parameters(), 0.6), grad_norm(theirs.parameters()))
    torch.testing.assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def _with_gradients() -> nn.Linear:
    linear = _pair()[0].double()
    linear(torch.ones(2, 5, dtype=torch.float64)).exp().sum().backward()
    return linear


def test_the_norm_of_nothing_is_zero_and_large_norms_do_not_overflow():
    large = nn.Parameter(torch.ones(3))
    assert grad_norm([large]).item() == 0
    large.grad = torch.full((3,), 1e30)
    assert grad_norm([large]).item() == pytest.approx(3**0.5 * 1e30)


def test_the_norm_of_many_small_gradients_is_exact():
    many = nn.Parameter(torch.zeros(2**25))  # an fp32 sum of squares is 1.7% off here
    many.grad = torch.full((2**25,), 0.001)
    assert grad_norm([many]).item() == pytest.approx(0.001 * 2**12.5, rel=1e-7)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_norm_over_sharded_and_whole_parameters_is_that_of_one_device(ranks, tmp_path):
    expected, clipped = _norms(*_pair())
    for norms, grads in on_ranks(ranks, _sharded_norms, tmp_path=tmp_path):
        assert norms == pytest.approx([expected, expected, 1.0], rel=1e-6)
        torch.testing.assert_close(grads, clipped)


def _pair() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(1)
    return nn.Linear(5, 7), nn.Linear(4, 3)


def _norms(sharded: nn.Linear, whole: nn.Linear) -> tuple[float, list[torch.Tensor]]:
    (sharded(torch.ones(2, 5)).exp().sum() + whole(torch.ones(2, 4)).exp().sum()).backward()
    parameters = [*sharded.parameters(), *whole.parameters()]
    before = nn.utils.clip_grad_norm_(parameters, 1.0)
    return before.item(), [parameter.grad for parameter in parameters]


def _sharded_norms():
    sharded, whole = _pair()
    fully_shard(sharded, mesh=ParallelMesh().fsdp_mesh)
    (sharded(torch.ones(2, 5)).exp().sum() + whole(torch.ones(2, 4)).exp().sum()).backward()
    parameters = [*sharded.parameters(), *whole.parameters()]
    norms = [grad_norm(parameters), clip_grad_norm_(parameters, 1.0), grad_norm(parameters)]
    grads = [*(parameter.grad.full_tensor() for parameter in sharded.parameters()), *(p.grad for p in whole.parameters())]
    return [float(one) for one in norms], grads


def test_clipping_takes_a_module_or_its_parameters_and_is_exact_in_fp32():
    torch.manual_seed(0)
    module, other = nn.Linear(3000, 3000), nn.Linear(3000, 3000)
    for one, two in zip(module.parameters(), other.parameters()):
        one.grad = torch.randn_like(one)
        two.grad = one.grad.clone()
    exact = torch.cat([parameter.grad.double().flatten() for parameter in module.parameters()]).norm()
    torch.testing.assert_close(clip_grad_norm_(module, 1.0), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(clip_grad_norm_(other.parameters(), 1.0), exact, rtol=1e-12, atol=0)
    for one, two in zip(module.parameters(), other.parameters()):
        assert torch.equal(one.grad, two.grad)
    torch.testing.assert_close(clip_grad_norm_(module, 9.0), torch.ones((), dtype=torch.float64), rtol=1e-5, atol=0)


def test_clipping_takes_one_tensor_and_spreads_nan_as_torch_does() -> None:
    for values in ([100.0, 100.0], [1.0, float("nan")]):
        pairs = [[nn.Parameter(torch.zeros(2)) for _ in range(2)] for _ in range(2)]
        for pair in pairs:
            pair[0].grad, pair[1].grad = torch.tensor(values), torch.tensor([3.0, 4.0])
        for given in (slice(0, 1), slice(0, 2)):
            ours, theirs = pairs[0][given], pairs[1][given]
            expected = nn.utils.clip_grad_norm_(theirs[0] if len(theirs) == 1 else theirs, 1.0)
            found = clip_grad_norm_(ours[0] if len(ours) == 1 else ours, 1.0)
            torch.testing.assert_close(found.float(), expected, equal_nan=True)
            for one, two in zip(ours, theirs):
                torch.testing.assert_close(one.grad, two.grad, equal_nan=True)


def test_the_norm_on_a_gpu_is_that_on_a_cpu() -> None:
    """The function that GPUs use, on CPU tensors: fp32 and halves, and one gradient without elements."""
    random = torch.Generator().manual_seed(0)
    held = [
        torch.randn(size, generator=random).to(dtype)
        for size, dtype in ((7, torch.float32), (300, torch.bfloat16), (0, torch.float32))
    ]
    assert _square_on_gpu(held).item() == pytest.approx(sum(x.double().square().sum().item() for x in held), rel=1e-6)
    doubles = [x.double() for x in held]
    assert _square_on_gpu(doubles).item() == pytest.approx(_square(doubles).item(), rel=1e-14)

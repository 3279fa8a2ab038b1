"""Products of halves: fp32 in blocks where the CPU has none, PyTorch's own elsewhere; each result rounded once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.kernels import matmul as products
from longspan.kernels.matmul import BLOCK_ROWS, Linear, linear
from longspan.loss import linear_cross_entropy
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SLOW_ON_CPU", frozenset(HALVES))


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, generator=generator) for size in (shape, (7, shape[-1]), (*shape[:-1], 7))]
    return [x.to(dtype) for x in drawn]


def _outcome(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = linear(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(5,), (2, 0, 5), (2, 3, 5), (2, BLOCK_ROWS + 3, 5)])
@pytest.mark.usefixtures("_slow")
def test_it_is_the_product_rounded_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = _inputs(shape, dtype)
    exact = _outcome(*(x.double() for x in inputs))
    found = _outcome(*inputs)
    half_a_step = torch.finfo(dtype).eps / 2
    for one, true in zip(found, exact):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), true, rtol=1.01 * half_a_step, atol=1e-5)


@pytest.mark.usefixtures("_slow")
def test_parts_of_weights_frozen_ones_and_gradients_that_lie_otherwise() -> None:
    x, weight, dy = _inputs((2, 3, 6), torch.bfloat16)
    exact = _outcome(x.double(), weight.double(), dy.double())
    wide = torch.randn(7, 9, dtype=torch.bfloat16).index_copy_(1, torch.arange(2, 8), weight)
    expanded = torch.ones(2, 3, 1, dtype=torch.bfloat16).expand(2, 3, 7)
    of_part = _outcome(x, wide[:, 2:8], dy)
    torch.testing.assert_close(of_part, [true.bfloat16() for true in exact])
    torch.testing.assert_close(_outcome(x, weight, expanded), _outcome(x, weight, expanded.contiguous()))
    frozen = x.detach().requires_grad_()
    linear(frozen, weight).backward(dy)
    torch.testing.assert_close(frozen.grad, of_part[1])
    trained = weight.detach().requires_grad_()
    linear(x, trained).backward(dy)
    torch.testing.assert_close(trained.grad, of_part[2])


@pytest.mark.usefixtures("_slow")
def test_what_is_no_product_of_halves_is_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_Widened", None)
    x, weight, _ = _inputs((2, 5), torch.float32)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.double(), weight.double()).dtype == torch.float64
    for mixed in ((x, weight.bfloat16()), (x.bfloat16(), weight)):
        with pytest.raises(RuntimeError, match="same dtype"):
            linear(*mixed)
    monkeypatch.setattr(products, "SLOW_ON_CPU", frozenset())
    assert torch.equal(linear(x.bfloat16(), weight.bfloat16()), F.linear(x.bfloat16(), weight.bfloat16()))


def test_a_decoder_in_bf16_is_no_less_exact_on_such_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients beside those of fp64, over all parameters; and each product of its blocks and loss is in fp32."""
    errors, seen = [], []
    for slow in ((), HALVES):
        monkeypatch.setattr(products, "SLOW_ON_CPU", frozenset(slow))
        with _Products() as products_seen:
            seen.append(products_seen)
            errors.append(_error_of_a_decoder())
    assert seen[0] == {torch.bfloat16}
    assert seen[1] == {torch.float32}
    assert errors[1] <= 1.05 * errors[0]


class _Products(TorchDispatchMode):
    """The dtypes of all products of matrices."""

    def __enter__(self) -> set[torch.dtype]:
        self.seen: set[torch.dtype] = set()
        super().__enter__()
        return self.seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_) and args[-1].dtype != torch.float64:
            self.seen.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def _error_of_a_decoder() -> float:
    shape = DecoderConfig(vocab=300, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96)
    total = 0.0
    for seed in range(4):
        ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(seed))
        half = Decoder(shape, seed=seed, head_chunks=2).bfloat16()
        exact = Decoder(shape, head_chunks=2).double()
        exact.load_state_dict(half.state_dict())
        for model in (half, exact):
            model(ids, labels=ids).loss.backward()
        pairs = zip(half.parameters(), exact.parameters())
        total += sum((one.grad.double() - true.grad).square().sum().item() for one, true in pairs)
    return total**0.5


@pytest.mark.usefixtures("_slow")
def test_autocast_rounds_both_and_multiplies_in_fp32() -> None:
    x, weight, dy = _inputs((2, 5), torch.float32)
    exact = _outcome(x.bfloat16().double(), weight.bfloat16().double(), dy.bfloat16().double())
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with _Products() as seen, torch.autocast("cpu", torch.bfloat16):
        y = linear(*leaves)
    found = [y.detach(), *torch.autograd.grad(y, leaves, dy.bfloat16())]
    assert [each.dtype for each in found] == [torch.bfloat16, torch.float32, torch.float32]
    assert seen == {torch.float32}
    for one, true in zip(found, exact):
        torch.testing.assert_close(one.double(), true, rtol=4e-3, atol=1e-5)


@pytest.mark.usefixtures("_slow")
def test_a_chunked_loss_multiplies_in_fp32() -> None:
    hidden, weight, _ = _inputs((9, 5), torch.bfloat16)
    labels = torch.arange(9) % 7
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    found, expected = linear_cross_entropy(*leaves, labels), F.cross_entropy(F.linear(*exact), labels)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    for one, true in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, exact)):
        torch.testing.assert_close(one.double(), true, rtol=4.1e-3, atol=1e-6)


def test_it_is_a_linear() -> None:
    layer = Linear(5, 7)
    assert isinstance(layer, nn.Linear)
    assert layer.bias is None
    assert layer.weight.shape == (7, 5)

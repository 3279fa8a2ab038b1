"""Kernels on the device of LONGSPAN_TEST_DEVICE against fp64: `make test-gpu`. Never run on a GPU; here on the CPU.

The kit needs torch, jaxtyping and pytest alone: no hypothesis, no beartype, no conftest of the other tests.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.attention.api import attend
from longspan.kernels.capability import capability
from longspan.kernels.protocol import Need
from longspan.kernels.reference import Reference
from longspan.kernels.table import KERNELS, choose
from longspan.masks.constructors import Causal, Documents, Full, Mask, SinkTokens, Window
from tests.helpers.device import DEVICE, launches

TOKENS = 1000
MASKS = [
    Causal(), Full(), Window(100), Window(30, 70), Documents((200, 1, 799)) & Causal(), Documents((500, 500)) & Window(64),
    Causal() & (Window(100) | SinkTokens(4)),
]  # fmt: skip
ON_GPU = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs LONGSPAN_TEST_DEVICE=cuda: it reads what a GPU alone has")


def inputs(dtype: torch.dtype, heads: int = 4, kv_heads: int = 2, dim: int = 64, tokens: int = TOKENS) -> list[Tensor]:
    """q, k, v and the gradient of the output; k and v are two parts of one tensor."""
    random = torch.Generator().manual_seed(0)
    q, dout = torch.randn(2, tokens, heads, dim, generator=random).to(DEVICE, dtype)
    k, v = torch.randn(tokens, kv_heads, 2 * dim, generator=random).to(DEVICE, dtype).split(dim, 2)
    return [q, k, v, dout]


def results(kernel: str, x: list[Tensor], mask: Mask) -> list[Tensor]:
    q, k, v, dout = x
    bands, scale = mask.bands(len(q), len(k)), q.shape[2] ** -0.5
    chosen = choose(
        kernel, device_type=DEVICE.type, dtype=q.dtype, qk_dim=q.shape[2], v_dim=v.shape[2], mask=mask, tokens=len(q)
    )
    out, lse = chosen.forward(q, k, v, bands, scale)
    dq, dk, dv, _ = chosen.backward(dout, q, k, v, out, lse, bands, scale)
    return [out, dq, dk, dv]


def exact(x: list[Tensor], mask: Mask) -> list[Tensor]:
    q, k, v, dout = (t.double().cpu() for t in x)
    bands, scale = mask.bands(len(q), len(k)), q.shape[2] ** -0.5
    out, lse = Reference().forward(q, k, v, bands, scale)
    return [out, *Reference().backward(dout, q, k, v, out, lse, bands, scale)[:3]]


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [((a.double().cpu() - b).norm() / b.norm()).item() for a, b in zip(found, wanted)]


@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_as_exact_as_their_rounding(mask: Mask, dtype: torch.dtype) -> None:
    x = inputs(dtype)
    assert max(errors(results("auto", x, mask), exact(x, mask))) < (3e-3 if dtype == torch.float16 else 2e-2)


@pytest.mark.long
@pytest.mark.parametrize("dim", [8, 64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_the_error_is_at_most_that_of_torch(dim: int, heads: int, kv_heads: int) -> None:
    x = inputs(torch.bfloat16, heads, kv_heads, dim)
    leaves = [t.detach().clone().requires_grad_() for t in x[:3]]
    q, k, v = (t.transpose(0, 1)[None] for t in leaves)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    theirs = [out.detach(), *torch.autograd.grad(out, leaves, x[3])]
    wanted = exact(x, Causal())
    for mine, other in zip(errors(results("auto", x, Causal()), wanted), errors(theirs, wanted)):
        assert mine <= 1.2 * other + 1e-4


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_fp32_is_exact(mask: Mask) -> None:
    x = inputs(torch.float32)
    assert max(errors(results("auto", x, mask), exact(x, mask))) < 1e-5


@pytest.mark.long
def test_70_000_documents_of_one_token_see_themselves() -> None:
    x = inputs(torch.bfloat16, dim=8, tokens=70_000)
    out = results("auto", x, Documents([1] * 70_000))[0]
    assert torch.equal(out.to(x[2].dtype), x[2].repeat_interleave(2, 1))


@pytest.mark.parametrize("kernel", sorted(set(KERNELS) - {"reference"}))
@pytest.mark.parametrize("mask", [Causal(), Full(), Window(30, 70), Documents((500, 500)) & Causal()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_kernel_by_name(kernel: str, mask: Mask, dtype: torch.dtype) -> None:
    x = inputs(dtype)
    reason = KERNELS[kernel].lacks(Need(DEVICE.type, dtype, 64, 64, capability=capability()))  # type: ignore[attr-defined]
    if reason is not None:
        pytest.skip(reason)
    assert max(errors(results(kernel, x, mask), exact(x, mask))) < (1e-5 if dtype == torch.float32 else 2e-2)


class Slope:
    """A bias in proportion to the distance, differentiable in its one parameter."""

    def __init__(self) -> None:
        self.parameters = (torch.full((1,), -0.01, device=DEVICE, requires_grad=True),)

    def __call__(self, q_index: Tensor, k_index: Tensor) -> Tensor:
        return (self.parameters[0] * (q_index[:, None] - k_index)).expand(4, -1, -1)


def test_a_bias_is_that_of_plain_pytorch() -> None:
    q, k, v, dout = inputs(torch.float32)
    bands, found = Causal().bands(TOKENS, TOKENS), []
    for name in ("auto", "online"):
        kernel = choose(name, device_type=DEVICE.type, dtype=q.dtype, qk_dim=64, v_dim=64, bias=Slope())
        out, lse = kernel.forward(q, k, v, bands, 0.1, bias=Slope())
        dq, dk, dv, dbias = kernel.backward(dout, q, k, v, out, lse, bands, 0.1, bias=Slope())
        found.append([out, dq, dk, dv, *dbias])
    assert max(errors(found[0], [t.double().cpu() for t in found[1]])) < 1e-5


@pytest.mark.parametrize("mask", [Causal(), Documents((200, 1, 799)) & Causal()], ids=repr)
def test_views_with_strides_are_read_in_place(mask: Mask) -> None:
    """q stored heads first, k and v parts of one tensor, and a gradient that is expanded: its last dim has stride 0."""
    q, k, v, dout = inputs(torch.bfloat16)
    strided = [q.transpose(0, 1).contiguous().transpose(0, 1), k, v, dout[:, :, :1].expand_as(dout)]
    whole = [x.contiguous() for x in strided]
    assert max(errors(results("auto", strided, mask), [t.double().cpu() for t in results("auto", whole, mask)])) < 1e-3


@contextmanager
def no_wait() -> Iterator[None]:
    """Context manager: an error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ON_GPU
@pytest.mark.parametrize("mask", [Causal(), Window(255), Documents((300, 700)), Documents((300, 700)) & Window(99)], ids=repr)
def test_a_layer_does_not_wait_and_launches_few_kernels(mask: Mask) -> None:
    q, k, v = (t[None].requires_grad_() for t in inputs(torch.bfloat16)[:3])
    attend(q, k, v, mask=mask).sum().backward()
    with no_wait(), torch.profiler.profile() as profile:
        out = attend(q, k, v, mask=mask)
        out.backward(out.detach())
    assert launches(profile) <= 4 + 10 + 6  # forward, backward, and the three gradients that are added


@ON_GPU
@pytest.mark.parametrize(
    "mask", [Causal(), Window(255), Documents([1024] * 128), Documents([1024] * 128) & Window(99)], ids=repr
)
def test_a_call_of_131_072_tokens_launches_few_kernels(mask: Mask) -> None:
    q, k, v, dout = inputs(torch.bfloat16, 4, 1, 128, 131_072)
    results("auto", [q, k, v, dout], mask)  # builds plans, and compiles
    kernel = choose("auto", device_type="cuda", dtype=q.dtype, qk_dim=128, v_dim=128, mask=mask, tokens=len(q))
    bands = mask.bands(len(q), len(k))
    with torch.profiler.profile() as forward:
        out, lse = kernel.forward(q, k, v, bands, 0.1)
    with torch.profiler.profile() as backward:
        kernel.backward(dout, q, k, v, out, lse, bands, 0.1)
    assert launches(forward) <= 4
    assert launches(backward) <= 10


@ON_GPU
def test_the_memory_of_a_causal_layer_is_linear() -> None:
    peaks = []
    for tokens in (16_384, 32_768):
        x = inputs(torch.bfloat16, tokens=tokens)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results("auto", x, Causal())
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.2 * peaks[0]

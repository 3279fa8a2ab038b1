"""Guarantee 1 for ``attend``: every shape, mask and layout gives the output and gradients of one device, on real ranks."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from longspan.attention.api import AttentionSpec, _as_autocast, attend, plan_attention
from longspan.attention.refusals import refuse_tensors, refuse_what_is_no_tensor
from longspan.distributed.collectives import CountingTransport, TorchTransport
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.traffic import Traffic
from longspan.errors import KernelError, LayoutError, MaskError
from longspan.kernels.reference import Reference
from longspan.masks.constructors import Causal, Documents, Full, Span, Window, batch_bands
from tests.helpers.attention_cases import (
    Case,
    assert_like_one_device,
    assert_like_one_device_in_fp32,
    cases,
    oracle,
    run,
    squared_error,
    whole_inputs,
)
from tests.helpers.examples import examples
from tests.helpers.ranks import Ranks

# beartype looks at a random item of each list that it checks
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


@examples(few=30, many=600)
@given(case=cases())
def test_attend_is_one_device_in_fp64(case: Case, pool: Callable[[int], Ranks]) -> None:
    assert_like_one_device(case, run(case, pool), 1e-10)


@examples(few=15, many=200)
@given(case=cases(torch.float32))
def test_attend_is_one_device_in_fp32(case: Case, pool: Callable[[int], Ranks]) -> None:
    assert_like_one_device_in_fp32(case, pool)


KEPT = [  # once failed: queries that see one key alone, whose gradient is 0 up to rounding
    Case(3, 2, False, 2, 6, 6, 28, 4, 2, 8, Span(0, 1) & Causal(), dtype=torch.float32, seed=799, head_chunks=2),
    Case(1, 2, False, 1, 3, 3, 1, 1, 16, 16, Window(0, 0), dtype=torch.float32, seed=1),
]


@pytest.mark.parametrize("case", KEPT)
def test_what_once_failed(case: Case, pool: Callable[[int], Ranks]) -> None:
    assert_like_one_device_in_fp32(case, pool)


NAMED = {
    "28 query and 4 key/value heads on 8 ranks": Case(8, 1, False, 2, 61, 61, 28, 4, 8, 8, Causal()),
    "28/4 on 8, ring of 2": Case(4, 2, True, 1, 61, 61, 28, 4, 8, 8, Causal(), sinks=True),
    "40/8 on 16 ranks": Case(16, 1, False, 1, 61, 61, 40, 8, 4, 4, Causal()),
    "40/8 on 16 ranks, ring of 2": Case(8, 2, True, 1, 97, 97, 40, 8, 4, 4, Window(11)),
    "one key/value head on 8 ranks": Case(8, 1, False, 1, 37, 37, 8, 1, 8, 8, Causal(), head_chunks=1),
    "3 heads on 2 ranks": Case(2, 1, False, 3, 31, 31, 3, 3, 8, 8, Causal()),
    "MLA: query/key dim 24, value dim 16": Case(4, 1, False, 1, 31, 31, 4, 4, 24, 16, Causal()),
    "cross-attention": Case(2, 2, False, 2, 19, 45, 4, 2, 8, 8, Full()),
    "stored heads first": Case(1, 3, False, 1, 31, 31, 4, 2, 8, 8, Causal(), head_chunks=2, stored=(3, 2, 1, 0)),
    "stored heads first, one rank": Case(1, 1, False, 2, 31, 31, 4, 2, 8, 8, Causal(), stored=(0, 3, 2, 1)),
    "as many tokens as ranks": Case(2, 4, True, 1, 8, 8, 2, 2, 4, 4, Causal()),
}


@pytest.mark.parametrize("name", NAMED)
def test_attend_is_one_device_in_named_shapes(name: str, pool: Callable[[int], Ranks]) -> None:
    assert_like_one_device(NAMED[name], run(NAMED[name], pool), 1e-10)


@pytest.mark.parametrize(("ulysses", "ring"), [(4, 1), (1, 4), (2, 2)])
def test_a_length_of_which_only_some_ranks_see_a_new_share(ulysses: int, ring: int, pool: Callable[[int], Ranks]) -> None:
    for tokens in (9, 10):
        case = Case(ulysses, ring, False, 1, tokens, tokens, 4, 2, 4, 4, Causal())
        assert_like_one_device(case, run(case, pool), 1e-10)


def dropping(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: object) -> torch.Tensor:
    raise AssertionError("it is refused before it is called")


Q, KV = torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 2, 4)


@pytest.mark.parametrize(
    ("degrees", "asked", "error", "text"),
    [
        ((8, 1), {}, LayoutError, "ulysses=8 exceeds the 4 query heads; use ulysses=4 ring=2"),
        ((2, 1), {"tokens": 1}, LayoutError, "tokens=1 is fewer than the 2 ranks of a sequence"),
        ((2, 1), {"tokens": 19}, LayoutError, "this rank passed 8 tokens, but holds .* of tokens=19"),
        ((2, 1), {"k": KV[:, :7], "v": KV[:, :7], "key_tokens": 16}, LayoutError, "this rank passed 7 tokens, but holds 8"),
        ((2, 1), {"k": KV[:, :7], "v": KV[:, :7], "tokens": 16}, LayoutError, "this rank passed 7 tokens, but holds 8"),
        ((2, 1), {"k": KV.half()}, KernelError, "k is torch.float16 on cpu.*: kernels need one dtype and one device"),
        ((2, 1), {"v": KV.to("meta")}, KernelError, "v is on meta and must be a tensor with values"),
        ((2, 1), {"k": KV[:, :, :, :2]}, LayoutError, "do not fit; .* q and k share batch and dim"),
        ((2, 1), {"sink_logits": torch.zeros(3)}, LayoutError, r"sink_logits of shape \[3\] do not fit 4 query heads"),
        ((2, 1), {"mask": Documents((5, 4))}, MaskError, "holds 9 queries and 9 keys, but is asked for 16"),
        ((2, 1), {"mask": [Causal()] * 2}, MaskError, "2 masks for a batch of 1 rows"),
        ((2, 1), {"softcap": 5.0, "kernel": "sdpa"}, KernelError, "no softcap"),
        ((2, 1), {"kernel": "flash"}, KernelError, "flash"),
        ((1, 2), {"kernel": dropping}, KernelError, "'dropping' returns only its output, which cannot carry ring; pass"),
        ((2, 1), {"kernel": dropping, "sink_logits": torch.zeros(4)}, KernelError, "cannot carry sink_logits"),
        ((2, 1), {"scale": 0.0}, KernelError, "scale=0.0 must be above 0 and finite, or None"),
        ((2, 1), {"scale": -0.5}, KernelError, "scale=-0.5 must be above 0 and finite.*; negate q for a negative scale"),
        ((2, 1), {"scale": float("nan")}, KernelError, "scale=nan must be above 0"),
        ((2, 1), {"softcap": 0.0}, KernelError, "softcap=0.0 must be above 0"),
        ((2, 1), {"softcap": float("inf")}, KernelError, "softcap=inf must be above 0"),
        ((2, 1), {"head_chunks": 3}, LayoutError, "head_chunks=3 cannot cut the 2 query heads"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sent(
    degrees: tuple[int, int], asked: dict[str, object], error: type[Exception], text: str, pool: Callable[[int], Ranks]
) -> None:
    for refused, sent in pool(degrees[0] * degrees[1]).run(refusal, degrees, asked):
        assert isinstance(refused, error)
        assert re.search(text, str(refused)), refused
        assert sent == Traffic()


@pytest.mark.parametrize(
    ("q", "k", "v", "error", "text"),
    [
        (
            Q[0],
            KV[0],
            KV[0],
            LayoutError,
            r"q \[8, 4, 4\], k .* are not \[batch, tokens, heads, dim\].*; a single row has batch 1",
        ),
        (Q, KV[0], KV[0], LayoutError, r"k \[8, 2, 4\] and v \[8, 2, 4\] are not"),
        (Q[None], KV[None], KV[None], LayoutError, r"q \[1, 1, 8, 4, 4\]"),
        (Q[..., :0], KV[..., :0], KV, LayoutError, "dim at least 1"),
        (Q.int(), KV.int(), KV.int(), KernelError, r"are torch.int32; kernels compute with torch.float64, .*; cast them"),
        (*[Q.to(torch.complex64)] * 3, KernelError, "are torch.complex64"),
        (*[Q.to(torch.float8_e4m3fn)] * 3, KernelError, "are torch.float8_e4m3fn"),
    ],
)
def test_tensors_of_another_kind_are_refused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        refuse_tensors(q, k, v, None)  # annotations refuse them in ``attend`` here, and do not for users


@pytest.mark.parametrize(
    ("asked", "error", "text"),
    [
        ({"kernel": None}, KernelError, "kernel=None is unknown; use 'auto'"),
        ({"kernel": 3}, KernelError, "kernel=3 is unknown; use 'auto'"),
        ({"mask": None}, MaskError, "mask=NoneType is no mask; pass one of longspan's, like Causal"),
        ({"mask": (Causal(), torch.ones(8, 8))}, MaskError, "mask=Tensor is no mask"),
        ({"bias": torch.zeros(8, 8)}, KernelError, "bias=Tensor is no Bias, which is called for a tile"),
        ({"kernel": torch.zeros(2)}, KernelError, "is unknown; use 'auto'"),
        (
            {"tokens": 7},
            LayoutError,
            "tokens=7 and key_tokens=7 are not those of q, 8, and k, 8: without a mesh they are whole",
        ),
        ({"tokens": 9}, LayoutError, "tokens=9 and key_tokens=9"),
        ({"key_tokens": 3}, LayoutError, "tokens=8 and key_tokens=3"),
        ({"tokens": True}, LayoutError, "tokens=True must be an int"),
        ({"tokens": 8.0}, LayoutError, "tokens=8.0 must be an int"),
        ({"key_tokens": "8"}, LayoutError, "key_tokens='8' must be an int"),
        ({"head_chunks": 1.5}, LayoutError, "head_chunks=1.5 must be an int"),
        ({"head_chunks": None}, LayoutError, "head_chunks=None must be an int"),
        ({"q_shape": torch.Size((1, 8, 0, 4))}, LayoutError, "0 query heads cannot share 2 key/value heads"),
        (
            {"scale": torch.tensor(0.5)},
            KernelError,
            "scale=Tensor must be a number: a tensor would get no gradient; multiply q",
        ),
        ({"softcap": "30"}, KernelError, "softcap=str must be a number"),
        ({"bias": torch.nn.Linear(2, 2)}, KernelError, "bias=Linear is no Bias, .* has its parameters as a tuple"),
    ],
)
def test_what_is_no_mask_bias_or_kernel_is_refused(asked: dict[str, Any], error: type[Exception], text: str) -> None:
    spec: dict[str, Any] = {"q_shape": Q.shape, "k_shape": KV.shape, "v_shape": KV.shape, "dtype": Q.dtype, "mask": Causal()}
    with pytest.raises(error, match=text):
        plan_attention(AttentionSpec(**spec | asked, device_type="cpu"))


def test_autocast_casts_floating_point_alone() -> None:
    """An int tensor that autocast casts would be computed with, and a complex one would lose its imaginary part."""
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(Q, KV.double().float(), KV, mask=Causal()).dtype == torch.bfloat16
        for dtype in (torch.int64, torch.bool, torch.complex64):
            with pytest.raises(KernelError, match=f"are {dtype}"):
                refuse_tensors(*_as_autocast(*[Q.to(dtype)] * 3), None)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"q": None}, "q is NoneType and must be a tensor"),
        ({"q": Q.tolist()}, "q is list and must be a tensor"),
        ({"q": Q, "k": KV.numpy()}, "k is ndarray and must be a tensor"),
        ({"v": KV.to_sparse()}, "v is torch.sparse_coo and must be a dense tensor"),
        ({"q": torch.nested.nested_tensor([Q[0]], layout=torch.jagged)}, "q is nested and must be a dense .*; pad rows"),
        ({"q": Q.to("meta")}, "q is on meta and must be a tensor with values"),
        ({"sink_logits": [0.0] * 4}, "sink_logits is list"),
    ],
)
def test_what_is_no_dense_tensor_is_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(KernelError, match=text):
        refuse_what_is_no_tensor(**values)  # annotations refuse most of them in ``attend`` here, and do not for users
    refuse_what_is_no_tensor(q=Q)


@pytest.mark.parametrize("sinks", [torch.zeros(4, device="meta"), torch.zeros(4, dtype=torch.int64)])
def test_sink_logits_are_of_floating_point_and_on_the_device_of_q(sinks: torch.Tensor) -> None:
    with pytest.raises(KernelError, match=f"sink_logits are {sinks.dtype} on {sinks.device} and q is on cpu"):
        refuse_tensors(Q, KV, KV, sinks)


def refusal(degrees: tuple[int, int], asked: dict[str, object]) -> tuple[Exception, Traffic]:
    transport = CountingTransport(TorchTransport())
    mesh = ParallelMesh(*degrees, transport=transport)
    try:
        attend(**{"q": Q, "k": KV, "v": KV, "mask": Causal(), "mesh": mesh} | asked)  # type: ignore[arg-type]
    except Exception as error:
        return error, transport.traffic
    raise AssertionError("nothing was refused")


@pytest.mark.long
def test_bf16_is_as_exact_as_one_device_over_hundreds_of_cases(pool: Callable[[int], Ranks]) -> None:
    errors = {"ranks": 0.0, "one device": 0.0}

    @examples(few=200, many=200)
    @given(case=cases(torch.bfloat16))
    def add(case: Case) -> None:
        alone = case._replace(ulysses=1, ring=1, zigzag=False, head_chunks=1)
        want = oracle(case)
        errors["ranks"] += squared_error(run(case, pool), want)
        errors["one device"] += squared_error(run(alone, pool), want)

    add()
    assert (errors["ranks"] / errors["one device"]) ** 0.5 <= 1.2


def test_a_gradient_that_is_one_number_everywhere() -> None:
    """``out.sum().backward()`` hands the kernel a gradient without memory of its own."""
    q, k, v = (torch.randn(1, 31, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    found = torch.autograd.grad(attend(q, k, v, mask=Causal()).sum(), (q, k, v))
    expected = torch.autograd.grad(attend(q, k, v, mask=Causal()), (q, k, v), torch.ones(1, 31, 4, 8, dtype=torch.float64))
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("options", [{}, {"recomputable": True}])
def test_a_kernel_of_the_user_gets_tensors_whose_last_dim_is_contiguous(options: dict[str, Any]) -> None:
    strides: set[int] = set()

    class Mine(Reference):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Any:
            strides.update(x.stride(-1) for x in (q, k, v))
            return super().forward(q, k, v, *rest, **more)

        def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Any, **more: Any) -> Any:
            strides.update(x.stride(-1) for x in (dout, q, k, v, out))
            return super().backward(dout, q, k, v, out, *rest, **more)

    q, k, v = (torch.randn(1, 7, 8, 4, dtype=torch.float64).transpose(2, 3).requires_grad_() for _ in range(3))
    attend(q, k, v, mask=Causal(), kernel=Mine(), **options).sum().backward()
    assert strides == {1}


@pytest.mark.parametrize("extras", [{"softcap": 20.0}, {"kernel": "online"}, {}])
def test_autocast_casts_the_inputs_and_nothing_else(extras: dict[str, object]) -> None:
    q, k, v = (torch.randn(1, 64, 4, 16, requires_grad=True) for _ in range(3))
    dout = torch.randn(1, 64, 4, 16)
    halves = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    expected = attend(*halves, mask=Causal(), **extras)  # type: ignore[arg-type]
    expected.backward(dout.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v, mask=Causal(), **extras)  # type: ignore[arg-type]
    found.backward(dout.bfloat16())
    assert torch.equal(found, expected)
    for mine, theirs in zip((q, k, v), halves):
        assert torch.equal(mine.grad.bfloat16(), theirs.grad)  # type: ignore[union-attr]


def test_the_oracle_is_the_reference_kernel_on_one_row() -> None:
    case = Case(1, 1, False, 1, 13, 13, 4, 2, 8, 8, Causal())
    x = whole_inputs(case)
    bands = batch_bands(case.mask, 1, 13, 13)
    out, _ = Reference().forward(x["q"][0], x["k"][0], x["v"][0], bands, 8**-0.5)
    torch.testing.assert_close(out, oracle(case)["out"][0], rtol=1e-12, atol=1e-12)

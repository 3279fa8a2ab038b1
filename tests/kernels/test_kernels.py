"""Every kernel gives the numbers of the dense oracle, forward and backward, and the oracle those of a naive softmax."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from longspan.errors import KernelError
from longspan.kernels import flash_cpu as flash
from longspan.kernels import flash_cuda as cuda
from longspan.kernels import flex, sdpa
from longspan.kernels import matmul as products
from longspan.kernels.online import Online, cells
from longspan.kernels.protocol import Kernel
from longspan.kernels.reference import Reference, visible
from longspan.kernels.sdpa import SDPA
from longspan.kernels.table import KERNELS, choose
from longspan.kernels.tiles import Shape, Stack, columns, corners, plan
from longspan.masks.bands import Band, area, localize
from longspan.masks.constructors import BlockSparse, Causal, Chunked, Documents, Full, Mask, PrefixLM, SinkTokens, Span, Window
from tests.helpers.examples import examples

# beartype looks at a random item of each list that it checks
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

KINDS = ["causal", "full", "window", "documents", "prefix", "chunked", "sinks", "only", "sparse"]
CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small calls on many threads wait for one another more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


class Slopes:
    """A bias that is learned: one slope a head times the distance, and one offset."""

    def __init__(self, heads: int, dtype: torch.dtype = torch.float64) -> None:
        slopes = torch.linspace(-0.3, 0.5, heads, dtype=dtype, requires_grad=True)
        self.parameters = (slopes, torch.tensor(0.7, dtype=dtype, requires_grad=True))

    def __call__(self, q_index: Tensor, k_index: Tensor) -> Tensor:
        slopes, offset = self.parameters
        distance = (q_index[:, None] - k_index).abs().double()
        return slopes[:, None, None] * distance.sqrt() + offset * torch.cos(k_index.double())


def draw_inputs(
    queries: int, keys: int, heads: int = 2, kv_heads: int = 1, dim: int = 8, v_dim: int | None = None,
    dtype: torch.dtype = torch.float64, seed: int = 0, strided: bool = True,
) -> Inputs:  # fmt: skip
    """Random q, k, v and gradient; ``strided``: k and v are halves of one tensor and q skips every other token's heads."""
    v_dim = dim if v_dim is None else v_dim
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, queries, dim, generator=random, dtype=torch.float64).to(dtype).transpose(0, 1)
    k, v = torch.randn(keys, kv_heads, dim + v_dim, generator=random, dtype=torch.float64).to(dtype).split((dim, v_dim), 2)
    dout = torch.randn(queries, heads, v_dim, generator=random, dtype=torch.float64).to(dtype)
    return Inputs(q, k, v, dout) if strided else Inputs(q.contiguous(), k.contiguous(), v.contiguous(), dout)


def run(kernel: Kernel, x: Inputs, bands: Any, scale: float = 0.3, **extras: Any) -> dict[str, Tensor]:
    out, lse = kernel.forward(x.q, x.k, x.v, bands, scale, **extras)
    dq, dk, dv, dbias = kernel.backward(x.dout, x.q, x.k, x.v, out, lse, bands, scale, **extras)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv} | {f"dbias{i}": g for i, g in enumerate(dbias)}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest element: an element of a gradient may be zero by cancellation."""
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        got, expected = found[name].double(), expected.double()
        assert torch.equal(got.isinf(), expected.isinf()), name
        got, expected = got.nan_to_num(neginf=0), expected.nan_to_num(neginf=0)
        bound = tolerance * max(1e-3, expected.abs().max().item() if expected.numel() else 0)
        torch.testing.assert_close(got, expected, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


@st.composite
def masks_of(draw: st.DrawFn, tokens: int, key_tokens: int) -> Mask:
    def documents(count: int, parts: int) -> tuple[int, ...]:
        cuts = sorted(draw(st.lists(st.integers(0, count), min_size=parts - 1, max_size=parts - 1)))
        return tuple(b - a for a, b in pairwise((0, *cuts, count)))

    def one() -> Mask:
        name = draw(st.sampled_from(KINDS))
        small = draw(st.integers(0, 300))
        if name == "window":
            return Window(small, draw(st.one_of(st.none(), st.just(0), st.integers(0, 300))))
        if name == "documents":
            parts = draw(st.integers(1, 6))
            return Documents(documents(tokens, parts), documents(key_tokens, parts))
        if name == "only":
            start, stop = sorted(draw(st.tuples(*[st.integers(0, min(tokens, key_tokens))] * 2)))
            return Span(start, stop)
        if name == "sparse":
            block = draw(st.integers(7, 150))
            columns = -(-key_tokens // block)
            rows = st.lists(st.booleans(), min_size=columns, max_size=columns)
            return BlockSparse(block, [draw(rows) for _ in range(-(-tokens // block))])
        plain = {"causal": Causal(), "full": Full(), "prefix": PrefixLM(small), "chunked": Chunked(small + 1)}
        return plain.get(name, SinkTokens(small))

    mask = one()
    joined = draw(st.sampled_from(["", "&", "|"]))
    if joined == "&":
        return mask & one()
    return mask | one() if joined == "|" else mask


@st.composite
def attentions(draw: st.DrawFn) -> tuple[Mask, Inputs]:
    tokens = draw(st.integers(1, 400))
    key_tokens = draw(st.one_of(st.just(tokens), st.integers(1, 400)))
    kv_heads, group, dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8, 16]))
    seed, strided = draw(st.integers(0, 99)), draw(st.booleans())
    x = draw_inputs(tokens, key_tokens, kv_heads * group, kv_heads, dim, seed=seed, strided=strided)
    return draw(masks_of(tokens, key_tokens)), x


def bands_of(mask: Mask, x: Inputs) -> tuple[Band, ...]:
    return mask.bands(x.q.shape[0], x.k.shape[0])


# equal tiles at equal distances: those of CORNERS share queries and are never one stack, those of COLUMN share keys and are
CORNERS = BlockSparse(50, [[True, False, True], [False, False, False], [True, False, True]])
COLUMN = BlockSparse(50, [[False, True, False], [False, False, False], [False, True, False]])


# ---- the oracle


def naive(x: Inputs, bands: Any, scale: float, softcap: float | None = None, bias: Any = None) -> dict[str, Tensor]:
    """Autograd of the formula, with the mask asked pair by pair. A row that sees nothing is left out of the softmax."""
    q, k, v = (t.detach().double().requires_grad_() for t in (x.q, x.k, x.v))
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias(torch.arange(q.shape[0]), torch.arange(k.shape[0]))
    seen = torch.tensor(
        [
            [any(b.q_start <= i < b.q_stop and b.k_start <= j < b.k_stop and b.lo <= j - i <= b.hi for b in bands)
             for j in range(k.shape[0])] for i in range(q.shape[0])
        ]
    )  # fmt: skip
    rows = seen.any(1)
    scores = scores.masked_fill(~seen, -math.inf)[:, rows]
    out = torch.zeros(x.dout.shape, dtype=torch.float64)
    out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(2), v.repeat_interleave(group, 1))
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float64)
    lse[:, rows] = scores.logsumexp(2).detach()
    parameters = () if bias is None else bias.parameters
    dq, dk, dv, *dbias = torch.autograd.grad(out, (q, k, v, *parameters), x.dout.double())
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv} | {f"dbias{i}": g for i, g in enumerate(dbias)}


@pytest.mark.parametrize("mask", [Causal(), Full(), Window(5, 2), Span(4, 20), Documents((9, 0, 20)) & Causal()], ids=repr)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kernel", [Reference(), Online()], ids=lambda kernel: kernel.name)
def test_dense_formula(kernel: Kernel, mask: Mask, softcap: float | None, biased: bool) -> None:
    x = draw_inputs(29, 29, heads=6, kv_heads=2, dim=5, v_dim=3)
    bias = Slopes(6) if biased else None
    extras = {"softcap": softcap, "bias": bias}
    assert_same(run(kernel, x, bands_of(mask, x), **extras), naive(x, bands_of(mask, x), 0.3, **extras), 1e-10)


# ---- every kernel against the oracle


@pytest.mark.parametrize("kernel", [SDPA(), Online()], ids=lambda kernel: kernel.name)
@examples(few=25, many=500)
@given(attention=attentions())
@example(attention=(Window(255), draw_inputs(1100, 1100)))
@example(attention=(Window(1500, 100), draw_inputs(3500, 3300)))
@example(attention=(Window(1023), draw_inputs(2500, 2500)))
@example(attention=(Causal() & (Window(100) | SinkTokens(4)), draw_inputs(800, 800)))
@example(attention=(CORNERS, draw_inputs(150, 150)))
@example(attention=(COLUMN, draw_inputs(150, 150)))
def test_kernel_equals_reference(kernel: Kernel, attention: tuple[Mask, Inputs]) -> None:
    mask, x = attention
    bands = bands_of(mask, x)
    assert_same(run(kernel, x, bands), run(Reference(), x, bands), 1e-10)


@examples(few=12, many=250)
@given(attention=attentions(), keys=st.integers(1, 150))
def test_a_column_of_keys_at_a_time_is_the_whole(attention: tuple[Mask, Inputs], keys: int) -> None:
    mask, x = attention
    bands = bands_of(mask, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_cpu, "arrange", partial(columns, keys=keys))
        assert all(stack.count > 1 or stack.keys <= keys for stack in columns(plan(bands), keys) if stack.shape in CUT)
        assert_same(run(SDPA(), x, bands), run(Reference(), x, bands), 1e-10)


CUT = (Shape.LOWER, Shape.RECTANGLE)


@pytest.mark.parametrize("mask", [Causal(), Window(130, 7), Chunked(90) & Causal(), Window(20) | SinkTokens(3)], ids=repr)
@pytest.mark.parametrize("kernel", [SDPA(), Online()], ids=lambda kernel: kernel.name)
def test_fp32(kernel: Kernel, mask: Mask) -> None:
    x = draw_inputs(1500, 1500, heads=4, kv_heads=2, dim=32, dtype=torch.float32)
    found = run(kernel, x, bands_of(mask, x))
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert_same(found, run(Reference(), Inputs(*(t.double() for t in x)), bands_of(mask, x)), 1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True])
def test_online_across_cells(softcap: float | None, biased: bool) -> None:
    """More keys and queries than one cell, so that merging, skipping and the sums over cells are met."""
    x = draw_inputs(1300, 2500, heads=4, kv_heads=2, dim=6, v_dim=10)
    bands = bands_of((Causal() & Window(600)) | SinkTokens(3), x)
    assert len({(cell.queries.start, cell.keys.start) for cell in cells(bands, 4)}) >= 4
    extras = {"softcap": softcap, "bias": Slopes(4) if biased else None}
    assert_same(run(Online(), x, bands, **extras), run(Reference(), x, bands, **extras), 1e-10)


def test_a_bias_that_does_not_learn() -> None:
    x, bias = draw_inputs(20, 20), Slopes(2)
    bias.parameters[0].requires_grad_(False)
    found = run(Online(), x, Causal().bands(20, 20), bias=bias)
    wanted = naive(x, Causal().bands(20, 20), 0.3, bias=Slopes(2))
    assert not found["dbias0"].any()
    torch.testing.assert_close(found["dbias1"], wanted["dbias1"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("kernel", [SDPA(), Online(), Reference()], ids=lambda kernel: kernel.name)
@examples(few=15, many=300)
@given(attention=attentions(), cut=st.floats(0, 1))
def test_parts_of_the_keys_add_up(kernel: Kernel, attention: tuple[Mask, Inputs], cut: float) -> None:
    """Out and lse of each part merge to the whole; each part's backward, given the whole out and lse, is its share."""
    mask, x = attention
    queries, keys = range(x.q.shape[0]), range(x.k.shape[0])
    whole = run(Reference(), x, bands_of(mask, x))
    at = int(cut * len(keys))
    total = {"dq": torch.zeros_like(whole["dq"])}
    outs, lses, pieces = [], [], {"dk": [], "dv": []}
    for part in (keys[:at], keys[at:]):
        bands = localize(bands_of(mask, x), (queries,), (part,))
        k, v = x.k[part.start : part.stop], x.v[part.start : part.stop]
        out, lse = kernel.forward(x.q, k, v, bands, 0.3)
        outs.append(out)
        lses.append(lse)
        dq, dk, dv, _ = kernel.backward(x.dout, x.q, k, v, whole["out"], whole["lse"], bands, 0.3)
        total["dq"] += dq
        pieces["dk"].append(dk)
        pieces["dv"].append(dv)
    total["lse"] = torch.stack(lses).logsumexp(0)
    shares = (torch.stack(lses) - total["lse"]).exp().nan_to_num(0)
    total["out"] = torch.einsum("phq,pqhd->qhd", shares, torch.stack(outs))
    total |= {name: torch.cat(parts) for name, parts in pieces.items()}
    assert_same(total, whole, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [SDPA(), Online(), Reference()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 5), (5, 0), (5, 5)])
def test_nothing_to_see(kernel: Kernel, queries: int, keys: int, dtype: torch.dtype) -> None:
    found = run(kernel, draw_inputs(queries, keys, dtype=dtype), ())
    assert {value.dtype for value in found.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert torch.equal(found.pop("lse"), torch.full((2, queries), -math.inf, dtype=found["out"].dtype))
    assert {name: value.shape for name, value in found.items()} == {
        "out": (queries, 2, 8), "dq": (queries, 2, 8), "dk": (keys, 1, 8), "dv": (keys, 1, 8)
    }  # fmt: skip
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("kernel", [SDPA(), Online()], ids=lambda kernel: kernel.name)
def test_bf16_is_as_good_as_sdpa(kernel: Kernel) -> None:
    """Pooled over 8 seeds, causal: at most 1.2 x the error that PyTorch's own attention in bf16 makes against fp64."""
    errors: dict[str, list[float]] = {"ours": [0.0] * 4, "torch": [0.0] * 4}
    for seed in range(8):
        x = draw_inputs(600, 600, heads=4, kv_heads=2, dim=32, dtype=torch.bfloat16, seed=seed)
        names = ("out", "dq", "dk", "dv")
        exact = run(Reference(), Inputs(*(t.double() for t in x)), Causal().bands(600, 600))
        ours = run(kernel, x, Causal().bands(600, 600))
        leaves = [t.detach().transpose(0, 1)[None].requires_grad_() for t in x[:3]]
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.3, enable_gqa=True)
        grads = torch.autograd.grad(out, leaves, x.dout.transpose(0, 1)[None])
        peer = dict(zip(names, (t[0].transpose(0, 1) for t in (out, *grads))))
        for i, name in enumerate(names):
            errors["ours"][i] += (ours[name].to(torch.bfloat16).double() - exact[name]).square().sum().item()
            errors["torch"][i] += (peer[name].double() - exact[name]).square().sum().item()
    for ours_squared, torch_squared in zip(errors["ours"], errors["torch"]):
        assert math.sqrt(ours_squared) <= 1.2 * math.sqrt(torch_squared)


@pytest.mark.parametrize("slow", [frozenset({torch.bfloat16}), frozenset()], ids=["slow", "fast"])
def test_halves_are_multiplied_as_the_cpu_can(slow: frozenset[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU without products of bf16 is given is fp32, and gradients in fp32 of the same numbers are no less exact."""
    given: set[torch.dtype] = set()
    monkeypatch.setattr(products, "SLOW_ON_CPU", slow)
    operator = flash._backward_cpu

    def backward(dout: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.add(dout.dtype)
        return operator(dout, *args, **kwargs)

    monkeypatch.setattr(flash, "_backward_cpu", backward)
    x = draw_inputs(70, 70, heads=4, kv_heads=2, dim=32, dtype=torch.bfloat16)
    bands = Window(20).bands(70, 70)
    assert_same(run(SDPA(), x, bands), run(Reference(), Inputs(*(t.double() for t in x)), bands), 0.02)
    assert given == {torch.float32 if slow else torch.bfloat16}


# ---- tiles: integers only


def test_plain_masks_are_one_call() -> None:
    assert plan(Causal().bands(100, 100)) == (Stack(Shape.LOWER, 0, 0, 100, 100),)
    assert plan(Full().bands(100, 70)) == (Stack(Shape.RECTANGLE, 0, 0, 100, 70),)
    assert plan(Window(None, None).bands(9, 9)) == (Stack(Shape.RECTANGLE, 0, 0, 9, 9),)
    assert plan(Window(0, None).bands(9, 9)) == (Stack(Shape.UPPER, 0, 0, 9, 9),)


def test_equal_documents_are_one_stack() -> None:
    assert plan((Chunked(10) & Causal()).bands(1000, 1000)) == (Stack(Shape.LOWER, 0, 0, 10, 10, 100, 10, 10),)
    assert plan((Documents((50, 50, 30)) & Causal()).bands(130, 130)) == (
        Stack(Shape.LOWER, 0, 0, 50, 50, 2, 50, 50),
        Stack(Shape.LOWER, 100, 100, 30, 30),
    )


def test_a_window_is_walked() -> None:
    assert plan(Window(255).bands(1000, 1000)) == (
        Stack(Shape.LOWER, 0, 0, 256, 256),
        Stack(Shape.BAND, 256, 1, 128, 383, 5, 128, 128),
        Stack(Shape.BAND, 896, 641, 104, 359),
    )
    assert plan(Window(2047).bands(8192, 8192)) == (
        Stack(Shape.LOWER, 0, 0, 2048, 2048),
        Stack(Shape.UPPER, 2048, 1, 2047, 2047, 3, 2048, 2048),
        Stack(Shape.LOWER, 2048, 2048, 2048, 2048, 3, 2048, 2048, fresh=False),
    )


def pairs(stacks: tuple[Stack, ...], queries: int, keys: int) -> Tensor:
    """How often each pair is computed."""
    count = torch.zeros(queries, keys, dtype=torch.int64)
    for stack in stacks:
        for tile in stack.chunks(1):
            q, k = torch.arange(tile.rows)[:, None], torch.arange(tile.keys)
            band = Band(0, tile.rows, 0, tile.keys, 0, tile.keys - tile.rows)
            seen = {
                Shape.RECTANGLE: torch.ones(tile.rows, tile.keys, dtype=torch.bool),
                Shape.LOWER: k <= q,
                Shape.UPPER: k >= q,
                Shape.BAND: visible([band], tile.rows, tile.keys, CPU),
            }[tile.shape]
            count[tile.q_start : tile.q_stop, tile.k_start : tile.k_start + tile.keys] += seen
    return count


@examples(few=25, many=500)
@given(attention=attentions())
@example(attention=(CORNERS, draw_inputs(150, 150)))
@example(attention=(COLUMN, draw_inputs(150, 150)))
def test_tiles_cover_each_pair_once(attention: tuple[Mask, Inputs]) -> None:
    mask, x = attention
    bands, stacks = bands_of(mask, x), plan(bands_of(mask, x))
    shape = x.q.shape[0], x.k.shape[0]
    assert torch.equal(pairs(stacks, *shape), visible(bands, *shape, CPU).long())
    touched: set[int] = set()
    for stack in stacks:
        rows = {row for tile in stack.chunks(1) for row in range(tile.q_start, tile.q_stop)}
        assert len(rows) == stack.count * stack.rows, "tiles of a stack share no query: results are written in place"
        assert not (stack.fresh and rows & touched)
        touched |= rows


@pytest.mark.parametrize(("left", "waste"), [(255, 1.5), (511, 1.25), (1023, 1.15), (4095, 1.01)])
def test_tiles_compute_little_that_nobody_sees(left: int, waste: float) -> None:
    """A million tokens: a few stacks, and an area near that of the band."""
    bands = Window(left).bands(2**20, 2**20)
    stacks = plan(bands)
    computed = {Shape.LOWER: 0.5, Shape.UPPER: 0.5, Shape.RECTANGLE: 1.0, Shape.BAND: 1.0}
    assert len(stacks) <= 7
    assert sum(computed[s.shape] * s.count * s.rows * s.keys for s in stacks) <= waste * area(bands)


def test_ten_times_the_documents_take_ten_times_as_long() -> None:
    """In a process of its own: the checks of shapes and types that the other tests run under would be timed too."""
    code = (
        "import time\n"
        "from longspan.kernels.tiles import corners, plan\n"
        "from longspan.masks.constructors import Causal, Documents\n"
        "def seconds_of(documents):\n"
        "    lengths = [1 + i * 7919 % 97 for i in range(documents)]\n"
        "    bands = (Documents(lengths) & Causal()).bands(sum(lengths), sum(lengths))\n"
        "    start = time.process_time()\n"
        "    stacks = corners(plan(bands))\n"
        "    seconds = time.process_time() - start\n"
        "    assert sum(s.count * max(1, len(s.documents)) for s in stacks) == documents\n"
        "    return seconds\n"
        "print(seconds_of(40_000) / sum(seconds_of(4_000) for _ in range(10)))\n"
    )
    ratio = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert ratio < 3  # 1.3 where nothing else runs; what goes over all documents for each of them takes 10


# ---- choosing


def ask(kernel: Any, **changes: Any) -> Kernel:
    need: dict[str, Any] = {"device_type": "cpu", "dtype": torch.float32, "qk_dim": 64, "v_dim": 64}
    return choose(kernel, **(need | changes))


def test_auto_takes_the_fused_operators_where_they_can() -> None:
    assert ask("auto").name == "sdpa"
    assert ask("auto", softcap=30.0).name == "online"
    assert ask("auto", v_dim=32).name == "online"
    assert ask("auto", bias=Slopes(2)).name == "online"
    assert ask("auto", device_type="cuda").name == "online"
    assert ask("auto", device_type="cuda", dtype=torch.bfloat16).name == "sdpa"
    assert ask("flex", device_type="cuda").name == "flex"
    mine = Online()
    assert ask(mine) is mine


@pytest.mark.parametrize(
    ("kernel", "changes", "text"),
    [
        ("fused", {}, r"kernel='fused' is unknown; use 'auto', 'sdpa', 'online', 'flex', 'reference', or a function"),
        ("sdpa", {"softcap": 30.0}, r"kernel='sdpa' cannot do this: .* has no softcap; use 'online' or 'reference'"),
        ("sdpa", {"bias": Slopes(2)}, r"has no bias; use 'online' or 'reference'"),
        ("sdpa", {"v_dim": 32}, r"wants equal query/key and value dims, not 64 and 32; use 'online'"),
        ("sdpa", {"device_type": "cuda"}, r"takes fp16 and bf16, not torch.float32; use 'online' or 'flex'"),
        ("sdpa", {"device_type": "cuda", "dtype": torch.half, "qk_dim": 20, "v_dim": 20}, r"multiples of 8 up to 256, not 20"),
        ("sdpa", {"device_type": "mps"}, r"are for cpu and cuda, not mps"),
        ("flex", {}, r"kernel='flex' cannot do this: flex_attention has no backward on cpu, only on cuda; use 'sdpa'"),
        ("flex", {"device_type": "cuda", "bias": Slopes(2)}, r"one score at a time"),
        ("flex", {"device_type": "cuda", "dtype": torch.float64}, r"not for fp64"),
    ],
)
def test_what_a_kernel_lacks_is_refused(kernel: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(KernelError, match=text):
        ask(kernel, **changes)


def test_kernels_refuse_by_themselves_too() -> None:
    x, bands = draw_inputs(5, 5), Causal().bands(5, 5)
    with pytest.raises(KernelError, match="kernel='sdpa' has neither softcap nor bias; use kernel='online'"):
        SDPA().forward(x.q, x.k, x.v, bands, 0.3, softcap=30.0)
    with pytest.raises(KernelError, match="no backward on cpu"):
        run(flex.Flex(), x, bands)
    assert [name for name, kernel in KERNELS.items() if kernel.name != name] == []


# ---- what runs on CUDA only: its integers, and its calls against stand-ins with the operators' documented meaning


@examples(few=12, many=250)
@given(attention=attentions())
def test_flex_reads_the_bands(attention: tuple[Mask, Inputs]) -> None:
    mask, x = attention
    queries, keys = x.q.shape[0], x.k.shape[0]
    sees = flex.mask_mod(bands_of(mask, x), queries, CPU)
    asked = sees(torch.tensor(0), torch.tensor(0), torch.arange(queries)[:, None], torch.arange(keys)[None])
    assert torch.equal(asked, visible(bands_of(mask, x), queries, keys, CPU))


@pytest.mark.filterwarnings("ignore")  # torch says at length that uncompiled flex_attention is slow
@pytest.mark.parametrize(
    "mask", [Causal(), Causal() & (Window(20) | SinkTokens(3)), Documents((50, 30, 76)) & Causal()], ids=repr
)
def test_flex_forward_uncompiled(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flex._compiled.cache_clear()
    x = draw_inputs(156, 156, heads=4, kv_heads=2, dim=16, v_dim=24, dtype=torch.float32)
    found = flex._attend(*x[:3], bands_of(mask, x), 0.3, 5.0)
    wanted = Reference().forward(*x[:3], bands_of(mask, x), 0.3, softcap=5.0)
    flex._compiled.cache_clear()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_flex_merges_backwards() -> None:
    """The gradients it hands to autograd are those of merging two parts by log-sum-exp."""
    out_a, out_b, dout = torch.randn(3, 5, 2, 4, dtype=torch.float64)
    lse_a, lse_b = torch.randn(2, 2, 5, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (out_a, lse_a)]
    lse = torch.logaddexp(lse_a, lse_b)
    out = sum(o * (part - lse).exp().T.unsqueeze(2) for o, part in ((out_a, lse_a), (out_b, lse_b)))
    wanted = torch.autograd.grad(out, leaves, dout)
    found = flex.merge_gradients(dout, out.detach(), lse.detach(), out_a.detach(), lse_a.detach())
    torch.testing.assert_close(found, wanted)


def _as_flash_on_cuda(rows: int, keys: int, is_causal: bool, left: int | None, right: int | None) -> tuple[Band, ...]:
    """What the operator shows, by its documentation: causal and windows are aligned at the bottom right."""
    shifted = keys - rows
    right = 0 if is_causal else right
    lo, hi = -rows if left is None else shifted - left, keys if right is None else shifted + right
    return (Band(0, rows, 0, keys, lo, hi),)


def _cut(x: Tensor, cum_seq: Tensor | None) -> list[Tensor]:
    return list(x) if cum_seq is None else [x[a:b] for a, b in pairwise(cum_seq.tolist())]


def _flash_forward(
    q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, debug, *, scale, window_size_left, window_size_right
):  # type: ignore[no-untyped-def]  # fmt: skip
    assert dropout_p == 0
    parts = []
    for one_q, one_k, one_v in zip(_cut(q, cum_q), _cut(k, cum_k), _cut(v, cum_k)):
        assert len(one_q) <= max_q
        assert len(one_k) <= max_k
        bands = _as_flash_on_cuda(len(one_q), len(one_k), is_causal, window_size_left, window_size_right)
        parts.append(Reference().forward(one_q, one_k, one_v, bands, scale))
    outs, lses = zip(*parts)
    return (torch.stack(outs), torch.stack(lses)) if cum_q is None else (torch.cat(outs), torch.cat(lses, 1)), None


def _flash_backward(
    dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *, scale,
    window_size_left, window_size_right,
):  # type: ignore[no-untyped-def]  # fmt: skip
    assert rng_state is None
    assert unused is None
    lses = list(lse) if cum_q is None else [lse[:, a:b] for a, b in pairwise(cum_q.tolist())]
    parts = []
    for *queries, one_k, one_v, one_lse in zip(*(_cut(x, cum_q) for x in (dout, q, out)), _cut(k, cum_k), _cut(v, cum_k), lses):
        one_dout, one_q, one_out = queries
        bands = _as_flash_on_cuda(len(one_q), len(one_k), is_causal, window_size_left, window_size_right)
        parts.append(Reference().backward(one_dout, one_q, one_k, one_v, one_out, one_lse, bands, scale)[:3])
    return tuple(torch.stack(x) if cum_q is None else torch.cat(x) for x in zip(*parts))


class _OnCuda:
    """SDPA's walk with the calls that it would make on CUDA."""

    @staticmethod
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        class Aten:
            def _flash_attention_forward(self, *args: Any, **kwargs: Any) -> Any:
                (out, lse), _ = _flash_forward(*args, **kwargs)
                return out, lse, None, None, None

            _flash_attention_backward = staticmethod(_flash_backward)

        monkeypatch.setattr(cuda, "aten", Aten())
        monkeypatch.setitem(sdpa.OPERATORS, "cpu", cuda)


@pytest.mark.parametrize(
    "mask",
    [
        Causal(), Full(), Window(30, 10), Window(5, None), Chunked(50) & Causal(), Documents((50, 30, 120)) & Causal(),
        Documents((20, 80, 100)), Documents((90, 110)) & Window(10), Causal() & (Window(20) | SinkTokens(4)),
    ],
    ids=repr,
)  # fmt: skip
def test_calls_on_cuda(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    _OnCuda.patch(monkeypatch)
    x = draw_inputs(200, 200, heads=4, kv_heads=2)
    assert_same(run(SDPA(), x, bands_of(mask, x)), run(Reference(), x, bands_of(mask, x)), 1e-10)


def test_packed_documents_are_one_call_on_cuda() -> None:
    bands = (Documents((50, 30, 120)) & Causal()).bands(200, 200)
    lengths = ((50, 50), (30, 30), (120, 120))
    assert corners(plan(bands)) == (Stack(Shape.LOWER, 0, 0, 200, 200, documents=lengths),)


# ---- memory

_PEAK = """
import json, re, sys, torch
from longspan.kernels.table import KERNELS
from longspan.masks.bands import Band
from longspan.masks.constructors import *
torch.set_num_threads(1)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def grown(kernel, mask, tokens):
    q, k, v, dout = torch.randn(4, tokens, 1, 16)
    bands = mask.bands(tokens, tokens)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    out, lse = kernel.forward(q, k, v, bands, 0.25)
    kernel.backward(dout, q, k, v, out, lse, bands, 0.25)
    return peak() - before

sizes, found = json.loads(sys.argv[1]), {}
for tokens in sizes:
    blocks = -(-tokens // 512)
    sparse = BlockSparse(512, [[j in (0, i) or (i * 7 + j * 3) % 31 == 0 for j in range(blocks)] for i in range(blocks)])
    documents = Documents([tokens // 16 - 3, tokens // 16 + 3, *[tokens // 128] * 112]) & Causal()
    for mask in (Causal(), Full(), Window(255), Window(4095), Window(63, 63), documents, PrefixLM(tokens // 3),
                 Chunked(1000), SinkTokens(64), Causal() & (Window(255) | SinkTokens(64)), Span(100, tokens // 4), sparse,
                 Bands([Band(0, tokens, 0, tokens, -999, -500)])):
        for kernel in ("sdpa", "online"):
            if kernel == "sdpa" or tokens <= 2**13:
                name = f"{kernel} {re.sub(r'[0-9]{4,}.*', '', repr(mask))}"
                found.setdefault(name, []).append(grown(KERNELS[kernel], mask, tokens))
print(json.dumps(found))
"""


def peaks(*sizes: int) -> dict[str, list[float]]:
    """MiB that forward and backward add, for each kernel, mask and number of tokens (1 head x 16)."""
    # without the threshold glibc keeps what was freed, and the peak shows nothing
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _PEAK, json.dumps(sizes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def test_memory_is_that_of_the_tokens() -> None:
    """8,192 tokens: 2 MiB of inputs; the scores would be 256 MiB, a mask of theirs 64."""
    for name, (grown,) in peaks(2**13).items():
        assert grown < 56, name


@pytest.mark.long
def test_memory_grows_linearly_to_131072_tokens() -> None:
    """Four times the tokens, at most four times the memory beyond that of one chunk of work."""
    for name, (some, all_) in peaks(2**15, 2**17).items():
        assert all_ < 4 * some + 32, (name, some, all_)
        assert all_ < 200, name

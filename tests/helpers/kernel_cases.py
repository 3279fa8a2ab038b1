"""Inputs of a kernel, a learned bias, a dense reference, the comparison, and hypothesis strategies for masks and inputs."""

import math
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from longspan.kernels.protocol import Kernel
from longspan.masks.bands import Band
from longspan.masks.constructors import BlockSparse, Causal, Chunked, Documents, Full, Mask, PrefixLM, SinkTokens, Span, Window

KINDS = ["causal", "full", "window", "documents", "prefix", "chunked", "sinks", "only", "sparse"]


CPU = torch.device("cpu")


class Inputs(NamedTuple):
    """q [queries, heads, dim], k [keys, kv_heads, dim], v [keys, kv_heads, v_dim]; dout: gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


class Slopes:
    """A learned bias: slope of the head * sqrt(|q - k|) + offset * cos(k), for positions q and k."""

    def __init__(self, heads: int, dtype: torch.dtype = torch.float64) -> None:
        slopes = torch.linspace(-0.3, 0.5, heads, dtype=dtype, requires_grad=True)
        self.parameters: tuple[Tensor, ...] = (slopes, torch.tensor(0.7, dtype=dtype, requires_grad=True))

    def __call__(self, q_index: Tensor, k_index: Tensor) -> Tensor:
        slopes, offset, *_ = self.parameters
        distance = (q_index[:, None] - k_index).abs().double()
        return slopes[:, None, None] * distance.sqrt() + offset * torch.cos(k_index.double())


class Distance:
    """The bias -|q - k| / 10 of two heads, with parameters on which it does not depend."""

    def __init__(self, *parameters: Tensor) -> None:
        self.parameters = parameters

    def __call__(self, q_index: Tensor, k_index: Tensor) -> Tensor:
        return ((q_index[:, None] - k_index).abs().double() / -10).expand(2, -1, -1)


def draw_inputs(
    queries: int, keys: int, heads: int = 2, kv_heads: int = 1, dim: int = 8, v_dim: int | None = None,
    dtype: torch.dtype = torch.float64, seed: int = 0, strided: bool = True,
) -> Inputs:  # fmt: skip
    """Random inputs, equal for equal arguments.

    ``strided``: not contiguous. k and v are two parts of one tensor, and q is stored heads first. Else all are contiguous.
    """
    v_dim = dim if v_dim is None else v_dim
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, queries, dim, generator=random, dtype=torch.float64).to(dtype).transpose(0, 1)
    k, v = torch.randn(keys, kv_heads, dim + v_dim, generator=random, dtype=torch.float64).to(dtype).split((dim, v_dim), 2)
    dout = torch.randn(queries, heads, v_dim, generator=random, dtype=torch.float64).to(dtype)
    return Inputs(q, k, v, dout) if strided else Inputs(q.contiguous(), k.contiguous(), v.contiguous(), dout)


def run(kernel: Kernel, x: Inputs, bands: Any, scale: float = 0.3, **extras: Any) -> dict[str, Tensor]:
    """Forward and backward of a kernel: out, lse, dq, dk, dv, and dbias0, dbias1, ... by name. ``extras``: its keywords."""
    out, lse = kernel.forward(x.q, x.k, x.v, bands, scale, **extras)
    dq, dk, dv, dbias = kernel.backward(x.dout, x.q, x.k, x.v, out, lse, bands, scale, **extras)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv} | {f"dbias{i}": g for i, g in enumerate(dbias)}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Assert equal names, and for each tensor: largest error <= tolerance * max(1e-3, its largest expected element).

    Not relative to each element, which may be zero by cancellation. Elements of -inf must be -inf in both.
    """
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        got, expected = found[name].double(), expected.double()
        assert torch.equal(got.isinf(), expected.isinf()), name
        got, expected = got.nan_to_num(neginf=0), expected.nan_to_num(neginf=0)
        bound = tolerance * max(1e-3, expected.abs().max().item() if expected.numel() else 0)
        torch.testing.assert_close(got, expected, rtol=0, atol=bound, msg=partial("{}: {}".format, name))


@st.composite
def masks_of(draw: st.DrawFn, tokens: int, key_tokens: int) -> Mask:
    """Draws a mask for ``tokens`` queries and ``key_tokens`` keys: one of KINDS, or two joined by & or |."""

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
    """Draws a mask and inputs of up to 400 queries and keys that fit it."""
    tokens = draw(st.integers(1, 400))
    key_tokens = draw(st.one_of(st.just(tokens), st.integers(1, 400)))
    kv_heads, group, dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8, 16]))
    seed, strided = draw(st.integers(0, 99)), draw(st.booleans())
    x = draw_inputs(tokens, key_tokens, kv_heads * group, kv_heads, dim, seed=seed, strided=strided)
    return draw(masks_of(tokens, key_tokens)), x


def bands_of(mask: Mask, x: Inputs) -> tuple[Band, ...]:
    """The bands of the mask for the numbers of queries and keys of ``x``."""
    return mask.bands(x.q.shape[0], x.k.shape[0])


# equal tiles at equal distances: those of CORNERS share queries and are never one stack, those of COLUMN share keys and are
CORNERS = BlockSparse(50, [[True, False, True], [False, False, False], [True, False, True]])


COLUMN = BlockSparse(50, [[False, True, False], [False, False, False], [False, True, False]])


def naive(x: Inputs, bands: Any, scale: float, softcap: float | None = None, bias: Any = None) -> dict[str, Tensor]:
    """The reference of ``run``, with the same names: dense attention in fp64 with autograd.

    A query that sees no key has output 0 and lse -inf. ``bias``: a Slopes, a Distance or None.
    """
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

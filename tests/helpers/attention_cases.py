"""Attention on real ranks against one device: a case, the oracle, the run over ranks, and the cases that hypothesis draws."""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from hypothesis import strategies as st

from longspan.attention.api import attend
from longspan.distributed.collectives import CountingTransport, TorchTransport
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.layout import Heads
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.traffic import Traffic, attention_traffic, recomputable_attention_traffic, ring_traffic
from longspan.masks.constructors import (
    BlockSparse,
    Causal,
    Chunked,
    Documents,
    Full,
    Mask,
    PrefixLM,
    SinkTokens,
    Span,
    Window,
    batch_bands,
)
from tests.helpers.ranks import Ranks


class Case(NamedTuple):
    """The arguments of one call of ``attend``, computed over ``ring * ulysses`` ranks and by ``oracle`` on one device.

    ``sinks`` and ``bias``: with sink logits, with the learned bias Slopes. ``stored``: see the function of that name.
    """

    ulysses: int
    ring: int
    zigzag: bool
    batch: int
    tokens: int
    key_tokens: int
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    mask: Mask | tuple[Mask, ...]
    softcap: float | None = None
    sinks: bool = False
    bias: bool = False
    dtype: torch.dtype = torch.float64
    kernel: str = "auto"
    seed: int = 0
    head_chunks: int = 1
    stored: tuple[int, ...] = (0, 1, 2, 3)  # the order in memory of the dims of q, k, v and of the gradient


class Slopes:
    """A learned bias: minus the head's slope times the distance between query and key, as in ALiBi."""

    def __init__(self, slopes: torch.Tensor) -> None:
        self.parameters: tuple[torch.Tensor, ...] = (slopes,)

    def __call__(
        self, heads: range, q_positions: torch.Tensor, k_positions: torch.Tensor, parameters: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        distance = (q_positions.unsqueeze(1) - k_positions).abs()
        return -parameters[0][heads.start : heads.stop, None, None] * distance


def whole_inputs(case: Case) -> dict[str, torch.Tensor]:
    """q, k, v and dout (the gradient of the output) [batch, tokens, heads, dim]; ``sinks`` and ``slopes`` [heads] if any."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    inputs = {
        "q": draw(case.batch, case.tokens, case.heads, case.qk_dim),
        "k": draw(case.batch, case.key_tokens, case.kv_heads, case.qk_dim),
        "v": draw(case.batch, case.key_tokens, case.kv_heads, case.v_dim),
        "dout": draw(case.batch, case.tokens, case.heads, case.v_dim),
    }
    if case.sinks:
        inputs["sinks"] = draw(case.heads)
    if case.bias:
        inputs["slopes"] = draw(case.heads).abs() / 8
    return inputs


def softmax_of_scores(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(3)


def oracle(case: Case, softmax: Callable[[torch.Tensor], torch.Tensor] = softmax_of_scores) -> dict[str, torch.Tensor]:
    """The output ("out") and the gradients of all inputs, by dense attention and autograd in fp64 on one device."""
    x = {name: value.double().requires_grad_() for name, value in whole_inputs(case).items()}
    group = case.heads // case.kv_heads
    k, v = (x[name].repeat_interleave(group, 2) for name in "kv")
    scores = torch.einsum("bshd,bthd->bhst", x["q"], k) / case.qk_dim**0.5
    if case.softcap is not None:
        scores = case.softcap * (scores / case.softcap).tanh()
    if case.bias:
        distance = (torch.arange(case.tokens).unsqueeze(1) - torch.arange(case.key_tokens)).abs()
        scores = scores - x["slopes"][:, None, None] * distance
    scores = scores.masked_fill(~seen(case).unsqueeze(1), -torch.inf)
    if case.sinks:
        scores = torch.cat([scores, x["sinks"][None, :, None, None].expand(*scores.shape[:3], 1)], 3)
    blind = (scores == -torch.inf).all(3, keepdim=True)
    weights = softmax(scores.masked_fill(blind, 0.0)).masked_fill(blind, 0.0)[..., : case.key_tokens]
    out = torch.einsum("bhst,bthd->bshd", weights, v)
    (out * x["dout"]).sum().backward()
    return {"out": out.detach()} | gradients(x)


def gradients(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The ``grad`` of every tensor but dout, by name; each must have one."""
    found = {name: value.grad for name, value in x.items() if name != "dout"}
    assert all(grad is not None for grad in found.values())
    return cast(dict[str, torch.Tensor], found)


def seen(case: Case) -> torch.Tensor:
    """[batch, tokens, key tokens]: whether the query sees the key, computed from the mask's bands.

    test_constructors.py checks the bands against the definitions of the masks.
    """
    dense = torch.zeros(case.batch * case.tokens, case.batch * case.key_tokens, dtype=torch.bool)
    for band in batch_bands(case.mask, case.batch, case.tokens, case.key_tokens):
        q = torch.arange(band.q_start, band.q_stop).unsqueeze(1)
        k = torch.arange(band.k_start, band.k_stop)
        dense[band.q_start : band.q_stop, band.k_start : band.k_stop] |= (k - q >= band.lo) & (k - q <= band.hi)
    blocks = dense.view(case.batch, case.tokens, case.batch, case.key_tokens)
    return torch.stack([blocks[row, :, row] for row in range(case.batch)])


_meshes: dict[tuple[int, int, bool], ParallelMesh] = {}


def mesh_of(case: Case) -> ParallelMesh:
    """The mesh of a case with a CountingTransport; made once on each rank for each layout."""
    key = (case.ulysses, case.ring, case.zigzag)
    if key not in _meshes:
        layout = "zigzag" if case.zigzag else "contiguous"
        _meshes[key] = ParallelMesh(case.ulysses, case.ring, layout=layout, transport=CountingTransport(TorchTransport()))
    return _meshes[key]


def on_this_rank(case: Case) -> tuple[dict[str, torch.Tensor], tuple[Traffic, Traffic]]:
    """Run ``attend`` and its backward: ({"out" and the gradients: this rank's tokens}, traffic of (forward, backward))."""
    mesh = mesh_of(case)
    transport = mesh.transport
    assert isinstance(transport, CountingTransport)
    transport.traffic = Traffic()
    cut = mine(whole_inputs(case), case, mesh.coordinate)
    x = {name: stored(value, case.stored).requires_grad_() for name, value in cut.items()}
    out = attend(
        x["q"], x["k"], x["v"], mask=case.mask, mesh=mesh, tokens=case.tokens, key_tokens=case.key_tokens,
        softcap=case.softcap, sink_logits=x.get("sinks"), bias=Slopes(x["slopes"]) if case.bias else None, kernel=case.kernel,
        head_chunks=case.head_chunks,
    )  # fmt: skip
    forward, transport.traffic = transport.traffic, Traffic()
    out.backward(x["dout"].detach())
    return {"out": out.detach()} | gradients(x), (forward, transport.traffic)


def stored(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """A copy of a 4-dim tensor whose dims are stored in memory in ``order``, outermost first; other tensors unchanged."""
    if x.ndim < 4:
        return x
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(4)])


def mine(whole: dict[str, torch.Tensor], case: Case, coordinate: MeshCoordinate) -> dict[str, torch.Tensor]:
    """The tokens that the rank at ``coordinate`` holds of each tensor in ``whole``; sinks and slopes are copied."""
    cut = {}
    for name, value in whole.items():
        if name in ("sinks", "slopes"):
            cut[name] = value.clone()
        else:
            length = case.key_tokens if name in ("k", "v") else case.tokens
            runs = coordinate.layout(length).mine(coordinate.ring_rank, coordinate.ulysses_rank)
            cut[name] = torch.cat([value[:, run.start : run.stop] for run in runs], 1)
    return cut


def gathered(case: Case, parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The whole tensors in fp64 from those of the ranks, in rank order; gradients of sinks and slopes are summed."""
    whole = {}
    for name in parts[0]:
        if name in ("sinks", "slopes"):
            whole[name] = torch.stack([part[name].double() for part in parts]).sum(0)
            continue
        length = case.key_tokens if name in ("k", "v") else case.tokens
        held = [coordinate.layout(length).mine(coordinate.ring_rank, coordinate.ulysses_rank) for coordinate in places(case)]
        order = [p for runs in held for run in runs for p in run]
        together = torch.cat([part[name].double() for part in parts], 1)
        whole[name] = together[:, torch.tensor(order).argsort()]
    return whole


def places(case: Case) -> list[MeshCoordinate]:
    """The mesh coordinate of each rank of the case, in the order of the ranks."""
    spots = [(r, u) for r in range(case.ring) for u in range(case.ulysses)]
    return [
        MeshCoordinate(ring=case.ring, ulysses=case.ulysses, ring_rank=r, ulysses_rank=u, zigzag=case.zigzag) for r, u in spots
    ]


def run(case: Case, pool: Callable[[int], Ranks]) -> dict[str, torch.Tensor]:
    """Run the case on real ranks: the whole output and gradients. Asserts that each rank's traffic is the closed form."""
    parts = pool(case.ulysses * case.ring).run(on_this_rank, case)
    rows_needed = keys_needed(case)
    for coordinate, (_, counted) in zip(places(case), parts):
        assert counted == closed_form(case, coordinate, rows_needed), f"traffic of {coordinate} in {case}"
    return gathered(case, [results for results, _ in parts])


def keys_needed(case: Case) -> dict[tuple[int, int], int]:
    """{(a, b): how many keys held by ring rank a are seen by any query of ring rank b}, counted on the dense mask."""
    by_row = seen(case)
    layouts = [places(case)[0].layout(length) for length in (case.tokens, case.key_tokens)]
    held = [[torch.tensor([p for run in layout.runs(r) for p in run]) for r in range(case.ring)] for layout in layouts]
    return {
        (source, asks): int(by_row[:, held[0][asks]][:, :, held[1][source]].any(1).sum())
        for source in range(case.ring)
        for asks in range(case.ring)
    }


def closed_form(case: Case, coordinate: MeshCoordinate, needed: dict[tuple[int, int], int]) -> tuple[Traffic, Traffic]:
    """(forward, backward) traffic of the attention on the rank at ``coordinate``, by the formulas of distributed/traffic.py.

    ``needed``: the result of ``keys_needed``.
    """
    heads = Heads(case.heads, case.kv_heads, case.ulysses, case.head_chunks)
    sizes, key_sizes = (coordinate.layout(n).sizes(coordinate.ring_rank) for n in (case.tokens, case.key_tokens))
    formula = recomputable_attention_traffic if case.head_chunks > 1 else attention_traffic
    itemsize = case.dtype.itemsize
    forward, backward = formula(
        heads, sizes, key_sizes, coordinate.ulysses_rank,
        rows=case.batch, qk_dim=case.qk_dim, v_dim=case.v_dim, itemsize=itemsize,
    )  # fmt: skip
    ranks, rank = range(case.ring), coordinate.ring_rank
    hops = [hop for hop in ranks[1:] if any(needed[source, (source + hop) % case.ring] for source in ranks)]
    leaving = [needed[rank, (rank + hop) % case.ring] for hop in hops]
    arriving = [needed[(rank - hop) % case.ring, rank] for hop in hops]
    for chunk in range(case.head_chunks):
        width = len(heads.kv_of(coordinate.ulysses_rank, chunk)) * (case.qk_dim + case.v_dim)
        sent, returned = ring_traffic(leaving, arriving, width, itemsize=itemsize, grad_itemsize=max(itemsize, 4))
        forward, backward = forward + sent, backward + returned
    return forward, backward


class Off(NamedTuple):
    """``error``: the largest difference of an element; ``scale``: the size to which the guarantee relates it."""

    error: float
    scale: float


def differences(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, Off]:
    """The difference of each tensor that is not empty; a gradient's scale is at least 1e-3 of the norm of all gradients."""
    total = torch.stack([value.norm() for name, value in want.items() if name != "out"]).norm().item()
    found = {}
    for name, value in want.items():
        if not value.numel():
            continue
        floor = 1e-3 * total if name != "out" else 1e-3
        found[name] = Off((got[name] - value).abs().max().item(), max(value.abs().max().item(), floor))
    return found


def assert_like_one_device(case: Case, got: dict[str, torch.Tensor], tol: float) -> None:
    """Assert that every tensor differs from the oracle's by at most ``tol`` times its scale."""
    for name, (error, scale) in differences(got, oracle(case)).items():
        assert error <= tol * scale, f"{name} differs by {error / scale:.2e} in {case}"


def assert_like_one_device_in_fp32(case: Case, pool: Callable[[int], Ranks]) -> None:
    """Run the case and assert that each error against fp64 is at most 1e-5 of its scale, or 2e-6 of what cancels in a gradient.

    The second bound is for a gradient that is exactly 0 in fp64 and rounding noise in fp32.
    """
    found = differences(run(case, pool), oracle(case))
    if all(error <= 1e-5 * scale for error, scale in found.values()):
        return
    terms = oracle(case, softmax_of_a_fixed_sum)
    for name, (error, scale) in found.items():
        bound = max(1e-5 * scale, 2e-6 * terms[name].abs().max().item())
        assert error <= bound, f"{name} differs by {error / scale:.2e} in {case}"


def softmax_of_a_fixed_sum(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over dim 3 whose sum of exponentials is a constant: its gradient is one of the two terms of softmax's.

    They cancel where a query sees one key alone.
    """
    return (scores - scores.detach().logsumexp(3, keepdim=True)).exp()


@st.composite
def a_mask(draw: st.DrawFn, tokens: int, key_tokens: int) -> Mask:
    kinds: list[Callable[[], Mask]] = [Causal, Full, lambda: Window(draw(st.integers(0, tokens)), draw(st.integers(0, 3)))]
    kinds.append(lambda: PrefixLM(draw(st.integers(0, key_tokens))))
    kinds.append(lambda: (Window(draw(st.integers(0, 4))) | SinkTokens(draw(st.integers(0, key_tokens)))) & Causal())
    if tokens == key_tokens:
        kinds.append(lambda: Documents(draw(_lengths(tokens))) & Causal())
        kinds.append(lambda: Documents(draw(_lengths(tokens))))
        kinds.append(lambda: Chunked(draw(st.integers(1, tokens))) & Causal())
        kinds.append(lambda: Span(0, draw(st.integers(1, tokens))) & Causal())
        kinds.append(lambda: Span(draw(st.integers(0, tokens - 1)), tokens))
        block = max(1, -(-tokens // 4))
        blocks = -(-tokens // block)
        layout = st.lists(st.lists(st.booleans(), min_size=blocks, max_size=blocks), min_size=blocks, max_size=blocks)
        if tokens % block == 0:
            kinds.append(lambda: BlockSparse(block, draw(layout)))
    return draw(st.sampled_from(kinds))()


@st.composite
def _lengths(draw: st.DrawFn, tokens: int) -> list[int]:
    cuts = sorted(draw(st.sets(st.integers(1, tokens), max_size=4)) - {tokens})
    return [b - a for a, b in zip([0, *cuts], [*cuts, tokens])]


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Case:
    ulysses = draw(st.integers(1, 8))
    ring = draw(st.integers(1, 8 // ulysses))
    ranks = ulysses * ring
    kv_heads = draw(st.integers(1, 10))
    group = draw(st.integers(-(-ulysses // kv_heads), max(40 // kv_heads, -(-ulysses // kv_heads))))
    tokens = draw(st.one_of(st.integers(ranks, ranks + 24), st.sampled_from([31, 37, 61, 64, 97])))
    key_tokens = tokens if draw(st.integers(0, 3)) else draw(st.integers(ranks, ranks + 40))
    batch = draw(st.integers(1, 3))
    qk_dim = draw(st.sampled_from([1, 2, 4, 8, 16]))
    v_dim = qk_dim if draw(st.booleans()) else draw(st.sampled_from([1, 3, 8]))
    mask: Mask | tuple[Mask, ...] = draw(a_mask(tokens, key_tokens))
    if draw(st.booleans()):
        mask = tuple(draw(a_mask(tokens, key_tokens)) for _ in range(batch))
    return Case(
        ulysses, ring, draw(st.booleans()), batch, tokens, key_tokens, kv_heads * group, kv_heads, qk_dim, v_dim, mask,
        softcap=draw(st.sampled_from([None, None, 5.0])), sinks=draw(st.booleans()),
        bias=draw(st.sampled_from([False, False, True])),
        dtype=dtype, seed=draw(st.integers(0, 2**16)), head_chunks=draw(_chunks(kv_heads * group // ulysses)),
        stored=draw(st.one_of(st.just((0, 1, 2, 3)), st.permutations(range(4)).map(tuple))),
    )  # fmt: skip


@st.composite
def _chunks(draw: st.DrawFn, most: int) -> int:
    return draw(st.integers(1, most)) if draw(st.booleans()) else 1


def squared_error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """The sum over all tensors of ||got - want||2 ** 2 / ||want||2 ** 2; a tensor of zeros counts 0."""
    sizes = {name: float(value.square().sum()) for name, value in want.items()}
    return sum(float((got[name] - want[name]).square().sum()) / size for name, size in sizes.items() if size)

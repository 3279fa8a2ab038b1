"""Attention on real ranks against one device: a case, the oracle, the run over ranks, and the cases that hypothesis draws."""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from hypothesis import strategies as st

from longspan.attention.api import attend
from longspan.distributed.collectives import CountingTransport, TorchTransport
from longspan.distributed.layout import Heads
from longspan.distributed.mesh import MeshCoordinate, ParallelMesh
from longspan.distributed.traffic import Traffic, attention_traffic, recomputable_attention_traffic, ring_traffic
from longspan.masks.constructors import BlockSparse, Causal, Chunked, Documents, Full, Mask, PrefixLM, SinkTokens, Span, Window
from longspan.masks.constructors import rows as bands_of_rows
from tests.helpers.ranks import Ranks


class Case(NamedTuple):
    """One attention: what is asked of every rank, and of one device."""

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
    """A bias that is learned: one slope a head times the distance, ALiBi's shape."""

    def __init__(self, slopes: torch.Tensor) -> None:
        self.parameters: tuple[torch.Tensor, ...] = (slopes,)

    def __call__(
        self, heads: range, q_positions: torch.Tensor, k_positions: torch.Tensor, parameters: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        distance = (q_positions.unsqueeze(1) - k_positions).abs()
        return -parameters[0][heads.start : heads.stop, None, None] * distance


def whole_inputs(case: Case) -> dict[str, torch.Tensor]:
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


def oracle(case: Case) -> dict[str, torch.Tensor]:
    """One device, dense, fp64, autograd: scores, cap, bias, mask, softmax with sinks."""
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
    weights = scores.masked_fill(blind, 0.0).softmax(3).masked_fill(blind, 0.0)[..., : case.key_tokens]
    out = torch.einsum("bhst,bthd->bshd", weights, v)
    (out * x["dout"]).sum().backward()
    return {"out": out.detach()} | gradients(x)


def gradients(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name: value.grad for name, value in x.items() if name != "dout"}
    assert all(grad is not None for grad in found.values())
    return cast(dict[str, torch.Tensor], found)


def seen(case: Case) -> torch.Tensor:
    """[batch, tokens, key tokens]: who sees whom, from the bands, which test_masks.py checks against their definitions."""
    dense = torch.zeros(case.batch * case.tokens, case.batch * case.key_tokens, dtype=torch.bool)
    for band in bands_of_rows(case.mask, case.batch, case.tokens, case.key_tokens):
        q = torch.arange(band.q_start, band.q_stop).unsqueeze(1)
        k = torch.arange(band.k_start, band.k_stop)
        dense[band.q_start : band.q_stop, band.k_start : band.k_stop] |= (k - q >= band.lo) & (k - q <= band.hi)
    blocks = dense.view(case.batch, case.tokens, case.batch, case.key_tokens)
    return torch.stack([blocks[row, :, row] for row in range(case.batch)])


_meshes: dict[tuple[int, int, bool], ParallelMesh] = {}


def mesh_of(case: Case) -> ParallelMesh:
    key = (case.ulysses, case.ring, case.zigzag)
    if key not in _meshes:
        layout = "zigzag" if case.zigzag else "contiguous"
        _meshes[key] = ParallelMesh(case.ulysses, case.ring, layout=layout, transport=CountingTransport(TorchTransport()))
    return _meshes[key]


def on_this_rank(case: Case) -> tuple[dict[str, torch.Tensor], tuple[Traffic, Traffic]]:
    """What ``attend`` gives this rank and its gradients, and what passed the Transport (forward, backward)."""
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
    """The same tensor, whose dims lie in memory in this order."""
    if x.ndim < 4:
        return x
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(4)])


def mine(whole: dict[str, torch.Tensor], case: Case, coordinate: MeshCoordinate) -> dict[str, torch.Tensor]:
    """A rank's tokens of everything that has tokens."""
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
    """The ranks' pieces put together in the order of the tokens; what is replicated is summed."""
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
    """Where each rank stands, in the order of the ranks."""
    spots = [(r, u) for r in range(case.ring) for u in range(case.ulysses)]
    return [MeshCoordinate(1, case.ring, case.ulysses, 0, r, u, case.zigzag) for r, u in spots]


def run(case: Case, pool: Callable[[int], Ranks]) -> dict[str, torch.Tensor]:
    """The whole out and gradients; guarantee 3 is checked on the way: every rank's traffic is the closed form."""
    parts = pool(case.ulysses * case.ring).run(on_this_rank, case)
    rows_needed = keys_needed(case)
    for coordinate, (_, counted) in zip(places(case), parts):
        assert counted == closed_form(case, coordinate, rows_needed), f"traffic of {coordinate} in {case}"
    return gathered(case, [results for results, _ in parts])


def keys_needed(case: Case) -> dict[tuple[int, int], int]:
    """(from, to) ring ranks: how many keys of the first some query of the second sees, counted on the dense mask."""
    by_row = seen(case)
    layouts = [places(case)[0].layout(length) for length in (case.tokens, case.key_tokens)]
    held = [[torch.tensor([p for run in layout.runs(r) for p in run]) for r in range(case.ring)] for layout in layouts]
    return {
        (source, asks): int(by_row[:, held[0][asks]][:, :, held[1][source]].any(1).sum())
        for source in range(case.ring)
        for asks in range(case.ring)
    }


def closed_form(case: Case, coordinate: MeshCoordinate, needed: dict[tuple[int, int], int]) -> tuple[Traffic, Traffic]:
    """(forward, backward) of one attention of one rank by the formulas of layout.py."""
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
    """By how much a tensor differs, and the size that the guarantee measures it by."""

    error: float
    scale: float


def differences(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, Off]:
    total = torch.stack([value.norm() for name, value in want.items() if name != "out"]).norm().item()
    found = {}
    for name, value in want.items():
        if not value.numel():
            continue
        floor = 1e-3 * total if name != "out" else 1e-3
        found[name] = Off((got[name] - value).abs().max().item(), max(value.abs().max().item(), floor))
    return found


def assert_like_one_device(case: Case, got: dict[str, torch.Tensor], tol: float) -> None:
    for name, (error, scale) in differences(got, oracle(case)).items():
        assert error <= tol * scale, f"{name} differs by {error / scale:.2e} in {case}"


def assert_like_one_device_in_fp32(case: Case, pool: Callable[[int], Ranks]) -> None:
    """Against fp64; where that asks for more than fp32 can give (a gradient that is truly 0), against one device in fp32."""
    want = oracle(case)
    found = differences(run(case, pool), want)
    if all(error <= 1e-5 * scale for error, scale in found.values()):
        return
    alone = differences(run(case._replace(ulysses=1, ring=1, zigzag=False, head_chunks=1), pool), want)
    for name, (error, scale) in found.items():
        assert error <= max(1e-5 * scale, 2 * alone[name].error), f"{name} differs by {error / scale:.2e} in {case}"


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
    """Each tensor relative to its own size, so that none drowns the others."""
    sizes = {name: float(value.square().sum()) for name, value in want.items()}
    return sum(float((got[name] - want[name]).square().sum()) / size for name, size in sizes.items() if size)

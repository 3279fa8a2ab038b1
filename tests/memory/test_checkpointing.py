"""What is kept is kept once and what is computed again is the same: gradients, collectives, bytes, kernel calls, memory."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan.attention.api import attend
from longspan.attention.ring import plan_hops
from longspan.distributed.collectives import CountingTransport, TorchTransport
from longspan.distributed.layout import Heads, Layout
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.traffic import Traffic, attention_traffic, recomputable_attention_traffic, ring_traffic
from longspan.errors import LayoutError, ModelError
from longspan.kernels.online import Online
from longspan.masks import constructors as masks
from longspan.masks.constructors import Causal
from longspan.memory.checkpointing import selective_context
from longspan.models.block import Block
from longspan.models.decoder_config import DecoderConfig
from tests.helpers import processes
from tests.helpers.ranks import Ranks

LAYERS, HEAD_DIM = 2, 4
PLAIN = partial(attend, mask=Causal())
RECOMPUTABLE = partial(attend, mask=Causal(), recomputable=True)


class Case(NamedTuple):
    ulysses: int
    ring: int
    rows: int
    tokens: int
    heads: int
    kv_heads: int
    head_chunks: int = 1
    sinks: bool = False


CASES = [
    Case(1, 1, 2, 9, 4, 2, sinks=True),
    Case(1, 1, 1, 9, 6, 2, head_chunks=4),
    Case(2, 1, 2, 13, 4, 4),
    Case(2, 1, 0, 13, 4, 2),
    Case(3, 1, 1, 11, 7, 1, sinks=True),
    Case(4, 1, 2, 10, 4, 2),
    Case(4, 1, 1, 17, 28, 4, head_chunks=3, sinks=True),
    Case(2, 1, 2, 9, 8, 2, head_chunks=4),
    Case(2, 2, 2, 15, 6, 3, sinks=True),
    Case(2, 2, 1, 18, 5, 1, head_chunks=2),
]


class Counting(Online):
    """A kernel that counts its forward calls."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return super().forward(*args, **kwargs)


Attention = Callable[..., Tensor]


class Stack(nn.Module):
    """Decoder blocks, each in a checkpoint if contexts are given, with one logit a head beside the keys."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        config = DecoderConfig(8, LAYERS, 12, case.heads, case.kv_heads, HEAD_DIM, ffn=16)
        self.blocks = nn.ModuleList(Block(config) for _ in range(LAYERS))
        self.sinks = nn.Parameter(torch.randn(case.heads)) if case.sinks else None

    def forward(self, x: Tensor, attention: Attention, again: dict[str, Any] | None = None) -> Tensor:
        def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, sink_logits=self.sinks)

        for block in self.blocks:
            x = block(x, mix) if again is None else checkpoint(block, x, mix, use_reentrant=False, **again)
        return x


class Seen(NamedTuple):
    """One step of a rank: the results, what was sent, how often the kernel ran forward."""

    results: list[Tensor]
    forward: Traffic
    backward: Traffic
    calls: int


def step(case: Case, attention: Attention, again: dict[str, Any] | None) -> tuple[list[Tensor], Seen]:
    """(One device's output and gradients at my tokens, this rank's with the parameters' summed over the ranks)."""
    transport, kernel = CountingTransport(TorchTransport()), Counting()
    mesh = ParallelMesh(case.ulysses, case.ring, transport=transport)
    coordinate = mesh.coordinate
    torch.manual_seed(0)
    stack = Stack(case).double()
    x, weight = torch.randn(2, case.rows, case.tokens, 12, dtype=torch.float64)
    positions = [p for run in coordinate.layout(case.tokens).mine(coordinate.ring_rank, coordinate.ulysses_rank) for p in run]

    whole = x.clone().requires_grad_()
    out = stack(whole, PLAIN)
    grads = torch.autograd.grad((out * weight).sum(), [whole, *stack.parameters()])
    want = [out.detach()[:, positions], grads[0][:, positions], *grads[1:]]

    def over_the_mesh(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        chunks = {"head_chunks": case.head_chunks}
        return attention(q, k, v, mesh=mesh, tokens=case.tokens, kernel=kernel, **chunks, **keywords)

    mine = x[:, positions].clone().requires_grad_()
    transport.traffic = Traffic()
    out = stack(mine, over_the_mesh, again)
    forward, transport.traffic = transport.traffic, Traffic()
    (out * weight[:, positions]).sum().backward()
    for parameter in stack.parameters():
        dist.all_reduce(parameter.grad)
    results = [out.detach(), mine.grad, *(parameter.grad for parameter in stack.parameters())]
    return want, Seen(results, forward, transport.traffic, kernel.calls)


def assert_exact(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for mine, one_device in zip(got, want):
        scale = max(one_device.abs().max().item() if one_device.numel() else 0.0, 1e-3)
        torch.testing.assert_close(mine, one_device, rtol=0.0, atol=1e-10 * scale)


def layer_traffic(case: Case, kept: bool) -> tuple[Traffic, Traffic]:
    """(forward, backward) of one layer of this rank by the closed forms, rings included."""
    coordinate = ParallelMesh(case.ulysses, case.ring).coordinate
    layout = Layout(case.tokens, case.ring, case.ulysses, coordinate.zigzag)
    sizes = layout.sizes(coordinate.ring_rank)
    heads = Heads(case.heads, case.kv_heads, case.ulysses, case.head_chunks)
    shape = {"rows": case.rows, "qk_dim": HEAD_DIM, "v_dim": HEAD_DIM, "itemsize": 8}
    formula = recomputable_attention_traffic if kept else attention_traffic
    forward, backward = formula(heads, sizes, sizes, coordinate.ulysses_rank, **shape)
    held = [layout.batch_runs(rank, case.rows) for rank in range(case.ring)]
    hops = plan_hops(masks.batch_bands(Causal(), case.rows, case.tokens, case.tokens), held, held, coordinate.ring_rank)[1:]
    leaving, arriving = ([sum(map(len, getattr(hop, name))) for hop in hops] for name in ("leaving", "arriving"))
    for chunk in range(case.head_chunks):
        width = len(heads.kv_of(coordinate.ulysses_rank, chunk)) * 2 * HEAD_DIM
        passed = ring_traffic(leaving, arriving, width, itemsize=8, grad_itemsize=8)
        forward, backward = forward + passed[0], backward + passed[1]
    return forward, backward


def times(traffic: Traffic, count: int) -> Traffic:
    return Traffic(count * traffic.collectives, count * traffic.bytes)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kept_attention_is_computed_once_and_exact(case: Case, pool: Callable[[int], Ranks]) -> None:
    pool(case.ulysses * case.ring).run(kept_is_exact, case)


def kept_is_exact(case: Case) -> None:
    want, plain = step(case, RECOMPUTABLE, None)
    assert_exact(plain.results, want)
    want, kept = step(case, RECOMPUTABLE, {"context_fn": selective_context})
    assert_exact(kept.results, want)
    assert kept.calls == plain.calls >= LAYERS * case.head_chunks  # no kernel runs forward again
    forward, backward = layer_traffic(case, kept=True)
    assert kept.forward == plain.forward == times(forward, LAYERS)
    assert kept.backward == plain.backward == times(backward, LAYERS)
    if case.ring == 1:
        expected = 2 * case.head_chunks if case.ulysses > 1 else 0
        assert (forward.collectives, backward.collectives) == (expected, expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.head_chunks == 1], ids=str)
def test_plain_attention_computed_again_is_exact(case: Case, pool: Callable[[int], Ranks]) -> None:
    pool(case.ulysses * case.ring).run(recomputed_is_exact, case)


def recomputed_is_exact(case: Case) -> None:
    _, plain = step(case, PLAIN, None)
    want, again = step(case, PLAIN, {})
    assert_exact(again.results, want)
    forward, backward = layer_traffic(case, kept=False)
    assert again.forward == times(forward, LAYERS)
    assert again.backward == times(forward + backward, LAYERS)
    assert again.calls == 2 * plain.calls


@pytest.mark.long  # the counts of calls and bytes above show a block that keeps more; this shows that they are true
def test_what_is_really_held(tmp_path: Path) -> None:
    """In hidden states of the rank's tokens; the shapes are those of attention_memory.py."""
    command = [sys.executable, "-m", "tests.helpers.attention_memory", str(tmp_path)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = processes.run(command, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    held = {tuple(words[:2]): [float(word) for word in words[2:]] for words in map(str.split, result.stdout.splitlines())}
    once, again = held["kept", "0"]
    assert 1.0 <= once <= 1.1  # one copy of out, and one number a head and token
    assert again <= 0.05
    assert held["block", "1"][0] >= 5 * held["block", "8"][0]
    assert max(held["exchanged", "8"]) <= 0.35 * min(held["exchanged", "1"])  # of eight parts two are there at a time


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("attention", [PLAIN, RECOMPUTABLE])
def test_a_block_in_head_chunks_is_the_block(ranks: int, attention: Attention, pool: Callable[[int], Ranks]) -> None:
    pool(ranks).run(chunked_is_whole, attention)


def chunked_is_whole(attention: Callable[..., Tensor]) -> None:
    ranks, tokens = dist.get_world_size(), 11
    transport, kernel = CountingTransport(TorchTransport()), Counting()
    mesh = ParallelMesh(ranks, transport=transport)
    positions = [p for run in mesh.coordinate.layout(tokens).mine(0, mesh.coordinate.ulysses_rank) for p in run]
    for heads, kv_heads, head_chunks in ((12, 4, 4), (12, 2, 3), (9, 3, 3), (12, 12, 3), (6, 1, 2), (12, 4, 1)):
        config = DecoderConfig(8, 1, 12, heads, kv_heads, HEAD_DIM, ffn=16)
        torch.manual_seed(0)
        whole, chunked = Block(config).double(), Block(config, head_chunks).double()
        chunked.load_state_dict(whole.state_dict())
        x, weight = torch.randn(2, 2, tokens, 12, dtype=torch.float64)
        every = x.clone().requires_grad_()
        out = whole(every, PLAIN)
        grads = torch.autograd.grad((out * weight).sum(), [every, *whole.parameters()])
        want = [out.detach()[:, positions], grads[0][:, positions], *grads[1:]]

        def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, mesh=mesh, tokens=tokens, kernel=kernel)

        for outer in (False, True):
            mine = x[:, positions].clone().requires_grad_()
            chunked.zero_grad()
            transport.traffic, kernel.calls = Traffic(), 0
            out = checkpoint(chunked, mine, mix, use_reentrant=False) if outer else chunked(mine, mix)
            forward_calls = kernel.calls
            (out * weight[:, positions]).sum().backward()
            for parameter in chunked.parameters():
                dist.all_reduce(parameter.grad)
            assert_exact([out.detach(), mine.grad, *(parameter.grad for parameter in chunked.parameters())], want)
            if not outer:
                again = 0 if head_chunks == 1 or attention.keywords.get("recomputable") else 1
                assert kernel.calls == (1 + again) * forward_calls
                expected = (4 + 2 * again) * head_chunks if ranks > 1 else 0
                assert transport.traffic.collectives == expected


def test_chunks_that_cannot_be_are_refused(pool: Callable[[int], Ranks]) -> None:
    with pytest.raises(ModelError, match=r"head_chunks=3 does not cut 12 query heads over 4 .*; use 1, 2, 4, 5, 6"):
        Block(DecoderConfig(8, 1, 12, 12, 4, HEAD_DIM, ffn=16), 3)
    pool(3).run(too_many_chunks)


def too_many_chunks() -> None:
    transport = CountingTransport(TorchTransport())
    mesh = ParallelMesh(3, transport=transport)
    q, k = torch.randn(1, 4, 8, 4), torch.randn(1, 4, 2, 4)
    with pytest.raises(LayoutError, match=r"head_chunks=3 cannot cut the 2 query heads .*; use head_chunks=2"):
        attend(q, k, k, mask=Causal(), mesh=mesh, head_chunks=3)
    assert transport.traffic == Traffic()

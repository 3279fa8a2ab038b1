"""Compile one decoder block over 1 and 2 ranks as a full graph; compare it with eager, gradients too (test_compile.py).

Run as a program: FOLDER RANKS ROWS BACKEND. It is run with one row and with two, which have other strides and another number
of kernel calls. Tiling breaks the graph, so it is compiled without fullgraph. The backend "aot_eager" traces and runs the
graph unchanged; "inductor" compiles it, which takes a minute. Prints "exact" if everything agrees.
"""

import sys
import warnings
from pathlib import Path

import torch

from longspan import Causal, ParallelMesh, attend
from longspan.memory.tiling import tile_by_tile
from longspan.models.block import Block
from longspan.models.decoder_config import DecoderConfig
from tests.helpers.ranks import on_ranks

CONFIG = DecoderConfig(vocab=16, layers=1, hidden=48, heads=6, kv_heads=2, head_dim=8, ffn=64)
TOKENS = 13


def compiled_is_eager(rows: int, backend: str) -> None:
    """Assert that a block, compiled as one graph, gives output, input gradient and parameter gradients of the eager block."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    mesh = ParallelMesh(ulysses=torch.distributed.get_world_size())
    coordinate = mesh.coordinate
    mine = sum(map(len, coordinate.layout(TOKENS).mine(coordinate.ring_rank, coordinate.ulysses_rank)))
    torch.manual_seed(coordinate.ulysses_rank)
    block = Block(CONFIG).double()
    x, weight = torch.randn(2, rows, mine, CONFIG.hidden, dtype=torch.float64)

    def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, mask=Causal(), mesh=mesh, tokens=TOKENS)

    def forward(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = block(x, mix)
        return out

    results = []
    for function in (forward, torch.compile(forward, fullgraph=True, backend=backend)):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        (out * weight).sum().backward()
        grads = [parameter.grad for parameter in block.parameters()]
        results.append([out.detach(), leaf.grad, *(grad.clone() for grad in grads if grad is not None)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=1e-12)


def tiles_inside_are_tiles(backend: str) -> None:
    """Assert that a compiled function that calls ``tile_by_tile`` has the gradients of the formula without tiles."""

    def twice(x: torch.Tensor) -> torch.Tensor:
        return tile_by_tile(lambda tile, rows, parameters: tile * parameters[0], x, 4, [weight]) * 2

    weight, x = torch.tensor([2.0, 3.0], requires_grad=True), torch.ones(9, 2, requires_grad=True)
    found = torch.autograd.grad(torch.compile(twice, backend=backend)(x).sum(), [x, weight])
    torch.testing.assert_close(found, torch.autograd.grad((2 * x * weight).sum(), [x, weight]))


if __name__ == "__main__":
    folder, ranks, rows, backend = sys.argv[1:]
    tiles_inside_are_tiles(backend)
    on_ranks(int(ranks), compiled_is_eager, int(rows), backend, tmp_path=Path(folder), seconds=240)
    print("exact")

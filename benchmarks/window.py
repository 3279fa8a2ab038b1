"""Benchmark: time of sliding-window attention beside full causal attention, forward and backward, kernel and 2 ranks.

    python benchmarks/window.py --help
    python benchmarks/window.py --tokens 32768 --heads 8 --dim 64 --windows 255 1023 4095 --dtypes float32 bfloat16

The kernel is timed in CPU seconds of one thread, and attend, exchanges included, in seconds until both of its ranks are done.
Causal and the windows take turns; the figures are medians and the ratios those of one turn, with their spread. "ideal" is the
ratio of the areas: what a kernel without any overhead gets.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from longspan import Causal, Mask, ParallelMesh, Window, attend
from longspan.kernels.sdpa import SDPA
from longspan.masks.bands import area

Timed = Callable[[Mask, torch.dtype], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--windows", type=int, nargs="+", default=[255, 1023, 4095], help="keys to the left of a query")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--turns", type=int, default=3, help="how often everything is timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{arguments.tokens} tokens, {arguments.heads} heads x {arguments.dim}, torch {torch.__version__}")
    print("| what | dtype | mask | seconds | x faster than causal | ideal |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    _table("kernel", arguments, lambda mask, dtype: _kernel(mask, dtype, arguments))
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (folder, arguments), nprocs=2, start_method="fork")


def _rank(rank: int, folder: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/rendezvous", 2), rank=rank, world_size=2)
    mesh = ParallelMesh(ulysses=2)
    _table("attend, 2 ranks", arguments, lambda mask, dtype: _attend(mask, dtype, arguments, mesh), silent=rank > 0)
    dist.destroy_process_group()


def _table(what: str, arguments: argparse.Namespace, timed: Timed, silent: bool = False) -> None:
    windows = [Window(left) for left in arguments.windows]
    tokens, causal = arguments.tokens, Causal()
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        turns = [[timed(mask, dtype) for mask in [causal, *windows]] for _ in range(arguments.turns)]
        if silent:
            continue
        print(f"| {what} | {name} | Causal() | {median(turn[0] for turn in turns):.2f} | 1 | 1 |", flush=True)
        for index, window in enumerate(windows, 1):
            ideal = area(causal.bands(tokens, tokens)) / area(window.bands(tokens, tokens))
            took, ratios = median(turn[index] for turn in turns), sorted(turn[0] / turn[index] for turn in turns)
            spread = f"{median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
            print(f"| {what} | {name} | Window({window.left}) | {took:.2f} | {spread} | {ideal:.1f} |", flush=True)


def _kernel(mask: Mask, dtype: torch.dtype, arguments: argparse.Namespace) -> float:
    """CPU seconds of one forward and backward: one thread's own time, whatever else the machine does."""
    q, k, v, dout = torch.randn(4, arguments.tokens, arguments.heads, arguments.dim).to(dtype)
    bands, kernel, scale = mask.bands(len(q), len(q)), SDPA(), q.shape[2] ** -0.5
    start = time.process_time()
    out, lse = kernel.forward(q, k, v, bands, scale)
    kernel.backward(dout, q, k, v, out, lse, bands, scale)
    return time.process_time() - start


def _attend(mask: Mask, dtype: torch.dtype, arguments: argparse.Namespace, mesh: ParallelMesh) -> float:
    """Seconds of one forward and backward of ``attend`` on the ranks of the mesh, until the last is done."""
    mine = (4, 1, arguments.tokens // mesh.world_group.size(), arguments.heads, arguments.dim)
    q, k, v, dout = (x.to(dtype).requires_grad_() for x in torch.randn(mine))
    dist.barrier()
    start = time.perf_counter()
    out = attend(q, k, v, mask=mask, mesh=mesh)
    out.backward(dout.detach())
    dist.barrier()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

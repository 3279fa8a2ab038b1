"""Benchmark: the Ulysses exchange beside a bare all-to-all: python benchmarks/exchange.py [--mib 16 64 256] [--pairs 11]

Two local ranks, batch 1, q, k and v of equal heads. In turn, in one run and on the same bytes:
  bare        one ``all_to_all_single`` into fresh memory, and one copy of as many bytes into reused memory
  exchange    ``tokens_to_heads`` of q, k and v as ``attend`` does it: pack, one collective, views
Prints the median of the paired ratios and their quartiles. The goal is at most 1.15.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from statistics import quantiles

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from longspan import ParallelMesh
from longspan.attention.ulysses import exchange_to_heads, plan_exchange

HEADS, DIM = 16, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, nargs="+", default=[16, 64, 256], help="what a rank exchanges, q, k and v together")
    parser.add_argument("--pairs", type=int, default=11, help="how many pairs are timed, after two that are not")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (folder, arguments.mib, arguments.pairs), nprocs=2, start_method="fork")


def _rank(rank: int, folder: str, sizes: list[int], pairs: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/rendezvous", 2), rank=rank, world_size=2)
    mesh = ParallelMesh(ulysses=2)
    for mib in sizes:
        tokens = mib * 2**20 // (3 * HEADS * DIM * 4)
        qkv = [torch.randn(1, tokens, HEADS, DIM) for _ in range(3)]
        plan = plan_exchange([x.shape for x in qkv], mesh, 2 * tokens)
        assert plan is not None
        send = torch.randn(3 * tokens * HEADS * DIM)
        reused = torch.empty_like(send)

        def bare(send: torch.Tensor = send, reused: torch.Tensor = reused) -> None:
            dist.all_to_all_single(torch.empty_like(send), send)
            reused.copy_(send)

        def exchange(qkv: list[torch.Tensor] = qkv, plan: object = plan) -> None:
            exchange_to_heads(qkv, plan)

        times = [(_seconds(bare), _seconds(exchange)) for _ in range(pairs + 2)][2:]
        low, middle, high = quantiles([ours / theirs for theirs, ours in times], n=4)
        theirs, ours = (sorted(column)[pairs // 2] * 1e3 for column in zip(*times))
        if rank == 0:
            spread = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            print(f"{mib:4d} MiB   bare {theirs:7.1f} ms   exchange {ours:7.1f} ms   ratio {spread}")
    dist.destroy_process_group()


def _seconds(action: Callable[[], None]) -> float:
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

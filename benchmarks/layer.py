"""Benchmark: bytes and time of one attention layer over the number of ranks, with the fraction that the exchanges take.

    python benchmarks/layer.py [--tokens-a-rank 2048] [--heads 32] [--dim 64] [--ranks 1 2 4 8]

For MHA, GQA (a quarter) and MQA, with as many tokens a rank at every number of ranks: the sequence grows with the ranks. The
bytes are counted at the Transport, forward and backward, and stand beside the formula of ``traffic.attention_traffic``.

    time       seconds of a forward and a backward of ``attend``, Window(1023), until the last rank is done
    exchanges  what of it the ranks spend in the Transport, waiting for each other included

More ranks than cores take turns on them, so times of different rows do not compare; shares and bytes do.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from longspan import ParallelMesh, Window, attend
from longspan.distributed.collectives import Arrival, CountingTransport, TorchTransport
from longspan.distributed.layout import Heads
from longspan.distributed.traffic import Traffic, attention_traffic

TURNS = 5


class TimedTransport:
    """PyTorch's own transport, and how many seconds were spent in it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def all_to_all(
        self, send: torch.Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], group: dist.ProcessGroup
    ) -> Arrival:
        start = time.perf_counter()
        arrival = TorchTransport().all_to_all(send, send_splits, recv_splits, group)
        self.seconds += time.perf_counter() - start
        return _TimedArrival(arrival, self)


class _TimedArrival:
    def __init__(self, arrival: Arrival, clock: TimedTransport) -> None:
        self.arrival, self.clock = arrival, clock

    def wait(self) -> torch.Tensor:
        start = time.perf_counter()
        received = self.arrival.wait()
        self.clock.seconds += time.perf_counter() - start
        return received


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-a-rank", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    print("| query, key/value heads | ranks | tokens | MiB a rank, counted | MiB a rank, formula | seconds | exchanges |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for kv_heads in (arguments.heads, arguments.heads // 4, 1):
        for ranks in arguments.ranks:
            with tempfile.TemporaryDirectory() as folder:
                mp.start_processes(_rank, (folder, ranks, kv_heads, arguments), nprocs=ranks, start_method="fork")


def _rank(rank: int, folder: str, ranks: int, kv_heads: int, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/rendezvous", ranks), rank=rank, world_size=ranks)
    clock = TimedTransport()
    counter = CountingTransport(clock)
    mesh = ParallelMesh(ulysses=ranks, transport=counter)
    mine, dim = arguments.tokens_a_rank, arguments.dim
    q = torch.randn(1, mine, arguments.heads, dim, requires_grad=True)
    k, v = (torch.randn(1, mine, kv_heads, dim, requires_grad=True) for _ in range(2))
    seconds, shares = [], []
    for _ in range(TURNS):
        clock.seconds, counter.traffic = 0.0, Traffic()
        dist.barrier()
        start = time.perf_counter()
        attend(q, k, v, mask=Window(1023), mesh=mesh).backward(torch.ones_like(q))
        dist.barrier()
        seconds.append(time.perf_counter() - start)
        shares.append(clock.seconds / seconds[-1])
    sizes = (mine,) * ranks
    formula = attention_traffic(Heads(arguments.heads, kv_heads, ranks), sizes, sizes, rank, qk_dim=dim, v_dim=dim, itemsize=4)
    if rank == 0:
        counted, expected = counter.traffic.bytes / 2**20, sum(way.bytes for way in formula) / 2**20
        print(
            f"| {arguments.heads}, {kv_heads} | {ranks} | {mine * ranks:,} | {counted:.2f} | {expected:.2f} | "
            f"{median(seconds):.3f} | {median(shares):.0%} |",
            flush=True,
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Benchmark: training steps on one sequence of a million tokens on two CPU cores: loss, seconds, memory and traffic.

    python benchmarks/million.py --help
    python benchmarks/million.py                                                    1,048,576 tokens, Window(4095), 4 layers
    python benchmarks/million.py --tokens 262144 --window 0 --layers 2 --steps 1    full causal attention

A decoder (hidden 256, 4 heads x 64, bytes) learns the source of Python's standard library, with AdamW, blocks in bf16,
parameters and their gradients in fp32 and in shares (zero=2), attention kept and all else recomputed, a share of the heads at
a time, feed-forwards and norms in tiles. Memory is the peak of each rank's process (VmHWM, reset before each step), with
MALLOC_MMAP_THRESHOLD_=8388608, without which glibc keeps what was freed, and MALLOC_TRIM_THRESHOLD_=67108864.
"""

import argparse
import os
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from longspan import Causal, MemoryOptions, ParallelMesh, Window, parallelize, shard_batch
from longspan.distributed.collectives import CountingTransport, TorchTransport
from longspan.distributed.grad_norm import clip_grad_norm_
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**23), "MALLOC_TRIM_THRESHOLD_": str(2**26)}
"""Larger blocks of memory go back to the system at once, so that the peak is what is really held. Smaller ones, the flash
operator's scratch and the tiles, are wanted again at once: new pages for each were a quarter of the time of a causal step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--window", type=int, default=4095, help="keys to the left of a query (0: all of them)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tile-tokens", type=int, default=2048)
    parser.add_argument("--head-chunks", type=int, default=2)
    arguments = parser.parse_args()
    if MALLOC.keys() - os.environ.keys():  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], MALLOC | os.environ)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (folder, arguments), nprocs=arguments.ranks, start_method="fork")


def _rank(rank: int, folder: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/rendezvous", arguments.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=arguments.ranks)
    transport = CountingTransport(TorchTransport())
    mesh = ParallelMesh(ulysses=arguments.ranks, transport=transport)
    shape = DecoderConfig(vocab=256, layers=arguments.layers, hidden=256, heads=4, kv_heads=4, head_dim=64, ffn=768)
    model = parallelize(
        Decoder(shape), mesh, zero=2, dtype=torch.bfloat16,
        memory=MemoryOptions("selective", arguments.tile_tokens, arguments.head_chunks),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = _text(arguments.tokens)
    mask = Window(arguments.window) if arguments.window else Causal()
    if rank == 0:
        print(f"{arguments.tokens:,} tokens, {mask}, {shape.parameters:,} parameters, {mesh}, torch {torch.__version__}")
        print("| step | loss | seconds | tokens/s | peak GiB of the fullest rank | GiB a rank sent |")
        print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for step in range(1, arguments.steps + 1):
        _reset_peak()
        dist.barrier()
        start, sent = time.perf_counter(), transport.traffic.bytes
        loss = model(**shard_batch({"input_ids": ids, "labels": ids}, mesh, mask=mask)).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        seconds = time.perf_counter() - start
        peak = torch.tensor(_peak_gib())
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        if rank == 0:
            gib, speed = (transport.traffic.bytes - sent) / 2**30, arguments.tokens / seconds
            print(f"| {step} | {loss.item():.4f} | {seconds:,.0f} | {speed:,.0f} | {peak.item():.2f} | {gib:.2f} |", flush=True)
    dist.destroy_process_group()


def _text(tokens: int) -> torch.Tensor:
    """The first so many bytes of Python's standard library, in one row."""
    content = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        content += path.read_bytes()
        if len(content) >= tokens:
            break
    return torch.frombuffer(content, dtype=torch.uint8)[:tokens].long().unsqueeze(0)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_gib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    main()

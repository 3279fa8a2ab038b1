"""Benchmark: the longest sequence that trains under a limit of resident memory a rank, with and without each memory option.

    python benchmarks/longest.py --help
    python benchmarks/longest.py --vocab 128256 --dtypes fp32 bf16
    python benchmarks/longest.py --vocab 32000 --dtypes fp32 bf16
    python benchmarks/longest.py --vocab 32000 --dtypes fp32 --cap 0.8 --ablate

A decoder shaped like Llama (4 layers, hidden 256, 4 heads x 64, ffn 768, untied) makes real steps of AdamW, causal. The
baseline is one rank with PyTorch's fused attention, checkpointed blocks, and whole logits whose loss is compiled (which keeps
two copies of them instead of three); ours is two ranks with every tool. A measurement is a fresh process a rank: short steps
first, which make the optimizer's states and compile, then the peak is reset (VmHWM, with MALLOC_MMAP_THRESHOLD_=65536) and one
step of the length is made. Memory grows in a line with the length, so the search goes along that line and then tries: what it
prints was measured, under the cap, and no more than 4% below it unless --enough times the baseline was reached before. The
compiler itself takes 80 MiB of the baseline's; rows of --ablate with whole logits have the loss that is not compiled.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from longspan import MemoryOptions, ParallelMesh, cross_entropy, parallelize, shard_batch
from longspan.memory import checkpointing as memory
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig

BASELINE: dict[str, Any] = {"ranks": 1}
OURS: dict[str, Any] = {
    "ranks": 2, "whole_logits": False,
    "options": {"zero": 3, "recompute": "selective", "tile_tokens": 4096, "head_chunks": 2},
}  # fmt: skip
STEP = 256
"""Lengths are multiples of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--cap", type=float, default=3.0, help="GiB a rank")
    parser.add_argument("--enough", type=float, default=16.0, help="stop at so many times the baseline")
    parser.add_argument("--ablate", action="store_true", help="leave out one option at a time")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        _measure(json.loads(arguments.measure))
        return
    print(f"vocabulary {arguments.vocab:,}, cap {arguments.cap} GiB a rank, torch {torch.__version__}")
    print("| dtype | what | longest | x baseline | GiB there |\n| --- | --- | --- | --- | --- |", flush=True)
    for dtype in arguments.dtypes:
        common = {"vocab": arguments.vocab, "dtype": dtype, "whole_logits": True, "options": {}}
        baseline = _print_row("one rank, fused attention, checkpointed, compiled loss", common | BASELINE, arguments, None)
        for what, changes in (_ablations() if arguments.ablate else {"two ranks, every option": OURS}).items():
            _print_row(what, common | changes, arguments, baseline)


def _ablations() -> dict[str, dict[str, Any]]:
    options = OURS["options"]
    without = {f"without {name}": OURS | {"options": {n: v for n, v in options.items() if n != name}} for name in options}
    return {
        "two ranks, no option": {"ranks": 2},
        "two ranks, every option": OURS,
        "without the chunked loss": OURS | {"whole_logits": True},
        **without,
    }


def _print_row(what: str, case: dict[str, Any], arguments: argparse.Namespace, baseline: int | None) -> int:
    enough = int(arguments.enough * baseline) // STEP * STEP if baseline else 10**9
    tokens, gib = _search(case, arguments.cap, enough)
    times = f"{tokens / baseline:.1f}" if baseline else ""  # nor where the baseline fits no length
    more = " and more" if tokens == enough else ""
    print(f"| {case['dtype']} | {what} | {tokens:,}{more} | {times} | {gib:.2f} |", flush=True)
    return tokens


def _search(case: dict[str, Any], cap: float, enough: int) -> tuple[int, float]:
    """The longest length found under the cap, and its peak."""
    fits, breaks = (0, 0.0), (enough + STEP, float("inf"))
    points = [(tokens, _peak_gib(case, tokens)) for tokens in (1024, 2048)]
    while True:
        for tokens, gib in points:
            if gib <= cap and tokens > fits[0]:
                fits = (tokens, gib)
            if gib > cap and tokens < breaks[0]:
                breaks = (tokens, gib)
        (a, low), (b, high) = sorted(points)[-2:]
        slope = max((high - low) / (b - a), 1e-9)
        guess = int((b + (cap * 0.985 - high) / slope) // STEP * STEP)
        guess = min(guess, 4 * b, enough, breaks[0] - STEP)
        if guess <= fits[0] or fits[1] >= 0.96 * cap:
            return fits
        points.append((guess, _peak_gib(case, guess)))


def _peak_gib(case: dict[str, Any], tokens: int) -> float:
    """Of the fullest rank of a step of this length, in processes of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps(case | {"tokens": tokens})]
    done = subprocess.run(command, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{case | {'tokens': tokens}} failed:\n{done.stderr[-3000:]}")
    gib = max(map(float, done.stdout.split()))
    print(f"    {case['dtype']} {case['ranks']} ranks {tokens:,} tokens: {gib:.2f} GiB", file=sys.stderr, flush=True)
    return gib


def _measure(case: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (folder, case), nprocs=case["ranks"], start_method="fork")


def _rank(rank: int, folder: str, case: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/rendezvous", case["ranks"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case["ranks"])
    step = _baseline(case) if case["ranks"] == 1 else _ours(case)
    step(512)
    step(768)
    Path("/proc/self/clear_refs").write_text("5")
    step(case["tokens"])
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    os.write(1, f"{int(line.split()[1]) / 2**20}\n".encode())  # at once: ranks share the pipe
    dist.destroy_process_group()


def _shape(case: dict[str, Any]) -> DecoderConfig:
    return DecoderConfig(vocab=case["vocab"], layers=4, hidden=256, heads=4, kv_heads=4, head_dim=64, ffn=768)


def _ids(case: dict[str, Any], tokens: int) -> Tensor:
    return torch.randint(case["vocab"], (1, tokens), generator=torch.Generator().manual_seed(0))


def _baseline(case: dict[str, Any]) -> Callable[[int], None]:
    def fused(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    model = Decoder(_shape(case), attention=fused)
    for block in model.blocks:
        memory.recompute(block, "full")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of = torch.compile(lambda logits, labels: F.cross_entropy(logits.float(), labels), dynamic=True)

    def step(tokens: int) -> None:
        ids = _ids(case, tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=case["dtype"] == "bf16"):
            loss = loss_of(model(ids).logits[0], F.pad(ids[0, 1:], (0, 1), value=-100))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ours(case: dict[str, Any]) -> Callable[[int], None]:
    mesh, options = ParallelMesh(ulysses=case["ranks"]), dict(case["options"])
    half, zero = case["dtype"] == "bf16", options.pop("zero", 0)
    sharded = zero > 0
    dtype = torch.bfloat16 if half and sharded else None
    model = parallelize(Decoder(_shape(case)), mesh, zero=zero, dtype=dtype, memory=MemoryOptions(**options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(tokens: int) -> None:
        ids = _ids(case, tokens)
        part = shard_batch({"input_ids": ids, "labels": ids}, mesh)
        with torch.autocast("cpu", torch.bfloat16, enabled=half and not sharded):
            if case["whole_logits"]:
                labels = part.pop("shift_labels")
                part.pop("labels")
                loss = cross_entropy(model(**part).logits, labels, mesh=mesh, num_labels=part["longspan"].num_labels)
            else:
                loss = model(**part).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()

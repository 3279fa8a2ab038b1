"""Benchmark: time and peak memory of the chunked loss beside the loss of whole logits, forward and backward.

    python benchmarks/loss.py --help
    python benchmarks/loss.py --tokens 4096 --vocab 128256 --hidden 256 1024

Both take turns in one process of one thread; figures are medians, the ratio of time is that of one turn, with its spread. Peak
is how far resident memory grew at most (VmHWM, reset before each turn, with MALLOC_MMAP_THRESHOLD_=65536).
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import linear_cross_entropy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # glibc reads it when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    torch.set_num_threads(1)
    print(f"{arguments.tokens:,} tokens, vocabulary {arguments.vocab:,}, torch {torch.__version__}")
    print("| hidden | dtype | whole | chunked | time, ratio | whole, peak | chunked, peak | whole / chunked |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for hidden in arguments.hidden:
        for name in arguments.dtypes:
            _row(arguments, hidden, getattr(torch, name))


def _row(arguments: argparse.Namespace, hidden: int, dtype: torch.dtype) -> None:
    x = torch.randn(arguments.tokens, hidden, dtype=dtype, requires_grad=True)
    head = (0.02 * torch.randn(arguments.vocab, hidden)).to(dtype).requires_grad_()
    labels = torch.randint(arguments.vocab, (arguments.tokens,))
    turns = [[_measure(loss, x, head, labels) for loss in (_whole, linear_cross_entropy)] for _ in range(arguments.turns)]
    seconds = [median(turn[which][0] for turn in turns) for which in (0, 1)]
    peaks = [median(turn[which][1] for turn in turns) for which in (0, 1)]
    ratios = sorted(turn[1][0] / turn[0][0] for turn in turns)
    print(
        f"| {hidden} | {str(dtype)[6:]} | {seconds[0]:.1f} s | {seconds[1]:.1f} s | {median(ratios):.2f} ({ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}) | {peaks[0]:,.0f} MiB | {peaks[1]:,.0f} MiB | {peaks[0] / peaks[1]:.1f} |",
        flush=True,
    )


def _whole(x: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((x @ head.T).float(), labels)


def _measure(loss: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, head: Tensor, labels: Tensor) -> tuple[float, float]:
    x.grad = head.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _peak_mib(), time.perf_counter()
    loss(x, head, labels).backward()
    return time.perf_counter() - start, _peak_mib() - before


def _peak_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


if __name__ == "__main__":
    main()

"""Speed of one GPU: GEMM and copy ceilings, then attention forward and backward against them. It has never run on a GPU.

    make bench-gpu PYTHON=python3                     8k to 1M tokens, 4 query heads and 1 key/value head of 128, bf16
    make bench-gpu DEVICE=cpu ARGS="--tokens 256"     a dry run

    TFLOP/s = 4 * visible pairs * heads * dim * 3.5 / seconds      (backward: 2.5 times the forward)

Prints a table and writes JSON. One layer's attention only: a rank's share of a whole step is not built yet.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from longspan.kernels.table import choose
from longspan.masks.bands import area
from longspan.masks.constructors import Causal, Documents, Mask, Window

HEADS, KV_HEADS, DIM = 4, 1, 128


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The fastest of ``repeats`` runs, after one that is not counted."""
    best = float("inf")
    for number in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        best = min(best, time.perf_counter() - start) if number else best
    return best


def wait(device: torch.device) -> None:
    """Wait for the device, if it is not the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def ceilings(device: torch.device, size: int) -> dict[str, float]:
    """bf16 GEMM in TFLOP/s and copy in GB/s (read and written) of square matrices."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    gemm, copy = seconds_of(lambda: a @ b, device), seconds_of(lambda: a.copy_(b), device)
    return {"gemm_tflops": 2 * size**3 / gemm / 1e12, "copy_gb_per_s": 4 * size**2 / copy / 1e9}


def attention(name: str, mask: Mask, tokens: int, device: torch.device) -> dict[str, Any]:
    """Seconds, TFLOP/s and peak bytes of forward and backward of the kernel that kernel="auto" chooses."""
    q, dout = (torch.randn(tokens, HEADS, DIM, device=device).bfloat16() for _ in range(2))
    k, v = (torch.randn(tokens, KV_HEADS, DIM, device=device).bfloat16() for _ in range(2))
    bands, scale = mask.bands(tokens, tokens), DIM**-0.5
    kernel = choose("auto", device_type=device.type, dtype=q.dtype, qk_dim=DIM, v_dim=DIM)
    out, lse = kernel.forward(q, k, v, bands, scale)
    forward = seconds_of(lambda: kernel.forward(q, k, v, bands, scale), device)
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    backward = seconds_of(lambda: kernel.backward(dout, q, k, v, out, lse, bands, scale), device)
    peak = torch.accelerator.max_memory_allocated(device) if device.type != "cpu" else 0
    work = 4 * area(bands) * HEADS * DIM
    return {
        "mask": name, "tokens": tokens, "kernel": kernel.name, "forward_s": forward, "backward_s": backward,
        "tflops": 3.5 * work / (forward + backward) / 1e12, "peak_bytes": peak,
    }  # fmt: skip


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description="Speed of one GPU: GEMM, copy, attention.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="*", default=[8_192, 32_768, 131_072, 262_144, 1_048_576])
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"))
    args = parser.parse_args()
    device = torch.device(args.device)
    card = torch.get_device_module(device).get_device_name(device) if device.type != "cpu" else platform.processor() or "CPU"
    found: dict[str, Any] = {"card": card, "torch": torch.__version__, "date": date.today().isoformat()}
    found |= ceilings(device, 8192 if device.type != "cpu" else 512)
    print(f"{card}, torch {torch.__version__}: GEMM {found['gemm_tflops']:.3g} TFLOP/s, copy {found['copy_gb_per_s']:.3g} GB/s")
    print(f"{'mask':<12}{'tokens':>10} {'kernel':<8}{'forward ms':>12}{'backward ms':>12}{'TFLOP/s':>9}{'of GEMM':>9}")
    found["attention"] = []
    for tokens in args.tokens:
        parts = [tokens // 4] * 3 + [tokens - tokens // 4 * 3]
        for name, mask in (("causal", Causal()), ("window 4095", Window(4095)), ("documents", Documents(parts) & Causal())):
            row = attention(name, mask, tokens, device)
            found["attention"].append(row)
            share = row["tflops"] / found["gemm_tflops"]
            times = f"{row['forward_s'] * 1e3:12.3f}{row['backward_s'] * 1e3:12.3f}"
            print(f"{name:<12}{tokens:>10} {row['kernel']:<8}{times}{row['tflops']:9.3f}{share:9.1%}", flush=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

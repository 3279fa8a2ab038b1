"""The machine beside every table: processor, flags, versions, date, and what it can do at most.

GEMM peak    the best of a sweep of square fp32 products, one thread a rank, both ranks at once
copy         a copy within a rank into memory that is there
all-to-all   the bare collective into memory that is there
"""

import importlib.metadata
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "axolotl-ringmaster", "yunchang")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")


def describe() -> str:
    """One paragraph: processor, its flags that matter to products, versions, date."""
    info = Path("/proc/cpuinfo").read_text()
    name = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "unknown")
    present = next((line.split() for line in info.splitlines() if line.startswith("flags")), [])
    flags = " ".join(flag for flag in FLAGS if flag in present) or "none of " + " ".join(FLAGS)
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    return (
        f"{datetime.now(UTC):%d %b %Y}, {name}, {flags}, Python {platform.python_version()}, {versions}; two ranks, one thread "
        f"each, gloo over the loopback."
    )


def version(library: str) -> str:
    """The installed version of a library, or "not installed"."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class Gemm:
    """Work of a contestant: the best rate of fp32 products over a sweep of sizes, in FLOP a second."""

    SIZES = (512, 1024, 2048, 4096)

    def __init__(self) -> None:
        self.baseline, self.rate = 0.0, 0.0

    def turn(self) -> None:
        for size in self.SIZES:
            a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
            torch.mm(a, b, out=out)
            repeats = max(1, 4096**3 // size**3 // 8)
            began = time.perf_counter()
            for _ in range(repeats):
                torch.mm(a, b, out=out)
            self.rate = max(self.rate, 2 * size**3 * repeats / (time.perf_counter() - began))

    def results(self) -> dict[str, float]:
        return {"rate": self.rate}

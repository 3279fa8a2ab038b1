"""What ``longspan probe`` measures: matrix products, attention, copies and collectives, each with its spread.

A figure is the median of several repeats; its spread is the distance of the quartiles over the median. Ranks measure at the
same time, because they share a machine's memory and cores in training too, and the slowest of them counts. Collectives are
those of ``torch.distributed``, with one small and one large message: bandwidth and latency follow from the two.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longspan.distributed.consensus import raise_together
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import RunError

SIZES = {"cpu": (256, 512, 1024), "cuda": (1024, 4096, 8192)}
"""Rows and columns of the square matrix products, by kind of device."""
SMALL_BYTES = 1024
"""The small message of a collective, whose time is its latency."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Figure(NamedTuple):
    """A measured number.

    Attributes:
        value: the median of the repeats.
        spread: the distance of their quartiles, over the median.
    """

    value: float
    spread: float


def measure_and_write(path: str, largest_mib: int, repeats: int, timeout: timedelta | None) -> int:
    """Measure on all ranks; rank 0 writes ``path`` and prints the figures. Every rank must call it.

    Args:
        path: the JSON file, which is replaced.
        largest_mib: MiB of the large message of the collectives.
        repeats: how often each figure is measured.
        timeout: how long a collective waits for other ranks; None: PyTorch's default.

    Returns:
        The exit code 0.

    Raises:
        RunError: the file cannot be written.
    """
    mesh = ParallelMesh(dist.get_world_size(), timeout=timeout)
    found, spreads = measure(mesh, largest_mib << 20, repeats)
    with raise_together(mesh.world_group):
        if dist.get_rank() == 0:
            try:
                Path(path).write_text(json.dumps(found | {"spread": spreads}, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                raise RunError(f"{path} cannot be written: {error.strerror}; name another file with --out") from error
    if dist.get_rank() == 0:
        print("\n".join(_lines(found, spreads)))
        print(f"\nWritten to {path}; plan with it:  longspan plan --hardware {path}")
    return 0


def measure(mesh: ParallelMesh, largest: int, repeats: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Measure on every rank of ``mesh``.

    Args:
        mesh: its world group carries the collectives.
        largest: bytes of the large message.
        repeats: how often each figure is measured.

    Returns:
        (what planner/probed.py reads, the spread of each figure), the same on all ranks but for names and memory.
    """
    device, group = mesh.device, mesh.world_group
    spreads: dict[str, float] = {}

    def seconds(name: str, run: Callable[[], Any]) -> float:
        figure = timed(run, device, group, repeats)
        spreads[name] = figure.spread
        return figure.value

    matmul: dict[str, dict[str, float]] = {}
    for dtype, torch_dtype in DTYPES.items():
        for size in SIZES.get(device.type, SIZES["cpu"]):
            x = torch.randn(size, size, dtype=torch_dtype, device=device)  # a GPU multiplies ones faster than data
            took = seconds(f"matmul {dtype} {size}", partial(torch.matmul, x, x))
            matmul.setdefault(dtype, {})[str(size)] = 2 * size**3 / took
    attention = _attention(device, seconds)
    training = _training(device, {dtype: max(rates.values()) for dtype, rates in matmul.items()}, seconds)
    block = torch.ones(largest // 4, device=device)
    copied = torch.empty_like(block)
    bandwidth = 2 * block.nbytes / seconds("copy", lambda: copied.copy_(block))
    on_host = torch.empty(block.shape, pin_memory=device.type == "cuda")
    to_host = block.nbytes / seconds("copy to host", lambda: on_host.copy_(block))
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ranks = dist.get_world_size(group)
    is_cuda = device.type == "cuda"
    found = {
        "name": torch.cuda.get_device_name(device) if is_cuda else f"{platform.machine()} cpu",
        "torch": torch.__version__,
        "ranks": ranks,
        "memory": torch.cuda.get_device_properties(device).total_memory if is_cuda else host / ranks,
        "host_memory": float(host),
        "matmul": matmul,
        "attention": attention,
        "training": training,
        "bandwidth": bandwidth,
        "to_host": to_host,
        "dispatch": seconds("dispatch", lambda: [block[:1].add_(0) for _ in range(100)]) / 100,
        "links": _links(device, group, largest, seconds) if ranks > 1 else {},
    }
    return found, spreads


def timed(run: Callable[[], Any], device: torch.device, group: dist.ProcessGroup, repeats: int) -> Figure:
    """The median seconds of ``run``, with their spread; all ranks of ``group`` begin each of ``repeats`` repeats together.

    Of each repeat the slowest rank counts, for which the others wait in training. The clock stops when ``device`` has ended its
    work.
    """
    run()
    taken = torch.zeros(max(2, repeats), dtype=torch.float64, device=device)
    for repeat in range(len(taken)):
        dist.barrier(group=group)
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        taken[repeat] = time.perf_counter() - begin
    dist.all_reduce(taken, dist.ReduceOp.MAX, group=group)
    slowest = taken.tolist()
    low, _, high = quantiles(slowest, n=4)
    return Figure(median(slowest), (high - low) / median(slowest))


def _wait(device: torch.device) -> None:
    """Wait until a CUDA device has ended its work; do nothing for others."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Seconds = Callable[[str, Callable[[], Any]], float]
"""``seconds(name, run)`` measures a function under a name."""


def _attention(device: torch.device, seconds: Seconds) -> dict[str, float]:
    """Causal attention in fp32 at two lengths, counted on the area of its mask.

    The longer one is of the lengths that are planned, with few heads on a CPU, which attends to one head after the other:
    a rate of shorter sequences, extrapolated, was 15% off.

    Returns:
        {"forward": ..., "backward": operations a second at many keys, "keys": keys a query at which half of that is reached}.
    """
    heads, lengths, dim = (2, (2048, 8192), 64) if device.type == "cpu" else (32, (2048, 16_384), 128)
    parts, wholes = [], []
    for tokens, length in zip(lengths, (", short sequence", "")):
        q, k, v = (torch.randn(1, heads, tokens, dim, device=device, requires_grad=True) for _ in range(3))
        forward = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        out, gradient = forward(), torch.randn_like(q)
        with torch.no_grad():
            one = seconds(f"attention, forward{length}", forward)
        backward = partial(torch.autograd.grad, out, (q, k, v), gradient, retain_graph=True)
        other = seconds(f"attention, backward{length}", backward)
        flops = 4 * dim * heads * tokens * (tokens + 1) / 2
        parts.append((flops / one, 2.5 * flops / other))
        wholes.append((tokens / 2, 3.5 * flops / (one + other)))
    few, many = wholes
    keys = min(few[0], half_rate_keys(few, many))
    reached = many[0] / (many[0] + keys)
    return {"forward": parts[1][0] / reached, "backward": parts[1][1] / reached, "keys": keys}


def half_rate_keys(few: tuple[float, float], many: tuple[float, float]) -> float:
    """The c of rate = R · keys / (keys + c) through two points (keys, rate); 0 where the rate does not rise."""
    rising = few[1] / few[0] - many[1] / many[0]
    return max(0.0, many[1] - few[1]) / rising if rising > 0 else 0.0


def _products(x: Tensor, w: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix products of a projection: its output, the gradient of its input and that of its weight."""
    return x @ w, grad @ w.T, x.T @ grad


def _training(device: torch.device, best: dict[str, float], seconds: Seconds) -> dict[str, Any]:
    """What a training step reaches beside single kernels: {"matmul_share": {dtype: share of ``best``}, "elementwise": bytes/s}.

    The products are those of a projection's forward and backward; the element-wise operators a norm, a residual and a gate,
    whose bytes are counted as planner/cost.py counts them.
    """
    rows, hidden, wide = (4096, 256, 768) if device.type == "cpu" else (8192, 4096, 14_336)
    shares = {}
    for dtype, torch_dtype in DTYPES.items():
        x, w = (torch.randn(*size, dtype=torch_dtype, device=device) for size in ((rows, hidden), (hidden, wide)))
        g = torch.randn(rows, wide, dtype=torch_dtype, device=device)
        took = seconds(f"training products {dtype}", partial(_products, x, w, g))
        shares[dtype] = min(1.0, 6 * rows * hidden * wide / took / best[dtype])
    x, residual = (torch.randn(rows, hidden, device=device, requires_grad=True) for _ in range(2))
    gate, up = (torch.randn(rows, wide, device=device, requires_grad=True) for _ in range(2))
    weight = torch.ones(hidden, device=device, requires_grad=True)

    def run() -> None:
        out = residual + F.rms_norm(x, (hidden,), weight), F.silu(gate) * up
        torch.autograd.backward(out, [torch.ones_like(one) for one in out])

    moved = 3 * 4 * rows * (7 * hidden + 5 * wide)
    return {"matmul_share": shares, "elementwise": moved / seconds("element-wise, forward and backward", run)}


def _links(
    device: torch.device, group: dist.ProcessGroup, largest: int, seconds: Callable[[str, Callable[[], Any]], float]
) -> dict[str, dict[str, float]]:
    """{collective: {"bandwidth": bytes a second, "latency": seconds}} over all ranks of ``group``.

    The bytes are those that a rank sends to others, for one small message and one of ``largest`` bytes; ``seconds(name, run)``
    measures a function under a name.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)

    def run(name: str, size: int) -> Callable[[], Any]:
        whole = torch.ones(max(1, size // 4 // ranks) * ranks, device=device)
        part, other = whole[: whole.numel() // ranks].clone(), torch.empty_like(whole)

        def send() -> None:
            ahead, behind = (rank + 1) % ranks, (rank - 1) % ranks
            works = [dist.P2POp(dist.isend, part, ahead, group), dist.P2POp(dist.irecv, other[: part.numel()], behind, group)]
            for request in dist.batch_isend_irecv(works):
                request.wait()

        return {
            "all-to-all": lambda: dist.all_to_all_single(other, whole, group=group),
            "all-gather": lambda: dist.all_gather(list(other.chunk(ranks)), part, group=group),
            "reduce-scatter": lambda: dist.reduce_scatter(part, list(whole.chunk(ranks)), group=group),
            "point-to-point": send,
        }[name]

    found = {}
    for name in ("all-to-all", "all-gather", "reduce-scatter", "point-to-point"):
        latency = seconds(f"{name}, small", run(name, SMALL_BYTES))
        took = seconds(f"{name}, large", run(name, largest))
        sent = largest / ranks * (1 if name == "point-to-point" else ranks - 1)
        hops = 1 if name in ("all-to-all", "point-to-point") else ranks - 1
        found[name] = {"bandwidth": sent / max(took - latency, 1e-9), "latency": latency / hops}
    return found


def _lines(found: dict[str, Any], spreads: dict[str, float]) -> list[str]:
    """The measured figures as lines of text, each with its spread, for the terminal."""
    lines = [f"{found['name']}, {found['ranks']} ranks at the same time; spread: quartiles over the median", ""]

    def line(name: str, value: str) -> None:
        lines.append(f"  {name:<34}{value:>16}   +-{spreads[name]:.0%}")

    for dtype, rates in found["matmul"].items():
        for size, rate in rates.items():
            line(f"matmul {dtype} {size}", f"{rate / 1e9:,.1f} GFLOP/s")
    for dtype, share in found["training"]["matmul_share"].items():
        line(f"training products {dtype}", f"{share:.0%} of the best")
    line("attention, forward", f"{found['attention']['forward'] / 1e9:,.1f} GFLOP/s")
    line("attention, backward", f"{found['attention']['backward'] / 1e9:,.1f} GFLOP/s")
    line("element-wise, forward and backward", f"{found['training']['elementwise'] / 1e9:,.2f} GB/s")
    line("copy", f"{found['bandwidth'] / 1e9:,.2f} GB/s")
    line("copy to host", f"{found['to_host'] / 1e9:,.2f} GB/s")
    line("dispatch", f"{found['dispatch'] * 1e6:,.2f} us")
    for name, link in found["links"].items():
        line(f"{name}, large", f"{link['bandwidth'] / 1e9:,.2f} GB/s")
        line(f"{name}, small", f"{link['latency'] * 1e6:,.0f} us")
    return lines

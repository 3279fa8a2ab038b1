"""Benchmark: the plan beside what this machine does: step time and memory of 15 layouts, each after a probe of as many ranks.

    python benchmarks/plan_here.py                    all, about half an hour on two quiet cores
    python benchmarks/plan_here.py --memory           memory alone: each fullest rank rehearsed, no quiet machine needed
    python benchmarks/plan_here.py --only 'ulysses 2' --tokens 1024

A decoder of 2 layers (hidden 256, 8 query and 4 key/value heads of 64, feed-forward 768, vocabulary 2,048) makes steps of AdamW
on real ranks, one thread each: {1, 2, 4} x {ulysses, ring} at 8k without and with all memory options (a ring of 1 is none),
tensor 2, pipeline 2, and ulysses 2 at 2k, 16k and 32k; with --memory also 8 in bf16. The machine is probed before and after
each, because its speed changes within minutes where others share it; the planned time is the mean of both probes' plans. A
configuration whose steps spread more than 10%, or whose two plans are that far apart, is measured again, at most --most times.
Memory is that of the tensors: of the process it lacks Python and libraries.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from longspan.cli.measure import measure_and_write
from longspan.cli.model_source import DecoderSource
from longspan.cli.rehearsal import Measured, measure_alone, measure_rank, mesh_of
from longspan.cli.rehearse import RehearseSettings
from longspan.cli.rehearsed_plan import predicted
from longspan.models.decoder_config import DecoderConfig
from longspan.planner.model import dense

CONFIG = DecoderConfig(vocab=2048, layers=2, hidden=256, heads=8, kv_heads=4, head_dim=64, ffn=768)
SHAPE = dense("decoder", layers=2, hidden=256, heads=8, kv_heads=4, head_dim=64, ffn=768, vocab=2048)
ALL: dict[str, Any] = {"zero": 3, "recompute": "selective", "tile_tokens": 1024, "head_chunks": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"{axis} {n}{', all options' * bool(more)}": {"world": n, axis: n} | more
       for n in (1, 2, 4) for axis in ("ulysses", "ring") for more in ({}, ALL) if (axis, n) != ("ring", 1)},
    "tensor 2": {"world": 2, "tensor": 2},
    "pipeline 2": {"world": 2, "pipeline": 2},
    **{f"ulysses 2, {n}k": {"world": 2, "ulysses": 2, "tokens": n * 1024} for n in (2, 16, 32)},
}  # fmt: skip
BF16: dict[str, dict[str, Any]] = {
    f"bf16: {name}": {"dtype": "bf16"} | layout
    for name, layout in {
        "ulysses 1": {"world": 1}, "ulysses 2": {"world": 2, "ulysses": 2}, "ring 2": {"world": 2, "ring": 2},
        "ulysses 2, zero=2": {"world": 2, "ulysses": 2, "zero": 2}, "ulysses 2, zero=3": {"world": 2, "ulysses": 2, "zero": 3},
        "ulysses 2, full": {"world": 2, "ulysses": 2, "recompute": "full"},
        "ulysses 2, all options": {"world": 2, "ulysses": 2} | ALL, "tensor 2": {"world": 2, "tensor": 2},
    }.items()
}  # fmt: skip
SPREAD = 0.10
SECONDS_WITHIN, MEMORY_WITHIN = 0.15, 0.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="memory alone, by rehearsals")
    parser.add_argument("--only", help="layouts whose name contains this")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--most", type=int, default=3, help="how often a layout is measured at most")
    given = parser.parse_args()
    torch.set_num_threads(1)
    layouts = {name: {"tokens": given.tokens} | layout for name, layout in (LAYOUTS | (BF16 if given.memory else {})).items()}
    layouts = {name: layout for name, layout in layouts.items() if given.only is None or given.only in name}
    with tempfile.TemporaryDirectory() as folder:
        print("| layout | step, planned | measured | ratio | spread | plans apart | memory, planned | measured | ratio |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        verdicts = [_compare(name, layout, folder, given) for name, layout in layouts.items()]
    times, sizes = [t for t, _ in verdicts if t is not None], [m for _, m in verdicts]
    if times:
        print(f"step time within {SECONDS_WITHIN:.0%}: {sum(times)} of {len(times)}")
    print(f"memory within {MEMORY_WITHIN:.0%}: {sum(sizes)} of {len(sizes)}")


def _compare(name: str, layout: dict[str, Any], folder: str, given: argparse.Namespace) -> tuple[bool | None, bool]:
    """Measure one layout and print its row; (whether its time is near, None if it was not measured; whether its memory is)."""
    settings = RehearseSettings(steps=1 if given.memory else given.steps, **layout)
    times, near = [""] * 5, None
    if given.memory:
        found = _together(_rehearsed, settings, folder, processes=1)
    else:
        for _ in range(given.most):
            before = _planned(settings, folder)
            found = _together(_real, settings, folder, processes=settings.world)
            after = _planned(settings, folder)
            step, apart = (before + after) / 2, abs(before - after) / min(before, after)
            spread = max(one.step_spread for one in found)
            if max(spread, apart) <= SPREAD:
                break
        took = max(one.step_seconds for one in found)
        near = abs(step / took - 1) <= SECONDS_WITHIN
        times = [f"{step:.3f} s", f"{took:.3f} s", f"{step / took:.2f}", f"{spread:.0%}", f"{apart:.0%}"]
    planned, peak = predicted(settings, _dtype(settings), SHAPE)["bytes"], max(one.peak_bytes for one in found)
    sizes = [f"{planned / 2**20:,.1f} MiB", f"{peak / 2**20:,.1f} MiB", f"{planned / peak:.2f}"]
    print(f"| {name} | {' | '.join(times + sizes)} |", flush=True)
    return near, abs(planned / peak - 1) <= MEMORY_WITHIN


def _planned(settings: RehearseSettings, folder: str) -> float:
    """Seconds of a step by the plan, on the machine as a probe finds it now."""
    plan = predicted(replace(settings, hardware=_probed(settings.world, folder)), _dtype(settings), SHAPE)
    return float(plan["compute"] + sum(plan["communication"].values()))


def _dtype(settings: RehearseSettings) -> str:
    return "bf16" if settings.dtype == "bf16" else "fp32"


def _probed(world: int, folder: str) -> str:
    """The file of a probe of ``world`` ranks, which prints its figures with their spread."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        path = str(Path(folder) / f"hardware-{world}.json")
        mp.spawn(_probe, (world, own, path), nprocs=world)
    return path


def _probe(rank: int, world: int, folder: str, path: str) -> None:
    _join(rank, world, str(Path(folder) / "store"))
    measure_and_write(path, 16, 5, None)
    dist.destroy_process_group()  # threads of gloo that still run at the exit abort the process


def _together(body: Any, settings: RehearseSettings, folder: str, processes: int) -> list[Measured]:
    with tempfile.TemporaryDirectory(dir=folder) as own:
        mp.spawn(body, (settings, own), nprocs=processes)
        return [torch.load(Path(own) / str(rank), weights_only=False) for rank in range(processes)]


def _real(rank: int, settings: RehearseSettings, folder: str) -> None:
    _join(rank, settings.world, str(Path(folder) / "store"))
    torch.save(measure_rank(settings, DecoderSource(CONFIG), mesh_of(settings)), Path(folder) / str(rank))
    dist.destroy_process_group()


def _rehearsed(rank: int, settings: RehearseSettings, folder: str) -> None:
    torch.set_num_threads(1)
    torch.save(measure_alone(settings, rank, DecoderSource(CONFIG)), Path(folder) / str(rank))


def _join(rank: int, world: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(path, world), rank=rank, world_size=world)


if __name__ == "__main__":
    main()

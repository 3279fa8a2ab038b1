"""Benchmark: compute time and memory of ranks that are rehearsed, beside those of real ranks.

    python benchmarks/rehearsal.py
    python benchmarks/rehearsal.py --tokens 16384 --steps 5

Real ranks on gloo, one thread each, then as many rehearsals at once, each of its own rank; both by ``measure_rank``, so both
share this machine's cores in the same way. Compute is the time of a rank's own thread: it stands still while a rank waits. What
gloo's threads copy is not in it. A pair of runs whose steps spread more than 10% is repeated, at most --most times.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from longspan.cli import model_source
from longspan.cli.rehearsal import Measured, measure_alone, measure_rank, mesh_of
from longspan.cli.rehearse import RehearseSettings

LAYOUTS: dict[str, dict[str, Any]] = {
    "ulysses 4": {"ulysses": 4},
    "ulysses 4, zero=3, selective": {"ulysses": 4, "zero": 3, "recompute": "selective"},
    "ring 2 x ulysses 2": {"ring": 2, "ulysses": 2},
}
SPREAD = 0.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--most", type=int, default=2, help="how often a layout is measured at most")
    given = parser.parse_args()
    print(f"{given.model}, {given.tokens:,} tokens, {given.ranks} ranks, torch {torch.__version__}")
    print("| layout | what | real, mean of ranks | rehearsed | ratio | spread |\n|---|---|---|---|---|---|", flush=True)
    worst = 0.0
    for name, layout in LAYOUTS.items():
        settings = RehearseSettings(world=given.ranks, model=given.model, tokens=given.tokens, steps=given.steps, **layout)
        for turn in range(given.most):
            real, alone = _together(_real, settings), _together(_alone, settings)
            spread = max(one.spread for one in (*real, *alone))
            if spread <= SPREAD or turn == given.most - 1:
                break
            print(f"(repeated: {name}, a rank's steps spread {spread:.0%})", file=sys.stderr, flush=True)
        seconds = [sum(one.seconds for one in found) / len(found) for found in (real, alone)]
        peaks = [max(one.peak_bytes for one in found) for found in (real, alone)]
        worst = max(worst, abs(seconds[1] / seconds[0] - 1))
        print(f"| {name} | compute of a step | {seconds[0]:.3f} s | {seconds[1]:.3f} s | {seconds[1] / seconds[0]:.3f} | "
              f"{spread:.0%} |")  # fmt: skip
        print(f"| {name} | memory of the fullest rank | {peaks[0] / 2**20:,.1f} MiB | {peaks[1] / 2**20:,.1f} MiB | "
              f"{peaks[1] / peaks[0]:.3f} | |", flush=True)  # fmt: skip
    print(f"compute: worst difference {worst:.1%}")


def _together(body: Any, settings: RehearseSettings) -> list[Measured]:
    """``body`` on as many processes at once as the world has ranks; what each found."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (body, settings, folder), nprocs=settings.world)
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(settings.world)]


def _process(rank: int, body: Any, settings: RehearseSettings, folder: str) -> None:
    torch.set_num_threads(1)
    torch.save(body(rank, settings, folder), Path(folder) / str(rank))


def _real(rank: int, settings: RehearseSettings, folder: str) -> Measured:
    store = dist.FileStore(os.path.join(folder, "store"), settings.world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=settings.world)
    return measure_rank(settings, model_source.from_name(settings.model), mesh_of(settings))


def _alone(rank: int, settings: RehearseSettings, folder: str) -> Measured:
    return measure_alone(replace(settings, rank=rank), rank)


if __name__ == "__main__":
    main()

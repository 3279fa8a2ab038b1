"""``longspan train --plan auto``: the layout and memory options that a plan finds best for the machine at hand.

    devices of this machine  ->  an accelerator known by name, else a probe  ->  plan  ->  ulysses, ring, tensor, zero,
                                                                                           recompute, tiles, micro-batches

The choice replaces the settings before the ranks start, so a run's config.json holds the layout itself. It imports no torch.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from longspan.cli import launch
from longspan.cli.config import Train
from longspan.cli.probe import ProbeSettings
from longspan.distributed.launchers import join_launcher
from longspan.errors import RunError
from longspan.planner.hardware import named
from longspan.planner.plan import Choice, plan
from longspan.planner.units import duration, gib

CHOSEN = (
    "ranks", "pipeline", "ulysses", "ring", "tensor", "zero", "recompute", "tile_tokens", "head_chunks", "offload_activations",
    "chunked_loss", "micro_batches",
)  # fmt: skip
"""The settings that a plan chooses; none of them may be given beside ``--plan auto``."""
PROBED = "hardware.json"
"""The file of ``longspan probe`` in the current folder that is used where it was measured with as many ranks."""


def refuse_beside(given: set[str]) -> None:
    """Raise RunError for a setting that ``--plan auto`` would choose, and that was given too."""
    if found := [name for name in CHOSEN if name in given]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in found)
        raise RunError(f"--plan auto chooses the layout and memory options, and {flags} gives one; leave out either")


def planned(config: Train, work: str) -> Train:
    """``config`` with the layout and options of the best plan for this machine; prints what it chose and predicts.

    Args:
        config: settings of a run.
        work: the function that each rank will call, as ``module:function``.

    Raises:
        LongspanError: nothing fits, or the model cannot be planned.
    """
    join_launcher(os.environ)
    devices = launch.visible_devices(work, config.local_ranks)
    ranks = int(os.environ["WORLD_SIZE"]) if launch.joins() else devices or config.local_ranks
    hardware = (named(_device_name()) if devices else None) or _probed(ranks)
    on_gpu = devices > 0
    dtype = ("bf16" if on_gpu else "fp32") if config.dtype == "auto" else config.dtype
    found = plan(
        config.model,
        hardware=hardware,
        gpus=ranks,
        tokens=config.tokens,
        rows=config.rows_per_step,
        dtype=dtype,
        fixed={"pipeline": 1, "offload_parameters": 0} | ({} if on_gpu else {"offload_activations": 0}),
    )
    if not launch.joins() or os.environ["RANK"] == "0":
        print(_sentence(found.best), flush=True)
    return apply(config, found.best)


def apply(config: Train, best: Choice) -> Train:
    """``config`` with the degrees and options of a choice."""
    s = best.strategy
    return replace(
        config,
        plan=None,
        ranks=s.ranks,
        ulysses=s.ulysses,
        ring=s.ring,
        tensor=s.tensor,
        zero=cast("Literal[0, 2, 3]", s.zero),  # the search prices no other
        recompute=s.recompute,
        tile_tokens=s.tile_tokens or None,
        head_chunks=s.head_chunks,
        offload_activations=s.offload_activations,
        chunked_loss=config.model.startswith("hf:"),
        micro_batches=config.rows_per_step // (s.data * s.micro_batch),
    )


def _sentence(best: Choice) -> str:
    where = best.setting.cluster
    return (
        f"plan   {best.strategy}, on {where.gpus} x {where.accelerator.name}: "
        f"a step of {duration(best.seconds)} +-{best.error:.0%} and {gib(best.bytes)} a rank are predicted"
    )


def _device_name() -> str:
    """The name of this machine's accelerator, found by another process: this one must not initialise it before its ranks."""
    code = "import torch; print(torch.get_device_module().get_device_name(0))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def _probed(ranks: int) -> str:
    """The file of a probe of this machine: that of the current folder, else one that is measured now."""
    import json

    with_ranks = json.loads(Path(PROBED).read_text(encoding="utf-8")).get("ranks") if Path(PROBED).is_file() else None
    if with_ranks == ranks:
        return PROBED
    if launch.joins():
        raise RunError(
            f"--plan auto does not know this machine's accelerator; run longspan probe with the same {ranks} ranks first, in "
            f"this folder, which writes {PROBED}"
        )
    print(f"plan   measuring this machine with {ranks} ranks (longspan probe keeps the figures in {PROBED})", flush=True)
    out = Path(tempfile.mkdtemp(prefix="longspan-")) / PROBED
    launch.run("longspan.cli.auto_plan:probe", ProbeSettings(ranks=ranks, out=str(out), repeats=3), ranks)
    return str(out)


def probe(config: ProbeSettings) -> int:
    """Measure on this rank, without the table of ``longspan probe``. Returns the exit code 0."""
    import contextlib
    import io

    from longspan.cli.probe import work

    with contextlib.redirect_stdout(io.StringIO()):
        return work(config)

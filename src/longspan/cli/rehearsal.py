"""What ``longspan rehearse`` measures: steps of one rank, on a fake world or on a real one, beside the plan.

    measure_rank   one optimizer step, some timed ones, on a CPU one that records every allocation
        compute    seconds of the rank's own thread on a CPU; on a GPU of the device, its waits included
        memory     peak of the tensors on a CPU (PyTorch's profiler); on a GPU peak of the allocator

``measure_rank`` takes any mesh, so that a real run and its rehearsal are measured by the same code.
"""

import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longspan.batch.shard import on_device, shard_batch
from longspan.cli import model_source
from longspan.cli.config import compute_dtype
from longspan.cli.model_source import DecoderSource, ModelSource
from longspan.cli.rehearse import RehearseSettings
from longspan.distributed.collectives import Transport
from longspan.distributed.device import choose_device
from longspan.distributed.fake_world import FakeTransport, fake_world
from longspan.distributed.grad_norm import clip_grad_norm_, local_part
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.pipeline_parallel import stage_modules
from longspan.errors import ModelError, RunError
from longspan.hf.balanced_routing import Balanced
from longspan.memory.profiler import Recorded
from longspan.models.adapter import UNREAD
from longspan.parallelize import adapter_of, forward_backward, parallelize


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank needed.

    Attributes:
        rank: in its world; ``stage`` of ``pipeline`` stages.
        seconds: of compute in a step, the median; ``spread``: (slowest - fastest) / median.
        step_seconds: of a whole step by the wall clock, the median, with its ``step_spread``.
        peak_bytes: of tensors on a CPU, of the allocator on a GPU; ``reserved_bytes`` what the allocator kept, 0 on a CPU.
        kinds: bytes at the peak by category, on a CPU.
        parameters: of this rank, shards counted as shards.
        tokens: of a row on this rank.
        balanced_routers: routers of experts whose choice was replaced by a balanced one.
    """

    rank: int
    stage: int
    seconds: float
    spread: float
    step_seconds: float
    step_spread: float
    peak_bytes: int
    reserved_bytes: int
    kinds: dict[str, int]
    parameters: int
    tokens: int
    balanced_routers: int


def rehearse(settings: RehearseSettings) -> int:
    """Measure the chosen ranks one after another; print and write them beside the plan. Returns the exit code 0."""
    from longspan.cli.rehearsed_plan import predicted, table

    source = model_source.from_name(settings.model).for_training(settings.tokens, "none")
    dtype = compute_dtype(settings.dtype, choose_device().type)
    plan = predicted(settings, dtype)
    ranks = [settings.rank] if settings.rank is not None else fullest_ranks(settings, source)
    if len(ranks) == 1:
        found = [measure_alone(settings, ranks[0])]
    else:  # a process for each: PyTorch's caches remember the groups of the world before
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            found = list(pool.map(measure_alone, [settings] * len(ranks), ranks))
    print(table(settings, source.summary, found, plan))
    if settings.json is not None:
        numbers = {"settings": asdict(settings), "measured": [asdict(one) for one in found], "plan": plan}
        try:
            Path(settings.json).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{settings.json} cannot be written: {error.strerror}; name another file with --json") from error
    return 0


def measure_alone(settings: RehearseSettings, rank: int, source: ModelSource | None = None) -> Measured:
    """``measure_rank`` of one rank in a fake world, in this process. ``source``: None for that of ``settings.model``."""
    source = source or model_source.from_name(settings.model).for_training(settings.tokens, "none")
    with fake_world(rank, settings.world):
        return measure_rank(settings, source, mesh_of(settings, FakeTransport()))


def mesh_of(settings: RehearseSettings, transport: Transport | None = None) -> ParallelMesh:
    """The mesh with the degrees of the settings over the default process group; data takes the ranks that are left.

    Args:
        settings: the rehearsal.
        transport: what moves the tensors; by default the process group.

    Raises:
        LayoutError: the degrees do not divide the number of ranks.
    """
    return ParallelMesh(
        settings.ulysses, settings.ring, tensor=settings.tensor, pipeline=settings.pipeline, transport=transport
    )


def fullest_ranks(settings: RehearseSettings, source: ModelSource) -> list[int]:
    """The first rank of each kind of pipeline stage, which has the most tokens, heads and largest shards of its stage.

    Stages are of one kind if they have equally many layers and are both, or neither, the first or the last.
    """
    ranks, stages = settings.world // settings.pipeline, settings.pipeline
    if stages == 1:
        return [0]
    with torch.device("meta"):
        model = source.outline if hasattr(source, "outline") else source.build(0)
    plan = adapter_of(model).pipeline_plan()
    held = Counter(stage for name, stage in stage_modules(model, plan, stages).items() if name in plan.blocks)
    kinds = {(stage == 0, stage == stages - 1, held[stage]): stage for stage in reversed(range(stages))}
    return [stage * ranks for stage in sorted(kinds.values())]


def measure_rank(settings: RehearseSettings, source: ModelSource, mesh: ParallelMesh) -> Measured:
    """Train a few steps on random ids as this rank of ``mesh``, and measure them. Every rank that exists calls it.

    Args:
        settings: layout, options and lengths; its degrees are those of ``mesh``.
        source: the model; its weights are drawn.
        mesh: of a fake world, or of a real one.
    """
    model = _parallel(settings, source, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    routing = Balanced(model)
    batches = _batches(settings, source, mesh)
    computes_in_bf16 = compute_dtype(settings.dtype, mesh.device.type) == "bf16" and not settings.zero

    def step() -> None:
        parts = [on_device(part, mesh.device) for part in shard_batch(batches, mesh)]
        with torch.autocast(mesh.device.type, torch.bfloat16, enabled=computes_in_bf16):
            forward_backward(model, parts)
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    _refuse_unbalanced(routing, model)
    on_cpu = mesh.device.type == "cpu"
    if not on_cpu:
        torch.accelerator.reset_peak_memory_stats(mesh.device)
    computed, taken = zip(*(_seconds(step, mesh) for _ in range(settings.steps)))
    kinds = recorded_peak(model, optimizer, step, mesh) if on_cpu else {}
    at = mesh.coordinate
    return Measured(
        rank=dist.get_rank(),
        stage=at.pipeline_rank,
        seconds=median(computed),
        spread=(max(computed) - min(computed)) / median(computed),
        step_seconds=median(taken),
        step_spread=(max(taken) - min(taken)) / median(taken),
        peak_bytes=sum(kinds.values()) if on_cpu else torch.accelerator.max_memory_allocated(mesh.device),
        reserved_bytes=0 if on_cpu else torch.accelerator.max_memory_reserved(mesh.device),
        kinds=kinds,
        parameters=sum(local_part(parameter).numel() for parameter in model.parameters()),
        tokens=sum(map(len, at.my_positions(settings.tokens))),
        balanced_routers=routing.routers,
    )


def _seconds(step: Callable[[], None], mesh: ParallelMesh) -> tuple[float, float]:
    """(seconds of compute of one step, without waiting and without what a FakeTransport fills; seconds by the wall clock)."""
    on_cpu = mesh.device.type == "cpu"
    filled = getattr(mesh.transport, "seconds", 0.0)
    if not on_cpu:
        torch.accelerator.synchronize(mesh.device)
    begin, own = time.perf_counter(), time.thread_time()  # a thread's own time stands still while it waits
    step()
    if not on_cpu:
        torch.accelerator.synchronize(mesh.device)
    own, whole = time.thread_time() - own, time.perf_counter() - begin
    return (own - (getattr(mesh.transport, "seconds", 0.0) - filled) if on_cpu else whole), whole


def recorded_peak(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None], mesh: ParallelMesh
) -> dict[str, int]:
    """Bytes by category at the peak of one step; memory that mesh and transport kept for exchanges before it is counted too."""
    transport: Any = mesh.transport
    kept = mesh.scratch.held_bytes + transport.memory.held_bytes
    with Recorded(model, optimizer) as recorded:
        step()
    kinds = recorded.timeline.at_peak()
    return kinds | {"exchange": kinds["exchange"] + kept}


def _parallel(settings: RehearseSettings, source: ModelSource, mesh: ParallelMesh) -> nn.Module:
    """The parallel model, its weights drawn on this rank: with zero > 0 shard by shard, after it was cut."""
    bf16 = compute_dtype(settings.dtype, mesh.device.type) == "bf16"
    cut_first = settings.zero > 0 and isinstance(source, DecoderSource)
    drawn = DrawnWeights(later=cut_first and settings.tensor * settings.pipeline > 1)
    if cut_first:
        with torch.device("meta"):
            model = source.build(0)
        vars(model)[UNREAD] = drawn
    else:
        model = source.build(0, settings.zero)
        model = model if any(parameter.is_meta for parameter in model.parameters()) else model.to(mesh.device)
    parallelize(
        model,
        mesh,
        zero=settings.zero,
        dtype=torch.bfloat16 if bf16 and settings.zero else None,
        offload_parameters=settings.offload_parameters,
        memory=settings.memory,
    )
    if drawn.later:
        drawn.draw(model, mesh.device)
    return model


class DrawnWeights:
    """The ``UnreadWeights`` of a Decoder for rehearsals: each rank draws its own shards, of which no other rank knows.

    Args:
        later: draw in ``draw``, after ``parallelize``, so that weights which tensor ranks or stages cut are never whole.
    """

    def __init__(self, later: bool) -> None:
        self.later = later

    def facts(self, model: nn.Module) -> dict[str, str]:
        return {}

    def read_into(self, model: nn.Module, device: torch.device) -> None:
        if not self.later:
            self.draw(model, device)

    @torch.no_grad()
    def draw(self, model: nn.Module, device: torch.device) -> None:
        """Move the model to ``device`` and draw this rank's part of each weight from N(0, 0.02²); norms are 1."""
        model.to_empty(device=device)
        for parameter in model.parameters():
            local = local_part(parameter)
            local.fill_(1) if parameter.ndim == 1 else local.normal_(std=0.02)


def _batches(settings: RehearseSettings, source: ModelSource, mesh: ParallelMesh) -> list[dict[str, Tensor]]:
    """The micro-batches of one data replica: whole rows of random ids, all labelled."""
    random = torch.Generator("cpu").manual_seed(settings.seed)
    rows = settings.batch // settings.data // settings.parts
    ids = [torch.randint(source.vocab, (rows, settings.tokens), generator=random, device="cpu") for _ in range(settings.parts)]
    return [{"input_ids": each, "labels": each} for each in ids]


def _refuse_unbalanced(routing: Balanced, model: nn.Module) -> None:
    if routing.experts and not routing.routers:
        raise ModelError(
            f"{type(model).__name__} has {routing.experts} experts, but none of its modules returns which expert a token goes "
            f"to, so that routing cannot be forced balanced; rehearse a dense model of the same active widths"
        )

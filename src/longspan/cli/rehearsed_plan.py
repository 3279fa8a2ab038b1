"""The plan's side of ``longspan rehearse``: what the formulas say of the same layout, and both side by side as text.

compute          measured  |  planned        matrix products, attention, element-wise, loss, recomputation, update
communication              |  planned        exposed collectives and the pipeline's bubble; a rehearsal has none
memory           measured  |  planned        tensors, without what the plan reserves for the process
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from longspan.cli.rehearse import RehearseSettings
from longspan.cli.text_table import text_table
from longspan.planner.decoder_memory import decoder_footprint
from longspan.planner.model import ModelShape
from longspan.planner.plan import choice, cluster_of, shape_of
from longspan.planner.probed import read_constants
from longspan.planner.setting import Constants, Setting
from longspan.planner.strategy import Recipe, Strategy, Workload, check

if TYPE_CHECKING:
    from longspan.cli.rehearsal import Measured

GIB = 2**30
COMPUTE = ("matmul", "attention", "elementwise", "dispatch", "loss", "recompute", "offload", "optimizer")
COMMUNICATION = ("tensor", "ulysses", "ring", "zero", "gradients", "pipeline", "bubble")
NOT_COVERED = (
    "the network: exchanges, and waiting for other ranks (its times above are the plan's)",
    "skew between ranks: data, clocks, devices of different speed",
    "buffers of communicators (NCCL), and the memory of the driver",
    "fragmentation of the allocator over many steps",
)
"""What a rehearsal leaves out."""


def predicted(settings: RehearseSettings, dtype: str, shape: ModelShape | None = None) -> dict[str, Any]:
    """The plan of the layout that is rehearsed, as plain numbers.

    Args:
        settings: the rehearsal.
        dtype: "fp32" or "bf16".
        shape: a decoder that is planned instead of ``settings.model``; by default ``settings.model`` is.

    Returns:
        Plain numbers of the fullest rank by name: its memory in bytes and, if ``settings.hardware`` is named, the seconds of a
        step and of its parts.

    Raises:
        LongspanError: the layout is not legal for the model, or the hardware is unknown.
    """
    is_decoder = shape is not None or not settings.model.startswith("hf:")
    shape, work = shape or shape_of(settings.model), Workload(tokens=settings.tokens, rows=settings.batch)
    strategy = Strategy(
        pipeline=settings.pipeline,
        data=settings.data,
        ring=settings.ring,
        ulysses=settings.ulysses,
        tensor=settings.tensor,
        zero=settings.zero,
        recompute=settings.recompute,
        micro_batch=settings.batch // settings.data // settings.parts,
        tile_tokens=settings.tile_tokens or 0,
        head_chunks=settings.head_chunks,
        chunked_loss=settings.chunked_loss or not settings.model.startswith("hf:"),
        offload_activations=settings.offload_activations,
        offload_optimizer=settings.offload_parameters,
        offload_parameters=settings.offload_parameters,
    )
    check(shape, work, strategy, settings.world)
    gathered = 2 if dtype == "bf16" and settings.zero else 4
    recipe = Recipe(dtype="bf16" if dtype == "bf16" else "fp32", gathered_bytes=gathered)
    hardware = settings.hardware or "h100"
    constants = read_constants(hardware) if hardware.endswith(".json") else Constants()
    found = choice(Setting(shape, cluster_of(hardware, settings.world), recipe, work, constants), strategy)
    kinds = {name: getattr(found.memory, name) for name in found.memory.__dataclass_fields__}
    tensors = decoder_footprint(shape, strategy, work, dtype).peak if is_decoder else found.memory.allocated
    plan: dict[str, Any] = {"bytes": float(tensors), "reserve": found.memory.reserve, "kinds": kinds}
    if settings.hardware is not None:
        plan |= {
            "compute": sum(getattr(found.time, name) for name in COMPUTE),
            "communication": {name: value for name in COMMUNICATION if (value := getattr(found.time, name)) > 0},
            "error": found.error,
        }
    return plan


def table(settings: RehearseSettings, about: str, found: "Sequence[Measured]", plan: dict[str, Any]) -> str:
    """What was measured and what the plan says, as text."""
    names = ("", *(f"rank {one.rank}{_stage(settings, one)}" for one in found), "plan, fullest rank")
    lines = [
        f"{settings.model}: {about}",
        f"One rank at a time of {_degrees(settings)}; {settings.batch} x {settings.tokens:,} tokens a step\n",
        text_table(names, _lines(found, plan)),
    ]
    routers = max(one.balanced_routers for one in found)
    if routers:
        lines.append(f"\nRouting is forced balanced in {routers} routers: every expert gets equally many tokens.")
    lines.append(
        "\nWeights are drawn a shard at a time; what other ranks would send is filled with finite values. Not covered:"
    )
    lines += [f"- {what}" for what in NOT_COVERED]
    if settings.hardware is None:
        lines.append("Times of a plan need --hardware: a name, or the file that longspan probe wrote.")
    return "\n".join(lines)


def _lines(found: "Sequence[Measured]", plan: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The rows of the table: a name, a cell for each rank, and the plan's."""
    compute, sent = plan.get("compute"), plan.get("communication", {})
    lines = [
        ("tokens of a row", [*(f"{one.tokens:,}" for one in found), ""]),
        ("parameters held", [*(f"{one.parameters:,}" for one in found), ""]),
        (
            "compute of a step",
            [*(f"{one.seconds:.4g} s +-{one.spread:.0%}" for one in found), "" if compute is None else f"{compute:.4g} s"],
        ),
    ]
    if compute is not None:
        total = sum(sent.values())
        lines += [(f"  communication: {name}", [*("" for _ in found), f"{value:.4g} s"]) for name, value in sent.items()]
        lines.append(
            (
                "step, with the plan's communication",
                [*(f"{one.seconds + total:.4g} s" for one in found), f"{compute + total:.4g} s +-{plan['error']:.0%}"],
            )
        )
    lines.append(("memory, peak", [*(_gib(one.peak_bytes) for one in found), _gib(plan["bytes"])]))
    if any(one.reserved_bytes for one in found):
        lines.append(("  kept by the allocator", [*(_gib(one.reserved_bytes) for one in found), ""]))
    names = dict.fromkeys(name for one in found for name in one.kinds)
    lines += [(f"  {name}", [*(_gib(one.kinds.get(name, 0)) for one in found), ""]) for name in names]
    lines.append(("beside the tensors: reserve", [*("" for _ in found), _gib(plan["reserve"])]))
    return lines


def _degrees(settings: RehearseSettings) -> str:
    axes = ("pipeline", "data", "ring", "ulysses", "tensor")
    named = " x ".join(f"{axis} {getattr(settings, axis)}" for axis in axes if getattr(settings, axis) > 1)
    return f"{settings.world} = {named or 'one rank'}, zero={settings.zero}, recompute={settings.recompute}"


def _stage(settings: RehearseSettings, one: "Measured") -> str:
    return f", stage {one.stage + 1} of {settings.pipeline}" if settings.pipeline > 1 else ""


def _gib(value: float) -> str:
    return f"{value / GIB:,.3f} GiB"

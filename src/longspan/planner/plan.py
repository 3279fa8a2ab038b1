"""``plan``: the best way to train a model on a cluster, with its time, memory and reasons, as frozen dataclasses.

plan("llama-70b", hardware="h100", gpus=64, tokens=1_048_576)   ->   Plan(best=Choice(...), runner_up=..., longest=...)
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from longspan.errors import LayoutError, ModelError
from longspan.planner.cost import StepTime, step_time
from longspan.planner.explain import lost, sentences, why
from longspan.planner.hardware import Cluster, cluster
from longspan.planner.model import PRESETS, ModelShape
from longspan.planner.model_config import read_config
from longspan.planner.probed import read_cluster, read_constants
from longspan.planner.rank_memory import RankMemory, rank_memory
from longspan.planner.search import OPTION_NAMES, longest, search
from longspan.planner.setting import Constants, Setting
from longspan.planner.strategy import AXES, Recipe, Strategy, Workload
from longspan.planner.uncertainty import memory_error, time_error

GIB = 2**30


@dataclass(frozen=True)
class Choice:
    """A strategy with what it costs, as a ``Plan`` has it.

    Attributes:
        strategy: degrees and options.
        seconds: of one step; ``error``: the median relative error of such predictions on published runs, as of all that
            follows from seconds.
        tokens_per_second: of the whole cluster.
        share_of_peak: operations without recomputation over the peak of all devices.
        bytes, host_bytes: memory of the fullest rank, and of a node's host; ``memory_error``: their relative error.
        price_per_million_tokens: None without a price of a GPU hour.
        time, memory: seconds and bytes, by what they are spent on.
        setting: the model, cluster, software and step that were priced.
    """

    strategy: Strategy
    seconds: float
    error: float
    tokens_per_second: float
    share_of_peak: float
    bytes: float
    host_bytes: float
    memory_error: float
    price_per_million_tokens: float | None
    time: StepTime
    memory: RankMemory
    setting: Setting

    def why(self, name: str) -> str:
        """The formula of one number with its terms, as text. ``name``: "seconds", "bytes", or a field of ``time`` or
        ``memory``."""
        return why(self.setting, self.strategy, name)

    def explain(self) -> tuple[str, ...]:
        """Sentences with numbers: what takes longest, what a layer sends, what doubling the tokens does."""
        return tuple(sentences(self.setting, self.strategy))


@dataclass(frozen=True)
class Plan:
    """The result of ``plan``.

    Attributes:
        model, cluster, workload: what was asked.
        best: the fastest layout that fits; of those within 1%, the one that needs less memory or has fewer axes.
        runner_up: likewise, with other degrees or another ZeRO stage; None if there is none.
        lost: the reason why the runner-up is slower, or lost a tie, a sentence; "" without one.
        legal, fitting: how many layouts were legal, and how many of them fit.
        longest: the most tokens of a row that some layout can hold.
    """

    model: ModelShape
    cluster: Cluster
    workload: Workload
    best: Choice
    runner_up: Choice | None
    lost: str
    legal: int
    fitting: int
    longest: int


def plan(
    model: str | Path | Mapping[str, Any] | ModelShape,
    *,
    hardware: str | Cluster = "h100",
    gpus: int = 8,
    tokens: int | None = None,
    rows: int | None = None,
    price: float | None = None,
    dtype: Literal["fp32", "bf16", "fp8"] = "bf16",
    goal: Literal["speed", "length", "cost"] = "speed",
    fixed: Mapping[str, int | str] | None = None,
) -> Plan:
    """Find the best legal layout of a cluster for a model, from formulas: no GPU, no process group, no tensors.

    Args:
        model: a preset ("llama-8b"), a config.json or its folder ("hf:FOLDER" too), its contents, or a ModelShape.
        hardware: a name ("h100", "a100-80gb", "mi300x", ...), a file of ``longspan probe`` (its name ends in .json), or a
            Cluster.
        gpus: accelerators of the cluster; a Cluster has its own number.
        tokens: tokens of a row; with ``goal="length"``, and only then, None: it is found.
        rows: rows of one optimizer step; None: one for each 8 GPUs.
        price: cost of one GPU hour, for the price of a million tokens; None: not known.
        dtype: compute dtype.
        goal: "speed", the fastest on all GPUs; "length", the fastest at the longest sequence that fits; "cost", the cheapest
            tokens on the GPUs, or on a half, a quarter, ... of them.
        fixed: degrees and options that must have these values: the axes, ``micro_batch``, ``zero``, ``recompute``,
            ``tile_tokens``, ``head_chunks``, ``offload_activations``, ``offload_parameters``.

    Returns:
        A Plan. Its numbers have the errors that docs/planner.md shows against published measurements.

    Raises:
        ModelError: the model cannot be read, or its sizes are impossible.
        LayoutError: unknown hardware, no legal layout, or none that fits; the message says what is legal, or what would fit.
    """
    shape = shape_of(model)
    where = cluster_of(hardware, gpus, price)
    if (tokens is None) != (goal == "length"):
        raise LayoutError(f"goal={goal!r} and tokens={tokens} contradict: give tokens, or goal='length', which finds them")
    if goal == "cost" and where.price is None:
        raise LayoutError("goal='cost' needs the price of a GPU hour; give price, or goal='speed'")
    if dtype not in where.accelerator.peak:
        raise LayoutError(f"{where.accelerator.name} has no {dtype}; it has {', '.join(where.accelerator.peak)}")
    if tokens is not None and shape.positions is not None and tokens > shape.positions:
        raise LayoutError(
            f"{tokens:,} tokens are beyond the {shape.positions:,} positions of {shape.name}; use at most "
            f"{shape.positions:,} tokens, or a config whose positions reach further (RoPE scaling)"
        )
    work = Workload(tokens=tokens or 1, rows=rows if rows is not None else max(1, where.gpus // 8))
    is_probed = isinstance(hardware, str) and hardware.endswith(".json")
    constants = read_constants(str(hardware)) if is_probed else Constants()
    x = Setting(shape, where, Recipe(dtype=dtype, gathered_bytes=4 if dtype == "fp32" else 2), work, constants)
    must = _fixed(fixed or {})
    if goal != "cost":
        return _planned(x, must, find_length=goal == "length")
    counts = [where.gpus >> halvings for halvings in range(where.gpus.bit_length()) if where.gpus % (1 << halvings) == 0]
    fewer = [replace(x, cluster=replace(where, gpus=count, gpus_per_node=min(where.gpus_per_node, count))) for count in counts]
    cheapest, least = x, float("inf")
    for smaller in fewer:
        with suppress(LayoutError):
            best = search(smaller, must).best
            if best is not None and smaller.cluster.gpus * best.seconds < least:
                cheapest, least = smaller, smaller.cluster.gpus * best.seconds
    return _planned(cheapest, must, find_length=False)  # where nothing fits, it says why on all GPUs


def _planned(x: Setting, must: dict[str, int], find_length: bool) -> Plan:
    """The plan for one number of GPUs.

    Args:
        x: model, cluster, software and step.
        must: degrees and options that must have these values.
        find_length: plan for the longest row that fits, instead of the one of ``x``.
    """
    shape, where, tokens = x.shape, x.cluster, x.workload.tokens
    limit = longest(x, must)
    if find_length:
        x = replace(x, workload=replace(x.workload, tokens=max(1, limit)))
    ranking = search(x, must)
    if ranking.best is None:
        least = ranking.smallest
        raise LayoutError(
            f"{shape.name} with {tokens:,} tokens does not fit on {where.gpus} {where.accelerator.name}: the layout that needs "
            f"least ({least.strategy}) needs {least.bytes / GIB:,.1f} GiB, +-{memory_error(least.strategy)[0]:.0%}, of "
            f"{where.accelerator.memory / GIB:,.1f} on a GPU and {least.host_bytes / GIB:,.0f} GiB of "
            f"{where.host_memory / GIB:,.0f} on a host; "
            f"{f'at most {limit:,} tokens fit' if limit else 'no length fits: use more GPUs'}{_freed(x, must, limit)}"
        )
    other = ranking.runner_up
    return Plan(
        model=shape,
        cluster=where,
        workload=x.workload,
        best=choice(x, ranking.best.strategy),
        runner_up=None if other is None else choice(x, other.strategy),
        lost="" if other is None else lost(x, ranking.best.strategy, other.strategy),
        legal=ranking.legal,
        fitting=ranking.fitting,
        longest=limit,
    )


def _freed(x: Setting, must: dict[str, int], limit: int) -> str:
    """The end of an error, where nothing fits: which of the options in ``must`` to leave out, if more than ``limit`` tokens fit
    without them; else ""."""
    options = {name: must[name] for name in OPTION_NAMES if name in must and not name.startswith("offload")}
    more = longest(x, {name: value for name, value in must.items() if name not in options}) if options else 0
    if more <= limit:
        return ""
    named = {name: f"{name}={value}" for name, value in options.items() if name not in ("full", "selective")}
    if "full" in options:
        named["recompute"] = f"recompute={'full' if options['full'] else 'selective' if options['selective'] else 'none'}"
    return f", or leave out {' and '.join(named.values())}: then up to {more:,} do"


def choice(x: Setting, strategy: Strategy) -> Choice:
    """The strategy with its time, memory and price, computed for ``x``: model, cluster, software and step."""
    time, memory = step_time(x, strategy), rank_memory(x, strategy)
    seconds, tokens = float(time.total), x.workload.tokens * x.workload.rows
    peak = x.cluster.accelerator.peak[x.recipe.dtype]
    flops = x.shape.training_flops(x.workload.tokens) * x.workload.rows
    hour = x.cluster.price
    return Choice(
        strategy=strategy,
        seconds=seconds,
        error=time_error(strategy)[0],
        tokens_per_second=tokens / seconds,
        share_of_peak=flops / seconds / x.cluster.gpus / peak,
        bytes=float(memory.total),
        host_bytes=float(memory.host),
        memory_error=memory_error(strategy)[0],
        price_per_million_tokens=None if hour is None else hour * x.cluster.gpus * seconds / 3600 / tokens * 1e6,
        time=StepTime(**{name: float(getattr(time, name)) for name in time.__dataclass_fields__}),
        memory=RankMemory(**{name: float(getattr(memory, name)) for name in memory.__dataclass_fields__}),
        setting=x,
    )


def cluster_of(hardware: str | Cluster, gpus: int, price: float | None = None) -> Cluster:
    """The cluster of ``gpus`` accelerators at ``price`` an hour that ``hardware`` names, or that a file of ``longspan probe``
    describes.

    A Cluster is returned as it is.
    """
    if isinstance(hardware, Cluster):
        return hardware
    return read_cluster(hardware, gpus, price) if hardware.endswith(".json") else cluster(hardware, gpus, price)


def shape_of(model: str | Path | Mapping[str, Any] | ModelShape) -> ModelShape:
    """The ModelShape that ``model`` names: a preset, a config.json or its folder, its contents, or a ModelShape.

    Raises:
        ModelError: it is unknown, or cannot be read.
    """
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, str) and model in PRESETS:
        return PRESETS[model]
    if isinstance(model, str):
        folder = model.removeprefix("hf:")
        if not model.startswith("hf:") and not Path(folder).exists():
            raise ModelError(
                f"model={model!r} is unknown; legal are {', '.join(PRESETS)}, hf:FOLDER, and the name of a config.json"
            )
        return read_config(folder)
    return read_config(model)


def _fixed(given: Mapping[str, int | str]) -> dict[str, int]:
    """The values of ``plan(fixed=)`` as ``search`` takes them: integers, with ``recompute`` as the two flags full and
    selective.

    Raises:
        LayoutError: a name is no degree or option.
    """
    must: dict[str, int] = {}
    for name, value in given.items():
        if name == "recompute" and value in ("none", "selective", "full"):
            must |= {"full": int(value == "full"), "selective": int(value == "selective")}
        elif name in (*AXES, "micro_batch", *OPTION_NAMES) and not isinstance(value, str):
            must[name] = int(value)
        else:
            names = ", ".join((*AXES, "micro_batch", "recompute", *(n for n in OPTION_NAMES if n not in ("full", "selective"))))
            raise LayoutError(f"{name}={value!r} is no degree or option of a plan; there are {names}")
    return must

"""``longspan plan``: the best layout of a cluster for a model, from formulas. It starts no ranks and imports no torch.

longspan plan --model llama-70b --gpus 64 --tokens 1048576    ->  a table, or --explain, --json, --html
"""

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from tyro.conf import arg

from longspan.cli.output_file import refuse_no_file
from longspan.cli.text_table import text_table
from longspan.errors import RunError
from longspan.planner.explain import kinds, part_name, parts, remarks
from longspan.planner.page import write_page
from longspan.planner.plan import Choice, Plan, plan
from longspan.planner.units import DAY, count_text, duration, gib

PREDICTED = "Predicted by formulas that were compared with published measurements, never on a GPU of longspan's own."


def _optional(hint: str, metavar: str = "INT") -> object:
    """A tyro annotation of a setting whose default is None: ``--help`` shows its type ``metavar`` and ``(default: {hint})``."""
    return arg(help_behavior_hint=f"(default: {hint})", metavar=metavar)


@dataclass(frozen=True)
class PlanSettings:
    """Settings of ``longspan plan``."""

    model: str = "llama-8b"
    """tiny, small, llama-1b, llama-8b or llama-70b: a decoder of that shape. hf:FOLDER: a Hugging Face config.json."""
    compare: Annotated[tuple[str, ...], _optional("no comparison", "MODEL MODEL")] = ()
    """Two models, each named as by --model, planned alike and set side by side."""
    hardware: str = "h100"
    """a100-40gb, a100-80gb, h100, h100-efa, h200, b200, gb200, gb300, mi300x, mi355x, l20, or the .json file of a probe."""
    gpus: int = 8
    """Accelerators of the whole cluster."""
    tokens: Annotated[int | None, _optional("131072; found with --goal length")] = None
    """Tokens of one sequence (the context length)."""
    rows: Annotated[int | None, _optional("one for each 8 GPUs")] = None
    """Sequences of one optimizer step (the global batch size), over all data replicas and micro-batches."""
    dtype: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Compute dtype; parameters, gradients and states are fp32. fp8 is for comparison: longspan does not train in it."""
    price: Annotated[float | None, _optional("not known", "FLOAT")] = None
    """Price of one accelerator for an hour."""
    goal: Literal["speed", "length", "cost"] = "speed"
    """speed: the most tokens a second. length: the longest sequence that fits. cost: the cheapest tokens, on fewer GPUs too."""
    pipeline: Annotated[int | None, _optional("chosen")] = None
    """Degree of pipeline parallelism: the layers are split over ranks."""
    ring: Annotated[int | None, _optional("chosen")] = None
    """Degree of ring attention (context parallelism)."""
    ulysses: Annotated[int | None, _optional("chosen")] = None
    """Degree of Ulysses sequence parallelism."""
    tensor: Annotated[int | None, _optional("chosen")] = None
    """Degree of tensor parallelism: heads and feed-forwards are split over ranks."""
    zero: Annotated[int | None, _optional("chosen")] = None
    """ZeRO stage: 0, 2 or 3."""
    recompute: Literal["chosen", "none", "full", "selective"] = "chosen"
    """What a block computes again in its backward instead of keeping it."""
    explain: bool = False
    """Print what binds, what a layer sends, what doubling the tokens does, and why the runner-up lost."""
    json: bool = False
    """Print every number as JSON instead of the table."""
    html: Annotated[str | None, _optional("no page", "FILE")] = None
    """Write a page with plots of time and memory against length, and what-if controls, to this file."""
    debug: bool = False
    """Show the traceback of an error beside its message."""

    def __post_init__(self) -> None:
        for name in ("gpus", "tokens", "rows", "pipeline", "ring", "ulysses", "tensor"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RunError(f"{name}={value} must be at least 1")
        if self.price is not None and not 0 < self.price < float("inf"):
            raise RunError(
                f"price={self.price:g} must be above 0 and finite; leave it out where the price of a GPU hour is not known"
            )
        if self.zero not in (None, 0, 2, 3):
            raise RunError(f"zero={self.zero} is unknown; legal are 0, 2 and 3")
        refuse_no_file("html", self.html)
        if self.goal == "length" and self.tokens is not None:
            raise RunError("--goal length finds the longest sequence, and --tokens names one; give one of them")
        if self.compare and len(self.compare) != 2:
            raise RunError(f"--compare takes two models, and {len(self.compare)} were named; name two, or one with --model")
        if self.compare and (self.explain or self.html is not None or self.model != "llama-8b"):
            raise RunError("--compare sets two models side by side; leave out --model, --explain and --html, which are of one")
        if self.goal == "cost" and self.price is None:
            raise RunError("--goal cost needs --price, the price of one GPU hour")

    @property
    def fixed(self) -> dict[str, int | str]:
        """{name: value} of the degrees and options that the user gave; the plan chooses the others."""
        named = {name: getattr(self, name) for name in ("pipeline", "ring", "ulysses", "tensor", "zero")}
        given: dict[str, int | str] = {name: value for name, value in named.items() if value is not None}
        return given | ({} if self.recompute == "chosen" else {"recompute": self.recompute})


def work(settings: PlanSettings) -> int:
    """Print the plan as a table, sentences or JSON, and write the page if asked; return the exit code 0.

    Raises:
        LongspanError: the model or the hardware cannot be read, or no layout is legal or fits.
    """
    if settings.compare:
        return _compare(settings)
    found = _planned(settings, settings.model)
    if settings.html is not None:
        write_page(found, settings.html)
    if settings.json:
        print(json.dumps(as_numbers(found), indent=2))
        return 0
    print(_table(found))
    if settings.goal == "length" and found.best.seconds > DAY:
        print(f"A step of that length takes {duration(found.best.seconds)}; name --tokens, which --goal speed plans for.")
    if settings.explain:
        print("\n".join(f"- {sentence}" for sentence in found.best.explain()))
        print(f"- {found.lost}." if found.lost else "- No other layout fits.")
    return 0


def _planned(settings: PlanSettings, model: str) -> Plan:
    return plan(
        model,
        hardware=settings.hardware,
        gpus=settings.gpus,
        tokens=settings.tokens or (None if settings.goal == "length" else 131_072),
        rows=settings.rows,
        price=settings.price,
        dtype=settings.dtype,
        goal=settings.goal,
        fixed=settings.fixed,
    )


def _compare(settings: PlanSettings) -> int:
    """Print the plans of two models side by side. LongspanError is raised if one has no plan: its message names the model."""
    one, two = (_planned(settings, model) for model in settings.compare)
    if settings.json:
        print(json.dumps([as_numbers(one), as_numbers(two)], indent=2))
        return 0
    where = one.cluster
    lines = [
        f"{found.model.name}, {count_text(found.model.parameters)} parameters: {found.best.strategy}" for found in (one, two)
    ]
    cells = [
        ("tokens of a row", [f"{found.workload.tokens:,}" for found in (one, two)]),
        ("longest sequence", [f"{found.longest:,}" for found in (one, two)]),
        *_lines(one.best, two.best),
    ]
    print(f"On {where.gpus} {where.accelerator.name}, the best layout of each")
    print("\n".join([*lines, "", text_table(("", *settings.compare), cells), "", PREDICTED]))
    return 0


def as_numbers(found: Plan) -> dict[str, Any]:
    """The plan ``found`` as names and plain values, for JSON."""

    def of(choice: Choice | None) -> dict[str, Any] | None:
        if choice is None:
            return None
        values = {name: getattr(choice, name) for name in choice.__dataclass_fields__ if name not in ("setting", "strategy")}
        described = {"strategy": asdict(choice.strategy), "time": asdict(choice.time), "memory": asdict(choice.memory)}
        return values | described | {"explain": list(choice.explain())}

    return {
        "model": found.model.name,
        "parameters": found.model.parameters,
        "hardware": found.cluster.accelerator.name,
        "gpus": found.cluster.gpus,
        "tokens": found.workload.tokens,
        "rows": found.workload.rows,
        "longest": found.longest,
        "legal": found.legal,
        "fitting": found.fitting,
        "best": of(found.best),
        "runner_up": of(found.runner_up),
        "lost": found.lost,
    }


def _table(found: Plan) -> str:
    """The plan ``found`` as text: what was asked, and best and runner-up side by side."""
    best, where = found.best, found.cluster
    lines = [
        f"{found.model.name}, {count_text(found.model.parameters)} parameters, on {where.gpus} {where.accelerator.name}: "
        f"{found.workload.rows} x {found.workload.tokens:,} tokens a step",
        f"{found.legal:,} legal layouts, {found.fitting:,} fit; longest sequence {found.longest:,} tokens\n",
        text_table(("", "best", *["runner-up"] * (found.runner_up is not None)), _lines(best, found.runner_up)),
        f"\nbest       {best.strategy}",
    ]
    if found.runner_up is not None:
        lines.append(f"runner-up  {found.runner_up.strategy}")
    return "\n".join([*lines, *remarks(best.setting, best.strategy), PREDICTED])


def _lines(best: Choice, other: Choice | None) -> list[tuple[str, list[str]]]:
    """The rows of the table: (name, a cell for each choice); ``other`` None: there is one choice only."""
    choices = [choice for choice in (best, other) if choice is not None]
    lines = [
        ("step", [f"{duration(c.seconds)} +-{c.error:.0%}" for c in choices]),
        ("tokens a second", [f"{c.tokens_per_second:,.0f} +-{c.error:.0%}" for c in choices]),
        ("share of peak", [f"{c.share_of_peak:.0%}" for c in choices]),
        ("memory of a GPU", [f"{gib(c.bytes)} +-{c.memory_error:.0%}" for c in choices]),
    ]
    if any(c.host_bytes for c in choices):
        lines.append(("memory of a host", [f"{gib(c.host_bytes)} +-{c.memory_error:.0%}" for c in choices]))
    if best.price_per_million_tokens is not None:
        lines.append(("price, million tokens", [f"{c.price_per_million_tokens:,.2f} +-{c.error:.0%}" for c in choices]))
    spent = [name for name, value in parts(best.time) if value > 0.005 * best.seconds]
    strategies = [c.strategy for c in choices]
    lines += [
        (f"  time: {part_name(n, *strategies)}", [f"{getattr(c.time, n) / c.seconds:.1%}" for c in choices]) for n in spent
    ]
    lines += [(f"  memory: {n}", [gib(getattr(c.memory, n)) for c in choices]) for n, _ in kinds(best.memory)]
    return lines

"""Compare the planner with published measurements: python benchmarks/validate_planner.py FILE.csv [--write docs/planner.md]

FILE.csv has one metric a row, with the columns that benchmarks/published.py names. Prints, for each source and over
all, the error of step time, memory and longest sequence, the rows that are not modelled by reason, and four figures at the end.
``--write`` replaces the part between two comment lines of the page by the tables, the effect of each constant and the errors of
a fit that leaves one source out, draws predicted against published step times into the .svg beside it, and writes the errors by
kind of layout into src/longspan/planner/published_errors.py, where a plan reads its uncertainty. Takes a minute.
"""

import argparse
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, median

from figures import beside_published
from published import ATTENTION, Case, Row, case, measured_memory, measured_seconds, runs

from longspan.planner.cost import attention_time, layer_time, step_time, ulysses_exposed
from longspan.planner.rank_memory import cached_bytes, rank_memory
from longspan.planner.setting import Constants, Setting
from longspan.planner.uncertainty import KINDS, kind

APART = ("best-config sweep", "vTrain")
"""Sources that are reported apart: a noisy sweep, and one of tensor and pipeline terms."""
FITTED = {"matmul": 0.05, "attention_keys": 64.0, "dispatch": 4e-6, "host_update": 0.5e-9}
"""The constants that are fitted to step times, and the step of the search for each."""
CHOSEN = Constants()
ENOUGH_RUNS = {"STEP_TIME": 2, "MEMORY": 3}
"""Runs of a kind that a source has at least for its error to be an uncertainty; two of memory can agree by chance."""
ERRORS = Path(__file__).parents[1] / "src" / "longspan" / "planner" / "published_errors.py"
MODULE = '''"""Errors of predictions on published runs by kind of layout and source, as make validate-planner writes them."""

Row = tuple[str, str, int, float]
"""Kind of layout, source, number of runs, median relative error."""
'''
UNCERTAINTY = (
    "`+-N%` beside a number of a plan is the largest median error below of its kind of layout: half of that source's runs\n"
    "were predicted worse. A kind that is missing (memory of `sequence` and `model`) has the error of the nearest kind\n"
    "that is there, data-parallel runs before runs with offload; no published run says how far off it is, several times\n"
    "as much may be, and `--explain` says so."
)
BEGIN, END = "<!-- written by make validate-planner -->", "<!-- end -->"


@dataclass(frozen=True)
class Error:
    """One comparison: seconds, bytes or tokens, predicted and published."""

    case: Case
    predicted: float
    published: float

    @property
    def relative(self) -> float:
        """predicted / published - 1."""
        return self.predicted / self.published - 1


def setting(c: Case, constants: Constants) -> Setting:
    """What the formulas read for a case."""
    return Setting(c.shape, c.cluster, c.recipe, c.workload, constants)


def step_errors(cases: list[Case], constants: Constants = CHOSEN) -> list[Error]:
    """Step times (of one layer where a source gives that) of all cases that have one."""
    found = []
    for c in cases:
        seconds = measured_seconds(c)
        if seconds is None:
            continue
        x = setting(c, constants)
        if c.metric("layer_time_combined"):
            one = layer_time(x, c.strategy)
            predicted = float(one.forward + one.backward + one.recompute + one.communication)
        else:
            predicted = float(step_time(x, c.strategy).total)
        found.append(Error(c, predicted, seconds))
    return found


def attention_errors(cases: list[Case], constants: Constants = CHOSEN) -> list[Error]:
    """Times of attention alone: kernel and exchange of one layer."""
    found = []
    for c in cases:
        metric = c.metric(*ATTENTION)
        if metric is None:
            continue
        name, value = metric
        x, s = setting(c, constants), c.strategy
        forward, backward = (float(part) for part in attention_time(x, s))
        sent = float(ulysses_exposed(x, s))
        ring = float(layer_time(x, s).ring) / 2
        alone = {"fwd": forward + sent + ring, "bwd": backward + sent + ring}
        predicted = alone["fwd"] + alone["bwd"] if "fwd+bwd" in name else alone["bwd" if name.endswith("bwd") else "fwd"]
        work = x.shape.attention_flops(c.workload.tokens) / c.cluster.gpus * (2.5 if name.endswith("bwd") else 1)
        published = 1 / value if "iter" in name else work * c.workload.rows / (value * 1e12)
        started = 12 * constants.dispatch * (s.ring if s.ring > 1 else 1)
        uneven = 2 - 1 / s.ring if {"basic", "ring"} & set(c.rows[0]["strategy"].split()[1:2]) else 1.0
        found.append(Error(c, max(predicted * uneven, started), published))
    return found


def memory_errors(cases: list[Case], constants: Constants = CHOSEN) -> list[Error]:
    """Peak memory of all cases that have one: of the device (nvidia-smi), reserved or allocated, as the source measures it."""
    found = []
    for c in cases:
        measured = measured_memory(c, cases)
        if measured is None:
            continue
        x, (what, published) = setting(c, constants), measured
        needs = rank_memory(x, c.strategy)
        kept = {"device": needs.reserve, "reserved": cached_bytes(x, c.strategy), "allocated": 0.0}[what]
        found.append(Error(c, float(needs.allocated + kept), published))
    return found


def longest_errors(cases: list[Case], constants: Constants = CHOSEN) -> list[Error]:
    """The longest sequence that fits device and host, of all cases that have one."""
    found = []
    for c in cases:
        metric = c.metric("max_seq_len")
        if metric is None:
            continue
        fits, above = 1, 1 << 26
        while above - fits > max(1, fits // 1000):
            middle = (fits + above) // 2
            needs = rank_memory(setting(replace(c, workload=replace(c.workload, tokens=middle)), constants), c.strategy)
            enough = needs.total <= c.cluster.accelerator.memory and needs.host <= c.cluster.host_memory
            fits, above = (middle, above) if enough else (fits, middle)
        found.append(Error(c, fits, metric[1]))
    return found


def by_source(errors: list[Error]) -> dict[str, list[Error]]:
    """Errors by source, in the order of the file."""
    found: dict[str, list[Error]] = defaultdict(list)
    for error in errors:
        found[error.case.source].append(error)
    return dict(found)


def is_apart(source: str) -> bool:
    """Whether a source is reported apart."""
    return any(name in source for name in APART)


def middle(errors: list[Error]) -> float:
    """The median absolute error."""
    return median(abs(error.relative) for error in errors)


def over_sources(errors: list[Error]) -> float:
    """The median over the sources with at least 4 runs of their median absolute errors."""
    medians = [middle(e) for s, e in by_source(errors).items() if len(e) >= 4 and not is_apart(s)]
    return median(medians) if medians else 0.0


def within(error: Error) -> bool:
    """Whether memory is within 10 %, or 2 GB where less than 20 GB was measured."""
    allowed = max(0.1 * error.published, 2e9 if error.published < 20e9 else 0)
    return abs(error.predicted - error.published) <= allowed


def is_near(error: Error) -> bool:
    """Whether a longest sequence is within 1.25 x; one that was found by powers of two, v, lies between v and 2 v."""
    tokens = int(error.published)
    upper = 2 * tokens if tokens & (tokens - 1) == 0 else tokens
    return tokens / 1.25 <= error.predicted <= 1.25 * upper


def pairs(errors: list[Error]) -> tuple[int, int]:
    """(pairs ordered right, pairs): same source, model, hardware, GPUs, length and batch, more than 5 % apart."""
    groups: dict[tuple[str, ...], list[Error]] = defaultdict(list)
    for error in errors:
        row = error.case.rows[0]
        groups[tuple(row[k] for k in ("source", "model", "gpu", "gpus", "seq_len", "global_batch"))].append(error)
    right = count = 0
    for group in groups.values():
        for one, other in combinations(group, 2):
            if max(one.published, other.published) > 1.05 * min(one.published, other.published):
                count += 1
                right += (one.predicted < other.predicted) == (one.published < other.published)
    return right, count


def table(title: str, errors: list[Error], memory: bool = False) -> list[str]:
    """A Markdown table of the errors of each source."""
    lines = [f"| {title} | runs | median error | mean | predicted / published |" + (" within |" if memory else "")]
    lines += ["|---" * (6 if memory else 5) + "|"]
    for source, own in by_source(errors).items():
        lines.append(
            f"| {source} | {len(own)} | {middle(own):.1%} | {fmean(abs(e.relative) for e in own):.1%} | "
            f"{median(1 + e.relative for e in own):.2f} |" + (f" {sum(map(within, own)) / len(own):.0%} |" if memory else "")
        )
    return lines


def by_kind(errors: list[Error]) -> list[tuple[str, str, int, float]]:
    """(kind of layout, source, runs, median error) of all sources but those apart, the largest error of a kind first."""
    own: dict[tuple[str, str], list[Error]] = defaultdict(list)
    for error in errors:
        if not is_apart(error.case.source):
            own[kind(error.case.strategy), error.case.source].append(error)
    rows = [(*key, len(group), round(middle(group), 3)) for key, group in own.items()]
    return sorted(rows, key=lambda row: (KINDS.index(row[0]), -row[3], row[1]))


def uncertainties(time: list[Error], memory: list[Error]) -> tuple[list[str], str]:
    """Errors by kind of layout: a table for the page, and the module that ``longspan.planner.uncertainty`` reads."""
    text, table = [MODULE], ["| kind of layout | number | source | runs | median error |", "|---|---|---|---|---|"]
    for name, number, errors in (("STEP_TIME", "step time", time), ("MEMORY", "memory", memory)):
        rows = [row for row in by_kind(errors) if row[2] >= ENOUGH_RUNS[name]]
        text += [f"{name}: tuple[Row, ...] = (", *(f'    ("{k}", "{s}", {n}, {e}),' for k, s, n, e in rows), ")"]
        table += [f"| {k} | {number} | {s} | {n} | {e:.1%} |" for k, s, n, e in rows]
    return table, "\n".join(text) + "\n"


def effects(cases: list[Case]) -> list[str]:
    """What moving each constant by 10 % does to the errors."""
    lines = ["| constant | value | -10 %: step time, memory | +10 %: step time, memory |", "|---|---|---|---|"]
    chosen = Constants()
    for field in fields(Constants):
        value, cells = getattr(chosen, field.name), []
        for factor in (0.9, 1.1):
            moved = replace(chosen, **{field.name: value * factor})
            memory = memory_errors(cases, moved)
            cells.append(f"{over_sources(step_errors(cases, moved)):.1%}, {sum(map(within, memory)) / max(1, len(memory)):.0%}")
        lines.append(f"| {field.name} | {value:g} | {' | '.join(cells)} |")
    return lines


def fitted(cases: list[Case]) -> Constants:
    """The constants that minimise the sum of the sources' median errors, by one coordinate after the other."""
    constants = Constants()

    def badness(at: Constants) -> float:
        return sum(middle(own) for own in by_source(step_errors(cases, at)).values())

    best = badness(constants)
    for name, step in FITTED.items():
        for change in (-2 * step, -step, step, 2 * step):
            value = getattr(constants, name) + change
            if value > 0 and (tried := badness(replace(Constants(), **{name: value}))) < best:
                best, constants = tried, replace(constants, **{name: value})
    return constants


def left_out(cases: list[Case]) -> list[str]:
    """The error of each source with constants fitted to all other sources; the two large sources are left out of the fit."""
    few = [c for c in cases if not is_apart(c.source) and measured_seconds(c) is not None]
    lines = ["| source left out | error with all | error when left out |", "|---|---|---|"]
    for source in {c.source: None for c in few}:
        own = [c for c in few if c.source == source]
        constants = fitted([c for c in few if c.source != source])
        lines.append(f"| {source} | {middle(step_errors(own)):.1%} | {middle(step_errors(own, constants)):.1%} |")
    return lines


def _set_aside(row: Row) -> str | None:
    """The reason for which a row is not compared whatever it says, None if it is: the comparison is over A and B."""
    if row["suggested_split"].lower() == "context":
        return "set aside: context"
    complete = row["completeness"].upper() or "B"
    return None if complete in ("A", "B") else f"set aside: completeness {complete}"


def report(path: str) -> tuple[list[str], list[Case]]:
    """The tables, the reasons for rows that are not modelled, and the line of four figures."""
    read = [(rows, case(rows)) for rows in runs(path)]
    wanted = [(rows, c) for rows, c in read if _set_aside(rows[0]) is None]
    reasons = Counter({c: 0 for _, c in wanted if isinstance(c, str)})
    for rows, _ in read:
        if reason := _set_aside(rows[0]):
            reasons[reason] += len(rows)
    for rows, c in wanted:
        if isinstance(c, str):
            reasons[c] += len(rows)
    cases = [c for _, c in wanted if isinstance(c, Case)]
    time, memory, longest = step_errors(cases), memory_errors(cases), longest_errors(cases)
    attention = attention_errors(cases)
    lines = ["### Step time", "", *table("source", time), "", "### Attention alone", "", *table("source", attention)]
    lines += ["", "### Memory", "", *table("source", memory, memory=True), "", "### Longest sequence", ""]
    lines += ["| run | published | predicted | ratio |", "|---|---|---|---|"]
    for e in longest:
        about = f"{e.case.shape.name}, {e.case.rows[0]['table']}"
        lines.append(f"| {about} | {e.published:,.0f} | {e.predicted:,.0f} | {e.predicted / e.published:.2f} |")
    whole = sum(len(rows) for rows, _ in wanted if rows[0]["completeness"].upper() == "A")
    lost = sum(len(rows) for rows, c in wanted if rows[0]["completeness"].upper() == "A" and isinstance(c, str))
    lines += ["", "### Rows not modelled", ""]
    lines += [f"- {count} rows: {reason}" for reason, count in reasons.most_common()]
    lines += [f"- {lost} of {whole} rows of completeness A are among them ({lost / max(1, whole):.1%}).", ""]
    lines += figures(time, memory, longest)
    return lines, cases


def figures(time: list[Error], memory: list[Error], longest: list[Error]) -> list[str]:
    """The figures that are judged, in one line, and what was reported apart, in another."""
    usual = [e for e in time if not is_apart(e.case.source)]
    right, count = pairs(usual)
    sources = by_source([e for e in memory if not is_apart(e.case.source)])
    enough = sum(sum(map(within, own)) / len(own) >= 0.8 for own in sources.values())
    close = sum(map(is_near, longest))
    apart = [
        f"{name}: median {middle(own):.1%}, mean {fmean(abs(e.relative) for e in own):.1%} of {len(own)}"
        for name in APART
        if (own := [e for e in time if name in e.case.source])
    ]
    return [
        f"Apart: {'; '.join(apart)}.",
        "",
        f"step time: median over sources {over_sources(time):.1%} | memory: {enough} of {len(sources)} sources within in 80 % "
        f"of runs | pairs ordered right: {right} of {count} ({right / max(1, count):.0%}) | "
        f"longest sequence within 1.25 x: {close} of {len(longest)}",
    ]


def main() -> None:
    """Print the report, and write it into the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", help="the published measurements")
    parser.add_argument("--write", help="the page whose part between two comment lines is replaced")
    arguments = parser.parse_args()
    lines, cases = report(arguments.csv)
    extra: list[str] = []
    if arguments.write:
        kinds, module = uncertainties(step_errors(cases), memory_errors(cases))
        extra = [
            "",
            "### Uncertainty by kind of layout",
            "",
            UNCERTAINTY,
            "",
            *kinds,
            "",
            "### The five constants",
            "",
            *effects(cases),
        ]
        extra += ["", "### One source left out", "", *left_out(cases)]
    print("\n".join([*lines[:-1], *extra, "", lines[-1]]))
    if not arguments.write:
        return
    if "(\n)" in module:
        print(
            "Nothing was written: a plan needs runs with a step time and runs with memory for its uncertainty.", file=sys.stderr
        )
        return
    page = Path(arguments.write)
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    series = {
        s: [(e.published, e.predicted) for e in own] for s, own in by_source(step_errors(cases)).items() if not is_apart(s)
    }
    page.with_suffix(".svg").write_text(beside_published(series, x="published seconds of a step", y="predicted seconds"))
    page.write_text(before + BEGIN + "\n\n" + "\n".join([*lines[:-1], f"**{lines[-1]}**", *extra]) + "\n\n" + END + after)
    ERRORS.write_text(module)


if __name__ == "__main__":
    main()

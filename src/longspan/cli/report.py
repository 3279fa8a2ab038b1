"""``longspan report``: finished or running runs as one HTML page. It starts no ranks and imports no torch.

    runs/NAME/config.json, metrics.jsonl  ->  loss, tokens a second, memory, bytes exchanged, of all named runs side by side

The page contains plotly itself and requests nothing. With ``--watch`` it is written again at an interval, and the browser
reloads it.
"""

import json
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from longspan.cli.output_file import refuse_no_file
from longspan.cli.settings_file import LATEST, settings_of_run
from longspan.errors import RunError
from longspan.planner.page import NO_NETWORK

PANELS = (
    ("loss", "Loss of training, nats a token", 1.0),
    ("eval_loss", "Loss of held-out text, nats a token", 1.0),
    ("tokens_per_s", "Tokens a second", 1.0),
    ("peak_share", "Share of the peak of this machine's matrix products, %", 100.0),
    ("memory_bytes", "Memory of the fullest rank, GiB", 2.0**-30),
    ("exchanged_bytes", "Exchanged by rank 0 in a step, MiB", 2.0**-20),
    ("grad_norm", "Global gradient norm", 1.0),
)
"""A metric of metrics.jsonl, the title of its plot, and the factor to its unit. Plots without data are left out."""
SETTINGS = ("model", "tokens", "rows_per_step", "ulysses", "ring", "tensor", "zero", "recompute", "dtype", "steps")
"""Settings of a run that the table shows."""
LONGEST_WATCH = 31_536_000
"""Seconds of a year: the longest interval at which the page is written again."""


@dataclass(frozen=True)
class ReportSettings:
    """Settings of ``longspan report``."""

    runs: Positional[tuple[str, ...]] = (LATEST,)
    """Names of runs, or ``latest``."""
    runs_folder: str = "runs"
    """Folder that holds the folders of all runs."""
    html: str = "report.html"
    """The page to write."""
    watch: Annotated[float | None, arg(help_behavior_hint="(default: write once)", metavar="SECONDS")] = None
    """Write the page again after this many seconds, until Ctrl-C; an open browser reloads it."""
    debug: bool = False
    """Show the traceback of an error beside its message."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise RunError("no run is named; name runs, or latest")
        if self.watch is not None and not 0 < self.watch <= LONGEST_WATCH:
            raise RunError(
                f"watch={self.watch:g} must be above 0 and at most {LONGEST_WATCH}; leave it out to write the page once"
            )
        refuse_no_file("html", self.html)


@dataclass(frozen=True)
class Run:
    """A run as its folder describes it.

    Attributes:
        name: the run's name.
        settings: the settings with which it was started.
        metrics: {metric: (steps, values)} of its records.
    """

    name: str
    settings: dict[str, Any]
    metrics: dict[str, tuple[list[int], list[float]]]


def work(settings: ReportSettings) -> int:
    """Write the page, once or until Ctrl-C, and print each run's last step; return the exit code 0.

    Raises:
        RunError: a run is not there.
    """
    while True:
        runs = [read_run(settings.runs_folder, name) for name in settings.runs]
        Path(settings.html).write_text(page(runs, settings.watch), encoding="utf-8")
        if settings.watch is None:
            break
        time.sleep(settings.watch)
    for run in runs:
        steps, losses = run.metrics.get("loss", ([], []))
        print(f"{run.name}  {f'step {steps[-1]}, loss {losses[-1]:.4f}' if steps else 'no step yet'}")
    print(f"Written to {settings.html}")
    return 0


def read_run(runs_folder: str, name: str) -> Run:
    """Read a run's settings and records.

    Args:
        runs_folder: the folder of all runs.
        name: the name of the run, or ``latest`` for the one started last.

    Returns:
        The Run. A last line that is being written is left out, and so is a damaged one.

    Raises:
        RunError: there is no such run.
    """
    name, values = settings_of_run(runs_folder, name)
    metrics: dict[str, tuple[list[int], list[float]]] = {}
    path = Path(runs_folder) / name / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        record = _record(line)
        for metric, value in record.items():
            steps, series = metrics.setdefault(metric, ([], []))
            steps.append(record["step"])
            series.append(value)
    return Run(name, values, metrics)


def _record(line: str) -> dict[str, Any]:
    """The metrics in a line of metrics.jsonl by name; {} if a run is writing it, or if it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return {}
    return {
        name: value for name, value in record.items() if isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
    }


def page(runs: list[Run], watch: float | None) -> str:
    """The HTML of a page that shows ``runs`` side by side. The browser reloads it every ``watch`` seconds; None: never."""
    from plotly import graph_objects as graph
    from plotly.offline import get_plotlyjs

    plots = []
    for metric, title, factor in PANELS:
        figure = graph.Figure()
        for run in runs:
            if metric in run.metrics:
                steps, values = run.metrics[metric]
                figure.add_scatter(x=steps, y=[factor * v for v in values], name=run.name, mode="lines+markers")
        if figure.data:
            title_left = {"text": title, "font": {"size": 15}, "x": 0.02, "xanchor": "left"}
            figure.update_layout(title=title_left, xaxis_title="step", height=340, margin={"l": 55, "r": 15, "t": 45, "b": 45})
            figure.update_layout(legend={"orientation": "h", "y": -0.2}, showlegend=True)
            config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}
            plots.append(figure.to_html(full_html=False, include_plotlyjs=False, config=config))
    again = f'<meta http-equiv="refresh" content="{watch:g}">' if watch is not None else ""
    style = (
        "body{font:15px/1.4 sans-serif;margin:1.5em auto;max-width:1400px;padding:0 1em}table{border-collapse:collapse}"
        ".plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(430px,1fr));gap:1em}.plots>div{min-width:0}"
        "td,th{text-align:left;padding:.2em .7em;border-bottom:1px solid #ddd}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Runs of longspan</title>{again}'
        f'{NO_NETWORK}<link rel="icon" href="data:,"><style>{style}</style><script>{get_plotlyjs()}</script></head>'
        f'<body><h1>Runs</h1>{_table(runs)}<div class="plots">{"".join(plots)}</div></body></html>'
    )


def _table(runs: list[Run]) -> str:
    """An HTML table with a row for each run: the settings that ``SETTINGS`` names, and the last loss."""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("run", *SETTINGS, "last loss"))
    rows = []
    for run in runs:
        last = run.metrics.get("loss", ([], []))[1][-1:]
        cells = [run.name, *(str(run.settings.get(name, "")) for name in SETTINGS), f"{last[0]:.4f}" if last else "none yet"]
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"

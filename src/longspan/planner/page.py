"""One self-contained HTML page of a plan: time and memory against length for each kind of layout, and what-if controls.

    kinds of layout x lengths x numbers of GPUs   ->   the best layout of each, by search   ->   data and plots in the page

The page holds plotly itself and requests nothing. Its controls choose the number of GPUs and the length; the plots and the
table follow. Points are computed before the page is written, so a control only chooses among them.
"""

import json
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from longspan.errors import LayoutError
from longspan.planner.plan import Plan
from longspan.planner.search import longest, search
from longspan.planner.setting import Setting
from longspan.planner.uncertainty import memory_error, time_error
from longspan.planner.units import duration

FAMILIES: dict[str, dict[str, int]] = {
    "data and Ulysses": {"ring": 1, "tensor": 1, "pipeline": 1},
    "data and ring": {"ulysses": 1, "tensor": 1, "pipeline": 1},
    "data, Ulysses and ring": {"tensor": 1, "pipeline": 1},
    "data and tensor": {"ulysses": 1, "ring": 1, "pipeline": 1},
    "every axis": {},
}
"""Kinds of layout, by the axes that they leave at 1."""
GIB = 2**30
NO_NETWORK = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:\">"
)
"""The browser itself refuses a request of a page with this line."""
POINTS = 9
"""Lengths of a curve: powers of two around the length of the plan."""


def write_page(found: Plan, path: str | Path) -> None:
    """Write the page of a plan.

    Args:
        found: the plan; its model, cluster, rows and constants are those of the page.
        path: the file, which is replaced.

    Raises:
        OSError: the file cannot be written.
    """
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped,unused-ignore]

    data = page_data(found)
    title = f"{found.model.name} on {found.cluster.accelerator.name}"
    Path(path).write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'{NO_NETWORK}<link rel="icon" href="data:,">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body><h1>{escape(title)}</h1>"
        f"<p>{escape(data['about'])}</p>{CONTROLS}"
        f'<script id="data" type="application/json">{json.dumps(data).replace("</", "<" + chr(92) + "/")}</script>'
        f"<script>{SCRIPT}</script></body></html>",
        encoding="utf-8",
    )


def page_data(found: Plan) -> dict[str, Any]:
    """What the page of the plan ``found`` draws, as plain values that JSON can write.

    Returns:
        gpus and lengths (the choices of the controls); for each family a list over GPUs of lists over lengths of points
        {seconds, time, gib, strategy, fits} (None where no layout is legal), and a list over GPUs of the longest sequence.
    """
    x = found.best.setting
    exponent = max(12, found.workload.tokens.bit_length() - 1)
    most = x.shape.positions or 1 << 40
    lengths = [1 << e for e in range(max(10, exponent - POINTS // 2), exponent + POINTS // 2 + 1) if 1 << e <= most]
    gpus = [g for g in (x.cluster.gpus // 4, x.cluster.gpus // 2, x.cluster.gpus, 2 * x.cluster.gpus) if g >= 1]
    clusters = [replace(x, cluster=replace(x.cluster, gpus=g, gpus_per_node=_node(x, g))) for g in gpus]
    families = {
        name: {
            "points": [[_point(_at(c, n), fixed) for n in lengths] for c in clusters],
            "longest": [longest(c, fixed) for c in clusters],
        }
        for name, fixed in FAMILIES.items()
    }
    return {
        "about": f"{found.workload.rows} rows a step, {x.recipe.dtype}. Predicted by formulas: step time +-"
        f"{found.best.error:.0%}, memory +-{found.best.memory_error:.0%} against published measurements "
        f"({time_error(found.best.strategy)[1]}; {memory_error(found.best.strategy)[1]}); never measured on a GPU by longspan.",
        "gpus": gpus,
        "lengths": lengths,
        "chosen": [gpus.index(x.cluster.gpus), min(range(len(lengths)), key=lambda i: abs(lengths[i] - found.workload.tokens))],
        "memory": x.cluster.accelerator.memory / GIB,
        "families": families,
    }


def _node(x: Setting, gpus: int) -> int:
    """Accelerators of a node where the cluster has ``gpus``: at most as many as a whole node of this plan's cluster has."""
    return min(gpus, max(x.cluster.gpus_per_node, 8 if gpus >= 8 else 1))


def _at(x: Setting, tokens: int) -> Setting:
    """A copy of ``x`` for rows of ``tokens`` tokens."""
    return replace(x, workload=replace(x.workload, tokens=tokens))


def _point(x: Setting, fixed: dict[str, int]) -> dict[str, Any] | None:
    """One point of a plot, {seconds, time, gib, strategy, fits}: the fastest layout that fits, or the smallest if none does.

    None where no layout with the values ``fixed`` is legal.
    """
    try:
        ranking = search(x, {"head_chunks": 1} | fixed)
    except LayoutError:
        return None
    best = ranking.best or ranking.smallest
    return {
        "seconds": best.seconds,
        "time": duration(best.seconds),
        "gib": best.bytes / GIB,
        "strategy": str(best.strategy),
        "fits": ranking.best is not None,
    }


STYLE = """
body { font: 15px/1.4 sans-serif; margin: 1.5em auto; max-width: 1100px; padding: 0 1em }
.plots { display: grid; gap: 1em; margin-top: 1em; grid-template-columns: repeat(auto-fill, minmax(430px, 1fr)) }
label { margin-right: 2em } output { font-weight: bold } table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .25em .6em; border-bottom: 1px solid #ddd }
"""

CONTROLS = """
<p><label>GPUs <input id="gpus" type="range" min="0" step="1"> <output id="gpus-shown"></output></label>
<label>Tokens of a row <input id="length" type="range" min="0" step="1"> <output id="length-shown"></output></label></p>
<table><thead><tr><th>axes</th><th>step</th><th>memory of a GPU</th><th>layout</th></tr></thead>
<tbody id="table"></tbody></table>
<div class="plots"><div id="time"></div><div id="memory"></div><div id="longest"></div></div>
"""

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const control = { gpus: document.getElementById("gpus"), length: document.getElementById("length") };
const names = Object.keys(data.families);
control.gpus.max = data.gpus.length - 1;
control.length.max = data.lengths.length - 1;
[control.gpus.value, control.length.value] = data.chosen;

const short = n => n >= 1048576 ? n / 1048576 + "M" : n >= 1024 ? n / 1024 + "k" : String(n);
const dashes = ["solid", "dot", "dash", "dashdot", "longdash"];  // curves that lie on one another stay visible

function layout(title, x, ticks, y, shapes) {
  return { title: { text: title, font: { size: 15 }, x: 0.02, xanchor: "left" }, height: 400,
    margin: { l: 65, r: 15, t: 45, b: 50 }, shapes, legend: { orientation: "h", y: -0.25 },
    xaxis: { title: { text: x }, type: "log", tickvals: ticks, ticktext: ticks.map(short) },
    yaxis: { title: { text: y }, type: "log" } };
}

function trace(name, x, y) {
  return { name, x, y, mode: "lines+markers", line: { dash: dashes[names.indexOf(name)] } };
}

function traces(gpus, value) {
  return names.map(name => trace(name, data.lengths,
    data.families[name].points[gpus].map(point => point === null ? null : value(point))));
}

function cell(row, text) {
  const made = document.createElement("td");
  made.textContent = text;
  row.appendChild(made);
}

function draw() {
  const gpus = Number(control.gpus.value), length = Number(control.length.value), at = data.lengths[length];
  document.getElementById("gpus-shown").textContent = data.gpus[gpus];
  document.getElementById("length-shown").textContent = at.toLocaleString("en");
  const mark = [{ type: "line", x0: at, x1: at, yref: "paper", y0: 0, y1: 1, line: { dash: "dot", color: "#888" } }];
  const limit = { type: "line", xref: "paper", x0: 0, x1: 1, y0: data.memory, y1: data.memory, line: { color: "#c00" } };
  const options = { responsive: true, displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"] };
  Plotly.react("time", traces(gpus, p => p.fits ? p.seconds : null),
    layout("Seconds of a step, where it fits", "tokens of a row", data.lengths, "seconds", mark), options);
  Plotly.react("memory", traces(gpus, p => p.gib),
    layout("Memory of the fullest GPU (red: what it has)", "tokens of a row", data.lengths, "GiB", [...mark, limit]), options);
  const most = names.map(name => trace(name, data.gpus, data.families[name].longest.map(n => n || null)));
  Plotly.react("longest", most, layout("Longest sequence", "GPUs", data.gpus, "tokens of a row", []), options);
  const table = document.getElementById("table");
  table.replaceChildren();
  for (const name of names) {
    const point = data.families[name].points[gpus][length], row = document.createElement("tr");
    cell(row, name);
    cell(row, point === null ? "not legal" : point.fits ? point.time : "does not fit");
    cell(row, point === null ? "" : point.gib.toFixed(1) + " GiB");
    cell(row, point === null ? "" : point.strategy);
    table.appendChild(row);
  }
}
control.gpus.addEventListener("input", draw);
control.length.addEventListener("input", draw);
draw();
"""

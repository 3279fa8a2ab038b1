"""The figures of the docs as SVG, drawn by matplotlib: lines, bars, and predicted against published values.

The text of a figure depends on its values alone: no date, and names of its parts that are derived from them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

Point = tuple[float, float]
APART = 0.15
"""How far a dashed line of ``predicted`` is from equality."""
WIDTH = 7.6
"""Inches."""
MARKERS = ("o", "^", "s")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "longspan",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a figure: its ``name``, the measured ``points``, and the ``curve`` of a closed form; both as (x, y)."""

    name: str
    points: Sequence[Point]
    curve: Sequence[Point] = ()


@rc_context(STYLE)
def lines(series: Sequence[Series], *, x: str, y: str) -> str:
    """Measured values as points and closed forms as lines, on two logarithmic axes.

    Args:
        series: what is drawn, in the order of the legend.
        x, y: the names of the axes.
    """
    figure, axes = _logarithmic(4.2, x, y, (1.0, 2.0, 5.0))
    for index, one in enumerate(series):
        axes.plot(*zip(*one.points), "o", color=f"C{index}", label=one.name)
        if one.curve:
            axes.plot(*zip(*one.curve), "-", color=f"C{index}")
    figure.legend(loc="outside right upper")
    return _svg(figure)


@rc_context(STYLE)
def beside_published(series: Mapping[str, Sequence[Point]], *, x: str, y: str) -> str:
    """Points (published, predicted) by source on two logarithmic axes, with lines where they are equal and 15 % apart.

    Args:
        series: the points of each source.
        x, y: the names of the axes.
    """
    figure, axes = _logarithmic(5.2, x, y, (1.0,))
    values = [value for points in series.values() for point in points for value in point]
    ends = (min(values) / 2, max(values) * 2)
    for factor, style in ((1.0, "-"), (1 + APART, "--"), (1 / (1 + APART), "--")):
        axes.plot(ends, [end * factor for end in ends], style, color="grey", linewidth=0.8)
    for index, (source, points) in enumerate(series.items()):
        marker = MARKERS[index // 10 % len(MARKERS)]  # the cycle has ten colours
        axes.plot(*zip(*points), marker, color=f"C{index % 10}", markersize=4, alpha=0.6, label=source[:48])
    axes.set_aspect("equal")
    figure.legend(loc="outside right upper")
    return _svg(figure)


@rc_context(STYLE)
def bars(values: Mapping[str, Mapping[str, float]], *, x: str, goal: float | None = None) -> str:
    """Horizontal bars: one group for each row, one colour for each case, and a dashed line at the goal.

    Args:
        values: {row: {case: value}}; a row that lacks a case has no bar for it.
        x: what the length of a bar is.
        goal: where the line is drawn.
    """
    cases = list(dict.fromkeys(case for row in values.values() for case in row))
    thick = 0.8 / len(cases)
    figure = Figure(figsize=(WIDTH, 1.2 + 0.2 * len(values) * max(len(cases), 2)), layout="constrained")
    axes = figure.add_subplot()
    for index, case in enumerate(cases):
        rows = [(at + thick * (index + 0.5) - 0.4, row[case]) for at, row in enumerate(values.values()) if case in row]
        drawn = axes.barh([at for at, _ in rows], [value for _, value in rows], thick, color=f"C{index}", label=case)
        axes.bar_label(drawn, fmt="{:,.3g}", padding=2, fontsize="small")
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlabel(x)
    if goal is not None:
        axes.axvline(goal, color="grey", linestyle="--", linewidth=0.8)
    if len(cases) > 1:
        figure.legend(loc="outside lower center", ncols=2)
    return _svg(figure)


def by_row(cases: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """{case: {row: value}} as ``bars`` takes it, rows in the order in which they appear first."""
    rows = dict.fromkeys(row for case in cases.values() for row in case)
    return {row: {name: case[row] for name, case in cases.items() if row in case} for row in rows}


def _logarithmic(height: float, x: str, y: str, ticks: Sequence[float]) -> tuple[Figure, Axes]:
    """A figure and its axes; ``ticks`` are the values in a power of ten that an axis names."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel=x, ylabel=y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(linewidth=0.3)
    return figure, axes


def _svg(figure: Figure) -> str:
    written = StringIO()
    figure.savefig(written, format="svg", facecolor="white", metadata={"Date": None})
    return written.getvalue()

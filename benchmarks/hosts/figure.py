"""A plot on two logarithmic axes as SVG: measured values as points, closed forms as lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT, LEFT, TOP, ACROSS, DOWN = 760, 440, 80, 20, 440, 350
COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8e44ad", "#e08e0b", "#555555")
STEPS = (1, 2, 5)
"""The values in a power of ten that an axis names."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One method: its ``name``, the measured ``points``, and the ``curve`` of a closed form; both as (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]
    curve: Sequence[tuple[float, float]] = ()


def lines(series: Sequence[Series], *, x: str, y: str) -> str:
    """The SVG text of a plot.

    Args:
        series: what is drawn, in the order of the legend.
        x, y: the names of the axes.
    """
    values = [point for one in series for point in (*one.points, *one.curve)]
    across, down = (_Scale([point[i] for point in values], side) for i, side in ((0, ACROSS), (1, DOWN)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<rect x="{LEFT}" y="{TOP}" width="{ACROSS}" height="{DOWN}" fill="none" stroke="#333"/>',
    ]
    bottom = TOP + DOWN
    for value in across.ticks():
        parts.append(f'<text x="{LEFT + across.at(value):.0f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
    for value in down.ticks():
        parts.append(f'<text x="{LEFT - 8}" y="{bottom - down.at(value) + 4:.0f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<text x="{LEFT + ACROSS / 2}" y="{HEIGHT - 20}" text-anchor="middle">{escape(x)}</text>')
    parts.append(f'<text transform="translate(20 {TOP + DOWN / 2}) rotate(-90)" text-anchor="middle">{escape(y)}</text>')
    for index, one in enumerate(series):
        colour, row = COLOURS[index % len(COLOURS)], TOP + 14 + 22 * index
        at = [f"{LEFT + across.at(a):.1f},{bottom - down.at(b):.1f}" for a, b in one.curve]
        parts.append(f'<polyline points="{" ".join(at)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for a, b in one.points:
            parts.append(f'<circle cx="{LEFT + across.at(a):.1f}" cy="{bottom - down.at(b):.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<circle cx="{LEFT + ACROSS + 22}" cy="{row}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + ACROSS + 34}" y="{row + 4}">{escape(one.name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


class _Scale:
    def __init__(self, values: Sequence[float], side: int) -> None:
        low, high = log10(min(values)), log10(max(values))
        margin = max(0.05 * (high - low), 0.05)
        self.low, self.high, self.side = low - margin, high + margin, side

    def at(self, value: float) -> float:
        return (log10(value) - self.low) / (self.high - self.low) * self.side

    def ticks(self) -> list[float]:
        powers = range(floor(self.low), ceil(self.high) + 1)
        return [step * 10.0**power for power in powers for step in STEPS if self.low <= log10(step * 10.0**power) <= self.high]

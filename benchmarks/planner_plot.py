"""A plot of predicted against published step times as SVG: one colour a source, lines at equal and at 15 % apart."""

from html import escape
from math import floor, log10

WIDTH, HEIGHT, LEFT, TOP, SIDE = 860, 520, 70, 20, 440
COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8e44ad", "#e08e0b", "#16a596", "#7a5230", "#555555", "#c71f87", "#9bab1a")


def plot(series: dict[str, list[tuple[float, float]]]) -> str:
    """The SVG text of points (published, predicted) in seconds, by source.

    Args:
        series: the points of each source.
    """
    values = [value for points in series.values() for point in points for value in point]
    low, high = floor(log10(min(values))), floor(log10(max(values))) + 1

    def at(value: float) -> float:
        return (log10(value) - low) / (high - low) * SIDE

    def line(factor: float, style: str) -> str:
        begin, end = 10.0**low, 10.0**high
        x0, y0 = (0.0, at(begin * factor)) if factor >= 1 else (at(begin / factor), 0.0)
        x1, y1 = (at(end / factor), SIDE) if factor >= 1 else (SIDE, at(end * factor))
        return (
            f'<line x1="{LEFT + x0:.1f}" y1="{TOP + SIDE - y0:.1f}" x2="{LEFT + x1:.1f}" y2="{TOP + SIDE - y1:.1f}" '
            f'stroke="#888" {style}/>'
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<rect x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#333"/>',
        line(1.0, ""),
        line(1.15, 'stroke-dasharray="4 4"'),
        line(1 / 1.15, 'stroke-dasharray="4 4"'),
    ]
    for power in range(low, high + 1):
        place = at(10.0**power)
        parts.append(f'<text x="{LEFT + place:.0f}" y="{TOP + SIDE + 18}" text-anchor="middle">{10.0**power:g}</text>')
        parts.append(f'<text x="{LEFT - 8}" y="{TOP + SIDE - place + 4:.0f}" text-anchor="end">{10.0**power:g}</text>')
    parts.append(f'<text x="{LEFT + SIDE / 2}" y="{HEIGHT - 16}" text-anchor="middle">published seconds of a step</text>')
    middle = TOP + SIDE / 2
    parts.append(f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">predicted seconds</text>')
    for index, (source, points) in enumerate(series.items()):
        colour, filled = COLOURS[index % len(COLOURS)], index < len(COLOURS)
        look = f'fill="{colour}" fill-opacity="0.6"' if filled else f'fill="none" stroke="{colour}"'
        parts += [f'<circle cx="{LEFT + at(x):.1f}" cy="{TOP + SIDE - at(y):.1f}" r="3" {look}/>' for x, y in points]
        y = TOP + 10 + 20 * index
        parts.append(f'<circle cx="{LEFT + SIDE + 22}" cy="{y}" r="4" {look}/>')
        parts.append(f'<text x="{LEFT + SIDE + 34}" y="{y + 4}">{escape(source[:48])}</text>')
    return "\n".join([*parts, "</svg>\n"])

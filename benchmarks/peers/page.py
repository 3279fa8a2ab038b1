"""docs/peers.md: sections that ``make bench`` writes, each between two markers of its own.

<!-- exchange -->            what stands between the markers is replaced, everything else on the page is left as it is,
| table |                    so that one work item can be measured without the others
<!-- /exchange -->
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "peers.md"


@dataclass(frozen=True, kw_only=True)
class Section:
    """What one work item writes: Markdown, and the SVG of a figure, if it has one."""

    text: str
    figure: str | None = None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, whose rows have as many cells as its head; a cell is cut to one line."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row of {len(row)} cells does not fit a table of {len(head)} columns: {row}")
        lines.append("| " + " | ".join(one_line(cell) for cell in row) + " |")
    return "\n".join(lines)


def one_line(cell: str, longest: int = 260) -> str:
    """A cell without line breaks and column marks, cut to ``longest`` characters."""
    flat = " ".join(cell.replace("|", "/").split())
    return flat if len(flat) <= longest else flat[: longest - 3] + "..."


def refusal_row(name: str, reason: str, columns: int) -> list[str]:
    """The row of a contestant that cannot do the work, with its own error in the second cell."""
    return [name, f"cannot: {reason}", *[""] * (columns - 2)]


def write(name: str, section: Section, page: Path = PAGE) -> None:
    """Replace what stands between the markers of ``name``, and the figure beside the page.

    Raises:
        ValueError: the page has no such markers.
    """
    whole = page.read_text()
    between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not between.search(whole):
        raise ValueError(f"{page} has no section {name!r}; add a line <!-- {name} --> and one <!-- /{name} -->")
    text = section.text.rstrip()
    if section.figure is not None:
        drawn = page.with_name(f"{page.stem}-{name}.svg")
        drawn.write_text(section.figure)
        text = f"![{name}]({drawn.name})\n\n{text}"
    page.write_text(between.sub(lambda found: f"{found[1]}{text}\n{found[2]}", whole, count=1))

"""The parts of docs/wire.md that the commands write: what stands between two comment lines is replaced."""

from pathlib import Path

from benchmarks.hosts.ranks import ROOT

PAGE = ROOT / "docs" / "wire.md"


def replace(part: str, text: str, page: Path = PAGE) -> None:
    """Replace a part of the page.

    Args:
        part: its name: it stands between ``<!-- written by ... hosts PART -->`` and ``<!-- end of PART -->``.
        text: what it is replaced by.
        page: the page.

    Raises:
        ValueError: the page has no such part.
    """
    begin, end = f"<!-- written by python -m benchmarks.hosts {part} --write -->", f"<!-- end of {part} -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no part {part!r}; put the lines {begin!r} and {end!r} where it is to stand")
    page.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")


def draw(name: str, svg: str) -> None:
    """Write a figure beside the page."""
    (PAGE.parent / name).write_text(svg)

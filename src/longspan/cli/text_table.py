"""A table as plain text, for the output of ``longspan plan`` and ``longspan rehearse``, without importing torch."""

from collections.abc import Sequence
from io import StringIO

WIDTH = 160


def text_table(names: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Lines of cells below names, without borders and without spaces at the end of a line.

    Args:
        names: the heads of the columns. The first is that of the lines' own names, which are aligned to the left.
        lines: (name, one cell for each further column).
    """
    from rich.console import Console
    from rich.table import Table

    table, written = Table(box=None, pad_edge=False), StringIO()
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left")
    for name, cells in lines:
        table.add_row(name, *cells)
    Console(file=written, width=WIDTH, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())

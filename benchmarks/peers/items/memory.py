"""Work item d: peak memory of a step, like for like, what the process takes before the model is built subtracted on both sides.

Resident memory of the fullest rank, in the second step (the first makes the optimizer's states). MALLOC_MMAP_THRESHOLD_ makes
the C library give freed memory back, so that the peak is what a step needs; it holds for every contestant.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.figures import Series, lines
from benchmarks.peers.contest import Entry, progress
from benchmarks.peers.contestant import Refused
from benchmarks.peers.items.step import llama
from benchmarks.peers.page import Section, one_line, table

EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
EVERY_OPTION = {"zero": 3, "memory": {"recompute": "selective", "tile_tokens": 256, "head_chunks": 4, "chunked_loss": True}}
NO_OPTION: dict[str, tuple[str, dict[str, Any], int]] = {
    "longspan, zero=3": ("ulysses", {"options": {"zero": 3}}, 2),
    "DeepSpeed ALST, ZeRO-3": ("alst", {"stage": 3}, 2),
    "ringmaster, FSDP2": ("ringmaster", {"api": "num_items_in_batch"}, 2),
}
EVERY: dict[str, tuple[str, dict[str, Any], int]] = {
    "longspan, every option": ("ulysses", {"options": EVERY_OPTION}, 2),
    "DeepSpeed ALST, ZeRO-3, checkpointed": ("alst", {"stage": 3, "checkpointed": True}, 2),
    "DeepSpeed ALST, ZeRO-3, checkpointed, tiled MLP and loss": (
        "alst", {"stage": 3, "checkpointed": True, "tiled_mlp": True, "tiled_loss": True, "shards": 16}, 2,
    ),
    "ringmaster, FSDP2, checkpointed": ("ringmaster", {"api": "num_items_in_batch", "checkpointed": True}, 2),
}  # fmt: skip
TOKENS = {"quick": (8192, 16384), "full": (32768,)}
LONGSPAN_ALONE = {"quick": (), "full": (65536, 131072)}
GOALS = {"no option": 0.85, "every option": 0.60}


def run(scale: str) -> Section:
    """The tables, and a figure of the peak over the length."""
    tables, drawn = [], []
    for title, libraries in (("no option", NO_OPTION), ("every option", EVERY)):
        columns = TOKENS[scale] + (LONGSPAN_ALONE[scale] if title == "every option" else ())
        measured = {name: [_cell(name, library, tokens) for tokens in columns] for name, library in libraries.items()}
        tables.append(_table(title, columns, measured))
        drawn += [_series(f"{name}, {title}", columns, cells) for name, cells in measured.items()]
    return Section(text="\n\n".join(tables), figure=lines(drawn, x="tokens", y="MiB of the fullest rank"))


def _series(name: str, columns: Sequence[int], cells: Sequence[float | str]) -> Series:
    points = [(tokens, mib) for tokens, mib in zip(columns, cells) if isinstance(mib, float)]
    return Series(name=name, points=points, curve=points)


def _cell(name: str, library: tuple[str, dict[str, Any], int], tokens: int) -> float | str:
    """MiB of the fullest rank, or the library's error."""
    if tokens in LONGSPAN_ALONE["full"] and library[0] != "ulysses":
        return ""
    try:
        mib = peak(name, library, llama(tokens, 2))
    except Refused as error:
        return f"cannot: {error}"
    progress(f"  {name}, {tokens:,} tokens: {mib:,.0f} MiB")
    return mib


def peak(name: str, library: tuple[str, dict[str, Any], int], case: dict[str, Any], whole: bool = False) -> float:
    """MiB of the fullest rank in the second step; ``whole``: with what the process takes.

    Raises:
        Refused: the library's own error.
    """
    side, more, ranks = library
    with Entry(name=name, side=side, case=case | more, ranks=ranks, environment=EXACT).start() as one:
        one.prepare()
        one.turn()
        return one.peak(whole=whole)


def _table(title: str, columns: tuple[int, ...], measured: dict[str, list[float | str]]) -> str:
    ours = next(cells for name, cells in measured.items() if name.startswith("longspan"))
    rows, ratios = [], []
    for name, cells in measured.items():
        row = [name]
        for mine, theirs in zip(ours, cells):
            both = isinstance(mine, float) and isinstance(theirs, float)
            row.append(f"{theirs:,.0f} MiB ({mine / theirs:.2f})" if both else one_line(str(theirs), 90))
            if both and not name.startswith("longspan"):
                ratios.append(mine / theirs)
        rows.append(row)
    head = [title, *(f"{tokens:,} tokens (longspan over it)" for tokens in columns)]
    held = "holds" if max(ratios, default=0.0) <= GOALS[title] else "misses"
    return f"{table(head, rows)}\n\nGoal: longspan at most {GOALS[title]} of the best peer: {held}."

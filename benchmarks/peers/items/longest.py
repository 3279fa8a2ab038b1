"""Work item e: the longest sequence whose training step stays under 3 GiB of resident memory a rank.

Memory grows in a line with the length, so the search goes along the line through two measured lengths and then tries. What it
prints was measured under the cap.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.figures import bars, by_row
from benchmarks.peers.contest import progress
from benchmarks.peers.contestant import Refused
from benchmarks.peers.items.memory import EVERY, peak
from benchmarks.peers.items.step import llama
from benchmarks.peers.page import Section, table

CAP_MIB = 3 * 1024
STEP = 512
"""Lengths are multiples of it."""
ALONE = "bare model, one rank, checkpointed"
ONE_RANK = ("one_device", {"checkpointed": True}, 1)
VOCABULARIES = {"quick": (128256,), "full": (32000,)}
GOALS = {128256: 12, 32000: 5}
LARGEST = {128256: 40960, 32000: 65536}
"""The search ends there: longer steps take many minutes."""


def run(scale: str) -> Section:
    """The tables, and a figure of the longest sequences."""
    found = {vocab: _longest(vocab) for vocab in VOCABULARIES[scale]}
    drawn = {
        f"{vocab:,} words": {name: cell[0] for name, cell in cells.items() if isinstance(cell, tuple)}
        for vocab, cells in found.items()
    }
    text = "\n\n".join(_table(vocab, cells) for vocab, cells in found.items())
    return Section(text=text, figure=bars(by_row(drawn), x=f"tokens under {CAP_MIB:,} MiB a rank"))


def _longest(vocab: int) -> dict[str, tuple[int, float] | str]:
    """For each contestant the longest length and its peak in MiB, or its own error."""
    found: dict[str, tuple[int, float] | str] = {}
    for name, library in ({ALONE: ONE_RANK} | EVERY).items():
        try:
            found[name] = search(lambda length, one=library, name=name: _peak(name, one, length, vocab), LARGEST[vocab])
        except Refused as error:
            found[name] = str(error)
    return found


def _table(vocab: int, cells: dict[str, tuple[int, float] | str]) -> str:
    rows, longest = [], {}
    for name, cell in cells.items():
        if isinstance(cell, str):
            rows.append([name, f"cannot: {cell}", ""])
            continue
        longest[name], mib = cell
        rows.append([name, f"{longest[name]:,}{' and more' if longest[name] == LARGEST[vocab] else ''}", f"{mib:,.0f} MiB"])
    ours, alone = longest["longspan, every option"], longest[ALONE]
    peers = max((tokens for name, tokens in longest.items() if name.startswith(("DeepSpeed", "ringmaster"))), default=0)
    found = f"longspan trains {ours / alone:.1f} x one rank (goal {GOALS[vocab]})"
    if peers:
        found += f" and {ours / peers:.1f} x the best peer (goal 1.3)"
    title = f"**{vocab:,} words, 4 layers x 256, {CAP_MIB:,} MiB a rank**"
    return f"{title}\n\n{table(['', 'longest', 'peak there'], rows)}\n\n{found}."


def search(peak_of: Callable[[int], float], largest: int, first: int = 1024) -> tuple[int, float]:
    """The longest length found under the cap, at most ``largest``, and its peak in MiB; (0, inf) if none fits.

    Args:
        peak_of: the peak of a length.
        largest: where the search ends.
        first: the first length tried; the second is twice as long.
    """
    fits, breaks = (0, float("inf")), largest + STEP
    points: list[tuple[int, float]] = []
    length = first
    while fits[0] < length < breaks:
        mib = peak_of(length)
        points.append((length, mib))
        if mib <= CAP_MIB:
            fits = (length, mib)
        else:
            breaks = length
        if mib > CAP_MIB * 0.96 and mib <= CAP_MIB:
            break
        length = _next(points, fits[0], breaks, largest)
    return fits


def _next(points: list[tuple[int, float]], fits: int, breaks: int, largest: int) -> int:
    if len(points) == 1:
        return min(2 * points[0][0], largest) if fits else points[0][0] // 2
    (a, low), (b, high) = sorted(points)[-2:]
    slope = max((high - low) / (b - a), 1e-9)
    guess = int((b + (CAP_MIB * 0.98 - high) / slope) // STEP * STEP)
    return min(max(guess, fits), 4 * b, largest, breaks - STEP)


def _peak(name: str, library: tuple[str, dict[str, Any], int], tokens: int, vocab: int) -> float:
    case = llama(tokens, 4, vocab, hidden=256, heads=4, ffn=704)
    mib = peak(name, library, case, whole=True)
    progress(f"  {name}, {tokens:,} tokens: {mib:,.0f} MiB")
    return mib

"""The map of ranks to hosts and axes as text, and what to say of an all-to-all that crosses hosts. Integers and names only.

    host a   ranks 0-3   data 0, ring 0-1, ulysses 0-1
    host b   ranks 4-7   data 1, ring 0-1, ulysses 0-1

Ranks are numbered along the axes as mesh.py does: the rightmost axis varies fastest.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby

MOST_LINES = 16
"""Hosts that are shown one by one; of more, the first ones and how many follow."""


def rank_map(hosts: Sequence[str], degrees: Mapping[str, int]) -> str:
    """One line for each run of ranks on one host: the host, its ranks, and which places on each axis they have.

    Args:
        hosts: the host of each rank.
        degrees: the degree of each axis, outermost first; their product is the number of ranks. Axes of degree 1 are left out.
    """
    runs = [list(run) for _, run in groupby(range(len(hosts)), key=lambda rank: hosts[rank])]
    width = max(len(hosts[run[0]]) for run in runs)
    lines = [f"host {hosts[run[0]]:<{width}}  {_span('rank', run)}  {_places(run, degrees)}".rstrip() for run in runs]
    left = len(lines) - MOST_LINES
    return "\n".join(lines[:MOST_LINES] + [f"and {left} more"] * (left > 0))


def crossing(hosts: Sequence[str], degrees: Mapping[str, int]) -> str | None:
    """A sentence about all-to-alls that cross hosts where another ulysses x ring would keep them inside; None without any.

    The all-to-all waits for its slowest link, while a ring overlaps with attention, so between hosts a ring is better.

    Args:
        hosts, degrees: as in ``rank_map``.
    """
    sequence, tensor = degrees["ring"] * degrees["ulysses"], degrees["tensor"]
    if not _crosses(hosts, degrees["ulysses"], tensor):
        return None
    inside = [d for d in range(2, degrees["ulysses"]) if sequence % d == 0 and not _crosses(hosts, d, tensor)]
    if not inside:
        return None
    return (
        f"the all-to-alls of ulysses={degrees['ulysses']} cross hosts; with ulysses={inside[-1]} and "
        f"ring={sequence // inside[-1]} they would stay inside a host, and only the ring, which overlaps with attention, would "
        f"cross"
    )


def _crosses(hosts: Sequence[str], ulysses: int, tensor: int) -> bool:
    """Whether ranks of one all-to-all are on different hosts."""
    block = ulysses * tensor
    return any(len(set(hosts[start + t : start + block : tensor])) > 1
               for start in range(0, len(hosts), block) for t in range(tensor))  # fmt: skip


def _places(ranks: Sequence[int], degrees: Mapping[str, int]) -> str:
    held, below = [], 1
    for axis, degree in reversed(list(degrees.items())):
        held.append((axis, degree, sorted({rank // below % degree for rank in ranks})))
        below *= degree
    return ", ".join(_span(axis, places) for axis, degree, places in reversed(held) if degree > 1)


def _span(what: str, numbers: Sequence[int]) -> str:
    """The text "rank 3", "ranks 0-3" or "ulysses 0-1"; numbers that are not neighbours are listed."""
    first, last = numbers[0], numbers[-1]
    shown = f"{first}-{last}" if last - first == len(numbers) - 1 else ",".join(map(str, numbers))
    plural = "s" if what == "rank" and len(numbers) > 1 else ""
    return f"{what}{plural} {first if len(numbers) == 1 else shown}"

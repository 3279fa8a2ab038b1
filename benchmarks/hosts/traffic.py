"""Bytes of one layer on the wire, counted by the kernel, beside the closed forms: python -m benchmarks.hosts traffic [--write]

Hosts of one rank each (2, 4, 6 and 12; tokens grow with the ranks) and 4 hosts of 3 ranks. For every method the bytes that a
host's interface has sent for one layer, forward and in a step, with headers and acknowledgements, and the payload without them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from benchmarks.figures import Series, lines
from benchmarks.hosts import ranks
from benchmarks.hosts.counters import Counted
from benchmarks.hosts.forms import Size, layer_bytes
from benchmarks.hosts.methods import COUNTED, FEWER, MEGATRON, MORE, ULYSSES, Method
from benchmarks.hosts.namespaces import hosts

WORLDS = ((2, 1), (4, 1), (6, 1), (12, 1), (4, 3))
"""(hosts, ranks of each)."""
TOKENS_A_RANK, HEADS, HEAD_DIM = 512, 12, 16
TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one method has sent for one layer.

    Attributes:
        method: the method.
        size: the sizes.
        wire: (forward, step) bytes of frames that a host sends, mean over the hosts.
        payload: (forward, step) without headers and acknowledgements.
    """

    method: Method
    size: Size
    wire: tuple[float, float]
    payload: tuple[float, float]

    @property
    def form(self) -> tuple[int, int]:
        """(forward, step) bytes of the closed form."""
        return layer_bytes(self.method.axis, self.method.recompute, self.size)

    @property
    def apart(self) -> tuple[float, float]:
        """(forward, step): bytes of frames over the closed form - 1."""
        forward, step = (wire / form - 1 for wire, form in zip(self.wire, self.form))
        return forward, step


def measure(
    worlds: Sequence[tuple[int, int]] = WORLDS,
    methods: Sequence[Method] = COUNTED,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
) -> list[Row]:
    """Count every method on every world of (hosts, ranks of each)."""
    rows = []
    for count, each in worlds:
        size = Size(tokens=TOKENS_A_RANK * count * each, hidden=heads * head_dim, hosts=count, ranks_per_host=each)
        found = _counted(size, [method.name for method in methods], heads)
        for method in methods:
            passes = [[Counted(**host[method.name][way]) for host in found] for way in (0, 1)]
            wire = [fmean(host.bytes for host in way) / (MORE - FEWER) for way in passes]
            payload = [fmean(host.payload for host in way) / (MORE - FEWER) for way in passes]
            rows.append(Row(method=method, size=size, wire=(wire[0], wire[1]), payload=(payload[0], payload[1])))
            print(line(rows[-1]), flush=True)
    return rows


def measure_doubled(counts: tuple[int, int]) -> list[Row]:
    """Count Ulysses alone on hosts of one rank, with as many tokens a rank on both numbers of hosts."""
    return measure([(count, 1) for count in counts], (ULYSSES,), heads=max(counts), head_dim=HEAD_DIM)


def _counted(size: Size, methods: Sequence[str], heads: int) -> list[dict[str, list[dict[str, int]]]]:
    with TemporaryDirectory(prefix="longspan-") as folder, hosts(size.hosts) as made:
        case = {"folder": folder, "methods": methods, "tokens": size.tokens, "hidden": size.hidden, "heads": heads}
        case["ffn"] = 2 * size.hidden
        program = ["-m", "benchmarks.hosts.traffic_rank", json.dumps(case)]
        ranks.run(made, size.ranks_per_host, program, timeout=TIMEOUT_SECONDS)
        return [json.loads(Path(folder, f"host{host}.json").read_text()) for host in range(size.hosts)]


HEADER = (
    "| hosts x ranks | tokens | method | forward: wire KiB | payload | closed form | wire apart | step: wire KiB | payload | "
    "closed form | wire apart |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """One row of the table."""
    cells = [f"{row.size.hosts} x {row.size.ranks_per_host}", f"{row.size.tokens:,}", row.method.name]
    for way in (0, 1):
        cells += [f"{part[way] / 1024:,.1f}" for part in (row.wire, row.payload, row.form)] + [f"{row.apart[way]:+.2%}"]
    return f"| {' | '.join(cells)} |"


def text(rows: Sequence[Row]) -> str:
    """The table, the ratio of Megatron-SP and Ulysses, and the effect of doubling tokens and ranks."""
    return "\n\n".join(["\n".join([HEADER, *map(line, rows)]), *filter(None, [_ratios(rows), _doubled(rows)])])


def _ratios(rows: Sequence[Row]) -> str:
    forward = {(row.method, row.size): row.wire[0] for row in rows}
    found = [
        f"| {size.hosts} x {size.ranks_per_host} | {forward[MEGATRON, size] / mine:.2f} | {size.ranks} |"
        for (method, size), mine in forward.items()
        if method == ULYSSES and (MEGATRON, size) in forward
    ]
    header = "| hosts x ranks | forward, Megatron-SP over Ulysses, counted | P |\n|---|---|---|"
    return "\n".join([header, *found]) if found else ""


def _doubled(rows: Sequence[Row]) -> str:
    mine = {row.size.hosts: row.wire[0] for row in rows if row.method == ULYSSES and row.size.ranks_per_host == 1}
    found = []
    for few, many in ((few, 2 * few) for few in mine if 2 * few in mine):
        whole = [mine[count] * count / (count - 1) for count in (few, many)]
        form = (many - 1) / many / ((few - 1) / few)
        found.append(f"| {few} to {many} | {mine[many] / mine[few]:.3f} | {form:.3f} | {whole[1] / whole[0]:.4f} |")
    header = "| hosts, tokens doubled too | Ulysses' bytes a link, ratio | of (P-1)/P | what is left |\n|---|---|---|---|"
    return "\n".join([header, *found]) if found else ""


def figure(rows: Sequence[Row]) -> str:
    """The forward bytes of a host's link over the number of hosts: counted as points, closed forms as lines."""
    alone = [row for row in rows if row.size.ranks_per_host == 1 and row.method.recompute == "none"]
    series = []
    for method in dict.fromkeys(row.method for row in alone):
        mine = [row for row in alone if row.method == method]
        points = [(float(row.size.hosts), row.wire[0] / 1024) for row in mine]
        curve = [(float(row.size.hosts), row.form[0] / 1024) for row in mine]
        series.append(Series(name=method.name, points=points, curve=curve))
    return lines(series, x=f"hosts of one rank, {TOKENS_A_RANK} tokens each", y="KiB that a host sends for a layer, forward")

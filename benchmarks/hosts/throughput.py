"""Throughput of a training step over the rate of the links, by method: python -m benchmarks.hosts throughput [--write]

A decoder of width 512, 8,192 tokens, fp32, 4 hosts of one rank: at 200 Mbit/s and 1 Gbit/s with 8 layers, and with one at the
rates at which a rank here can send as many bytes per FLOP as a GPU of two clusters can. A step is forward, backward and the
average of the gradients; the optimizer is left out. ``accumulated`` has several rows a step, one after the other, whose
gradients are averaged once a step. Sets of ranks are started anew for every rate.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.figures import Series, lines
from benchmarks.hosts import ranks
from benchmarks.hosts.fit import Line, fit, where_ratio
from benchmarks.hosts.methods import MEGATRON, TIMED, ULYSSES, Method
from benchmarks.hosts.namespaces import hosts

HOSTS = 4
GOAL = 2.5
"""Tokens a second of Ulysses over those of Megatron-SP at 200 Mbit/s that the comparison was to show."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A GPU of a cluster: its peak in bf16 without sparsity, and the rate of its own link to other nodes."""

    name: str
    flops: float
    bytes_per_second: float


CLUSTERS = (
    Cluster(name="A100, 200 Gbit/s a GPU", flops=312e12, bytes_per_second=25e9),
    Cluster(name="H100, 400 Gbit/s a GPU", flops=989e12, bytes_per_second=50e9),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """The sizes of a run: (Mbit/s, layers) of fixed rates, layers at the clusters' rates, decoder, rows a step, methods."""

    rates: tuple[tuple[float, int], ...]
    cluster_layers: int
    tokens: int
    hidden: int
    heads: int
    ffn: int
    steps: int = 1
    clusters: tuple[Cluster, ...] = CLUSTERS
    rows: int = 1
    methods: tuple[Method, ...] = TIMED


WHOLE = Case(rates=((200, 8), (1000, 8)), cluster_layers=1, tokens=8192, hidden=512, heads=8, ffn=1408)
ACCUMULATED = Case(
    rates=((200, 8),),
    cluster_layers=1,
    tokens=8192,
    hidden=512,
    heads=8,
    ffn=1408,
    clusters=(),
    rows=8,
    methods=(ULYSSES, MEGATRON),
)
SMALL = Case(rates=((200, 1), (1000, 1)), cluster_layers=1, tokens=512, hidden=64, heads=4, ffn=128)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What the ranks found for one method: seconds of each step, bytes that a rank sends in one, and {collective: how}."""

    seconds: list[float]
    sent: int
    collectives: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One rate: its name, Mbit/s, layers, the FLOP/s of a rank, the tokens of a step, and what was found for each method."""

    name: str
    mbit: float
    layers: int
    flops_a_rank: float
    tokens: int
    methods: dict[str, Timed]

    def seconds(self, method: str) -> float:
        """Seconds of a step for each layer."""
        return median(self.methods[method].seconds) / self.layers

    def sent(self, method: str) -> int:
        """The bytes that a rank sends in a step, counted by the kernel, without headers: exchanges and averaged gradients."""
        return self.methods[method].sent


def measure(case: Case) -> list[Point]:
    """Time every method at every rate: first the fixed rates, then those of the clusters."""
    points = [_point(f"{mbit:g} Mbit/s", mbit, layers, case) for mbit, layers in case.rates]
    for cluster in case.clusters:
        points.append(_point(cluster.name, equal_rate(points[0].flops_a_rank, cluster), case.cluster_layers, case))
    return points


def equal_rate(flops_a_rank: float, cluster: Cluster) -> float:
    """The Mbit/s at which a rank sends as many bytes per FLOP of its matrix products as a GPU of the cluster at its peak."""
    return flops_a_rank * cluster.bytes_per_second / cluster.flops * 8 / 1e6


def _point(name: str, mbit: float, layers: int, case: Case) -> Point:
    with TemporaryDirectory(prefix="longspan-") as folder, hosts(HOSTS, mbit) as made:
        asked = {name: getattr(case, name) for name in ("tokens", "hidden", "heads", "ffn", "steps", "rows")}
        asked |= {"folder": folder, "layers": layers, "methods": [method.name for method in case.methods]}
        ranks.run(made, 1, ["-m", "benchmarks.hosts.throughput_rank", json.dumps(asked)], timeout=3600)
        found = json.loads(Path(folder, "found.json").read_text())
    methods = {method: Timed(**timed) for method, timed in found["methods"].items()}
    point = Point(
        name=name, mbit=mbit, layers=layers, tokens=case.tokens * case.rows, flops_a_rank=found["flops_a_rank"], methods=methods
    )
    print(_rows(point), flush=True)
    return point


HEADER = (
    "| link | layers | method | seconds a step | tokens/s | of Megatron-SP | MiB that a rank sends | sending alone, s |\n"
    "|---|---|---|---|---|---|---|---|"
)


def _rows(point: Point) -> str:
    found = []
    for method in point.methods:
        seconds = point.seconds(method) * point.layers
        ratio, sent = point.seconds(MEGATRON.name) / point.seconds(method), point.sent(method)
        cells = [f"{point.name} ({point.mbit:.0f} Mbit/s)" if method == ULYSSES.name else "", str(point.layers), method]
        cells += [f"{seconds:.2f}", f"{point.tokens / seconds:,.0f}", f"{ratio:.2f}", f"{sent / 2**20:,.1f}"]
        found.append(f"| {' | '.join(cells)} | {sent * 8e-6 / point.mbit:.2f} |")
    return "\n".join(found)


def text(points: Sequence[Point]) -> str:
    """The table, the arithmetic of the clusters' rates, the collectives of Megatron-SP, and where its ratio crosses."""
    parts = [table(points), "", *(_arithmetic(points[0].flops_a_rank, cluster) for cluster in CLUSTERS), ""]
    return "\n".join(
        [*parts, collectives(points), "", _crossings(points), "", "![Seconds of a layer over the rate](wire-throughput.svg)"]
    )


def table(points: Sequence[Point]) -> str:
    """The rows of all points and methods."""
    return "\n".join([HEADER, *map(_rows, points)])


def collectives(points: Sequence[Point]) -> str:
    """A line for each point: which collectives of Megatron-SP were the faster ones."""
    found = []
    for point in points:
        used = "; ".join(f"{name} {how}" for name, how in point.methods[MEGATRON.name].collectives.items())
        found.append(f"Megatron-SP at {point.name}: {used}.")
    return "\n".join(found)


def _arithmetic(flops: float, cluster: Cluster) -> str:
    return (
        f"{cluster.name}: {cluster.bytes_per_second:.3g} B/s / {cluster.flops:.3g} FLOP/s = "
        f"{cluster.bytes_per_second / cluster.flops:.2e} bytes a FLOP; a rank here multiplies with {flops / 1e9:.1f} GFLOP/s "
        f"while all {HOSTS} do, so its link gets {equal_rate(flops, cluster):.1f} Mbit/s."
    )


def _curves(points: Sequence[Point]) -> dict[str, Line]:
    """For each method the line seconds of a layer = a + b / Mbit/s through its points."""
    return {method: fit([(1 / point.mbit, point.seconds(method)) for point in points]) for method in points[0].methods}


def _crossings(points: Sequence[Point]) -> str:
    """Where the lines of ``_curves`` cross that of Ulysses, as text."""
    curves = _curves(points)
    mine = curves.pop(ULYSSES.name)
    goal = where_ratio(curves[MEGATRON.name], mine, GOAL)
    equal = {method: where_ratio(line, mine, 1.0) for method, line in curves.items()}
    crossing = [f"that of {method} at {1 / rate:.3g} Mbit/s" for method, rate in equal.items() if rate is not None]
    reached = "at no rate" if goal is None else f"below {1 / goal:.3g} Mbit/s"
    return (
        f"By lines a + b / rate through the points Ulysses is {GOAL} x Megatron-SP {reached}; its line crosses "
        f"{', '.join(crossing) or 'that of no other method'}."
    )


def figure(points: Sequence[Point]) -> str:
    """Seconds of a layer over the rate of the links: measured as points, a + b / rate as lines."""
    curves = _curves(points)
    low, high = min(point.mbit for point in points) / 2, max(point.mbit for point in points) * 4
    rates = [low * (high / low) ** (step / 40) for step in range(41)]
    series = [
        Series(
            name=method,
            points=[(point.mbit, point.seconds(method)) for point in points],
            curve=[(rate, curve.at(1 / rate)) for rate in rates if curve.at(1 / rate) > 0],
        )
        for method, curve in curves.items()
    ]
    return lines(series, x="Mbit/s of a link, each direction", y="seconds of a step, per layer")

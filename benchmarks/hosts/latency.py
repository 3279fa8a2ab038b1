"""What Ulysses adds to a layer, in seconds, beside its closed form: python -m benchmarks.hosts latency [--write]

    seconds = collectives * latency + bytes / rate          2 collectives forward and 4 in a step; bytes of forms.py

Latency and rate are those of the set-up: fitted on some numbers of tokens, then compared on others. 4 hosts of one rank.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.hosts import ranks
from benchmarks.hosts.fit import Line, fit
from benchmarks.hosts.forms import Size, layer_bytes
from benchmarks.hosts.namespaces import hosts

COLLECTIVES = (2, 4)
"""All-to-alls of a layer, forward and in a step."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The sizes of a run: tokens on which the line is fitted, tokens on which it is compared, links, and the layer."""

    fitted: tuple[int, ...]
    compared: tuple[int, ...]
    mbits: tuple[float, ...] = (200, 1000)
    hosts: int = 4
    hidden: int = 512
    heads: int = 8
    ffn: int = 1408
    repeats: int = 5


WHOLE = Case(fitted=(512, 1536, 6144, 16384), compared=(1024, 2048, 3072, 4096, 8192, 12288))
SMALL = Case(fitted=(256, 1024), compared=(512,), mbits=(200,), repeats=1)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One link, by tokens: what the exchanges of a layer take and what the whole layer takes.

    Attributes:
        mbit: the rate.
        seconds: (forward, step) of the exchanges.
        layer: seconds of a training step for each layer, the exchanges among them.
        case: the sizes.
    """

    mbit: float
    seconds: dict[int, tuple[float, float]]
    layer: dict[int, float]
    case: Case

    def sent(self, tokens: int, way: int) -> int:
        """The bytes that a rank sends for a layer, forward (0) or in a step (1)."""
        return layer_bytes("ulysses", "none", Size(tokens=tokens, hidden=self.case.hidden, hosts=self.case.hosts))[way]

    @property
    def line(self) -> Line:
        """Seconds of one collective: a latency, and seconds a byte; fitted on ``case.fitted`` only, both passes together."""
        points = [
            (self.sent(tokens, way) / COLLECTIVES[way], self.seconds[tokens][way] / COLLECTIVES[way])
            for tokens in self.case.fitted
            for way in (0, 1)
        ]
        return fit(points)

    def predicted(self, tokens: int, way: int) -> float:
        """The closed form in seconds."""
        return COLLECTIVES[way] * self.line.offset + self.sent(tokens, way) * self.line.slope


def measure(case: Case) -> list[Found]:
    """Time the exchanges of a layer on every link."""
    return [_on_link(mbit, case) for mbit in case.mbits]


def _on_link(mbit: float, case: Case) -> Found:
    with TemporaryDirectory(prefix="longspan-") as folder, hosts(case.hosts, mbit) as made:
        asked = {name: getattr(case, name) for name in ("hosts", "hidden", "heads", "ffn", "repeats")}
        asked |= {"folder": folder, "tokens": [*case.fitted, *case.compared], "shares": case.compared}
        ranks.run(made, 1, ["-m", "benchmarks.hosts.latency_rank", json.dumps(asked)], timeout=1800)
        found = json.loads(Path(folder, "found.json").read_text())
    seconds = {int(tokens): (both[0], both[1]) for tokens, both in found["exchanges"].items()}
    return Found(mbit=mbit, seconds=seconds, layer={int(tokens): one for tokens, one in found["layer"].items()}, case=case)


HEADER = (
    "| tokens | MiB sent forward | forward, ms | closed form | apart | step, ms | closed form | apart | of a layer's step |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def text(found: Sequence[Found]) -> str:
    """The fitted latency and rate of each link, and predicted beside measured seconds of the sizes that were not fitted."""
    parts = []
    for link in found:
        latency, rate = link.line.offset, 8e-6 / link.line.slope
        parts.append(
            f"{link.mbit:g} Mbit/s: {latency * 1e3:.2f} ms a collective and {rate:.0f} Mbit/s, fitted on "
            f"{', '.join(f'{tokens:,}' for tokens in link.case.fitted)} tokens."
        )
        parts += ["", HEADER]
        for tokens in link.case.compared:
            cells = [f"{tokens:,}", f"{link.sent(tokens, 0) / 2**20:.2f}"]
            for way in (0, 1):
                measured, predicted = link.seconds[tokens][way], link.predicted(tokens, way)
                cells += [f"{measured * 1e3:.1f}", f"{predicted * 1e3:.1f}", f"{predicted / measured - 1:+.1%}"]
            cells.append(f"{link.seconds[tokens][1] / link.layer[tokens]:.0%}")
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)

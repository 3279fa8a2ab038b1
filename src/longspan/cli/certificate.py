"""The certificate of ``longspan check``: one JSON file that says what was compared, on what, and with which verdict.

    {"holds": true,
     "model": {...}, "batch": {...}, "layout": {"ulysses": 2, ..., "zero": 3}, "versions": {"torch": "2.13.0", ...},
     "compared": {"loss": {...}, "gradients": {...}, "norm": {...}},
     "traffic": [{"what": "ulysses: bytes, forward", "found": 8192, "expected": 8192, ...}, ...]}

Independent of how the numbers were made.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from longspan.cli.config import Check
from longspan.cli.model_source import ModelSource
from longspan.distributed.mesh import AXES, ParallelMesh
from longspan.distributed.software import software
from longspan.errors import RunError


class Line(NamedTuple):
    """One line of the check's table: what is compared, found and expected values, the error and the largest legal one.

    Attributes:
        kind: "loss", "gradients", "norm" or "traffic".
        what: the name of the line.
        found: the value over the mesh.
        expected: the value on one device; of traffic, that of the closed form.
        error: how far they differ: relative, of traffic absolute.
        bound: the largest legal error.
    """

    kind: str
    what: str
    found: float
    expected: float
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether ``error <= bound``; False if the error is NaN."""
        return self.error <= self.bound


def write(path: str, config: Check, source: ModelSource, mesh: ParallelMesh, lines: list[Line]) -> None:
    """Write the certificate to the file ``path``, by one rank.

    Args:
        path: the file; an existing one is replaced.
        config: the settings of the check.
        source: the model.
        mesh: the ranks.
        lines: all lines of the table.

    Raises:
        RunError: the file cannot be written.
    """
    text = json.dumps(_content(config, source, mesh, lines), indent=2, allow_nan=False) + "\n"
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise RunError(f"the certificate {path} cannot be written: {error.strerror}; name another file") from error


def _content(config: Check, source: ModelSource, mesh: ParallelMesh, lines: list[Line]) -> dict[str, Any]:
    """The certificate as JSON values: verdict, model, batch, layout, device, versions and every line."""
    at = mesh.coordinate
    traffic = [_numbers(line) for line in lines if line.kind == "traffic"]
    return {
        "holds": all(line.holds for line in lines),
        "model": {"name": config.model, "summary": source.summary, **source.described()},
        "batch": {"rows": config.rows, "micro_batches": config.micro_batches, "tokens": config.tokens, "seed": config.seed}
        | {"dtype": config.dtype},
        "layout": {axis.name: getattr(at, axis.name) for axis in AXES}
        | {"zigzag": at.zigzag, "zero": config.zero, "schedule": config.schedule, "stages_per_rank": config.stages_per_rank}
        | asdict(config.memory),
        "device": str(mesh.device.type),
        "versions": software(),
        "hosts": list(mesh.hosts),
        "compared": {line.kind: _numbers(line) for line in lines if line.kind != "traffic"},
        "traffic": traffic or "not compared: the closed forms are those of the decoder",
    }


def _numbers(line: Line) -> dict[str, Any]:
    """{field: value} of one line, with its verdict ``holds``; a number that JSON cannot write (NaN, infinite) as text."""
    values = {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x for name, x in line._asdict().items()}
    return values | {"holds": line.holds}

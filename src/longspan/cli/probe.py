"""``longspan probe``: measure this machine or cluster into a JSON that ``longspan plan --hardware FILE`` reads.

matrix products, attention, memory copies of each rank  |  collectives of all ranks   ->   hardware.json, and a table
"""

from dataclasses import dataclass

from longspan.cli.config import Ranks
from longspan.errors import RunError


@dataclass(frozen=True)
class ProbeSettings(Ranks):
    """Settings of ``longspan probe``."""

    out: str = "hardware.json"
    """The file to write."""
    largest_mib: int = 16
    """Size of the largest message of the collectives, in MiB."""
    repeats: int = 5
    """How often each figure is measured; the median counts, and the spread is printed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("largest_mib", "repeats"):
            if getattr(self, name) < 1:
                raise RunError(f"{name}={getattr(self, name)} must be at least 1")


def work(config: ProbeSettings) -> int:
    """Measure on this rank; rank 0 writes the file and prints the table.

    Returns:
        The exit code 0.

    Raises:
        RunError: the file cannot be written; raised on every rank with the same text.
    """
    from longspan.cli.measure import measure_and_write

    return measure_and_write(config.out, config.largest_mib, config.repeats, config.timeout)

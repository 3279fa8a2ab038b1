"""A straight line through measured values by least squares of relative errors, and where two lines have a ratio."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """``y = offset + slope * x``."""

    offset: float
    slope: float

    def at(self, x: float) -> float:
        """The value at ``x``."""
        return self.offset + self.slope * x


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """The line whose relative errors ``(offset + slope x - y) / y`` have the least sum of squares.

    Args:
        points: at least two (x, y) with different x and y > 0.
    """
    ones = [(1 / y, x / y) for x, y in points]
    aa, ab, bb = (sum(one[i] * one[j] for one in ones) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(one[i] for one in ones) for i in (0, 1))
    determinant = aa * bb - ab * ab
    return Line((a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant)


def where_ratio(above: Line, below: Line, ratio: float) -> float | None:
    """The x > 0 at which ``above`` is ``ratio`` times ``below``; None if there is none."""
    slope = above.slope - ratio * below.slope
    x = (ratio * below.offset - above.offset) / slope if slope else 0.0
    return x if x > 0 else None

"""Paired measurements: contestants take turns, ratios are formed round by round, tables give medians and quartiles.

    round 0     longspan  peer  bare         the order is reversed from round to round, so that a machine that slows down
    round 1     bare  peer  longspan         slows every contestant alike
    ratio       longspan / peer of the same round; its median and quartiles over the rounds

A ratio of medians would mix rounds in which the machine was fast with rounds in which it was slow. Numbers only, no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TypeVar

Name = TypeVar("Name")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median and the quartiles of some numbers."""

    median: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """The interquartile range."""
        return self.high - self.low

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """The median and quartiles of ``values``; of one or two values the quartiles are the smallest and the largest."""
    if not values:
        raise ValueError("no value was measured, so that there is no median; measure at least one round")
    if len(values) < 3:
        return Spread(median=median(values), low=min(values), high=max(values))
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Spread(median=median(values), low=low, high=high)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """The spread of ours / theirs, where numbers at the same place were measured in the same round."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def in_turns(turns: Mapping[Name, Callable[[], Result]], rounds: int) -> dict[Name, list[Result]]:
    """Call every function once in each round, in an order that is reversed from round to round.

    Args:
        turns: for each contestant the function that makes one turn and returns what it measured.
        rounds: the number of rounds.

    Returns:
        For each contestant its results, in the order of the rounds.
    """
    results: dict[Name, list[Result]] = {name: [] for name in turns}
    for number in range(rounds):
        for name in list(turns) if number % 2 == 0 else list(turns)[::-1]:
            results[name].append(turns[name]())
    return results


def verdict(ratio: Spread, goal: float, widest: float | None = None) -> str:
    """Whether a ratio that is to be at most ``goal`` is: "holds", "misses", or "not decided" where its quartiles lie further
    apart than ``widest``."""
    if widest is not None and ratio.width >= widest:
        return "not decided"
    return "holds" if ratio.median <= goal else "misses"

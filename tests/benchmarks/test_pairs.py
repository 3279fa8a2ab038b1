"""Paired measurements: the order of the turns, ratios round by round, medians, quartiles and verdicts."""

import pytest

from benchmarks.peers.pairs import Spread, in_turns, paired_ratio, spread, verdict


def test_contestants_take_turns_and_the_order_is_reversed_from_round_to_round() -> None:
    called: list[str] = []

    def turn(name: str) -> int:
        called.append(name)
        return len(called)

    results = in_turns({name: lambda name=name: turn(name) for name in "abc"}, 3)
    assert "".join(called) == "abccbaabc"
    assert results == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}


def test_a_ratio_is_taken_pair_by_pair_so_that_a_slow_round_does_not_change_it() -> None:
    ours, theirs = [1.0, 10.0, 1.0, 1.0], [2.0, 20.0, 2.0, 2.0]  # the machine was ten times slower in one round
    assert paired_ratio(ours, theirs) == Spread(median=0.5, low=0.5, high=0.5)
    with pytest.raises(ValueError, match="argument 2"):
        paired_ratio([1.0], [1.0, 2.0])


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert spread([2.0, 1.0]) == Spread(median=1.5, low=1.0, high=2.0)
    assert str(spread([1.0])) == "1.00 (1.00 to 1.00)"
    with pytest.raises(ValueError, match="no value was measured"):
        spread([])


def test_a_verdict_is_not_decided_where_the_quartiles_lie_too_far_apart() -> None:
    narrow, wide = Spread(median=1.01, low=1.0, high=1.015), Spread(median=1.01, low=1.0, high=1.02)
    assert verdict(narrow, 1.02, widest=0.02) == "holds"
    assert verdict(narrow, 1.00, widest=0.02) == "misses"
    assert verdict(wide, 1.02, widest=0.02) == "not decided"
    assert verdict(wide, 1.02) == "holds"

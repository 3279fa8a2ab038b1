"""Layers split into stages by their cost, and options that do not go together."""

from itertools import pairwise
from typing import Any

import pytest

from longspan import LayoutError, ModelError, PipelineOptions
from longspan.distributed.pipeline_options import split_layers


def test_layers_are_split_by_their_cost() -> None:
    assert split_layers([1.0] * 5, 2) == (range(3), range(3, 5))
    assert split_layers([1.0] * 6, 2, last_cost=2.0) == (range(4), range(4, 6))
    assert split_layers([1.0, 1.0, 5.0, 1.0], 3) == (range(2), range(2, 3), range(3, 4))


@pytest.mark.parametrize(("costs", "stages"), [([3.0, 1.0, 4.0, 1.0, 5.0, 9.0], 3), ([2.0] * 7, 4), ([1.0, 8.0], 2)])
def test_no_other_split_has_a_cheaper_stage(costs: list[float], stages: int) -> None:
    def most(cuts: tuple[int, ...]) -> float:
        edges = (0, *cuts, len(costs))
        return max(sum(costs[a:b]) + (2.0 if b == len(costs) else 0) for a, b in pairwise(edges))

    def all_cuts(start: int, left: int) -> list[tuple[int, ...]]:
        if not left:
            return [()]
        return [(cut, *more) for cut in range(start, len(costs) - left + 1) for more in all_cuts(cut + 1, left - 1)]

    runs = split_layers(costs, stages, last_cost=2.0)
    assert most(tuple(run.start for run in runs[1:])) == min(map(most, all_cuts(1, stages - 1)))


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(LayoutError, match="2 layers cannot be split into 3 pipeline stages; use up to 2"):
        split_layers([1.0, 1.0], 3)


@pytest.mark.parametrize(("schedule", "per_rank"), [("zigzag", 1), ("1f1b", 2), ("interleaved", 1)])
def test_options_that_do_not_go_together_are_refused(schedule: Any, per_rank: int) -> None:
    with pytest.raises(LayoutError, match=r"is unknown|does not go with"):
        PipelineOptions(schedule, per_rank)


@pytest.mark.parametrize(("micro_batches", "legal"), [(1, False), (2, True), (3, True), (4, True), (5, False), (6, True)])
def test_interleaved_stages_take_whole_rounds(micro_batches: int, legal: bool) -> None:
    PipelineOptions().refuse_broken_rounds(2, micro_batches)
    options = PipelineOptions("interleaved", 2)
    if legal:
        options.refuse_broken_rounds(2, micro_batches)
    else:
        with pytest.raises(ModelError, match=f"in whole rounds of 2 ranks, and the step has {micro_batches}; "):
            options.refuse_broken_rounds(2, micro_batches)

"""The schedule of a pipeline, and layers split into stages by cost. Numbers and names only: no torch.

    costs of layers  1 1 5 1   --split_layers, 3 stages-->   layers 0-1 | layer 2 | layer 3

The most expensive stage decides how long a step takes, so its cost is what is made small.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from longspan.errors import LayoutError, ModelError


@dataclass(frozen=True)
class PipelineOptions:
    """How the stages of a pipeline work: ``pipeline=`` of ``parallelize``. Frozen, checked when made.

    Raises:
        LayoutError: an unknown schedule, or several stages on a rank with a schedule that has none.
    """

    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    """The order of forwards and backwards: "1f1b" holds the activations of at most as many micro-batches as stages follow,
    "gpipe" those of all, "interleaved" has several stages on each rank and a shorter bubble."""
    stages_per_rank: int = 1
    """Stages on each rank, in turn: rank 0 has stages 0, p, 2p, ...; more than 1 needs "interleaved"."""

    def __post_init__(self) -> None:
        if self.schedule not in ("1f1b", "gpipe", "interleaved"):
            raise LayoutError(f"schedule={self.schedule!r} is unknown; legal are '1f1b', 'gpipe' and 'interleaved'")
        if (self.stages_per_rank > 1) != (self.schedule == "interleaved") or self.stages_per_rank < 1:
            raise LayoutError(
                f"stages_per_rank={self.stages_per_rank} does not go with schedule={self.schedule!r}; use 'interleaved' with 2 "
                f"or more, the others with 1"
            )

    def refuse_without_stages(self, pipeline: int) -> None:
        """Raise ModelError for options on one stage only (``pipeline`` 1); otherwise return."""
        if pipeline == 1 and self != PipelineOptions():
            raise ModelError(f"pipeline={self} needs a mesh with pipeline > 1; use ParallelMesh(pipeline=...), or leave it out")

    def refuse_broken_rounds(self, pipeline: int, micro_batches: int) -> None:
        """Raise ModelError for a number of micro-batches that interleaved stages on ``pipeline`` ranks cannot run."""
        rounds = max(1, micro_batches // pipeline)
        if self.schedule == "interleaved" and (micro_batches % rounds or micro_batches < pipeline):
            raise ModelError(
                f"interleaved stages need micro-batches in whole rounds of {pipeline} ranks, and the step has {micro_batches}; "
                f"pass a multiple of {pipeline}, or use schedule='1f1b'"
            )


def split_layers(costs: Sequence[float], stages: int, *, last_cost: float = 0.0) -> tuple[range, ...]:
    """Split consecutive layers into ``stages`` ranges so that the most expensive stage costs as little as possible.

    Args:
        costs: the cost of each layer.
        stages: the number of stages, each of which gets at least one layer.
        last_cost: what the last stage computes besides (the head).

    Returns:
        For each stage the indices of its layers. Of equally good splits, earlier stages have more layers.

    Raises:
        LayoutError: fewer layers than stages.
    """
    if len(costs) < stages:
        raise LayoutError(
            f"{len(costs)} layers cannot be split into {stages} pipeline stages; use up to {len(costs)} "
            f"(pipeline x stages_per_rank)"
        )
    before = [0.0, *accumulate(costs)]
    # best[n]: the smallest maximum over the last s stages of layers n.., with the end of the first of them.
    best = {n: (before[-1] - before[n] + last_cost, len(costs)) for n in range(len(costs))}
    plans = [best]
    for left in range(2, stages + 1):
        best = {
            n: min((max(before[end] - before[n], best[end][0]), -end) for end in range(n + 1, len(costs) - left + 2))
            for n in range(len(costs) - left + 1)
        }  # fmt: skip
        best = {n: (cost, -end) for n, (cost, end) in best.items()}
        plans.append(best)
    cuts = [0]
    for plan in reversed(plans):
        cuts.append(plan[cuts[-1]][1])
    return tuple(range(start, stop) for start, stop in pairwise(cuts))

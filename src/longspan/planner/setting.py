"""What every formula of a plan reads: model, cluster, recipe, workload and the fitted constants; the ranks along each axis.

The five fields of ``Constants`` are fitted to published measurements (docs/planner.md); everything else is arithmetic.
"""

from dataclasses import dataclass
from typing import Any

from longspan.planner.closed_forms import Number
from longspan.planner.collectives import Group
from longspan.planner.hardware import Cluster
from longspan.planner.model import ModelShape
from longspan.planner.strategy import Recipe, Workload


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The five numbers that are fitted to published measurements; the same for every model, device and source.

    Attributes:
        matmul: share of the measured rate of large matrix products that those of a training step reach.
        attention_keys: keys a query at which an attention kernel reaches half of its rate.
        dispatch: seconds in which the host starts one operator.
        host_update: seconds in which the host of a node updates one parameter of an offloaded optimizer.
        reserve: bytes of a process beside its tensors: context, buffers of collectives, fragmentation.
    """

    matmul: float = 0.70
    attention_keys: float = 128.0
    dispatch: float = 20e-6
    host_update: float = 2e-9
    reserve: float = 4e9


@dataclass(frozen=True)
class Setting:
    """What all formulas read beside a strategy; they call it ``x``, and the strategy ``s``.

    Attributes:
        shape: the model.
        cluster: the accelerators and links.
        recipe: what the training software does: dtype, kernels, what is fused, bytes kept for a parameter.
        workload: tokens and rows of a step.
        constants: the fitted numbers.
    """

    shape: ModelShape
    cluster: Cluster
    recipe: Recipe
    workload: Workload
    constants: Constants = Constants()

    @property
    def matmul_rate(self) -> float:
        """Operations a second that a large matrix product reaches within a training step, in the recipe's dtype."""
        rates = self.cluster.accelerator.matmul
        return rates.get(self.recipe.dtype, rates["bf16"]) * self.constants.matmul


def groups(cluster: Cluster, s: Any) -> dict[str, Group]:
    """The ranks along each axis of the strategy ``s``, and along "fsdp": data x ring x ulysses, ``tensor`` ranks apart."""
    stride: Number = 1
    found = {}
    for axis in ("tensor", "ulysses", "ring", "data", "pipeline"):
        found[axis] = Group(getattr(s, axis), stride, cluster)
        stride = stride * getattr(s, axis)
    found["fsdp"] = Group(s.data * s.ring * s.ulysses, s.tensor, cluster)
    return found


def rank_tokens(workload: Workload, s: Any) -> Number:
    """Tokens of a micro-batch on one rank of the strategy ``s`` within a tensor region: micro_batch · N / (ring · ulysses)."""
    return s.micro_batch * workload.tokens / (s.ring * s.ulysses)

"""The mean loss over every labelled token of the whole batch, the same number on every rank. Knows nothing of models or masks.

    rank 0   - 7.1 2.3 - -      sum of mine \\
    rank 1   4.0 - - 1.1 0.7    sum of mine  >  all-reduced  /  labelled tokens of all ranks  =  one device's loss
    rank 2   - - - - -          0           /

Ranks hold unequally many labels, and some hold none: a mean of the ranks' means would be another loss. The sum over ranks
has its true adjoint, so with gradients averaged over the ranks every rank's labels count once.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from longspan.batch import IGNORE
from longspan.collectives import all_reduce_sum
from longspan.mesh import ParallelMesh


def cross_entropy(
    logits: Float[Tensor, "*tokens vocab"],
    labels: Int[Tensor, "*tokens"],
    *,
    mesh: ParallelMesh | None = None,
    labelled: int | None = None,
) -> Float[Tensor, ""]:
    """The mean cross-entropy (nats) of the labelled tokens of all ranks; ``labels`` stand where they are predicted.

    Equals ``F.cross_entropy(logits, labels)`` on the whole batch (of all data replicas), in fp32, or fp64 for fp64 logits. A
    token labelled -100 is not learned from; where no rank has a label the loss is 0 with zero gradients.

    ``labelled`` is what the sum is divided by: ``Step.labelled``, so that over the micro-batches of an accumulated step the
    losses add up to the mean of all. Without it the labels of this call are counted, by one more all-reduce.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    exact = rows if rows.dtype == torch.float64 else rows.float()
    total = F.cross_entropy(exact, labels.reshape(-1), ignore_index=IGNORE, reduction="sum")
    count = (labels != IGNORE).sum() if labelled is None else torch.tensor(labelled, device=logits.device)
    if mesh is not None:
        total = all_reduce_sum(total, mesh.mean_group)
        count = all_reduce_sum(count, mesh.mean_group) if labelled is None else count
    return total / count.clamp(min=1)

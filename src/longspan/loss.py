"""The mean loss over every labelled token of the whole batch, the same number on every rank. Knows nothing of models or masks.

    rank 0   - 7.1 2.3 - -      sum of mine \\
    rank 1   4.0 - - 1.1 0.7    sum of mine  >  all-reduced  /  labelled tokens of all ranks  =  one device's loss
    rank 2   - - - - -          0           /

Ranks hold unequally many labels, and some hold none: a mean of the ranks' means would be another loss. The sum over ranks
has its true adjoint, so with gradients averaged over the ranks every rank's labels count once.

    hidden [tokens, M] --head [V, M]--> logits [tokens, V]         128,256 words in fp32: half a megabyte a token, three times
           a tile of tokens at a time: logits, their sum, drop           again in the backward: logits, softmax, gradient

N labelled tokens   M hidden   V vocabulary
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial

from longspan.batch import IGNORE
from longspan.collectives import all_reduce_sum
from longspan.footprint import LOSS_TILE_BYTES
from longspan.mesh import ParallelMesh

TILE_BYTES = LOSS_TILE_BYTES


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
    return mean_over_ranks(total, labels != IGNORE, mesh, labelled)


def linear_cross_entropy(
    hidden: Float[Tensor, "*tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, "*tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    mesh: ParallelMesh | None = None,
    labelled: int | None = None,
    ignore_index: int = IGNORE,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Tensor, ""]:
    """``cross_entropy`` of the logits of a linear head that are never there at once.

    Equals ``F.cross_entropy(scale * (hidden @ weight.T + bias), labels, ...)`` on the whole batch, where a ``softcap`` c turns
    a logit x into c·tanh(x/c), plus ``z_loss`` times the mean square of the log-sum-exp. The backward forms the logits of each
    tile again; the head's gradient is formed there too, so whatever scales the loss reaches it, and summed over tiles in fp32.

    ``weight`` may be tied, and a DTensor (its gradient is then the mean over the ranks, as FSDP2 forms it). Under autocast the
    products are in its dtype. ``labelled`` as in ``cross_entropy``. Source: z-loss, arXiv:2204.02311.
    """
    wanted = labels.reshape(-1) != ignore_index
    weight, bias = _whole(weight), None if bias is None else _whole(bias)
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
    say = _Say(scale, softcap, label_smoothing, z_loss, dtype if hidden.dtype != torch.float64 else torch.float64)
    rows, targets = wanted.nonzero().flatten(), labels.reshape(-1)[wanted].long()
    hidden_RM = hidden.reshape(-1, hidden.shape[-1])
    total: Tensor = _TiledLoss.apply(hidden_RM, weight, bias, rows, targets, say)  # type: ignore[no-untyped-call]
    return mean_over_ranks(total, wanted, mesh, labelled)


def mean_over_ranks(total: Tensor, wanted: Tensor, mesh: ParallelMesh | None, labelled: int | None) -> Float[Tensor, ""]:
    """The sum of all ranks' ``total``, divided by ``labelled`` (None: by how many tokens they want); 0 where none is."""
    count = wanted.sum() if labelled is None else torch.tensor(labelled, device=total.device)
    if mesh is not None:
        total = all_reduce_sum(total, mesh.mean_group)
        count = all_reduce_sum(count, mesh.mean_group) if labelled is None else count
    return total / count.clamp(min=1)


class _Say(NamedTuple):
    """How logits become a loss, and the dtype of the products with the head."""

    scale: float
    softcap: float | None
    smoothing: float
    z_loss: float
    dtype: torch.dtype

    def logits(self, hidden_NM: Tensor, weight_VM: Tensor, bias: Tensor | None) -> Tensor:
        """In fp32 (fp64 for fp64), in memory of their own."""
        logits_NV = hidden_NM @ weight_VM.T
        logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        if bias is not None:
            logits_NV += bias
        if self.scale != 1.0:
            logits_NV *= self.scale
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV

    def through_softcap_and_scale(self, dlogits_NV: Tensor, logits_NV: Tensor) -> None:
        """Turn the gradient of the logits, in place, into that of the products with the head."""
        if self.softcap is not None:
            dlogits_NV *= 1 - (logits_NV / self.softcap).square_()
        if self.scale != 1.0:
            dlogits_NV *= self.scale


class _TiledLoss(torch.autograd.Function):
    """The sum of the losses of the labelled rows of hidden; keeps their log-sum-exp and no logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RM: Tensor, weight_VM: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor, say: _Say
    ) -> Tensor:
        lses, total = [], hidden_RM.new_zeros((), dtype=_wide(hidden_RM.dtype))
        with torch.autocast(hidden_RM.device.type, enabled=False):
            cast_VM = weight_VM.to(say.dtype)
            for mine, wanted in _tiles(rows, targets, len(weight_VM)):
                logits_NV = say.logits(hidden_RM[mine].to(say.dtype), cast_VM, bias)
                hit = logits_NV.gather(1, wanted[:, None]).squeeze(1)
                mean = logits_NV.mean(1) if say.smoothing else hit
                top = logits_NV.amax(1)
                lse = logits_NV.sub_(top[:, None]).exp_().sum(1).log_().add_(top)
                losses = lse - torch.lerp(hit, mean, say.smoothing) + say.z_loss * lse.square()
                total += losses.sum()
                lses.append(lse)
        ctx.save_for_backward(hidden_RM, weight_VM, bias, rows, targets, torch.cat(lses) if lses else targets)
        ctx.say = say
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Any, ...]:
        hidden_RM, weight_VM, bias, rows, targets, lses = ctx.saved_tensors
        say: _Say = ctx.say
        wide, head = _wide(hidden_RM.dtype), weight_VM.requires_grad
        dhidden_RM = torch.zeros_like(hidden_RM)
        dweight_VM = torch.zeros_like(weight_VM, dtype=wide) if head else None
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        cast_VM = weight_VM.to(say.dtype)
        lse_of_tiles = iter(lses.split(tile_rows(len(weight_VM))))
        for mine, wanted in _tiles(rows, targets, len(weight_VM)):
            lse = next(lse_of_tiles)[:, None]
            hidden_NM = hidden_RM[mine].to(say.dtype)
            logits_NV = say.logits(hidden_NM, cast_VM, bias)
            kept = logits_NV.clone() if say.softcap is not None else logits_NV
            dlogits_NV = logits_NV.sub_(lse).exp_()
            if say.z_loss:
                dlogits_NV *= 1 + 2 * say.z_loss * lse
            if say.smoothing:
                dlogits_NV -= say.smoothing / len(weight_VM)
            dlogits_NV.scatter_add_(1, wanted[:, None], torch.full_like(lse, say.smoothing - 1))
            say.through_softcap_and_scale(dlogits_NV, kept)
            dlogits_NV *= dtotal
            if dbias is not None:
                dbias += dlogits_NV.sum(0)
            cast_NV = dlogits_NV.to(say.dtype)
            dhidden_RM[mine] = (cast_NV @ cast_VM).to(dhidden_RM.dtype)
            if dweight_VM is not None:
                _add_product(dweight_VM, cast_NV, hidden_NM)
        of = (dhidden_RM, None if dweight_VM is None else dweight_VM.to(weight_VM.dtype), None if bias is None else dbias)
        return *of, None, None, None


def _add_product(dweight_VM: Tensor, dlogits_NV: Tensor, hidden_NM: Tensor) -> None:
    if dweight_VM.dtype == dlogits_NV.dtype:
        dweight_VM.addmm_(dlogits_NV.T, hidden_NM)
    else:
        dweight_VM += dlogits_NV.T @ hidden_NM


def _tiles(rows: Tensor, targets: Tensor, vocab: int) -> list[tuple[Tensor, Tensor]]:
    size = tile_rows(vocab)
    return list(zip(rows.split(size), targets.split(size))) if len(rows) else []


def tile_rows(vocab: int) -> int:
    """How many tokens' logits are there at a time."""
    return max(1, TILE_BYTES // (4 * vocab))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _whole(head: Tensor) -> Tensor:
    """A sharded head, gathered; what each rank finds for it is averaged on the way back."""
    if not isinstance(head, DTensor):
        return head
    whole: Tensor = head.full_tensor(grad_placements=[Partial("avg")] * head.device_mesh.ndim)
    return whole

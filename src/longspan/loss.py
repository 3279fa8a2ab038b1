"""The mean loss over every labelled token of the whole batch, the same number on every rank. Knows nothing of models or masks.

    rank 0   - 7.1 2.3 - -      sum of mine \\
    rank 1   4.0 - - 1.1 0.7    sum of mine  >  all-reduced  /  labelled tokens of all ranks  =  one device's loss
    rank 2   - - - - -          0           /

Ranks hold unequally many labels, and some hold none: a mean of the ranks' means would be another loss. The sum over ranks
has its true adjoint, so with gradients averaged over the ranks every rank's labels count once.

    hidden [tokens, M] --head [V, M]--> logits [tokens, V]         128,256 words in fp32: half a megabyte a token, three times
           a block of tokens and words at a time, in cache:           again in the backward: logits, softmax, gradient
           logits, their sum, drop

N labelled tokens of a tile   M hidden   V vocabulary   W words of a block
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial

from longspan.batch.shard import IGNORE
from longspan.distributed.collectives import all_reduce_sum
from longspan.distributed.consensus import raise_first_error
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError
from longspan.kernels.matmul import product_dtype
from longspan.tuning import LOSS_TOKENS, LOSS_WORDS


def cross_entropy(
    logits: Float[Tensor, "*tokens vocab"],
    labels: Int[Tensor, "*tokens"],
    *,
    mesh: ParallelMesh | None = None,
    num_labels: int | None = None,
) -> Float[Tensor, ""]:
    """The mean cross-entropy (nats) of the labelled tokens of all ranks; ``labels`` stand where they are predicted.

    Equals ``F.cross_entropy(logits, labels)`` on the whole batch (of all data replicas), in fp32, or fp64 for fp64 logits. A
    token labelled -100 is not learned from; where no rank has a label the loss is 0 with zero gradients.

    ``num_labels`` is what the sum is divided by: ``BatchInfo.num_labels``, so that over the micro-batches of a step the losses
    add up to the mean of all. Without it the labels of this call are counted, by one more all-reduce. Raises BatchError
    on every rank of ``mesh`` where one has a label that ``logits`` do not know.
    """
    _refuse_unknown_words(labels[labels != IGNORE], logits.shape[-1], IGNORE, mesh)
    return mean_cross_entropy(logits, labels, mesh, num_labels)


def mean_cross_entropy(
    logits: Float[Tensor, "*tokens vocab"], labels: Int[Tensor, "*tokens"], mesh: ParallelMesh | None, num_labels: int | None
) -> Float[Tensor, ""]:
    """``cross_entropy`` of labels that the step's agreement has found to be known."""
    rows = logits.reshape(-1, logits.shape[-1])
    exact = rows if rows.dtype == torch.float64 else rows.float()
    total = F.cross_entropy(exact, labels.reshape(-1), ignore_index=IGNORE, reduction="sum")
    return mean_over_ranks(total, labels != IGNORE, mesh, num_labels)


def linear_cross_entropy(
    hidden: Float[Tensor, "*tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, "*tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    mesh: ParallelMesh | None = None,
    num_labels: int | None = None,
    ignore_index: int = IGNORE,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Tensor, ""]:
    """``cross_entropy`` of the logits of a linear head that are never there at once.

    Equals ``F.cross_entropy(scale * (hidden @ weight.T + bias), labels, ...)`` on the whole batch, where a ``softcap`` c turns
    a logit x into c·tanh(x/c), plus ``z_loss`` times the mean square of the log-sum-exp. The backward forms the logits of each
    block again; the head's gradient is formed there too, so whatever scales the loss reaches it, and summed over tiles in fp32.

    ``weight`` may be tied, and a DTensor (its gradient is then the mean over the ranks, as FSDP2 forms it). Under autocast the
    products are in its dtype, or in fp32 on a CPU that has none. ``num_labels`` as in ``cross_entropy``. Raises BatchError on
    every rank of ``mesh`` where one has a label that is no row of ``weight``. Source: z-loss, arXiv:2204.02311.
    """
    wanted = labels.reshape(-1) != ignore_index
    rows, targets = wanted.nonzero().flatten(), labels.reshape(-1)[wanted].long()
    _refuse_unknown_words(targets, len(weight), ignore_index, mesh)
    weight, bias = _whole(weight), None if bias is None else _whole(bias)
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
    dtype = torch.float64 if hidden.dtype == torch.float64 else product_dtype(dtype, hidden.device)
    say = _Say(scale, softcap, label_smoothing, z_loss, dtype)
    hidden_RM = hidden.reshape(-1, hidden.shape[-1])
    total: Tensor = _TiledLoss.apply(hidden_RM, weight, bias, rows, targets, say)  # type: ignore[no-untyped-call]
    return mean_over_ranks(total, wanted, mesh, num_labels)


def mean_over_ranks(total: Tensor, wanted: Tensor, mesh: ParallelMesh | None, num_labels: int | None) -> Float[Tensor, ""]:
    """The sum of all ranks' ``total``, divided by ``num_labels`` (None: by how many tokens they want); 0 where none is."""
    count = wanted.sum() if num_labels is None else torch.tensor(num_labels, device=total.device)
    if mesh is not None:
        total = all_reduce_sum(total, mesh.loss_group)
        count = all_reduce_sum(count, mesh.loss_group) if num_labels is None else count
    return total / count.clamp(min=1)


def _refuse_unknown_words(targets: Tensor, vocab: int, ignore_index: int, mesh: ParallelMesh | None) -> None:
    error, outside = None, targets[(targets < 0) | (targets >= vocab)]
    if len(outside):
        error = BatchError(
            f"label {int(outside[0])} is none of the {vocab} words that the logits know; labels are 0 to {vocab - 1}, or "
            f"{ignore_index} where nothing is learned"
        )
    if mesh is not None:
        raise_first_error(error, mesh.world_group)
    elif error is not None:
        raise error


class _Say(NamedTuple):
    """How logits become a loss, and the dtype of the products with the head."""

    scale: float
    softcap: float | None
    smoothing: float
    z_loss: float
    dtype: torch.dtype

    def logits(self, hidden_NM: Tensor, weight_WM: Tensor, bias_W: Tensor | None, room: "_Room") -> Tensor:
        """In fp32 (fp64 for fp64), where the last block's were."""
        product_NW = torch.mm(hidden_NM, weight_WM.T, out=room.product(len(hidden_NM), len(weight_WM)))
        logits_NW = room.widened(product_NW)
        if bias_W is not None:
            logits_NW += bias_W
        if self.scale != 1.0:
            logits_NW *= self.scale
        if self.softcap is not None:
            logits_NW.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NW

    def gradient(self, logits_NW: Tensor, lse_N1: Tensor, column_N: Tensor, here_N: Tensor, vocab: int) -> Tensor:
        """The gradient of the sum of the losses by the products with a block of the head; written over the logits."""
        slope = None if self.softcap is None else 1 - (logits_NW / self.softcap).square_()
        dlogits_NW = logits_NW.sub_(lse_N1).exp_()
        if self.z_loss:
            dlogits_NW *= 1 + 2 * self.z_loss * lse_N1
        if self.smoothing:
            dlogits_NW -= self.smoothing / vocab
        dlogits_NW.scatter_add_(1, column_N[:, None], (self.smoothing - 1) * here_N[:, None].to(dlogits_NW.dtype))
        if slope is not None:
            dlogits_NW *= slope
        return dlogits_NW.mul_(self.scale) if self.scale != 1.0 else dlogits_NW


class _Room:
    """Memory for the logits of a block, which the next block writes over: fresh pages would be a fifth of the time."""

    def __init__(self, hidden_RM: Tensor, tokens: int, vocab: int, dtype: torch.dtype) -> None:
        size = min(tokens, LOSS_TOKENS) * min(vocab, LOSS_WORDS)
        self._products = hidden_RM.new_empty(size, dtype=dtype)
        wide = _wide(hidden_RM.dtype)
        self._widened = self._products if dtype == wide else hidden_RM.new_empty(size, dtype=wide)

    def product(self, tokens: int, words: int) -> Tensor:
        """[tokens, words] in the dtype of the products with the head."""
        return self._products[: tokens * words].view(tokens, words)

    def widened(self, product_NW: Tensor) -> Tensor:
        if self._widened is self._products:
            return product_NW
        return self._widened[: product_NW.numel()].view_as(product_NW).copy_(product_NW)

    def narrowed(self, dlogits_NW: Tensor) -> Tensor:
        """Gradients of what was widened, in the dtype of the products."""
        return dlogits_NW if self._widened is self._products else self.product(*dlogits_NW.shape).copy_(dlogits_NW)


class _TiledLoss(torch.autograd.Function):
    """The sum of the losses of the labelled rows of hidden; keeps their log-sum-exp and no logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RM: Tensor, weight_VM: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor, say: _Say
    ) -> Tensor:
        wide, vocab = _wide(hidden_RM.dtype), len(weight_VM)
        lses, total = [], hidden_RM.new_zeros((), dtype=wide)
        with torch.autocast(hidden_RM.device.type, enabled=False):
            room = _Room(hidden_RM, len(rows), vocab, say.dtype)
            for mine, wanted in _tiles(rows, targets):
                hidden_NM = hidden_RM[mine].to(say.dtype)
                hit, mean, lse = (hidden_RM.new_full(wanted.shape, start, dtype=wide) for start in (0, 0, -torch.inf))
                for words in _blocks(vocab):
                    weight_WM = weight_VM[words].to(say.dtype)
                    logits_NW = say.logits(hidden_NM, weight_WM, None if bias is None else bias[words], room)
                    column, here = _column(wanted, words)
                    hit += logits_NW.gather(1, column[:, None]).squeeze(1).where(here, 0)
                    mean += logits_NW.sum(1) / vocab if say.smoothing else 0
                    lse = torch.logaddexp(lse, _log_sum_exp_(logits_NW))
                smoothed = torch.lerp(hit, mean, say.smoothing) if say.smoothing else hit
                total += (lse - smoothed + say.z_loss * lse.square()).sum()
                lses.append(lse)
        ctx.save_for_backward(hidden_RM, weight_VM, bias, rows, targets, torch.cat(lses) if lses else targets)
        ctx.say = say
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Any, ...]:
        hidden_RM, weight_VM, bias, rows, targets, lses = ctx.saved_tensors
        say: _Say = ctx.say
        wide, vocab = _wide(hidden_RM.dtype), len(weight_VM)
        dhidden_RM = torch.zeros_like(hidden_RM)
        dweight_VM = torch.zeros_like(weight_VM, dtype=wide) if weight_VM.requires_grad else None
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        room = _Room(hidden_RM, len(rows), vocab, say.dtype)
        for (mine, wanted), lse in zip(_tiles(rows, targets), lses.split(LOSS_TOKENS)):
            hidden_NM = hidden_RM[mine].to(say.dtype)
            dhidden_NM = torch.zeros_like(hidden_NM, dtype=wide)
            for words in _blocks(vocab):
                weight_WM = weight_VM[words].to(say.dtype)
                logits_NW = say.logits(hidden_NM, weight_WM, None if bias is None else bias[words], room)
                dlogits_NW = say.gradient(logits_NW, lse[:, None], *_column(wanted, words), vocab).mul_(dtotal)
                if dbias is not None:
                    dbias[words] += dlogits_NW.sum(0)
                cast_NW = room.narrowed(dlogits_NW)
                _add_product(dhidden_NM, cast_NW, weight_WM)
                if dweight_VM is not None:
                    _add_product(dweight_VM[words], cast_NW.T, hidden_NM)
            dhidden_RM[mine] = dhidden_NM.to(dhidden_RM.dtype)
        of = (dhidden_RM, None if dweight_VM is None else dweight_VM.to(weight_VM.dtype), dbias)
        return *of, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _tiles(rows: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(rows.split(LOSS_TOKENS), targets.split(LOSS_TOKENS))) if len(rows) else []


def _blocks(vocab: int) -> list[slice]:
    return [slice(start, min(start + LOSS_WORDS, vocab)) for start in range(0, vocab, LOSS_WORDS)]


def _column(wanted_N: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """The column of each token's label in a block of words, and whether it is there."""
    column = wanted_N - words.start
    return column.clamp(0, words.stop - words.start - 1), (column >= 0) & (wanted_N < words.stop)


def _log_sum_exp_(logits_NW: Tensor) -> Tensor:
    """The log-sum-exp of each row, -inf for a row of -inf; overwrites the logits."""
    top = logits_NW.amax(1).clamp(min=torch.finfo(logits_NW.dtype).min)
    return logits_NW.sub_(top[:, None]).exp_().sum(1).log_().add_(top)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _whole(head: Tensor) -> Tensor:
    """A sharded head, gathered; what each rank finds for it is averaged on the way back."""
    if not isinstance(head, DTensor):
        return head
    whole: Tensor = head.full_tensor(grad_placements=[Partial("avg")] * head.device_mesh.ndim)
    return whole

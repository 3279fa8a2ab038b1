"""Cross-entropy over all labelled tokens of the global batch, equal on every rank; from logits, or chunked from hidden states.

    rank 0   - 7.1 2.3 - -      local sum \\
    rank 1   4.0 - - 1.1 0.7    local sum  >  all-reduce  /  labelled tokens of all ranks  =  one device's loss
    rank 2   - - - - -          0         /

Ranks hold unequally many labels and some hold none, so a mean of the ranks' means would be a different loss. The all-reduce has
its true adjoint, so with gradients averaged over the ranks every label counts once.

    hidden [tokens, M] --head, a block of tokens and vocabulary entries at a time--> log-sum-exp, the label's logit
                                                                                     of each token   (kernels/linear_loss.py)
                       --head cut over the tensor axis, for the tokens of all tensor ranks--> the same of my tokens
                                                                                              (distributed/vocab_parallel.py)

R tokens of this rank   L of them with a label   M hidden   V vocabulary   K terms of a token. Independent of models and masks.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial
from torch.profiler import record_function

from longspan.batch.context import BatchInfo
from longspan.batch.labels import IGNORE, labelled_rows, refuse_largest_label, unknown_label
from longspan.distributed.collectives import all_reduce_sum
from longspan.distributed.consensus import raise_first_error
from longspan.distributed.mesh import ParallelMesh, refuse_no_mesh
from longspan.distributed.tensor_cuts import own_part
from longspan.distributed.vocab_parallel import VocabularyRegion, is_on_tensor_axis, vocabulary_cut
from longspan.errors import BatchError
from longspan.kernels.linear_loss import LogitOptions, logit_terms, nan_where_unknown, product_dtype_of
from longspan.kernels.protocol import accumulation_dtype
from longspan.tuning import LOSS_TOKENS, LOSS_WORDS


def cross_entropy(
    logits: Float[Tensor, "*tokens vocab"],
    labels: Shaped[Tensor, "*label_tokens"],
    *,
    mesh: ParallelMesh | None = None,
    num_labels: int | None = None,
    longspan: BatchInfo | None = None,
) -> Float[Tensor, ""]:
    """The mean cross-entropy in nats over the labelled tokens of all ranks.

    Equals ``F.cross_entropy(logits, labels)`` on the global batch (all data replicas), computed in fp32, or fp64 for fp64
    logits.

    Args:
        logits: this rank's logits, [..., vocab].
        labels: this rank's labels, of the leading shape of ``logits``, already shifted: each at the token whose logits predict
            it; -100 is ignored.
        mesh: the loss is summed over ``mesh.loss_group``. None is one device.
        num_labels: the divisor of the sum: ``BatchInfo.num_labels``, with which the losses of a step's micro-batches add up to
            the mean over all of them. None: that of ``longspan``, or the labels of this call, with one more all-reduce.
        longspan: the BatchInfo of the part that ``labels`` are of. Ranks have agreed on its largest label already, so that no
            rank reads its labels or waits for others to check them, which on a GPU would leave it idle.

    Returns:
        A scalar that is equal on every rank; 0 with zero gradients if no rank has a label.

    Raises:
        LayoutError: ``mesh`` is no ParallelMesh.
        BatchError: on every rank of ``mesh``, if the labels of any rank do not fit its logits, or one is not in the vocabulary.
    """
    if mesh is not None:
        refuse_no_mesh(mesh)
    unfit = _unfit(logits, labels, num_labels)
    if longspan is None:
        _raise_on_every_rank(unfit or unknown_label(labels[labels != IGNORE], logits.shape[-1], IGNORE), mesh)
    elif unfit is not None:
        raise unfit
    else:
        refuse_largest_label(longspan, logits.shape[-1], IGNORE)
        num_labels = longspan.num_labels if num_labels is None else num_labels
    return mean_cross_entropy(logits, labels, mesh, num_labels)


def mean_cross_entropy(
    logits: Float[Tensor, "*tokens vocab"], labels: Int[Tensor, "*tokens"], mesh: ParallelMesh | None, num_labels: int | None
) -> Float[Tensor, ""]:
    """The result of ``cross_entropy``, without its check that labels are in the vocabulary: ``shard_batch`` has checked them.

    Args:
        logits: this rank's logits, [..., vocab].
        labels: this rank's labels, already shifted; -100 is ignored.
        mesh: the ranks; None is one device.
        num_labels: the divisor of the sum; None counts the labels of this call over all ranks.
    """
    total: Tensor = _SummedLoss.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long()
    )
    return mean_over_ranks(total, labels != IGNORE, mesh, num_labels)


def linear_cross_entropy(
    hidden: Float[Tensor, "*tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Shaped[Tensor, "*label_tokens"],
    *,
    bias: Float[Tensor, " bias_vocab"] | None = None,
    mesh: ParallelMesh | None = None,
    num_labels: int | None = None,
    ignore_index: int = IGNORE,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    longspan: BatchInfo | None = None,
) -> Float[Tensor, ""]:
    """The mean cross-entropy of a linear head's logits, computed in blocks so that never all logits exist (chunked loss).

    Equals ``F.cross_entropy(scale * (hidden @ weight.T + bias), labels, ...)`` on the global batch, plus the z-loss. The
    backward computes each block's logits again and sums the gradient of the head over blocks in fp32.

    Args:
        hidden: this rank's hidden states, [..., hidden].
        weight: the head, [vocab, hidden]. It may be tied to the embedding. The gradient of a DTensor is averaged over ranks, as
            FSDP2 does.
        labels: this rank's labels, already shifted, of the leading shape of ``hidden``.
        bias: [vocab], added to the logits; None: none.
        mesh: the loss is summed over ``mesh.loss_group``. None is one device.
        num_labels: the divisor of the sum: ``BatchInfo.num_labels``. None: that of ``longspan``, or the labels of this call,
            with one all-reduce.
        ignore_index: the label of tokens that are ignored.
        scale: factor of the logits.
        softcap: c turns a logit x into c·tanh(x/c); None: none.
        label_smoothing: the share of each target that is spread over the whole vocabulary, 0 to 1, as in ``F.cross_entropy``.
        z_loss: factor of the mean square of the log-sum-exp, added to the loss (arXiv:2204.02311).
        longspan: as in ``cross_entropy``; the labels must be those of the part, with ``ignore_index=-100``.

    Returns:
        A scalar that is equal on every rank. Matrix products are in the dtype of ``hidden`` (under autocast, of autocast), or
        in fp32 on a CPU without native GEMM in it.

    Raises:
        LayoutError: ``mesh`` is no ParallelMesh.
        BatchError: on every rank of ``mesh``, if the labels of any rank do not fit its hidden states, one is not a row of
            ``weight``, or an option has no meaning.
    """
    if mesh is not None:
        refuse_no_mesh(mesh)
    unfit = _unfit(hidden, labels, num_labels) or _unfit_head(weight, bias, softcap, label_smoothing)
    wanted = labels.reshape(-1) != ignore_index
    rows = labelled_rows(wanted, None if longspan is None else longspan.num_local_labels)
    targets = labels.reshape(-1)[rows].long()
    if longspan is None:
        _raise_on_every_rank(unfit or unknown_label(targets, len(weight), ignore_index), mesh)
    elif unfit is not None:
        raise unfit
    else:
        refuse_largest_label(longspan, len(weight), ignore_index)
        num_labels = longspan.num_labels if num_labels is None else num_labels
    head = _Head(weight, bias, LogitOptions(scale, softcap, label_smoothing != 0, product_dtype_of(hidden)))
    if mesh is not None and longspan is not None and is_on_tensor_axis(weight, mesh):
        lse, hit, *sums = _terms_over_vocabulary(hidden, labels, head, mesh, longspan)[:, rows]
    else:
        lse, hit, *sums = head.terms(hidden.reshape(-1, hidden.shape[-1]), rows, targets)
    hit = nan_where_unknown(hit, targets, len(weight))
    for of_logits in sums:
        hit = torch.lerp(hit, of_logits / len(weight), label_smoothing)
    total = (lse - hit + z_loss * lse.square() if z_loss else lse - hit).sum()
    return mean_over_ranks(total, wanted, mesh, num_labels)


def _raise_on_every_rank(error: BatchError | None, mesh: ParallelMesh | None) -> None:
    """Raise the error of the first rank of ``mesh`` (None: one device) that has one. Every rank must call it."""
    if mesh is not None:
        raise_first_error(error, mesh.loss_control_group)
    elif error is not None:
        raise error


def _unfit(inputs: Tensor, labels: Tensor, num_labels: int | None) -> BatchError | None:
    """The error of labels that do not stand one for each token of ``inputs``; None if they do.

    Args:
        inputs: logits or hidden states, [..., any].
        labels: of these tokens.
        num_labels: the divisor of the sum; None: it is counted.
    """
    if labels.shape != inputs.shape[:-1]:
        return BatchError(
            f"labels of shape {list(labels.shape)} do not stand beside logits or hidden states of shape {list(inputs.shape)}; "
            f"give each token one label, {IGNORE} where nothing is learned: shape {list(inputs.shape[:-1])}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return BatchError(f"labels are {labels.dtype}, and the label of a token is an integer; use labels.long()")
    if num_labels is not None and num_labels < 0:
        return BatchError(f"num_labels={num_labels} is a number of labels; it must be 0 or more, or None to count them")
    return None


def _unfit_head(weight: Tensor, bias: Tensor | None, softcap: float | None, label_smoothing: float) -> BatchError | None:
    """The error of a head's bias of another shape, or of an option of ``linear_cross_entropy`` that has no meaning; else
    None."""
    if bias is not None and bias.shape != weight.shape[:1]:
        return BatchError(
            f"bias of shape {list(bias.shape)} does not fit a head of shape {list(weight.shape)}; pass one number for each row"
        )
    if softcap is not None and not 0 < softcap < math.inf:
        return BatchError(f"softcap={softcap} must be above 0 and finite, or None for no softcap")
    if not 0 <= label_smoothing <= 1:
        return BatchError(f"label_smoothing={label_smoothing} is a share of the target; it must be from 0 to 1")
    return None


class _Head(NamedTuple):
    """A linear head, and how its logits are formed."""

    weight: Tensor
    bias: Tensor | None
    options: LogitOptions

    def terms(self, hidden_RM: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """``logit_terms`` of the whole head; one whose shards are on several ranks is gathered."""
        bias = None if self.bias is None else _whole(self.bias)
        return logit_terms(hidden_RM, _whole(self.weight), bias, rows, targets, options=self.options)


def _terms_over_vocabulary(hidden: Tensor, labels: Tensor, head: _Head, mesh: ParallelMesh, step: BatchInfo) -> Tensor:
    """The terms of the losses of this rank's tokens [K, R], where each tensor rank computes with its own rows of the head.

    Args:
        hidden, labels: of this rank's tokens, those of the part.
        head: on the tensor axis of ``mesh``.
        mesh: the ranks.
        step: the BatchInfo of the part.

    Raises:
        BatchError: the labels are not those of the part.
    """
    region = VocabularyRegion(mesh, mesh.coordinate.tensor_sizes(step.tokens))
    if labels.numel() != step.rows * region.my_tokens:
        raise BatchError(
            f"linear_cross_entropy was given {labels.numel()} labels with longspan=, whose part has {step.rows} rows of "
            f"{region.my_tokens} tokens on this rank; pass the labels and hidden states of the whole part, with "
            f"{IGNORE} where nothing is learned"
        )
    mine, first, cut = (step.rows, region.my_tokens), region.first_row(len(head.weight)), vocabulary_cut(len(head.weight))
    hidden_BNM = region.gathered(hidden.reshape(*mine, hidden.shape[-1]))
    wanted = region.gathered(labels.reshape(mine)).flatten()
    rows = labelled_rows(wanted != IGNORE, None)
    weight, bias = own_part(head.weight, cut, mesh), head.bias
    if bias is not None:
        bias = own_part(bias, cut, mesh) if is_on_tensor_axis(bias, mesh) else _whole(bias)[first : first + len(weight)]
    targets = wanted[rows].long() - first
    terms_KL = logit_terms(hidden_BNM.flatten(0, 1), weight, bias, rows, targets, options=head.options)
    terms_KR = terms_KL.new_zeros(len(terms_KL), len(wanted)).index_copy(1, rows, terms_KL)
    return region.of_my_tokens(terms_KR.unflatten(1, hidden_BNM.shape[:2])).flatten(1)


def mean_over_ranks(total: Tensor, wanted: Tensor, mesh: ParallelMesh | None, num_labels: int | None) -> Float[Tensor, ""]:
    """The sum of ``total`` over the ranks of ``mesh.loss_group``, divided by the number of labels; equal on every rank.

    Args:
        total: this rank's sum of losses, a scalar.
        wanted: True for each of this rank's tokens that has a label.
        mesh: the ranks; None is one device, without a sum.
        num_labels: the divisor; 0 counts as 1. None sums ``wanted`` over the ranks.
    """
    if mesh is not None:
        total = all_reduce_sum(total, mesh.loss_group)
    if num_labels is not None:
        return total / max(1, num_labels)
    count = wanted.sum() if mesh is None else all_reduce_sum(wanted.sum(), mesh.loss_group)
    return total / count.clamp(min=1)


class _SummedLoss(torch.autograd.Function):
    """The cross-entropy of logits [rows, V] and labels [rows], summed in fp32 (fp64), a few rows at a time.

    It saves the logits and one log-sum-exp a row. ``F.cross_entropy`` saves as many log-probabilities as there are logits, and
    its backward forms two more tensors of that size; this one forms the gradient alone.
    """

    @staticmethod
    @record_function("longspan::loss")
    def forward(ctx: Any, logits_RV: Tensor, labels_R: Tensor) -> Tensor:
        exact = accumulation_dtype(logits_RV.dtype)
        wanted_R = labels_R != IGNORE
        column_R1 = labels_R.where(wanted_R, 0).unsqueeze(1)
        ctx.rows = max(1, LOSS_TOKENS * LOSS_WORDS // logits_RV.shape[1])
        lse_R = torch.cat([tile.to(exact).logsumexp(1) for tile in logits_RV.split(ctx.rows)])
        ctx.save_for_backward(logits_RV, lse_R, column_R1, wanted_R)
        return (lse_R - logits_RV.gather(1, column_R1).squeeze(1).to(exact)).where(wanted_R, 0).sum()

    @staticmethod
    @once_differentiable
    @record_function("longspan::loss")
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None]:
        logits_RV, lse_R, column_R1, wanted_R = ctx.saved_tensors
        dlogits_RV = torch.empty_like(logits_RV)
        factor_R1 = wanted_R.to(lse_R.dtype).mul_(dtotal).unsqueeze(1)
        tensors = (dlogits_RV, logits_RV, lse_R.unsqueeze(1), column_R1, factor_R1)
        for target, logits, lse, column, factor in zip(*(tensor.split(ctx.rows) for tensor in tensors)):
            probabilities = (logits - lse).exp_()
            target.copy_(probabilities.scatter_add_(1, column, -torch.ones_like(lse)).mul_(factor))
        return dlogits_RV, None


def _whole(head: Tensor) -> Tensor:
    """``head`` itself; of a DTensor the whole tensor, gathered on every rank, whose gradient is averaged over the ranks."""
    if not isinstance(head, DTensor):
        return head
    whole: Tensor = head.full_tensor(grad_placements=[Partial("avg")] * head.device_mesh.ndim)
    return whole

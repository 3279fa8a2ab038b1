"""Cross-entropy over all labelled tokens of the global batch, equal on every rank; from logits, or chunked from hidden states.

    rank 0   - 7.1 2.3 - -      local sum \\
    rank 1   4.0 - - 1.1 0.7    local sum  >  all-reduce  /  labelled tokens of all ranks  =  one device's loss
    rank 2   - - - - -          0         /

Ranks hold unequally many labels and some hold none, so a mean of the ranks' means would be a different loss. The all-reduce has
its true adjoint, so with gradients averaged over the ranks every label counts once.

    hidden [tokens, M] --head [V, M]--> logits [tokens, V]         With V = 128,256 the fp32 logits of a token take half a
           one block of tokens and vocabulary entries at a time,   megabyte, and three times that in the backward; a block
           in the CPU's cache: logits, log-sum-exp, discard        takes 16 MiB. The backward computes each block again.

N labelled tokens of a tile   M hidden   V vocabulary   W vocabulary entries of a block. Independent of models and masks.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial

from longspan.batch.agreement import refuse_unknown_labels
from longspan.batch.context import BatchInfo
from longspan.batch.labels import IGNORE, labelled_rows, refuse_largest_label
from longspan.distributed.collectives import all_reduce_sum
from longspan.distributed.mesh import ParallelMesh
from longspan.kernels.matmul import product_dtype
from longspan.kernels.protocol import accumulation_dtype
from longspan.tuning import LOSS_TOKENS, LOSS_TOKENS_ON_GPU, LOSS_WORDS, LOSS_WORDS_ON_GPU


def cross_entropy(
    logits: Float[Tensor, "*tokens vocab"],
    labels: Int[Tensor, "*tokens"],
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
        labels: this rank's labels, already shifted: each at the token whose logits predict it; -100 is ignored.
        mesh: the loss is summed over ``mesh.loss_group``. None is one device.
        num_labels: the divisor of the sum: ``BatchInfo.num_labels``, with which the losses of a step's micro-batches add up to
            the mean over all of them. None: that of ``longspan``, or the labels of this call, with one more all-reduce.
        longspan: the BatchInfo of the part that ``labels`` are of. Ranks have agreed on its largest label already, so that no
            rank reads its labels or waits for others to check them, which on a GPU would leave it idle.

    Returns:
        A scalar that is equal on every rank; 0 with zero gradients if no rank has a label.

    Raises:
        BatchError: on every rank of ``mesh``, if a label of any rank is not in the vocabulary.
    """
    if longspan is None:
        refuse_unknown_labels(labels[labels != IGNORE], logits.shape[-1], IGNORE, mesh)
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
        BatchError: on every rank of ``mesh``, if a label of any rank is not a row of ``weight``.
    """
    wanted = labels.reshape(-1) != ignore_index
    rows = labelled_rows(wanted, None if longspan is None else longspan.num_local_labels)
    targets = labels.reshape(-1)[rows].long()
    if longspan is None:
        refuse_unknown_labels(targets, len(weight), ignore_index, mesh)
    else:
        refuse_largest_label(longspan, len(weight), ignore_index)
        num_labels = longspan.num_labels if num_labels is None else num_labels
    weight, bias = _whole(weight), None if bias is None else _whole(bias)
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
    dtype = torch.float64 if hidden.dtype == torch.float64 else product_dtype(dtype, hidden.device)
    terms = _Terms(scale, softcap, label_smoothing, z_loss, dtype)
    hidden_RM = hidden.reshape(-1, hidden.shape[-1])
    total: Tensor = _TiledLoss.apply(hidden_RM, weight, bias, rows, targets, terms)  # type: ignore[no-untyped-call]
    return mean_over_ranks(total, wanted, mesh, num_labels)


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


class _Terms(NamedTuple):
    """The options of ``linear_cross_entropy``, for one call.

    Attributes:
        scale, softcap: of the logits.
        smoothing: label smoothing, 0 to 1.
        z_loss: factor of the mean square of the log-sum-exp.
        dtype: the dtype of the matrix products.
    """

    scale: float
    softcap: float | None
    smoothing: float
    z_loss: float
    dtype: torch.dtype

    def logits(self, hidden_NM: Tensor, weight_WM: Tensor, bias_W: Tensor | None, buffer: "_BlockBuffer") -> Tensor:
        """The logits of a block of tokens and vocabulary entries: hidden times weight plus bias, scaled and capped.

        They are in fp32, or fp64 for an fp64 model, and lie in ``buffer``, where they overwrite those of the previous block.

        Args:
            hidden_NM, weight_WM, bias_W: hidden states of the tokens, and the head's rows for these entries.
            buffer: their memory.
        """
        product_NW = torch.mm(hidden_NM, weight_WM.T, out=buffer.product(len(hidden_NM), len(weight_WM)))
        logits_NW = buffer.widened(product_NW)
        if bias_W is not None:
            logits_NW += bias_W
        if self.scale != 1.0:
            logits_NW *= self.scale
        if self.softcap is not None:
            logits_NW.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NW

    def gradient(self, logits_NW: Tensor, lse_N1: Tensor, column_N: Tensor, here_N: Tensor, vocab: int) -> Tensor:
        """The gradient of the summed loss with respect to hidden times weight plus bias, for one block; overwrites the logits.

        Args:
            logits_NW: the block's logits.
            lse_N1: the log-sum-exp of each token's logits over the whole vocabulary.
            column_N: the column of each token's label in the block.
            here_N: whether the label is in the block.
            vocab: the number of vocabulary entries, over which label smoothing spreads.
        """
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


class _BlockBuffer:
    """Memory for the logits of one block, which every block uses again: allocating each would take a fifth of the time.

    Args:
        hidden_RM: the hidden states, for device and dtype.
        tokens, vocab: the most tokens and vocabulary entries of a block.
        dtype: the dtype of the matrix products.
    """

    def __init__(self, hidden_RM: Tensor, tokens: int, vocab: int, dtype: torch.dtype) -> None:
        most = _block_size(hidden_RM.device)
        size = min(tokens, most[0]) * min(vocab, most[1])
        self._products = hidden_RM.new_empty(size, dtype=dtype)
        wide = accumulation_dtype(hidden_RM.dtype)
        self._widened = self._products if dtype == wide else hidden_RM.new_empty(size, dtype=wide)

    def product(self, tokens: int, words: int) -> Tensor:
        """The buffer's memory as a tensor [tokens, words] in the dtype of the matrix products, whose content is undefined.

        ``words`` is the number of vocabulary entries.
        """
        return self._products[: tokens * words].view(tokens, words)

    def widened(self, product_NW: Tensor) -> Tensor:
        """``product_NW`` converted to fp32, or fp64 if it is fp64; the same tensor where it has that dtype."""
        if self._widened is self._products:
            return product_NW
        return self._widened[: product_NW.numel()].view_as(product_NW).copy_(product_NW)

    def narrowed(self, dlogits_NW: Tensor) -> Tensor:
        """``dlogits_NW`` converted to the dtype of the matrix products; the same tensor where it has that dtype."""
        return dlogits_NW if self._widened is self._products else self.product(*dlogits_NW.shape).copy_(dlogits_NW)


class _SummedLoss(torch.autograd.Function):
    """The cross-entropy of logits [rows, V] and labels [rows], summed in fp32 (fp64), a few rows at a time.

    It saves the logits and one log-sum-exp a row. ``F.cross_entropy`` saves as many log-probabilities as there are logits, and
    its backward forms two more tensors of that size; this one forms the gradient alone.
    """

    @staticmethod
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
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None]:
        logits_RV, lse_R, column_R1, wanted_R = ctx.saved_tensors
        dlogits_RV = torch.empty_like(logits_RV)
        factor_R1 = wanted_R.to(lse_R.dtype).mul_(dtotal).unsqueeze(1)
        tensors = (dlogits_RV, logits_RV, lse_R.unsqueeze(1), column_R1, factor_R1)
        for target, logits, lse, column, factor in zip(*(tensor.split(ctx.rows) for tensor in tensors)):
            probabilities = (logits - lse).exp_()
            target.copy_(probabilities.scatter_add_(1, column, -torch.ones_like(lse)).mul_(factor))
        return dlogits_RV, None


class _TiledLoss(torch.autograd.Function):
    """Autograd function of the chunked loss: the sum of the losses of those rows of ``hidden`` that have a label.

    It saves the log-sum-exp of each row for the backward, and no logits, which the backward computes again block by block.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_RM: Tensor, weight_VM: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor, terms: _Terms
    ) -> Tensor:
        wide, vocab = accumulation_dtype(hidden_RM.dtype), len(weight_VM)
        lses, total = [], hidden_RM.new_zeros((), dtype=wide)
        with torch.autocast(hidden_RM.device.type, enabled=False):
            buffer = _BlockBuffer(hidden_RM, len(rows), vocab, terms.dtype)
            tokens, words_at_once = _block_size(hidden_RM.device)
            for mine, wanted in _tiles(rows, targets, tokens):
                hidden_NM = hidden_RM[mine].to(terms.dtype)
                hit, mean, lse = (hidden_RM.new_full(wanted.shape, start, dtype=wide) for start in (0, 0, -torch.inf))
                for words in _blocks(vocab, words_at_once):
                    weight_WM = weight_VM[words].to(terms.dtype)
                    logits_NW = terms.logits(hidden_NM, weight_WM, None if bias is None else bias[words], buffer)
                    column, here = _column(wanted, words)
                    hit += logits_NW.gather(1, column[:, None]).squeeze(1).where(here, 0)
                    mean += logits_NW.sum(1) / vocab if terms.smoothing else 0
                    lse = torch.logaddexp(lse, _log_sum_exp_(logits_NW))
                smoothed = torch.lerp(hit, mean, terms.smoothing) if terms.smoothing else hit
                total += (lse - smoothed + terms.z_loss * lse.square()).sum()
                lses.append(lse)
        ctx.save_for_backward(hidden_RM, weight_VM, bias, rows, targets, torch.cat(lses) if lses else targets)
        ctx.terms = terms
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Any, ...]:
        hidden_RM, weight_VM, bias, rows, targets, lses = ctx.saved_tensors
        terms: _Terms = ctx.terms
        wide, vocab = accumulation_dtype(hidden_RM.dtype), len(weight_VM)
        dhidden_RM = torch.zeros_like(hidden_RM)
        dweight_VM = torch.zeros_like(weight_VM, dtype=wide) if weight_VM.requires_grad else None
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        buffer = _BlockBuffer(hidden_RM, len(rows), vocab, terms.dtype)
        tokens, words_at_once = _block_size(hidden_RM.device)
        for (mine, wanted), lse in zip(_tiles(rows, targets, tokens), lses.split(tokens)):
            hidden_NM = hidden_RM[mine].to(terms.dtype)
            dhidden_NM = torch.zeros_like(hidden_NM, dtype=wide)
            for words in _blocks(vocab, words_at_once):
                weight_WM = weight_VM[words].to(terms.dtype)
                logits_NW = terms.logits(hidden_NM, weight_WM, None if bias is None else bias[words], buffer)
                dlogits_NW = terms.gradient(logits_NW, lse[:, None], *_column(wanted, words), vocab).mul_(dtotal)
                if dbias is not None:
                    dbias[words] += dlogits_NW.sum(0)
                cast_NW = buffer.narrowed(dlogits_NW)
                _add_product(dhidden_NM, cast_NW, weight_WM)
                if dweight_VM is not None:
                    _add_product(dweight_VM[words], cast_NW.T, hidden_NM)
            dhidden_RM[mine] = dhidden_NM.to(dhidden_RM.dtype)
        of = (dhidden_RM, None if dweight_VM is None else dweight_VM.to(weight_VM.dtype), dbias)
        return *of, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the matrix product of ``a`` and ``b`` to ``total`` in place."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _block_size(device: torch.device) -> tuple[int, int]:
    """(Tokens, vocabulary entries) of one block of logits on ``device``."""
    return (LOSS_TOKENS, LOSS_WORDS) if device.type == "cpu" else (LOSS_TOKENS_ON_GPU, LOSS_WORDS_ON_GPU)


def _tiles(rows: Tensor, targets: Tensor, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """The indices ``rows`` of tokens that have a label, and their targets, cut into tiles of ``tokens`` tokens."""
    return list(zip(rows.split(tokens), targets.split(tokens))) if len(rows) else []


def _blocks(vocab: int, words: int) -> list[slice]:
    """The vocabulary cut into blocks of ``words`` entries, as slices."""
    return [slice(start, min(start + words, vocab)) for start in range(0, vocab, words)]


def _column(wanted_N: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Where each token's label lies in a block of vocabulary entries.

    Args:
        wanted_N: the labels.
        words: the block.

    Returns:
        (its column, whether it is in the block). The column of a label outside of the block is 0 or the last; it must not be
        used.
    """
    column = wanted_N - words.start
    return column.clamp(0, words.stop - words.start - 1), (column >= 0) & (wanted_N < words.stop)


def _log_sum_exp_(logits_NW: Tensor) -> Tensor:
    """The log-sum-exp of each row of ``logits_NW``, [N]; -inf for a row of -inf. Overwrites ``logits_NW``."""
    top = logits_NW.amax(1).clamp(min=torch.finfo(logits_NW.dtype).min)
    return logits_NW.sub_(top[:, None]).exp_().sum(1).log_().add_(top)


def _whole(head: Tensor) -> Tensor:
    """``head`` itself; of a DTensor the whole tensor, gathered on every rank, whose gradient is averaged over the ranks."""
    if not isinstance(head, DTensor):
        return head
    whole: Tensor = head.full_tensor(grad_placements=[Partial("avg")] * head.device_mesh.ndim)
    return whole

"""What the loss needs of a linear head's logits, of each token, computed in blocks so that never all logits exist.

    hidden [tokens, M] --head [V, M]--> logits [tokens, V]         With V = 128,256 the fp32 logits of a token take half a
           one block of tokens and vocabulary entries at a time,   megabyte, and three times that in the backward; a block
           in the CPU's cache: logits, log-sum-exp, discard        takes 16 MiB. The backward computes each block again.
                              |
    terms [2 or 3, tokens]:   the log-sum-exp, the label's logit and, for label smoothing, the sum of the logits

R tokens   L of them with a label   N of those in a tile   M hidden   V vocabulary   W vocabulary entries of a block   K terms
The head may be some rows of a vocabulary only: a label that is none of them has the logit 0. Independent of ranks and models.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from longspan.kernels.matmul import product_dtype
from longspan.kernels.protocol import accumulation_dtype
from longspan.tuning import LOSS_TOKENS, LOSS_TOKENS_ON_GPU, LOSS_WORDS, LOSS_WORDS_ON_GPU


class LogitOptions(NamedTuple):
    """How logits are formed from hidden states, for one call.

    Attributes:
        scale: factor of the logits.
        softcap: c turns a logit x into c·tanh(x/c); None: none.
        sums: whether the sum of each token's logits is wanted too.
        dtype: the dtype of the matrix products.
    """

    scale: float
    softcap: float | None
    sums: bool
    dtype: torch.dtype


def logit_terms(
    hidden_RM: Float[Tensor, "tokens hidden"],
    weight_VM: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    rows: Int[Tensor, " labelled"],
    targets: Int[Tensor, " labelled"],
    *,
    options: LogitOptions,
) -> Float[Tensor, "terms labelled"]:
    """The terms of a token's loss: log-sum-exp, the label's logit and, with ``options.sums``, the sum of its logits.

    Differentiable in the first three arguments; the gradients of weight and bias are summed over blocks in fp32.

    Args:
        hidden_RM: hidden states.
        weight_VM: the head, or some of its rows.
        bias: added to the logits; None: none.
        rows: the indices of the tokens that have a label.
        targets: for each of them, the row of its label in the head; one that is not in 0 to V - 1 has the logit 0.
        options: how logits are formed.

    Returns:
        2 or 3 terms of each token that has a label, in fp32 (fp64 for fp64).
    """
    terms: Tensor = _LogitTerms.apply(hidden_RM, weight_VM, bias, rows, targets, options)  # type: ignore[no-untyped-call]
    return terms


def nan_where_unknown(hit_L: Tensor, labels_L: Tensor, vocab: int) -> Tensor:
    """The logits of labels, with NaN for a label that is not in the vocabulary of ``vocab`` entries.

    Ranks have agreed on the labels that ``shard_batch`` was given. This finds one that was written afterwards, whose loss would
    look plausible, without a host sync.
    """
    return hit_L.where((labels_L >= 0) & (labels_L < vocab), torch.nan)


def product_dtype_of(hidden: Tensor) -> torch.dtype:
    """The dtype of the products of ``hidden`` and a head: its own (fp64 stays fp64), or that of the autocast around the call.

    On a CPU that has no native GEMM in it, fp32.
    """
    if hidden.dtype == torch.float64:
        return torch.float64
    kind = hidden.device.type
    asked = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return product_dtype(asked, hidden.device)


def block_size(device: torch.device) -> tuple[int, int]:
    """(Tokens, vocabulary entries) of one block of logits on ``device``."""
    return (LOSS_TOKENS, LOSS_WORDS) if device.type == "cpu" else (LOSS_TOKENS_ON_GPU, LOSS_WORDS_ON_GPU)


class _LogitTerms(torch.autograd.Function):
    """Autograd function of ``logit_terms``. It saves the log-sum-exp of each token, and no logits."""

    @staticmethod
    @record_function("longspan::loss")
    def forward(
        ctx: Any,
        hidden_RM: Tensor,
        weight_VM: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        targets: Tensor,
        options: LogitOptions,
    ) -> Tensor:
        vocab, device = len(weight_VM), hidden_RM.device
        terms_KL = hidden_RM.new_zeros(3 if options.sums else 2, len(rows), dtype=accumulation_dtype(hidden_RM.dtype))
        terms_KL[0] = -torch.inf
        with torch.autocast(device.type, enabled=False):
            buffer = _BlockBuffer(hidden_RM, len(rows), vocab, options.dtype)
            tokens, words_at_once = block_size(device)
            for tile in _blocks(len(rows), tokens):
                hidden_NM, wanted = hidden_RM[rows[tile]].to(options.dtype), targets[tile]
                lse, hit, *sums = terms_KL[:, tile]
                for words in _blocks(vocab, words_at_once):
                    weight_WM = weight_VM[words].to(options.dtype)
                    logits_NW = _logits(options, hidden_NM, weight_WM, None if bias is None else bias[words], buffer)
                    column, here = _column(wanted, words)
                    hit += logits_NW.gather(1, column[:, None]).squeeze(1).where(here, 0)
                    for total in sums:
                        total += logits_NW.sum(1)
                    torch.logaddexp(lse, _log_sum_exp_(logits_NW), out=lse)
        ctx.save_for_backward(hidden_RM, weight_VM, bias, rows, targets, terms_KL[0].clone())
        ctx.options = options
        return terms_KL

    @staticmethod
    @once_differentiable
    @record_function("longspan::loss")
    def backward(ctx: Any, dterms_KL: Tensor) -> tuple[Any, ...]:
        hidden_RM, weight_VM, bias, rows, targets, lse_L = ctx.saved_tensors
        options: LogitOptions = ctx.options
        wide, vocab = accumulation_dtype(hidden_RM.dtype), len(weight_VM)
        dhidden_RM = torch.zeros_like(hidden_RM)
        dweight_VM = torch.zeros_like(weight_VM, dtype=wide) if weight_VM.requires_grad else None
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        buffer = _BlockBuffer(hidden_RM, len(rows), vocab, options.dtype)
        tokens, words_at_once = block_size(hidden_RM.device)
        for tile in _blocks(len(rows), tokens):
            mine, wanted, lse_N, dterms_KN = rows[tile], targets[tile], lse_L[tile], dterms_KL[:, tile]
            hidden_NM = hidden_RM[mine].to(options.dtype)
            dhidden_NM = torch.zeros_like(hidden_NM, dtype=wide)
            for words in _blocks(vocab, words_at_once):
                weight_WM = weight_VM[words].to(options.dtype)
                logits_NW = _logits(options, hidden_NM, weight_WM, None if bias is None else bias[words], buffer)
                dlogits_NW = _gradient(options, logits_NW, lse_N, dterms_KN, _column(wanted, words))
                if dbias is not None:
                    dbias[words] += dlogits_NW.sum(0)
                cast_NW = buffer.narrowed(dlogits_NW)
                _add_product(dhidden_NM, cast_NW, weight_WM)
                if dweight_VM is not None:
                    _add_product(dweight_VM[words], cast_NW.T, hidden_NM)
            dhidden_RM[mine] = dhidden_NM.to(dhidden_RM.dtype)
        of = (dhidden_RM, None if dweight_VM is None else dweight_VM.to(weight_VM.dtype), dbias)
        return *of, None, None, None


class _BlockBuffer:
    """Memory for the logits of one block, which every block uses again: allocating each would take a fifth of the time.

    Args:
        hidden_RM: the hidden states, for device and dtype.
        tokens, vocab: the most tokens and vocabulary entries of a block.
        dtype: the dtype of the matrix products.
    """

    def __init__(self, hidden_RM: Tensor, tokens: int, vocab: int, dtype: torch.dtype) -> None:
        most = block_size(hidden_RM.device)
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


def _logits(options: LogitOptions, hidden_NM: Tensor, weight_WM: Tensor, bias_W: Tensor | None, buffer: _BlockBuffer) -> Tensor:
    """The logits of a block of tokens and vocabulary entries: hidden times weight plus bias, scaled and capped.

    They are in fp32, or fp64 for an fp64 model, and lie in ``buffer``, where they overwrite those of the previous block.

    Args:
        options: how they are formed.
        hidden_NM, weight_WM, bias_W: hidden states of the tokens, and the head's rows for these entries.
        buffer: their memory.
    """
    product_NW = torch.mm(hidden_NM, weight_WM.T, out=buffer.product(len(hidden_NM), len(weight_WM)))
    logits_NW = buffer.widened(product_NW)
    if bias_W is not None:
        logits_NW += bias_W
    if options.scale != 1.0:
        logits_NW *= options.scale
    if options.softcap is not None:
        logits_NW.div_(options.softcap).tanh_().mul_(options.softcap)
    return logits_NW


def _gradient(
    options: LogitOptions, logits_NW: Tensor, lse_N: Tensor, dterms_KN: Tensor, label: tuple[Tensor, Tensor]
) -> Tensor:
    """The gradient with respect to hidden times weight plus bias, for one block; overwrites the logits.

    Args:
        options: how the logits were formed.
        logits_NW: the block's logits.
        lse_N: the log-sum-exp of each token's logits over all blocks.
        dterms_KN: the gradients of the terms.
        label: (the column of each token's label in the block, whether the label is in the block).
    """
    column_N, here_N = label
    dlse_N, dhit_N, *dsums = dterms_KN
    slope = None if options.softcap is None else 1 - (logits_NW / options.softcap).square_()
    finite_N = lse_N.clamp(min=torch.finfo(lse_N.dtype).min)  # of these rows all logits may be -inf
    dlogits_NW = logits_NW.sub_(finite_N[:, None]).exp_().mul_(dlse_N[:, None])
    for dsum_N in dsums:
        dlogits_NW += dsum_N[:, None]
    dlogits_NW.scatter_add_(1, column_N[:, None], dhit_N.where(here_N, 0)[:, None])
    if slope is not None:
        dlogits_NW *= slope
    return dlogits_NW.mul_(options.scale) if options.scale != 1.0 else dlogits_NW


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the matrix product of ``a`` and ``b`` to ``total`` in place."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _blocks(count: int, size: int) -> list[slice]:
    """``count`` items cut into blocks of ``size``, as slices."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


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

"""What a batch says of its rows beside tokens: where padding is, where documents begin.

    attention_mask   0 0 1 1 1 1     ->   Span(2, 6)            the run of tokens that are real
    position_ids     0 1 2 0 1 2     ->   Documents([3, 3])     a restart begins another document for most decoders
    cu_seq_lens_q    0 3 6           ->   Documents([3, 3])     to every layer, as kernels of varying lengths take it
    seq_idx          0 0 0 1 1 1     ->   the same

Read once, of whole rows. Independent of ranks.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.errors import BatchError
from longspan.masks.constructors import Documents, Span

VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""The keys by which collators of packed documents describe the documents to variable-length kernels."""


def padding_of(attention_mask: Tensor | None, rows: int, tokens: int) -> tuple[Span, ...] | None:
    """For each row the one run of tokens that are not padding, from ``attention_mask``; padding may be left, right or both.

    Args:
        attention_mask: [rows, tokens], 1 for a token and 0 for padding; None: no padding.
        rows, tokens: the shape of the batch.

    Returns:
        A ``Span`` for each row; None if there is no padding.

    Raises:
        BatchError: its shape is not [rows, tokens], a value is neither 0 nor 1, or the tokens of a row are not one run.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise BatchError(
            f"attention_mask is a {type(attention_mask).__name__}; pass a tensor [{rows}, {tokens}], 1 for a token and 0 for "
            f"padding, and say anything else by shard_batch(batch, mesh, mask=...)"
        )
    if attention_mask.shape != (rows, tokens) or bool(((attention_mask != 0) & (attention_mask != 1)).any()):
        raise BatchError(
            f"attention_mask of shape {list(attention_mask.shape)} must be [{rows}, {tokens}] like input_ids, 1 for a token "
            f"and 0 for padding; say anything else by shard_batch(batch, mesh, mask=...)"
        )
    if bool(attention_mask.all()):
        return None
    counts = attention_mask.sum(1).tolist()
    starts = attention_mask.int().argmax(1).tolist()
    for row, (start, count) in enumerate(zip(starts, counts)):
        if not attention_mask[row, start : start + int(count)].all():
            raise BatchError(
                f"attention_mask has a hole in row {row}: its {int(count)} tokens are not one run; padding may stand before "
                f"and behind them, and documents in one row are given by mask=Documents(lengths) & Causal()"
            )
    return tuple(Span(start, start + int(count)) for start, count in zip(starts, counts))


def documents_by_position(position_ids: Tensor | None, rows: int, tokens: int) -> tuple[Documents, ...] | None:
    """The packed documents of each row: one begins where a position of ``position_ids`` is not the previous position plus 1.

    Args:
        position_ids: [rows, tokens], or [1, tokens] for all rows; None or another shape: no documents.
        rows, tokens: the shape of the batch.

    Returns:
        The documents of each row; None if every row is one document.

    Raises:
        BatchError: ``position_ids`` is [4, rows, tokens] and its first row restarts, which only some models read as documents.
    """
    if position_ids is None:
        return None
    if position_ids.ndim == 3 and bool((position_ids[0].diff(dim=1) != 1).any()):
        _refuse_four_rows(position_ids)
    if position_ids.shape not in ((rows, tokens), (1, tokens)):
        return None
    position_ids = position_ids.expand(rows, tokens)  # Transformers takes one row of positions for all
    starts = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)
    if int(starts.sum()) == rows:
        return None
    return _documents(starts)


def restarts_beside_mask(
    padding: tuple[Span, ...] | None, position_ids: Tensor | None, rows: int, tokens: int
) -> tuple[Documents, ...] | None:
    """For each row of a batch with an ``attention_mask`` its packed documents: one begins where ``position_ids`` decrease.

    A position that skips numbers does not begin a document: the model sees across such a gap on one device too.

    Args:
        padding: for each row the tokens that are not padding; the positions of padding are not looked at. None is no padding.
        position_ids: [rows, tokens] or [1, tokens], or None.
        rows, tokens: the shape of the batch.

    Returns:
        The documents of each row; None if no row has more than one, or if ``position_ids`` have another shape.
    """
    if position_ids is None:
        return None
    real = torch.zeros(rows, tokens, dtype=torch.bool, device=position_ids.device)
    for row, run in enumerate(padding or (Span(0, tokens),) * rows):
        real[row, run.start + 1 : run.stop] = True  # a document begins before the first in any case
    first = position_ids[0] if position_ids.ndim == 3 and len(position_ids) == 4 else position_ids
    if first.shape not in ((rows, tokens), (1, tokens)):
        return None
    starts = F.pad(first.expand(rows, tokens).diff(dim=1) <= 0, (1, 0), value=False) & real
    if not bool(starts.any()):
        return None
    _refuse_four_rows(position_ids)
    starts[:, 0] = True
    return _documents(starts)


def documents_of_batch(batch: Mapping[str, Any], rows: int, tokens: int) -> tuple[Documents, ...] | None:
    """The packed documents of a batch of one row, from ``cu_seq_lens_q``, ``cu_seq_lens_k`` [documents + 1] or ``seq_idx`` [1,
    tokens].

    Args:
        batch: the whole batch by name.
        rows, tokens: its shape.

    Returns:
        The documents, in a tuple of one; None if the batch has none of these entries, or no row.

    Raises:
        BatchError: they contradict one another or ``position_ids``, do not cover the tokens, or the batch has several rows.
    """
    given = [_starts(name, batch[name]) for name in VARLEN if batch.get(name) is not None and not name.startswith("max_length")]
    if not given or rows == 0:
        return None
    starts = given[0]
    one = rows == 1 and all(other == starts for other in given) and (starts[0], starts[-1]) == (0, tokens)
    documents = (Documents([b - a for a, b in pairwise(starts)]),) if one else None
    if documents is None or documents_by_position(batch.get("position_ids"), rows, tokens) not in (None, documents):
        names = ", ".join(name for name in VARLEN if name in batch)
        raise BatchError(
            f"{names} and position_ids that restart must say the same beginnings of documents in one row, from 0 to its "
            f"{tokens} tokens; say anything else by shard_batch(batch, mesh, mask=...)"
        )
    return documents


def _starts(name: str, value: Any) -> list[int]:
    """The index at which each document that is not empty begins, then the number of tokens; [-1] if ``value`` is no valid
    entry.

    ``value`` is not valid if it is no tensor or empty, or if it is cumulative lengths that decrease. The caller checks that the
    result runs from 0 to the tokens of the row.

    Args:
        name: ``seq_idx``: ``value`` has the document's number for each token; ``cu_seq_lens_q`` or ``cu_seq_lens_k``: the
            cumulative lengths [0, first length, ..., tokens], in which an empty document is a repeated number.
        value: the tensor that the batch has under this name.
    """
    if not isinstance(value, Tensor) or not value.numel():
        return [-1]
    if name == "seq_idx":
        numbers = value.flatten()
        return [0, *(numbers.diff().nonzero().flatten() + 1).tolist(), numbers.numel()]
    return [-1] if bool((value.flatten().diff() < 0).any()) else value.unique().tolist()


def _documents(starts: Tensor) -> tuple[Documents, ...]:
    """The documents of each row, from ``starts``, a boolean [rows, tokens] that is True where one begins; the first must be
    True."""
    firsts = [row.nonzero().flatten().tolist() for row in starts]
    return tuple(Documents([b - a for a, b in pairwise([*row, starts.shape[1]])]) for row in firsts)


def _refuse_four_rows(position_ids: Tensor) -> None:
    """Raise BatchError for ``position_ids`` of shape [4, rows, tokens], whose first row the caller has found to restart."""
    if position_ids.ndim == 3 and len(position_ids) == 4:
        raise BatchError(
            f"position_ids of shape {list(position_ids.shape)} restart in their first row: some models read restarting "
            f"positions as packed documents and others do not; pass mask=Documents(lengths) & Causal() instead"
        )

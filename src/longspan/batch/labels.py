"""The labels of a batch, on whole rows: shifted before the cut, counted, and refused where nothing could learn them.

    ids        a  b  c  d  e  f        rank 0: a b c    labels predict b c d       shifted on the whole, then cut: my last
    shifted    b  c  d  e  f  .        rank 1: d e f    labels predict e f .       token predicts the next rank's first

Independent of ranks.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from longspan.batch.context import BatchInfo
from longspan.errors import BatchError
from longspan.masks import constructors as masks
from longspan.masks.bands import blind_rows
from longspan.masks.constructors import Full

IGNORE = -100
"""The label of a token that nothing is learned from, as in ``F.cross_entropy``."""


def refuse_unfit_labels(labels: Any, rows: int, tokens: int, name: str = "labels") -> None:
    """Raise BatchError if ``labels``, the batch's tensor called ``name``, fit none of the forms that a model takes.

    The forms are: an integer for each token [rows, tokens], and, for a pooled head, a value or a vector for each row [rows,
    ...]. None is legal too.
    """
    if labels is None:
        return
    if not isinstance(labels, Tensor):
        raise BatchError(
            f"{name} is a {type(labels).__name__}; pass a tensor of integers [{rows}, {tokens}], one for each token"
        )
    shape = list(labels.shape)
    one_a_token, fractional = shape == [rows, tokens], labels.is_floating_point() or labels.dtype == torch.bool
    one_a_row = shape == [rows] or (len(shape) == 2 and shape[0] == rows and fractional)
    if one_a_token and fractional:
        raise BatchError(
            f"{name} of shape {shape} are {labels.dtype}, and the label of a token is an integer; use {name}.long()"
        )
    if one_a_token or one_a_row:
        return
    unfit = f"{name} of shape {shape} do not stand beside input_ids of shape [{rows}, {tokens}]"
    if shape == [rows, tokens - 1]:
        raise BatchError(
            f"{unfit}, but are one token shorter, as if they were shifted already; pass them unshifted, as long as input_ids: "
            f"shard_batch shifts them over the whole row"
        )
    raise BatchError(
        f"{unfit}; give each token one label, {IGNORE} where nothing is learned, or each row one, of shape [{rows}]"
    )


def token_labels(batch: Mapping[str, Any], rows: int, tokens: int, shift: bool) -> dict[str, Tensor]:
    """The labels of whole rows as int64: the batch's own and, where the loss compares others with the logits, these too.

    Fractions are none: they are targets of a loss of the user's own, declared by ``dims=``, and only cut.

    Args:
        batch: the whole batch by name.
        rows, tokens: the shape of the batch.
        shift: each token learns the label of the following token, and the last one -100.

    Returns:
        {"labels": [rows, tokens], "shift_labels": [rows, tokens]}, without the latter where labels are aligned already and the
        batch has none, without the former where the batch has only labels that are shifted already; {} if the batch has no
        label for each token. The last one is what the loss compares with the logits.
    """
    found = {name: batch[name].long() for name in ("labels", "shift_labels") if _one_a_token(batch.get(name), rows, tokens)}
    if shift and "labels" in found and batch.get("shift_labels") is None:
        found["shift_labels"] = F.pad(found["labels"][:, 1:], (0, 1), value=IGNORE)
    return found


def _one_a_token(labels: Any, rows: int, tokens: int) -> bool:
    """Whether ``labels`` are a tensor with one integer for each token."""
    if not isinstance(labels, Tensor) or labels.shape != (rows, tokens):
        return False
    return not labels.is_floating_point() and labels.dtype != torch.bool


def largest_ids(batch: Mapping[str, Any], learned: Tensor | None) -> tuple[int, int]:
    """The largest ids of whole rows, by which tokens beyond a model's vocabulary are refused.

    Args:
        batch: the whole batch, whose ``input_ids`` are read.
        learned: the labels that the loss compares with the logits, -100 not counted; None: there are none.

    Returns:
        (the largest id among tokens and labels, the largest label); -1 where there is none.

    Raises:
        BatchError: an id or a label other than -100 is negative.
    """
    labels = None if learned is None else learned[learned != IGNORE]
    found = {"input_ids": -1, "labels": -1}
    for name, values in {"input_ids": batch.get("input_ids"), "labels": labels}.items():
        if isinstance(values, Tensor) and values.numel():
            if (least := int(values.min())) < 0:
                raise BatchError(f"{name} holds {least}; tokens are 0 or more, and labels too, or {IGNORE}")
            found[name] = int(values.max())
    return max(found.values()), found["labels"]


def refuse_blind_labels(learned: Tensor | None, step: BatchInfo, shift: bool) -> None:
    """Raise BatchError if a token that has a label sees no token at all, not even itself; otherwise return None.

    Args:
        learned: the labels that the loss compares with the logits; None if there are none.
        step: describes the mask, padding and documents of the batch.
        shift: whether labels were shifted; the message names the place of the label before that.

    Raises:
        BatchError: as above.
        MaskError: the batch's mask is made for another number of tokens.
    """
    if step.mask is None and step.padding is None and step.documents is None:
        return
    bands = masks.batch_bands(step.mask_for(Full()), step.rows, step.tokens, step.tokens)
    if learned is None:
        return
    flat = learned.flatten()
    for run in blind_rows(bands, step.rows * step.tokens):
        asked = (flat[run.start : run.stop] != IGNORE).nonzero()
        if len(asked):
            row, token = divmod(run.start + int(asked[0]), step.tokens)
            raise BatchError(
                f"token {token} of row {row} is asked for a prediction, but sees nothing, itself included; "
                f"set labels[{row}, {token + shift}] to {IGNORE}, or let it see itself"
            )


def labelled_rows(wanted_R: Bool[Tensor, "rows"], count: int | None) -> Int[Tensor, "labelled"]:
    """The indices of the True elements of ``wanted_R``, in order.

    Args:
        wanted_R: True for each token that has a label.
        count: how many there are, as the host has counted them; then an accelerator is not waited for. None: not known.
    """
    if count is None or wanted_R.device.type == "cpu":
        return wanted_R.nonzero().flatten()
    return labelled_first(wanted_R, count)


def labelled_first(wanted_R: Bool[Tensor, "rows"], count: int) -> Int[Tensor, "labelled"]:
    """``labelled_rows`` for a known ``count``, without a number that the host must wait for."""
    return (~wanted_R).to(torch.uint8).argsort(stable=True)[:count]


def unknown_label(targets: Int[Tensor, "targets"], vocab: int, ignore_index: int) -> BatchError | None:
    """The error of a target that is not below ``vocab``, which names the legal ``ignore_index`` too; None if all are."""
    outside = targets[(targets < 0) | (targets >= vocab)]
    return _no_word(int(outside[0]), vocab, ignore_index) if len(outside) else None


def refuse_largest_label(step: BatchInfo, vocab: int, ignore_index: int) -> None:
    """Raise BatchError for a label of the step that is not below ``vocab``, or for an ``ignore_index`` other than -100."""
    if ignore_index != IGNORE:
        raise BatchError(
            f"ignore_index={ignore_index} does not go with longspan=, whose labels were counted by {IGNORE}; set the labels "
            f"that are not learned from to {IGNORE} before shard_batch, or leave longspan out"
        )
    if step.largest_label >= vocab:
        raise _no_word(step.largest_label, vocab, IGNORE)


def _no_word(label: int, vocab: int, ignore_index: int) -> BatchError:
    """The error of a label that is no word of a vocabulary of ``vocab``."""
    return BatchError(
        f"label {label} is none of the {vocab} words that the logits know; labels are 0 to {vocab - 1}, or {ignore_index} "
        f"where nothing is learned"
    )

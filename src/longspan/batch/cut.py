"""Cut the tensors of one row of tokens to the tokens of one rank, and describe the whole row in a BatchInfo.

    [rows, N, ...]   --declared dim of tokens, Layout-->   [rows, n, ...]   +   BatchInfo of the whole

Computed on one rank alone. An encoder-decoder has two rows of tokens (encoder_decoder.py), each cut here by its own length.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from longspan.batch.context import BatchInfo, Part
from longspan.batch.labels import IGNORE, largest_ids, refuse_blind_labels, refuse_unfit_labels, token_labels
from longspan.batch.padding import VARLEN, documents_by_position, documents_of_batch, padding_of, restarts_beside_mask
from longspan.batch.short_rows import lengthen, lengthen_info
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.layout import Runs
from longspan.errors import BatchError
from longspan.masks import constructors as masks
from longspan.masks.constructors import Mask
from longspan.masks.refusals import refuse_no_mask

TOKEN_DIM = {
    "input_ids": 1,
    "labels": 1,
    "position_ids": 1,
    "token_type_ids": 1,
    "inputs_embeds": 1,
}
"""Which dimension of the batch's well-known tensors is the tokens (of ``position_ids`` with three, [3, batch, tokens], the
last); others are declared by ``dims=``."""


def cut_row(
    batch: Mapping[str, Any],
    coordinate: MeshCoordinate,
    *,
    shift: bool,
    mask: Mask | Sequence[Mask] | None,
    dims: Mapping[str, int],
) -> Part:
    """The tensors of a batch with one row of tokens (no encoder-decoder), cut to the tokens of the rank at ``coordinate``.

    ``shard_local`` calls it for such a batch, with its own arguments.

    Args:
        batch: tensors [batch, tokens, ...] of whole rows by name.
        coordinate: the place of the rank in the mesh.
        shift: whether each token predicts the next one, so that labels are shifted before the cut.
        mask: who sees whom, for all rows or one for each row; None: each layer's own mask.
        dims: {name of a tensor: its dim of tokens}, for tensors that are not known by name.

    Returns:
        The cut tensors and, under ``longspan``, the BatchInfo of the whole rows.

    Raises:
        BatchError: the batch cannot be cut.
        MaskError: a mask has another length.
    """
    shaped, rows, tokens = _row_shape(batch, dims)
    for name in ("labels", "shift_labels"):
        if name not in dims:
            refuse_unfit_labels(batch.get(name), rows, tokens, name)
    _refuse_fractions(batch)
    step_mask = _step_mask(mask)
    whole = {name: value for name, value in batch.items() if name not in ("attention_mask", *VARLEN)}
    if "position_ids" not in whole:
        whole["position_ids"] = _counted_positions(step_mask, rows, tokens).to(shaped.device)
    labels = token_labels(batch, rows, tokens, shift)
    whole |= labels
    compared = "shift_labels" if "shift_labels" in labels else "labels"
    learned = labels.get(compared)
    padding = padding_of(batch.get("attention_mask"), rows, tokens)
    documents = documents_of_batch(batch, rows, tokens)
    restarts = None
    if mask is None and documents is None:
        find = documents_by_position if batch.get("attention_mask") is None else partial(restarts_beside_mask, padding)
        restarts = find(batch.get("position_ids"), rows, tokens)
    declared: dict[str, int | None] = (
        TOKEN_DIM | {"shift_labels": 1, "position_ids": max(1, whole["position_ids"].ndim - 1)} | dict(dims)
    )
    short = max(0, coordinate.sequence_ranks - tokens)
    positions = coordinate.my_positions(tokens + short)
    if "labels" not in dims and not _has_tokens(batch.get("labels"), tokens):  # of rows
        declared["labels"] = None
    part: Part = {name: _cut_one(name, value, declared, tokens, short, positions) for name, value in whole.items()}
    counted = "position_ids" not in batch
    last_position = int(whole["position_ids"].max()) if rows else tokens - 1
    largest, largest_label = largest_ids(batch, learned)
    info = BatchInfo(
        tokens=tokens,
        rows=rows,
        positions=positions,
        mask=step_mask,
        padding=padding,
        documents=documents,
        restarts=restarts,
        positions_counted=counted,
        last_position=last_position,
        digest=_digest(batch, step_mask, shift, dims),
        num_labels=0 if learned is None else int((learned != IGNORE).sum()),
        largest_token_or_label=largest,
        largest_label=largest_label,
        last_counted_position=last_position if rows and counted else -1,
        last_given_position=last_position if rows and not counted else -1,
        counted_rows_have_ids=rows == 0 or not counted or "input_ids" in batch,
        rows_have_masks=rows == 0 or "attention_mask" in batch,
        num_local_labels=0 if learned is None else int((part[compared] != IGNORE).sum()),
    )
    refuse_blind_labels(learned, info, shift)
    return part | {"longspan": lengthen_info(info, positions, short) if short else info}


def _step_mask(mask: Any) -> Mask | tuple[Mask, ...] | None:
    """``mask=`` of ``shard_batch`` with a sequence as a tuple; MaskError if it holds anything but masks."""
    each = tuple(mask) if isinstance(mask, list | tuple) else (mask,)
    refuse_no_mask(each if mask is not None else ())
    return each if isinstance(mask, list | tuple) else mask


def _refuse_fractions(batch: Mapping[str, Any]) -> None:
    """Raise BatchError if the ids or positions in ``batch`` are not integers."""
    for name in ("input_ids", "position_ids"):
        value = batch.get(name)
        if isinstance(value, Tensor) and (value.is_floating_point() or value.dtype == torch.bool):
            raise BatchError(f"{name} are {value.dtype}, and must be integers; use {name}.long()")


def _row_shape(batch: Mapping[str, Any], dims: Mapping[str, int]) -> tuple[Tensor, int, int]:
    """The shape of a batch's rows, read from a tensor that is known by name or in ``dims``.

    Returns:
        (that tensor, the number of rows, the number of tokens in a row).

    Raises:
        BatchError: no tensor is known to have the tokens, or a row has none.
    """
    ids = batch.get("input_ids", batch.get("inputs_embeds"))
    known = {name: dim for name, dim in dims.items() if isinstance(batch.get(name), Tensor) and batch[name].ndim > dim}
    if isinstance(ids, Tensor) and ids.ndim > 1:
        shaped, dim = ids, 1
    elif known:
        name = min(known, key=lambda name: known[name] != 1)  # [batch, tokens, ...], if one is, tells the rows too
        shaped, dim = batch[name], known[name]
    else:
        given = f" but of {list(ids.shape)}" if isinstance(ids, Tensor) else ""
        if ids is not None and not given:
            raise BatchError(f"input_ids are a {type(ids).__name__}; pass tensors: torch.as_tensor(ids), [batch, tokens]")
        raise BatchError(
            f"the batch has no input_ids of shape [batch, tokens]{given} (nor inputs_embeds); it needs one of them, or "
            f"dims={{name: dim}} with the dim of tokens of each of its tensors"
        )
    rows, tokens = shaped.shape[0] if dim else 1, shaped.shape[dim]
    if not tokens:
        raise BatchError(f"a row of the batch has no tokens, its shape is {list(shaped.shape)}; leave such rows out")
    return shaped, rows, tokens


def take(x: Shaped[Tensor, "*whole"], runs: Runs, dim: int) -> Shaped[Tensor, "*part"]:
    """The positions ``runs`` (ranges) of ``x`` along ``dim``, one range after the other, as a new contiguous tensor."""
    return torch.cat([x.narrow(dim, run.start, len(run)) for run in runs], dim)


def content_hash(data: bytes) -> int:
    """A hash of ``data`` as an integer of 56 bits, small enough for the int64 in which ranks compare it."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "big")


def _counted_positions(mask: Mask | tuple[Mask, ...] | None, rows: int, tokens: int) -> Tensor:
    """The ``position_ids`` [rows, tokens] of a batch that came without any: 0, 1, 2, ... along each row.

    They restart at 0 in each document where ``mask`` (one for all rows, or one per row) is made of documents.
    """
    counted = torch.arange(tokens, device="cpu").expand(rows, tokens)
    each = mask if isinstance(mask, tuple) else (mask,) * rows
    packed = [masks.documents_in_mask(one) for one in each]
    if not any(packed) or len(each) != rows:
        return counted
    restarted = [
        of_row
        if documents is None or sum(documents.lengths) != tokens
        else torch.cat([torch.arange(n, device="cpu") for n in documents.lengths])
        for of_row, documents in zip(counted, packed)
    ]
    return torch.stack(restarted)


def _has_tokens(labels: Any, tokens: int) -> bool:
    """Whether ``labels`` are a tensor with an entry for each of a row's ``tokens`` in dim 1."""
    return isinstance(labels, Tensor) and labels.shape[1:2] == (tokens,)


def _cut_one(name: str, value: Any, declared: Mapping[str, int | None], tokens: int, short: int, positions: Runs) -> Any:
    """One tensor of the batch, cut to this rank's tokens; what is no tensor, or has no dim of tokens, is returned as it is.

    Args:
        name, value: of the batch's entry.
        declared: {name: dim of tokens, or None without one} of all known tensors.
        tokens: tokens of the row as given.
        short: tokens of padding to append, because the row has fewer tokens than ranks.
        positions: this rank's positions in the row.

    Raises:
        BatchError: the tensor is not in ``declared``, or does not have ``tokens`` elements in that dim.
    """
    if not isinstance(value, Tensor):
        return value
    if name not in declared:
        raise BatchError(
            f"the batch's tensor {name!r} of shape {list(value.shape)} is unknown; say which of its dimensions is the tokens "
            f"by dims={{{name!r}: 1}}, or take it out of the batch"
        )
    dim = declared[name]
    if dim is None:
        return value
    if value.ndim <= dim or value.shape[dim] != tokens:
        raise BatchError(
            f"{name!r} of shape {list(value.shape)} does not have the row's {tokens} tokens in dim {dim}; "
            f"declare its token dimension by dims={{{name!r}: ...}}"
        )
    if short:
        value = lengthen(value, dim, short, IGNORE if name.endswith("labels") else 0)
    return take(value, positions, dim)


def _digest(batch: Mapping[str, Any], mask: Mask | tuple[Mask, ...] | None, shift: bool, dims: Mapping[str, int]) -> int:
    """A 56-bit hash of the batch and of the other arguments of ``shard_batch``, which ranks of a sequence compare.

    Of the batch's tensors it covers names, shapes, dtypes and values. ``mask`` None: each layer's own.
    """
    described = (sorted(batch), masks.full_repr(mask), shift, sorted(dims.items()))
    content = hashlib.blake2b(repr(described).encode(), digest_size=7)
    for name in sorted(batch):
        value = batch[name]
        if isinstance(value, Tensor):
            content.update(repr((name, value.shape, value.dtype)).encode())
            content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return int.from_bytes(content.digest(), "big")

"""The batch of an encoder-decoder: two rows of tokens, each cut by its own length.

input_ids, attention_mask, ...               [batch, N]   --cut_row-->  the encoder's part    longspan: its BatchInfo
decoder_input_ids, decoder_..., labels       [batch, M]   --cut_row-->  the decoder's part    longspan.target
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from longspan.batch.context import TARGET, BatchInfo, Part
from longspan.batch.cut import content_hash, cut_row
from longspan.batch.labels import IGNORE
from longspan.batch.padding import VARLEN
from longspan.distributed.coordinate import MeshCoordinate
from longspan.errors import BatchError, LongspanError
from longspan.masks.constructors import Mask


def shift_right(labels: Int[Tensor, "batch tokens"], start: int | None, padding: int | None) -> Int[Tensor, "batch tokens"]:
    """The decoder's input ids with which an encoder-decoder learns to predict ``labels``.

    They are ``start`` followed by all labels but the last, with ``padding`` in the place of -100: what
    ``model.prepare_decoder_input_ids_from_labels(labels)`` returns in BART, Marian, Pegasus and T5. Models whose decoder input
    starts with a language id (mBART, PLBart) have another rule; call their method instead. Call it on whole rows, before the
    cut: ``shard_batch({"input_ids": ..., "decoder_input_ids": ..., "labels": labels}, mesh, shift=False)``.

    Args:
        labels: the labels of whole rows, [batch, tokens]; -100 where nothing is learned.
        start: the model's ``config.decoder_start_token_id``.
        padding: the model's ``config.pad_token_id``.

    Returns:
        A new tensor of the shape of ``labels``.

    Raises:
        BatchError: ``start`` or ``padding`` is None.
    """
    if start is None or padding is None:
        raise BatchError(
            f"shift_right was given start={start} and padding={padding}, and needs both; a model without them makes its "
            f"decoder_input_ids by model.prepare_decoder_input_ids_from_labels(labels)"
        )
    shifted = F.pad(labels[:, :-1], (1, 0), value=start)
    return shifted.masked_fill(shifted == IGNORE, padding)


def has_two_rows(batch: Mapping[str, Any]) -> bool:
    """Whether the batch is one of an encoder-decoder: it has ``decoder_input_ids`` or ``decoder_inputs_embeds``."""
    return any(name in batch for name in (f"{TARGET}input_ids", f"{TARGET}inputs_embeds"))


def cut_pair(
    batch: Mapping[str, Any],
    coordinate: MeshCoordinate,
    *,
    shift: bool,
    mask: Mask | Sequence[Mask] | None,
    dims: Mapping[str, int],
) -> Part:
    """The tensors of an encoder-decoder's batch, cut to the tokens of the rank at ``coordinate``; ``shard_local`` calls it.

    Labels and tensors named ``decoder_...`` are cut by the length of the decoder's rows, all others by that of the encoder's.

    Args:
        batch: tensors [batch, tokens, ...] of whole rows by name.
        coordinate: the place of the rank in the mesh.
        shift: must be False.
        mask: must be None: each layer's own mask is used.
        dims: {name of a tensor: its dim of tokens}, for tensors that are not known by name.

    Returns:
        The cut tensors and, under ``longspan``, the encoder's BatchInfo, whose ``target`` is the decoder's.

    Raises:
        BatchError: the batch cannot be cut; it has a mask, documents or ``shift=True``; encoder and decoder do not fit.
    """
    if shift and "labels" in batch:
        raise BatchError(
            "labels of an encoder-decoder stand where they are predicted, its decoder_input_ids are what is shifted; "
            "use shard_batch(batch, mesh, shift=False)"
        )
    if mask is not None:
        raise BatchError(
            "mask= says who may look at whom in one row of tokens, and an encoder-decoder has two; say padding by "
            "attention_mask and decoder_attention_mask"
        )
    if any(name in batch for name in VARLEN):
        raise BatchError("cu_seq_lens_q says documents in one row of tokens, and an encoder-decoder has two; pass one a row")
    theirs = {name: name.removeprefix(TARGET) for name in (*batch, *dims) if name.startswith(TARGET) or name == "labels"}
    encoder = {name: value for name, value in batch.items() if name not in theirs}
    decoder = {theirs[name]: value for name, value in batch.items() if name in theirs}
    mine = cut_row(
        encoder, coordinate, shift=False, mask=None, dims={name: dim for name, dim in dims.items() if name not in theirs}
    )
    try:
        wanted = {theirs[name]: dim for name, dim in dims.items() if name in theirs}
        other = cut_row(decoder, coordinate, shift=False, mask=None, dims=wanted)
    except LongspanError as error:
        raise type(error)(f"of the decoder's tensors ({TARGET}..., labels): {error}") from error
    source, target = mine.pop("longspan"), other.pop("longspan")
    _refuse_unfit(source, target, decoder.get("labels"))
    digest = content_hash(repr((source.digest, target.digest)).encode())
    step = replace(
        source, target=target, num_labels=target.num_labels, largest_label=target.largest_label, digest=digest,
        num_local_labels=target.num_local_labels,
        rows_have_masks=source.rows_have_masks and target.rows_have_masks,
    )  # fmt: skip
    renamed = {name if name == "labels" else f"{TARGET}{name}": value for name, value in other.items()}
    return mine | renamed | {"longspan": step}


def _refuse_unfit(source: BatchInfo, target: BatchInfo, labels: Any) -> None:
    """Raise BatchError if an encoder-decoder's two rows of tokens do not fit each other.

    Args:
        source, target: the BatchInfo of the encoder's rows and of the decoder's, which must be equally many.
        labels: a row that has some must have a token, not padding alone, for the encoder to read.
    """
    if source.rows != target.rows:
        raise BatchError(f"the encoder was given {source.rows} rows and the decoder {target.rows}; pass as many of each")
    if not isinstance(labels, Tensor) or labels.shape[1:] != (target.given_tokens,):
        return
    for row, real in enumerate(source.padding or ()):
        if real.start == real.stop and bool((labels[row] != IGNORE).any()):
            raise BatchError(
                f"row {row} is padding alone, so that its decoder sees nothing of it, but it has labels; set them to "
                f"{IGNORE}, or give it a token"
            )

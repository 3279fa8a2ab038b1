"""What one forward must know of the whole batch, and a rank cannot see in its part of it.

    model(**part)   part["longspan"] = BatchInfo   ->   attention: tokens, mask   positions: last_position   loss: num_labels

Made by ``shard_local``, agreed on by ``sync_batches``, and frozen: it belongs to one call, never to a model.
"""

from dataclasses import dataclass
from typing import Any

from longspan.distributed.layout import Runs
from longspan.errors import BatchError, MaskError
from longspan.masks.bands import rectangle
from longspan.masks.constructors import Bands, Documents, Full, Mask, Span, hides_later_tokens, shows_later_tokens

Part = dict[str, Any]
"""A rank's tensors by name, and under ``longspan`` the BatchInfo: ``model(**part)``."""

TARGET = "decoder_"
"""The prefix of the names of an encoder-decoder's tensors that hold the decoder's tokens; ``labels`` belong to them too."""


@dataclass(frozen=True, kw_only=True)
class BatchInfo:
    """What a call of the model must know of the whole batch: its keyword ``longspan``.

    "By agreement" means: what ``shard_local`` found in this rank's batch until ``sync_batches`` completes it with what all
    ranks and micro-batches of the step hold, so that every rank refuses what one of them has.
    """

    tokens: int
    """Tokens of a whole row."""
    rows: int
    """Rows of this data replica."""
    positions: Runs
    """The positions in the whole row of this rank's tokens, in their order."""
    mask: Mask | tuple[Mask, ...] | None
    """``mask=`` of ``shard_batch``; None: every layer's own mask; a tuple: one mask for each row."""
    padding: tuple[Span, ...] | None
    """For each row the run of tokens that are not padding; None: no row has padding."""
    documents: tuple[Documents, ...] | None
    """For each row the documents that the batch gives by ``cu_seq_lens_q`` or ``seq_idx``, valid in every layer; None: none."""
    restarts: tuple[Documents, ...] | None
    """For each row the documents between which the caller's ``position_ids`` restart; None: they never do."""
    positions_counted: bool
    """Whether the batch came without ``position_ids``, so that those of the part are counted by ``shard_local``."""
    last_position: int
    """The largest of the batch's ``position_ids``."""
    digest: int
    """A hash of the batch's content and of the arguments of ``shard_batch``; equal on the ranks that share a sequence."""
    num_labels: int
    """Tokens that are learned from. By agreement: of all data replicas and micro-batches of the step."""
    largest_token_or_label: int
    """The largest id in ``input_ids`` and in the labels that are learned from, -1 without any. By agreement."""
    largest_label: int
    """The largest label that is learned from, -1 without any. By agreement."""
    last_counted_position: int
    """The largest position of rows without ``position_ids``, -1 without such a row. By agreement."""
    last_given_position: int
    """The largest position of rows with ``position_ids``, -1 without such a row. By agreement."""
    counted_rows_have_ids: bool
    """Whether every row without ``position_ids`` came with ``input_ids``. By agreement."""
    rows_have_masks: bool
    """Whether every row came with its ``attention_mask`` (and ``decoder_attention_mask``). By agreement."""
    num_local_labels: int | None = None
    """Tokens of this rank that are learned from, counted on the host where the part was cut; None: not counted."""
    target: "BatchInfo | None" = None
    """The BatchInfo of the decoder's tokens, where the batch is that of an encoder-decoder."""
    added_padding: int = 0
    """Tokens of padding that were added behind rows shorter than the ranks of their sequence; ``tokens`` counts them."""
    is_dummy: bool = False
    """Whether this is the row that a replica without rows computes to join the collectives; nobody learns from it."""

    @property
    def given_tokens(self) -> int:
        """Tokens of a whole row as it was given to ``shard_batch``."""
        return self.tokens - self.added_padding

    @property
    def is_plain(self) -> bool:
        """Whether the batch (and its ``target``) has no ``mask=``, padding or documents, so that each layer uses its own
        mask unchanged."""
        plain = (self.mask, self.padding, self.documents, self.restarts) == (None,) * 4
        return plain and (self.target is None or self.target.is_plain)

    def mask_across(self) -> Mask | tuple[Mask, ...]:
        """The mask of cross-attention: each token of ``target`` (query) sees every token of the same row here that is not
        padding.

        Returns:
            One mask for all rows; where there is padding, a tuple with one for each row.
        """
        if self.target is None or self.padding is None:
            return Full()
        tokens = self.target.tokens
        seen = [rectangle(0, tokens, real.start, real.stop) for real in self.padding]
        return tuple(Bands([band] if band else []) for band in seen)

    def mask_for(self, own: Mask, restarts: bool = False) -> Mask | tuple[Mask, ...]:
        """The mask that one attention layer uses in this step: the layer's own mask ``&`` the step's ``mask=``, padding and
        documents.

        Args:
            own: the layer's mask: causal, full, a window, chunked.
            restarts: whether the model treats restarting ``position_ids`` as the beginning of another document.

        Returns:
            One mask for all rows, or a tuple with one per row.

        Raises:
            MaskError: the step's mask is built to show later tokens, and the layer's hides them.
        """
        if self.mask is None:
            mask: Mask | tuple[Mask, ...] = own
        elif isinstance(self.mask, Mask):
            mask = within(self.mask, own)
        else:
            mask = tuple(within(of_row, own) for of_row in self.mask)
        narrower = [rows for rows in (self.padding, self.documents, self.restarts if restarts else None) if rows is not None]
        if not narrower:
            return mask
        each = (mask,) * self.rows if isinstance(mask, Mask) else mask
        for rows in narrower:
            each = tuple(of_row & narrow for of_row, narrow in zip(each, rows, strict=True))
        return each


def within(mask: Mask, own: Mask) -> Mask:
    """The mask ``mask & own``: a token sees what both the step's ``mask`` and a layer's ``own`` mask show it.

    So a layer's window is kept in a step with a mask of its own.

    Raises:
        MaskError: ``mask`` is built to show later tokens (Full, PrefixLM) and ``own`` hides them; the result would hide them.
    """
    if hides_later_tokens(own) and shows_later_tokens(mask):
        raise MaskError(
            f"mask={mask} lets tokens see later ones, and the model's layers are {own}; use mask=... & Causal(), or a model "
            f"whose attention is not causal"
        )
    return own if mask == own else mask & own


def refuse_unknown_tokens(step: BatchInfo, vocab: int | None, name: str) -> None:
    """Raise BatchError, on every rank alike, if a token id or label of any rank is not below ``vocab``; otherwise return.

    Args:
        step: the BatchInfo after ``sync_batches``, which has the largest id of all ranks.
        vocab: the size of the model's vocabulary; None: nothing is checked.
        name: the model's name, for the error.
    """
    if vocab is not None and step.largest_token_or_label >= vocab:
        largest = step.largest_token_or_label
        raise BatchError(
            f"the step holds token or label {largest}, and {name} knows 0 to {vocab - 1}; use the model's own tokenizer"
        )

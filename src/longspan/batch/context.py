"""What one forward must know of the whole batch, and a rank cannot see in its part of it.

    model(**part)    part["longspan"] = BatchInfo    ->   attention: tokens, mask    positions: last_position    loss: labelled

Made by ``shard_local``, agreed on by ``sync_batches``, and frozen: it hangs on a call, never on a model. Knows no collective.
"""

from dataclasses import dataclass

from longspan.distributed.layout import Runs
from longspan.errors import BatchError, MaskError
from longspan.masks.bands import rectangle
from longspan.masks.constructors import Bands, Documents, Full, Mask, Span, hides_later_tokens, shows_later_tokens

TARGET = "decoder_"
"""How tensors of an encoder-decoder's batch are named that hold its decoder's tokens; ``labels`` are theirs too."""


@dataclass(frozen=True)
class BatchInfo:
    """The keyword ``longspan`` of a call.

    ``tokens`` of the whole row, ``rows`` of this replica, ``positions`` of this rank's tokens, ``counted`` (whether the batch
    came without ``position_ids``, so that they are these), ``named`` (whether, by agreement, every row that did came with ids),
    ``masked`` (whether, by agreement, every row came with its masks),
    ``last_position`` (the largest ``position_ids`` of the batch), ``mask`` (None: what the model says itself; a tuple has one
    mask a row), ``padding`` (None, or for each row the run of tokens that are real), ``documents`` (None, or those that the
    batch says to every layer), ``restarts`` (None, or for each row the documents between which the caller's ``position_ids``
    begin anew), ``num_labels`` tokens that are learned from (by agreement: over all replicas and micro-batches of the step),
    ``digest`` of the whole content, equal on the ranks that share a sequence, ``largest`` token or label, ``largest_label``,
    ``furthest`` position of rows without ``position_ids`` and ``furthest_placed`` of rows with them (by agreement: of all ranks
    and micro-batches; -1 without such a row), so that all ranks can refuse what a model does not know. ``target`` is that
    of the decoder's tokens, where the batch is an encoder-decoder's. ``is_dummy``: the row is one that a replica without rows
    computes to join the others' collectives, and that nobody learns from.
    """

    tokens: int
    rows: int
    positions: Runs
    counted: bool
    named: bool
    masked: bool
    last_position: int
    mask: Mask | tuple[Mask, ...] | None
    padding: tuple[Span, ...] | None
    documents: tuple[Documents, ...] | None
    restarts: tuple[Documents, ...] | None
    num_labels: int
    digest: int
    largest: int
    largest_label: int
    furthest: int
    furthest_placed: int
    target: "BatchInfo | None" = None
    is_dummy: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether every layer's own mask says all that there is to say."""
        plain = (self.mask, self.padding, self.documents, self.restarts) == (None,) * 4
        return plain and (self.target is None or self.target.is_plain)

    def mask_across(self) -> Mask | tuple[Mask, ...]:
        """Who in ``target`` may look at whom here: every token of a row at every real token of the same row."""
        if self.target is None or self.padding is None:
            return Full()
        tokens = self.target.tokens
        seen = [rectangle(0, tokens, real.start, real.stop) for real in self.padding]
        return tuple(Bands([band] if band else []) for band in seen)

    def mask_for(self, own: Mask, restarts: bool = False) -> Mask | tuple[Mask, ...]:
        """The mask of a layer in this step: its own, restricted by the step's, by padding and by documents.

        Args:
            own: the layer's mask: causal, full, a window, chunked.
            restarts: whether positions that restart mean another document to the model.

        Returns:
            One mask for all rows, or one for each.

        Raises:
            MaskError: the step's mask shows later tokens, which the layer's hides.
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
    """The tokens that both a step's mask and a layer's own let a token see: a window of the layer survives.

    Raises MaskError where the step's mask shows later tokens by its kind and the layer's hides them: the intersection would
    drop what was asked for.
    """
    if hides_later_tokens(own) and shows_later_tokens(mask):
        raise MaskError(
            f"mask={mask} lets tokens see later ones, and the model's layers are {own}; use mask=... & Causal(), or a model "
            f"whose attention is not causal"
        )
    return own if mask == own else mask & own


def refuse_unknown_tokens(step: BatchInfo, vocab: int | None, name: str) -> None:
    """Raise BatchError, on every rank alike, if any rank holds a token or label beyond a model's ``vocab``."""
    if vocab is not None and step.largest >= vocab:
        raise BatchError(
            f"the step holds token or label {step.largest}, and {name} knows 0 to {vocab - 1}; use the model's own tokenizer"
        )

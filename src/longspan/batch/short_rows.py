"""A row shorter than the ranks of its sequence gets padding behind it, so that every rank holds a token.

    3 tokens on 4 ranks       a b c   ->   a | b | c | .       id 0, label -100: no token sees it, and nobody learns from it

So a short row in the middle of a run has the loss and gradients of one device. Computed on one rank alone.
"""

from dataclasses import replace

import torch
from jaxtyping import Num
from torch import Tensor

from longspan.batch.context import BatchInfo
from longspan.distributed.layout import Runs
from longspan.masks.constructors import And, Bands, BlockSparse, Documents, Mask, Or, Span


def lengthen(x: Num[Tensor, "*whole"], dim: int, count: int, fill: int) -> Num[Tensor, "*longer"]:
    """A copy of ``x`` with ``count`` tokens appended along ``dim``, each element of which is ``fill``."""
    shape = [*x.shape]
    shape[dim] = count
    return torch.cat([x, x.new_full(shape, fill)], dim)


def lengthen_info(info: BatchInfo, positions: Runs, count: int) -> BatchInfo:
    """A copy of ``info`` for rows to which padding was appended: length, positions, mask and documents include the padding.

    Args:
        info: describes the rows without the appended padding.
        positions: this rank's positions in the longer row.
        count: tokens of padding appended to each row.
    """

    def longer(rows: tuple[Documents, ...] | None) -> tuple[Documents, ...] | None:
        return None if rows is None else tuple(Documents((*row.lengths, count)) for row in rows)

    mask = info.mask
    if isinstance(mask, Mask):
        mask = lengthen_mask(mask, info.tokens, count)
    elif mask is not None:
        mask = tuple(lengthen_mask(of_row, info.tokens, count) for of_row in mask)
    return replace(
        info,
        tokens=info.tokens + count,
        added_padding=count,
        positions=positions,
        mask=mask,
        padding=info.padding or (Span(0, info.tokens),) * info.rows,
        documents=longer(info.documents),
        restarts=longer(info.restarts),
    )


def lengthen_mask(mask: Mask, tokens: int, count: int) -> Mask:
    """A mask that hides and shows the same as ``mask`` in a row to which ``count`` tokens are appended.

    A mask that is made for rows of exactly ``tokens`` tokens (documents, blocks) becomes one for ``tokens + count``; a mask
    that fits rows of any length is returned as it is.
    """
    if isinstance(mask, And | Or):
        return type(mask)(lengthen_mask(mask.left, tokens, count), lengthen_mask(mask.right, tokens, count))
    if isinstance(mask, Documents) and mask.key_lengths is None:
        return Documents((*mask.lengths, count))
    return Bands(mask.bands(tokens, tokens)) if isinstance(mask, BlockSparse) else mask

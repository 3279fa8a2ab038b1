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
    """``x`` with ``count`` tokens of the value ``fill`` behind its last along ``dim``."""
    shape = [*x.shape]
    shape[dim] = count
    return torch.cat([x, x.new_full(shape, fill)], dim)


def lengthen_info(info: BatchInfo, positions: Runs, count: int) -> BatchInfo:
    """The BatchInfo of the lengthened rows.

    Args:
        info: of the rows as they were given.
        positions: this rank's positions in the lengthened row.
        count: tokens of padding behind each row.
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
    """``mask``, with those of its parts that hold for exactly ``tokens`` tokens made to hold for ``count`` more."""
    if isinstance(mask, And | Or):
        return type(mask)(lengthen_mask(mask.left, tokens, count), lengthen_mask(mask.right, tokens, count))
    if isinstance(mask, Documents) and mask.key_lengths is None:
        return Documents((*mask.lengths, count))
    return Bands(mask.bands(tokens, tokens)) if isinstance(mask, BlockSparse) else mask

"""Refusal of what is no mask, where one is given. Independent of what a mask is given to."""

from collections.abc import Iterable

from longspan.errors import MaskError
from longspan.masks.constructors import Mask


def refuse_no_mask(given: Iterable[object]) -> None:
    """Raise MaskError if anything in ``given`` is no mask."""
    for one in given:
        if not isinstance(one, Mask):
            raise MaskError(
                f"mask={type(one).__name__} is no mask; pass one of longspan's, like Causal(), Window(left) or "
                f"Documents(lengths) & Causal(), or a list of them, one for each row"
            )

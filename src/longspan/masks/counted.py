"""Numbers of tokens as the masks take them: whole numbers, not below a least one. Independent of which masks there are."""

from collections.abc import Iterable
from operator import index

from longspan.errors import MaskError


def counted(least: int, mask: object, name: str, given: int, otherwise: str = "") -> None:
    """Raise MaskError if ``given``, the argument ``name`` of ``mask``, is no whole number or below ``least``.

    ``otherwise`` ends the message.
    """
    if not isinstance(given, int):
        raise MaskError(f"{mask}: {name} is {given}, a {type(given).__name__}; it counts tokens, so pass an int{otherwise}")
    if given < least:
        raise MaskError(f"{mask}: {name} is {given}, but it counts tokens; it must be {least} or more{otherwise}")


def whole(lengths: Iterable[int]) -> tuple[int, ...]:
    """``lengths`` as ints; elements of an integer array or tensor become ints, which are compared and hashed by value.

    Raises:
        MaskError: an element is a fraction.
    """
    given = list(lengths)
    try:
        return tuple(map(index, given))
    except TypeError:
        raise MaskError(f"the lengths {given} of documents count tokens; pass a sequence of ints") from None

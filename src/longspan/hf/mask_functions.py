"""Transformers' mask functions, which are closures over (row, head, query, key), as masks of longspan.

    mask_function(row, head, q, k) -> sees or not     evaluated at rows and keys of interest     Causal(), Full(), Window(...)

Does not know batches, layers or meshes.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from longspan.masks.constructors import Causal, Chunked, Full, Mask, Window


class MaskFunction:
    """What a layer of a parallel model is given as its ``attention_mask``: its mask function, evaluated only when needed.

    Args:
        function: Transformers' closure.
        device: where it is evaluated.
        padding: the ``attention_mask`` [batch, tokens] that the model passed beside it, or None.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device, padding: Tensor | None = None) -> None:
        self.function, self.device, self._padding = function, device, padding

    @property
    def hides_padding(self) -> bool:
        """Whether the model hides tokens besides, as padding."""
        return self._padding is not None and not bool(self._padding.all())

    def sees(self, q: int, k: int) -> bool:
        """Whether query q of the first row sees key k."""
        row, head, query, key = torch.tensor([0, 0, q, k], device=self.device)
        return bool(self.function(row, head, query, key))

    @cached_property
    def mask(self) -> Mask | None:
        """The same as a mask, or None where it is none of the kinds that Transformers builds."""
        return as_mask(self.function, self.device)


def as_mask(function: Callable[..., Tensor], device: torch.device, tokens: int = 2**21) -> Mask | None:
    """One of Transformers' mask functions as a mask; None where it is of no kind that Transformers builds.

    The number of queries that see the first key gives the reach; the kind that this allows is then compared with the function
    at rows and keys of interest: where rows begin and end, and a few hundred others. Evaluating every query would take half a
    second a kind, most of it for fresh memory pages.

    Args:
        function: (row, head, query, key) -> bool tensor.
        device: where it is evaluated.
        tokens: the length of the row that is looked at.
    """
    zero = torch.zeros((), dtype=torch.long, device=device)
    reach = _reach(lambda queries: function(zero, zero, queries, zero).expand(len(queries)), device, tokens)
    kinds: list[tuple[Mask, Callable[[int], tuple[int, int]]]] = [
        (Full(), lambda q: (0, tokens)),
        (Causal(), lambda q: (0, q + 1)),
        (Window(reach - 1), lambda q: (max(0, q - reach + 1), q + 1)),
        (Window(reach - 1, reach - 1), lambda q: (max(0, q - reach + 1), min(tokens, q + reach))),
        (Chunked(reach) & Causal(), lambda q: (q // reach * reach, q + 1)),
    ]
    rows = [q for q in {0, 1, 2, reach - 1, reach, reach + 1, tokens // 3, tokens // 2, tokens - 1} if 0 <= q < tokens]
    some = {*range(64), *range(0, tokens, tokens // 256)}

    def fits(row: Callable[[int], tuple[int, int]]) -> bool:
        for q in rows:
            start, stop = row(q)
            edges = {k + near for k in (start, stop, q) for near in (-2, -1, 0, 1, 2)}
            keys = torch.tensor(sorted(k for k in some | edges if 0 <= k < tokens), device=device)
            seen = function(zero, zero, zero + q, keys).expand(len(keys))
            if not torch.equal(seen, (keys >= start) & (keys < stop)):
                return False
        return True

    return next((mask for mask, row in kinds if fits(row)), None) if reach else None


def _reach(sees: Callable[[Tensor], Tensor], device: torch.device, tokens: int, stride: int = 1024) -> int:
    """How many queries see the first key: they are the first ones in every kind of mask; 0 where they are not.

    Every ``stride``-th query is looked at, then each one of the stretch in which the last one that sees must be.
    """
    start = 0
    for queries in (torch.arange(0, tokens, stride, device=device), torch.arange(stride, device=device)):
        seen = sees((queries + start).clamp(max=tokens - 1))
        count = int(seen.sum())
        if not count or not bool(seen[:count].all()):
            return 0
        start += int(queries[count - 1])
    return min(start + 1, tokens)

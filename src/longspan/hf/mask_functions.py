"""What a Hugging Face model says of itself: who may look at whom, by mask functions, which are closures, as masks.

    mask_function(row, head, q, k) -> sees or not     asked at rows and keys of interest     Causal(), Full(), Window(...), ...

Knows nothing of batches, layers or meshes.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longspan.masks.constructors import Causal, Chunked, Full, Mask, Window


def is_pair(model: Any) -> bool:
    """Whether the model is an encoder-decoder."""
    return bool(getattr(model.config, "is_encoder_decoder", False)) and model.get_encoder() is not model.get_decoder()


class Said:
    """A layer's mask function, asked when it is needed; and whether the model hides tokens besides (``hides``), as padding."""

    def __init__(self, function: Callable[..., Tensor], device: torch.device, padding: Tensor | None = None) -> None:
        self.function, self.device, self._padding = function, device, padding

    @property
    def hides(self) -> bool:
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
    """One of Transformers' mask functions, which are closures, as a mask; None where it is of no kind that it builds.

    Its first column says how far it reaches; the kind that this allows is then compared with it at rows and keys of interest:
    where rows begin and end, and a few hundred others.
    """
    every, zero = torch.arange(tokens, device=device), torch.zeros((), dtype=torch.long, device=device)
    reach = int(function(zero, zero, every, zero).expand(tokens).sum())
    kinds: list[tuple[Mask, Callable[[int], tuple[int, int]]]] = [
        (Full(), lambda q: (0, tokens)),
        (Causal(), lambda q: (0, q + 1)),
        (Window(reach - 1), lambda q: (max(0, q - reach + 1), q + 1)),
        (Window(reach - 1, reach - 1), lambda q: (max(0, q - reach + 1), min(tokens, q + reach))),
        (Chunked(reach) & Causal(), lambda q: (q // reach * reach, q + 1)),
    ]
    rows = sorted({0, 1, 2, reach - 1, reach, reach + 1, tokens // 3, tokens // 2, tokens - 1} & set(range(tokens)))
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

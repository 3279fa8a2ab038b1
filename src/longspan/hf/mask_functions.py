"""Transformers' mask functions, which are closures over (row, head, query, key), as masks of longspan.

    mask_function(row, head, q, k) -> sees or not     evaluated at rows and keys of interest     Causal(), Full(), Window(...)

Independent of batches, layers and meshes.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longspan.masks.constructors import Causal, Chunked, Full, Mask, Window


class MaskFunction:
    """The ``attention_mask`` that layers of a parallel model get: Transformers' mask function, evaluated only when needed.

    It replaces the tensor of eager attention (0 where a query sees a key, a large negative number elsewhere), which would have
    queries x keys elements. Test forwards read the layer's mask from it.

    Args:
        function: Transformers' closure.
        device: where it is evaluated.
        padding: the ``attention_mask`` [batch, tokens] that the model passed beside it, or None.
        shape: [batch, 1, queries, keys] of the tensor that eager attention would get.
        tokens: how many queries and keys the function knows.
    """

    def __init__(
        self, function: Callable[..., Tensor], device: torch.device, padding: Tensor | None = None,
        shape: tuple[int, ...] = (), tokens: int = 2**21,
    ) -> None:  # fmt: skip
        self.function, self.device, self.shape, self._padding, self._tokens = function, device, shape, padding, tokens

    def size(self, dim: int | None = None) -> Any:
        """The whole ``shape``, or its element number ``dim`` (None: all), as ``Tensor.size`` does, because models ask for
        it."""
        return torch.Size(self.shape) if dim is None else self.shape[dim]

    def to(self, *_: Any, **__: Any) -> "MaskFunction":
        """Returns this object: the mask is the same for every dtype and device."""
        return self

    def __getitem__(self, index: Any) -> "MaskFunction":
        """Returns this object for a slice that keeps everything, as models slice the mask to the number of keys.

        Raises:
            TypeError: the slice changes the shape.
        """
        kept = torch.empty((), device="meta").expand(self.shape)[index].shape
        if kept != torch.Size(self.shape):
            raise TypeError(f"{type(self).__name__} of shape {self.shape} is cut to {kept}")
        return self

    @property
    def hides_padding(self) -> bool:
        """Whether the model hides tokens as padding in addition to the mask function."""
        return self._padding is not None and not bool(self._padding.all())

    def sees(self, q: int, k: int) -> bool:
        """Whether query q of the first row sees key k."""
        row, head, query, key = torch.tensor([0, 0, q, k], device=self.device)
        return bool(self.function(row, head, query, key))

    def shown(self, queries: int, keys: int) -> Tensor:
        """[queries, keys], bool: which of the first keys each of the first queries of row 0 sees; padding is hidden."""
        zero, q, k = (torch.arange(count, device=self.device) for count in (1, queries, keys))
        shown = self.function(zero, zero, q.unsqueeze(1), k).expand(queries, keys)
        return shown if self._padding is None else shown & self._padding[0, :keys].bool()

    @cached_property
    def mask(self) -> Mask | None:
        """This mask as a mask of longspan (``Causal``, ``Window``, ...); None if it is of no kind that Transformers builds.

        A function that reads a tensor about the row's tokens (such as which are an image's) is compared on those tokens only.
        """
        try:
            return as_mask(self.function, self.device, self._tokens)
        except IndexError:
            return as_mask(self.function, self.device, min(self.shape[-2:]))


class DenseMask(MaskFunction):
    """A mask that a model's code has built as a tensor: query q sees key k if ``sees[q, k]``; ``sees`` is [queries, keys]."""

    def __init__(self, sees: Tensor) -> None:
        super().__init__(lambda row, head, q, k: sees[q, k], sees.device, shape=(1, 1, *sees.shape), tokens=min(sees.shape))

    @property
    def hides_padding(self) -> bool:
        """Whether these values also hide single tokens as padding: True if they are no mask of a kind that Transformers
        builds."""
        return self.mask is None


class AllOf(MaskFunction):
    """The intersection of several masks: a query sees a key if it does in all of them. No masks: it sees every key.

    Args:
        masks: the masks.
        device: where the mask is evaluated.
    """

    def __init__(self, masks: Sequence[MaskFunction], device: torch.device) -> None:
        super().__init__(lambda *at: torch.stack([each.function(*at) for each in masks]).all(0), device)
        self._masks = tuple(masks)

    def shown(self, queries: int, keys: int) -> Tensor:
        """[queries, keys], bool: the keys that each query sees in all of the masks."""
        every = torch.ones(queries, keys, dtype=torch.bool, device=self.device)
        return torch.stack([every, *(each.shown(queries, keys) for each in self._masks)]).all(0)

    @property
    def hides_padding(self) -> bool:
        """Whether any of the masks hides padding."""
        return any(each.hides_padding for each in self._masks)

    def sees(self, q: int, k: int) -> bool:
        """Whether query q of the first row sees key k in all of the masks."""
        return all(each.sees(q, k) for each in self._masks)

    @cached_property
    def mask(self) -> Mask | None:
        """The intersection as a mask of longspan; None if one of the masks is of no kind that Transformers builds."""
        whole: Mask = Full()
        for each in self._masks:
            if each.mask is None:
                return None
            if whole == Full():
                whole = each.mask
            elif each.mask not in (Full(), whole):
                whole = whole & each.mask
        return whole


def as_mask(function: Callable[..., Tensor], device: torch.device, tokens: int = 2**21) -> Mask | None:
    """One of Transformers' mask functions as a mask of longspan; None if it is of no kind that Transformers builds.

    How many queries see the first key tells how far the mask reaches. The mask of that reach is then compared with the function
    at a few hundred queries and keys, among them those where rows begin and end. Evaluating every query would take half a
    second for each kind.

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
    some = {*range(64), *range(0, tokens, max(1, tokens // 256))}

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
    """The number of queries that see the first key, if these are the first queries of the row; 0 if they are not.

    Args:
        sees: called with query indices, tells for each of them whether it sees that key.
        device: where the indices are.
        tokens: the length of the row.
        stride: it is called for every ``stride``-th query, then for each query of the stretch in which the last one that sees
            the key must be.
    """
    start = 0
    for queries in (torch.arange(0, tokens, stride, device=device), torch.arange(stride, device=device)):
        seen = sees((queries + start).clamp(max=tokens - 1))
        count = int(seen.sum())
        if not count or not bool(seen[:count].all()):
            return 0
        start += int(queries[count - 1])
    return min(start + 1, tokens)

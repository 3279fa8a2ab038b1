"""Memory of the exchanges that is used again, because on a CPU new pages take longer than the copy into them.

    lend    a buffer of one exchange: filled, sent or unpacked, and free again at the end of the block
    take    received tensors: free again when no tensor, view, saved activation or storage refers to any of them

The system fills every new page with zeros before it hands it out: received into new memory, the exchange of 16,384 tokens took
several times the processor time of the same exchange into memory that is there. On other devices PyTorch itself keeps memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import ref

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from longspan.tuning import SCRATCH_BYTES, SMALLEST_KEPT_BYTES

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
ALIGNMENT = 64
"""Bytes: where PyTorch's own memory on a CPU begins, and its fastest kernels expect it."""


class Scratch:
    """Memory that the exchanges of one mesh use again: a buffer to lend for each device, and received tensors on the CPU.

    What is free is at most ``SCRATCH_BYTES`` of each kind: more would add to the peak memory of the kernels.
    """

    def __init__(self) -> None:
        self._free: dict[torch.device, Tensor] = {}
        self._taken: list[_Taken] = []

    @contextmanager
    def lend(self, elements: int, like: Tensor) -> Iterator[Shaped[Tensor, " elements"]]:
        """Context manager that gives a flat uninitialised buffer of ``elements`` elements in the dtype and on the device of
        ``like``.

        The buffer is taken back at the end of the block and must not be used after it. Of two that are lent at once the larger
        is kept.
        """
        needed = elements * like.element_size()
        buffer = self._free.pop(like.device, None)
        if buffer is None or buffer.numel() < needed:
            buffer = torch.empty(needed, dtype=torch.uint8, device=like.device)
        yield buffer[:needed].view(like.dtype)
        free = self._free.get(like.device)
        if buffer.numel() <= SCRATCH_BYTES and (free is None or free.numel() < buffer.numel()):
            self._free[like.device] = buffer

    def take(self, elements: int, like: Tensor) -> Shaped[Tensor, " elements"]:
        """A flat uninitialised tensor of ``elements`` elements in the dtype and on the device of ``like``.

        It is an ordinary tensor that may be kept as long as wanted. Its memory is used again once nothing refers to it.
        """
        return self.take_several([elements], like)[0]

    def take_several(self, elements: Sequence[int], like: Tensor) -> list[Tensor]:
        """Flat uninitialised tensors of so many elements each, in the dtype and on the device of ``like``.

        Each has a storage of its own. They lie in one piece of memory, so that what held received q, k and v can hold their
        gradients; it is used again once nothing refers to any of them.
        """
        sizes = [count * like.element_size() for count in elements]
        firsts = [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
        needed = max((first + size for first, size in zip(firsts, sizes)), default=0)
        if like.device.type != "cpu" or type(like) is not Tensor or not SMALLEST_KEPT_BYTES <= needed <= SCRATCH_BYTES:
            return [like.new_empty(count) for count in elements]
        memory = self._free_memory(needed)
        parts = [memory[first : first + size] for first, size in zip(firsts, sizes)]
        self._taken.append(_Taken(memory=memory, owners=tuple(map(ref, parts))))
        storages = [torch.from_numpy(part).untyped_storage() for part in parts]
        return [like.new_empty(0).set_(storage, 0, (count,), (1,)) for storage, count in zip(storages, elements)]

    def _free_memory(self, needed: int) -> Bytes:
        """At least ``needed`` bytes, and at most twice as many, that are free; new ones replace what is free and a little
        smaller."""
        self._drop_what_is_too_much()
        free = [taken for taken in self._taken if taken.is_free and needed <= taken.memory.nbytes <= 2 * needed]
        chosen = min(free, key=lambda taken: taken.memory.nbytes, default=None)
        if chosen is not None:
            self._taken.remove(chosen)
            return chosen.memory
        self._taken = [each for each in self._taken if not (each.is_free and needed / 2 <= each.memory.nbytes < needed)]
        return _new_memory(needed)

    @property
    def send_bytes(self) -> int:
        """Bytes of the lent buffers that are kept now and free."""
        return sum(buffer.nbytes for buffer in self._free.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of the memory that is kept now: lent buffers that are free, and received tensors that are free or in use."""
        return self.send_bytes + sum(taken.memory.nbytes for taken in self._taken)

    def _drop_what_is_too_much(self) -> None:
        """Forget the free memory beyond ``SCRATCH_BYTES`` in sum."""
        left, kept = SCRATCH_BYTES, []
        for taken in reversed(self._taken):  # the newest are most like the next one
            if not taken.is_free:
                kept.append(taken)
            elif taken.memory.nbytes <= left:
                left -= taken.memory.nbytes
                kept.append(taken)
        self._taken = kept[::-1]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Taken:
    """Memory that was taken.

    Attributes:
        memory: the bytes.
        owners: weak references to the NumPy arrays as whose memory storages were made. The storage alone holds its array, so it
            is gone when no tensor, view, saved tensor or storage of a user refers to the memory.
    """

    memory: Bytes
    owners: tuple[ref[Any], ...]

    @property
    def is_free(self) -> bool:
        return all(owner() is None for owner in self.owners)


def _new_memory(needed: int) -> Bytes:
    """``needed`` uninitialised bytes from NumPy: an operator of PyTorch's here, in a first call and not in the next, would be
    seen by a selective checkpoint, which recomputes operator by operator."""
    memory = np.empty(needed + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + needed]

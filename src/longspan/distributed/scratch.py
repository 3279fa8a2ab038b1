"""Memory of the exchanges that is used again, because on a CPU new pages take longer than the copy into them.

    lend    a send buffer: filled, sent, and free again at the end of the block
    take    a received tensor: free again when no tensor, view, saved activation or storage refers to it

The system fills every new page with zeros before it hands it out: received into new memory, the exchange of 16,384 tokens took
several times the processor time of the same exchange into memory that is there. On other devices PyTorch itself keeps memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """Memory that the exchanges of one mesh use again: send buffers, one for each device, and received tensors on the CPU.

    What is free is at most ``SCRATCH_BYTES`` of each kind: more would add to the peak memory of the kernels.
    """

    def __init__(self) -> None:
        self._free: dict[torch.device, Tensor] = {}
        self._taken: list[_Taken] = []

    @contextmanager
    def lend(self, elements: int, like: Tensor) -> Iterator[Shaped[Tensor, " elements"]]:
        """Context manager that gives a flat uninitialised buffer of ``elements`` elements in the dtype and on the device of
        ``like``.

        The buffer is taken back at the end of the block and must not be used after it.
        """
        needed = elements * like.element_size()
        buffer = self._free.pop(like.device, None)
        if buffer is None or buffer.numel() < needed:
            buffer = torch.empty(needed, dtype=torch.uint8, device=like.device)
        yield buffer[:needed].view(like.dtype)
        if buffer.numel() <= SCRATCH_BYTES:
            self._free[like.device] = buffer

    def take(self, elements: int, like: Tensor) -> Shaped[Tensor, " elements"]:
        """A flat uninitialised tensor of ``elements`` elements in the dtype and on the device of ``like``.

        It is an ordinary tensor that may be kept as long as wanted. Its memory is used again once nothing refers to it.
        """
        needed = elements * like.element_size()
        if like.device.type != "cpu" or type(like) is not Tensor or not SMALLEST_KEPT_BYTES <= needed <= SCRATCH_BYTES:
            return like.new_empty(elements)
        self._drop_what_is_too_much()
        free = [taken for taken in self._taken if taken.is_free and needed <= taken.memory.nbytes <= 2 * needed]
        chosen = min(free, key=lambda taken: taken.memory.nbytes, default=None)
        if chosen is None:
            memory = _new_memory(needed)
        else:
            memory = chosen.memory
            self._taken.remove(chosen)
        owner = memory[:]
        self._taken.append(_Taken(memory=memory, owner=ref(owner)))
        return like.new_empty(0).set_(torch.from_numpy(owner).untyped_storage(), 0, (elements,), (1,))

    @property
    def send_bytes(self) -> int:
        """Bytes of the send buffers that are kept now and free."""
        return sum(buffer.nbytes for buffer in self._free.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of the memory that is kept now: free send buffers, and received tensors that are free or in use."""
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
        owner: a weak reference to the NumPy array as whose memory a storage was made. The storage alone holds the array, so it
            is gone when no tensor, view, saved tensor or storage of a user refers to the memory.
    """

    memory: Bytes
    owner: ref[Any]

    @property
    def is_free(self) -> bool:
        return self.owner() is None


def _new_memory(needed: int) -> Bytes:
    """``needed`` uninitialised bytes from NumPy: an operator of PyTorch's here, in a first call and not in the next, would be
    seen by a selective checkpoint, which recomputes operator by operator."""
    memory = np.empty(needed + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + needed]

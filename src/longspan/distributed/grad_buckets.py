"""The mean of gradients over the ranks in buckets, which are reduced in place and asynchronously as they fill.

    gradients   p9  p8  p7  p6 ...      a backward computes those of the last parameters first
                 |   |   |
    buckets    [ p9 | p8 | p7 ]  [ p6 | ...          each is copied once, converted to fp32
    full       all-reduce in place, while the next bucket fills
    the end    which parameters has any rank a gradient for?   one control all-reduce; then sum / ranks

Buckets are reduced in one fixed order and not in the order in which a rank fills them. A bucket that is not full, because this
rank does not use all of its parameters, is reduced at the end if any rank has a gradient in it. Independent of backwards.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longspan.distributed.consensus import largest_integers
from longspan.distributed.grad_norm import local_part
from longspan.errors import ModelError
from longspan.tuning import BUCKET_BYTES


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Which gradients are reduced together.

    Attributes:
        members: the indices of the parameters of each bucket, of one dtype and device and about BUCKET_BYTES; the last
            parameters come first, because a backward computes their gradients first.
        shapes, dtypes, devices: for each parameter, those of this rank's part of its gradient's sum.
        bucket_of: for each parameter, the index of its bucket.
    """

    members: tuple[tuple[int, ...], ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]
    bucket_of: tuple[int, ...]

    @classmethod
    def of(cls, parameters: Sequence[nn.Parameter]) -> "Buckets":
        shapes = tuple(local_part(parameter).shape for parameter in parameters)
        dtypes = tuple(reduction_dtype(parameter.dtype) for parameter in parameters)
        devices = tuple(parameter.device for parameter in parameters)
        members: list[list[int]] = []
        bucket_of, kind, free = [0] * len(parameters), None, 0
        for index in reversed(range(len(parameters))):
            size = shapes[index].numel() * dtypes[index].itemsize
            if (dtypes[index], devices[index]) != kind or size > free:
                members.append([])
                kind, free = (dtypes[index], devices[index]), BUCKET_BYTES
            members[-1].append(index)
            bucket_of[index] = len(members) - 1
            free -= size
        return cls(
            members=tuple(map(tuple, members)), shapes=shapes, dtypes=dtypes, devices=devices, bucket_of=tuple(bucket_of)
        )


class Reductions:
    """The all-reduces of gradients over a group, and the agreement about them; one for all models whose gradients it reduces.

    Args:
        group: the ranks that hold the parameters.
        control: these ranks, or more that call it as often, on gloo.
    """

    def __init__(self, group: dist.ProcessGroup, control: dist.ProcessGroup) -> None:
        self.group, self._control = group, control
        self.unfinished = 0
        """All-reduces of means that were never finished: of those that are running, and of backwards that failed."""
        self._early: Callable[[], MeanInBuckets | None] = lambda: None

    def let_start_early(self, mean: "MeanInBuckets") -> None:
        """Let ``mean`` start all-reduces before its end, unless there is another one that may.

        In one backward of two models those of the second start at its end: where ranks use different parameters, one rank
        would otherwise start them before some of the first that another rank starts at the end.
        """
        if self._early() is None:
            self._early = ref(mean)

    def starts_early(self, mean: "MeanInBuckets") -> bool:
        """Whether ``mean`` may start all-reduces before its end."""
        return self._early() is mean

    def start(self, flat: Tensor) -> dist.Work | None:
        """Start the sum of ``flat`` over the ranks, in place; None where there is nothing to wait for."""
        self.unfinished += 1
        return dist.all_reduce(flat, group=self.group, async_op=True) if self.group.size() > 1 else None

    def present_anywhere(self, present: Sequence[bool]) -> list[bool]:
        """For each parameter, whether any rank has a gradient for it.

        Raises:
            ModelError: on every rank alike, where ranks have started different numbers of all-reduces before this mean.
        """
        hint = "Every rank must call backward equally often."
        *anywhere, most, minus_least = largest_integers(
            [*map(int, present), self.unfinished, -self.unfinished], self._control, hint
        )
        if most != -minus_least:
            raise ModelError(
                f"the ranks have started between {-minus_least} and {most} all-reduces of gradients for other backwards than "
                f"this: an earlier backward failed, after more of them on one rank than on another, or one runs inside another "
                f"(checkpointing with use_reentrant=True) where ranks use different parameters; start all ranks again from a "
                f"checkpoint, with use_reentrant=False"
            )
        return [bool(each) for each in anywhere]


class MeanInBuckets:
    """One mean of gradients over the ranks, formed in fp32 (fp64 for fp64), in buckets that are filled in any order."""

    def __init__(self, buckets: Buckets, reductions: Reductions) -> None:
        self._buckets, self._reductions = buckets, reductions
        self._present = [False] * len(buckets.shapes)
        self._missing = list(map(len, buckets.members))
        self._flat: dict[int, Tensor] = {}
        self._pieces: dict[int, Tensor] = {}
        self._started: dict[int, dist.Work | None] = {}

    def add(self, index: int, grad: Tensor) -> None:
        """Add this rank's gradient of the parameter ``index``, which is copied."""
        number = self._buckets.bucket_of[index]
        if number not in self._flat:
            self._allocate(number)
        if self._present[index]:
            self._pieces[index].add_(grad)
            return
        self._pieces[index].copy_(grad)
        self._present[index] = True
        self._missing[number] -= 1

    def reduce_full_buckets(self) -> None:
        """Start the all-reduces of buckets that are full on this rank, up to the first that is not: the order is fixed.

        Nothing is started if ``Reductions.let_start_early`` chose another mean.
        """
        if not self._reductions.starts_early(self):
            return
        while (number := len(self._started)) < len(self._missing) and not self._missing[number]:
            self._start(number)

    def finished(self) -> Iterator[tuple[int, Tensor]]:
        """Start the rest, wait for all, and yield (parameter, mean) where any rank has a gradient.

        A rank without one counts as zero. The mean is in fp32 or fp64, and part of its bucket's memory.
        """
        before, self._reductions.unfinished = len(self._started), self._reductions.unfinished - len(self._started)
        anywhere = self._reductions.present_anywhere(self._present)
        for number in range(before, len(self._missing)):
            if any(anywhere[index] for index in self._buckets.members[number]):
                self._start(number)
        self._reductions.unfinished -= len(self._started) - before
        for number, work in self._started.items():
            if work is not None:
                work.wait()
            self._flat.pop(number).div_(self._reductions.group.size())
            for index in self._buckets.members[number]:
                piece = self._pieces.pop(index)
                if anywhere[index]:
                    yield index, piece

    def _start(self, number: int) -> None:
        if number not in self._flat:
            self._allocate(number)
        for index in self._buckets.members[number]:
            if not self._present[index]:
                self._pieces[index].zero_()
        self._started[number] = self._reductions.start(self._flat[number])

    def _allocate(self, number: int) -> None:
        members = self._buckets.members[number]
        shapes = [self._buckets.shapes[index] for index in members]
        sizes = [shape.numel() for shape in shapes]
        flat = torch.empty(sum(sizes), dtype=self._buckets.dtypes[members[0]], device=self._buckets.devices[members[0]])
        self._flat[number] = flat
        self._pieces |= {index: piece.view(shape) for index, piece, shape in zip(members, flat.split(sizes), shapes)}


def reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients of parameters of ``dtype`` are averaged: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32

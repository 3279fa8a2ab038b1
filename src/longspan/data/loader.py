"""Which sequences a step trains on, and a rank's tokens of them. The order is a function; nothing has to be remembered.

    split       |--- 0 ---|--- 1 ---|--- 2 ---|--- 3 ---|--- 4 ---|..      sequences of ``tokens`` tokens; the rest is not used
    epoch 0      3  0  4  1  2            permuted by (seed, 0)
    epoch 1                     1  4  ..  permuted by (seed, 1); steps run on over the seam
    step 0       3  0  4                  rows=3: dealt to micro-batches, these to the data replicas
    step 1                1  2  1

So step 731 is asked for as step 731, and a run that resumes asks for its next one. The sequences of a step do not depend
on how many ranks there are. Knows nothing of models.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from longspan.batch.context import BatchInfo
from longspan.batch.shard import IGNORE, Part
from longspan.distributed.layout import Runs, consecutive, split
from longspan.distributed.mesh import Place
from longspan.errors import DataError


@runtime_checkable
class Stream(Protocol):
    """Tokens that can be read anywhere: a ``packing.Split``."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def tokens(self) -> int: ...

    def read(self, start: int, stop: int) -> Int64[Tensor, "tokens"]: ...


class Loader:
    """A rank's part of every step. ``rows`` is those of one step, over all its micro-batches and all data replicas.

    Raises DataError where the text is shorter than one sequence, and LayoutError where a sequence has fewer tokens than
    ranks.
    """

    def __init__(self, stream: Stream, *, tokens: int, rows: int, seed: int, place: Place, micro_batches: int = 1) -> None:
        self.sequences = stream.tokens // tokens
        if not self.sequences:
            raise DataError(_too_short(stream, tokens))
        self._stream, self._tokens, self._rows, self._seed, self._place = stream, tokens, rows, seed, place
        self._micro_batches = micro_batches
        self._mine = place.layout(tokens).mine(place.ring_rank, place.ulysses_rank)

    def step(self, step: int) -> list[Part]:
        """The micro-batches of a step, each {input_ids, labels, shift_labels, position_ids [rows, my tokens], longspan}.

        A part equals ``shard_local(whole, place)`` of the whole rows, of which only this rank's tokens and their successors
        are read. A replica for which there is no row gets [0, my tokens]. ``sync_batches`` counts the labels of all.
        """
        first = step * self._rows
        return [
            self._part([self.sequence(first + row) for row in rows])
            for rows in consecutive(split(self._rows, self._micro_batches))
        ]

    def epoch(self, sequences: int | None = None) -> Iterator[Part]:
        """Every sequence once (or the first ``sequences`` of epoch 0), ``rows`` at a time: for evaluation.

        The last part may have fewer rows, some replicas none; every replica gets equally many parts.
        """
        count = self.sequences if sequences is None else min(sequences, self.sequences)
        for first in range(0, count, self._rows):
            yield self._part([self.sequence(i) for i in range(first, min(first + self._rows, count))])

    def sequence(self, index: int) -> int:
        """Which sequence of the split stands at ``index`` of the endless order."""
        epoch, place = divmod(index, self.sequences)
        return int(_permutation(self._seed, epoch, self.sequences)[place])

    def _part(self, sequences: Sequence[int]) -> Part:
        share = consecutive(split(len(sequences), self._place.data))[self._place.data_rank]
        starts = [sequences[i] * self._tokens for i in share]
        return part(self._stream, starts, self._tokens, self._mine)


def part(stream: Stream, starts: Sequence[int], tokens: int, positions: Runs) -> Part:
    """A rank's part of the rows of ``tokens`` tokens that begin at ``starts``: the tokens at ``positions``, and their labels.

    Equals ``shard_local({"input_ids": rows, "labels": rows}, place)``; the digest is that of their source, equal on
    all ranks that share the rows. The last token of a row has no label.
    """
    rows = [[_with_successors(stream, start, tokens, run) for run in positions] for start in starts]
    mine = sum(map(len, positions))
    ids, following = (
        torch.stack([torch.cat([run[i] for run in row]) for row in rows]) if rows else torch.empty(0, mine, dtype=torch.int64)
        for i in range(2)
    )
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "shift_labels": following,
        "position_ids": torch.cat([torch.arange(run.start, run.stop) for run in positions]).repeat(len(rows), 1),
        "longspan": BatchInfo(
            tokens=tokens,
            rows=len(rows),
            positions=positions,
            counted=True,
            named=True,
            masked=False,
            last_position=tokens - 1,
            mask=None,
            padding=None,
            documents=None,
            restarts=None,
            num_labels=len(rows) * (tokens - 1),
            digest=_digest(f"{stream.fingerprint} {starts} {tokens}"),
            largest=max((int(x.max()) for x in (ids, following) if x.numel()), default=-1),
            largest_label=int(following.max()) if following.numel() else -1,
            furthest=tokens - 1,
            furthest_placed=-1,
        ),
    }


def _with_successors(stream: Stream, start: int, tokens: int, run: range) -> tuple[Tensor, Tensor]:
    """The tokens at ``run`` of a row, and those that follow each."""
    read = stream.read(start + run.start, start + min(run.stop + 1, tokens))
    ids, following = read[: len(run)], read[1:]
    return ids, following if run.stop < tokens else torch.cat([following, following.new_tensor([IGNORE])])


@lru_cache(maxsize=4)  # an epoch, the next one at the seam, and those of an evaluation
def _permutation(seed: int, epoch: int, count: int) -> Int64[Tensor, "count"]:
    """0 .. count-1 in an order of their own for each seed and epoch; 8 bytes a sequence."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(_digest(f"{seed} {epoch}")))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _too_short(stream: Stream, tokens: int) -> str:
    name = stream.name.replace("_", "-")
    fits = f"use --tokens {stream.tokens} or fewer, or give more text" if stream.tokens > 1 else "give more text"
    return f"the {name} text has {stream.tokens:,} tokens, fewer than one sequence of tokens={tokens:,}; {fits}"

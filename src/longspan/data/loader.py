"""The data loader: which sequences a step trains on, and this rank's tokens of them. It has no state to save or resume.

    split       |--- 0 ---|--- 1 ---|--- 2 ---|--- 3 ---|--- 4 ---|..      sequences of ``tokens`` tokens; the rest is not used
    epoch 0      3  0  4  1  2            permuted by (seed, 0)
    epoch 1                     1  4  ..  permuted by (seed, 1); a step may take rows of two epochs
    step 0       3  0  4                  rows=3: split into micro-batches, and these over the data replicas
    step 1                1  2  1

The sequences of a step are a function of its number alone, so a resumed run just asks for its next step, and they do not
depend on the number of ranks. Knows nothing of models.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from longspan.batch.context import BatchInfo, Part
from longspan.batch.labels import IGNORE
from longspan.distributed.layout import Runs, consecutive, split
from longspan.distributed.mesh import MeshCoordinate
from longspan.errors import DataError


@runtime_checkable
class Stream(Protocol):
    """A token stream with random access: a ``packing.Split``."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def tokens(self) -> int: ...

    def read(self, start: int, stop: int) -> Int64[Tensor, "tokens"]: ...


class Loader:
    """This rank's part of every step.

    Args:
        stream: the tokens.
        tokens: tokens of one sequence.
        rows: sequences of one step, over all its micro-batches and all data replicas.
        seed: the seed of the order.
        coordinate: this rank's coordinate in the mesh.
        micro_batches: the parts that a step is accumulated from.

    Raises:
        DataError: the text is shorter than one sequence.
        LayoutError: a sequence has fewer tokens than ranks.
    """

    def __init__(
        self, stream: Stream, *, tokens: int, rows: int, seed: int, coordinate: MeshCoordinate, micro_batches: int = 1
    ) -> None:
        self.sequences = stream.tokens // tokens
        if not self.sequences:
            raise DataError(_too_short(stream, tokens))
        self._stream, self._tokens, self._rows, self._seed, self._coordinate = stream, tokens, rows, seed, coordinate
        self._micro_batches = micro_batches
        self._mine = coordinate.layout(tokens).mine(coordinate.ring_rank, coordinate.ulysses_rank)

    def step(self, step: int) -> list[Part]:
        """The micro-batches of step 0, 1, ..: {input_ids, labels, shift_labels, position_ids [rows, my tokens], longspan}.

        A part equals ``shard_local(whole, coordinate)`` of the whole rows, but only this rank's tokens and their successors are
        read. A replica without a row gets [0, my tokens]. ``sync_batches`` counts the labels of all ranks.
        """
        first = step * self._rows
        return [
            self._part([self.sequence(first + row) for row in rows])
            for rows in consecutive(split(self._rows, self._micro_batches))
        ]

    def epoch(self, sequences: int | None = None) -> Iterator[Part]:
        """Every sequence of epoch 0 once (or its first ``sequences``), ``rows`` at a time, for evaluation.

        The last part may have fewer rows, and some replicas none; every replica gets the same number of parts.
        """
        count = self.sequences if sequences is None else min(sequences, self.sequences)
        for first in range(0, count, self._rows):
            yield self._part([self.sequence(i) for i in range(first, min(first + self._rows, count))])

    def sequence(self, index: int) -> int:
        """The sequence of the split at ``index`` of the order, which runs on over all epochs."""
        epoch, offset = divmod(index, self.sequences)
        return int(_permutation(self._seed, epoch, self.sequences)[offset])

    def _part(self, sequences: Sequence[int]) -> Part:
        my_rows = consecutive(split(len(sequences), self._coordinate.data))[self._coordinate.data_rank]
        starts = [sequences[i] * self._tokens for i in my_rows]
        return part(self._stream, starts, self._tokens, self._mine)


def part(stream: Stream, starts: Sequence[int], tokens: int, positions: Runs) -> Part:
    """A rank's part of the rows of ``tokens`` tokens that begin at ``starts``: the tokens at ``positions``, and their labels.

    Equals ``shard_local({"input_ids": rows, "labels": rows}, coordinate)``, except that the digest hashes the stream's name and
    the rows' starts; it is equal on all ranks of a sequence. The last token of a row has no label.
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
            mask=None,
            padding=None,
            documents=None,
            restarts=None,
            positions_counted=True,
            last_position=tokens - 1,
            digest=_digest(f"{stream.fingerprint} {starts} {tokens}"),
            num_labels=len(rows) * (tokens - 1),
            largest_token_or_label=max((int(x.max()) for x in (ids, following) if x.numel()), default=-1),
            largest_label=int(following.max()) if following.numel() else -1,
            last_counted_position=tokens - 1,
            last_given_position=-1,
            counted_rows_have_ids=True,
            rows_have_masks=False,
        ),
    }


def _with_successors(stream: Stream, start: int, tokens: int, run: range) -> tuple[Tensor, Tensor]:
    """The tokens at ``run`` of a row, and the next token of each."""
    read = stream.read(start + run.start, start + min(run.stop + 1, tokens))
    ids, following = read[: len(run)], read[1:]
    return ids, following if run.stop < tokens else torch.cat([following, following.new_tensor([IGNORE])])


@lru_cache(maxsize=4)  # the current epoch, the next one where a step takes rows of both, and those of an evaluation
def _permutation(seed: int, epoch: int, count: int) -> Int64[Tensor, "count"]:
    """A random permutation of 0 .. count-1 for a seed and epoch; 8 bytes a sequence."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(_digest(f"{seed} {epoch}")))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _too_short(stream: Stream, tokens: int) -> str:
    name = stream.name.replace("_", "-")
    fits = f"use --tokens {stream.tokens} or fewer, or give more text" if stream.tokens > 1 else "give more text"
    return f"the {name} text has {stream.tokens:,} tokens, fewer than one sequence of tokens={tokens:,}; {fits}"

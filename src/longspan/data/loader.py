"""The data loader: which sequences a step trains on, and this rank's tokens of them. It has no state to save or resume.

    split       |--- 0 ---|--- 1 ---|--- 2 ---|--- 3 ---|--- 4 ---|..      sequences of ``tokens`` tokens; the rest is not used
    epoch 0      3  0  4  1  2            permuted by (seed, 0)
    epoch 1                     1  4  ..  permuted by (seed, 1); a step may take rows of two epochs
    step 0       3  0  4                  rows=3: split into micro-batches, and these over the data replicas
    step 1                1  2  1

The sequences of a step are a function of its number alone, so a resumed run just asks for its next step, and they do not
depend on the number of ranks. Independent of the model.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from longspan.batch.context import BatchInfo, Part
from longspan.batch.labels import IGNORE
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.layout import Runs, consecutive, split
from longspan.errors import DataError


@runtime_checkable
class Stream(Protocol):
    """A token stream with random access, from which ``Loader`` reads. ``packing.Split`` implements it.

    Attributes:
        name: for messages.
        fingerprint: streams with equal ones hold equal tokens.
        tokens: the number of tokens.
    """

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def tokens(self) -> int: ...

    def read(self, start: int, stop: int) -> Int64[Tensor, "tokens"]:
        """The ids of the tokens ``start`` to ``stop - 1``."""
        ...


class Loader:
    """Reads this rank's part of each training step from a token stream: its rows, and of each row its tokens.

    Args:
        stream: the tokens of the text.
        tokens: tokens of one sequence.
        rows: sequences of one step, over all its micro-batches and all data replicas.
        seed: the seed of the permutation of the sequences.
        coordinate: this rank's coordinate in the mesh.
        micro_batches: the number of micro-batches into which a step's rows are split, as evenly as possible.

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
        self._mine = coordinate.my_positions(tokens)

    def step(self, step: int) -> list[Part]:
        """Read this rank's part of every micro-batch of a step, without communication: a thread may do it ahead of time.

        Before the parts are used, all ranks pass their lists to ``sync_batches``, which counts the labels of all ranks.

        Args:
            step: the number of the step, from 0.

        Returns:
            One part for each micro-batch, as ``part`` describes it, with the rows of this rank's data replica; a replica
            without a row gets tensors [0, my tokens].
        """
        first = step * self._rows
        return [
            self._part([self.sequence(first + row) for row in rows])
            for rows in consecutive(split(self._rows, self._micro_batches))
        ]

    def epoch(self, sequences: int | None = None, rounds: int = 1) -> list[Part]:
        """This rank's parts of the first ``sequences`` sequences of epoch 0 (None: all), for evaluation.

        All parts have one shape, as pipeline stages need: each covers ``rows`` sequences over all data replicas. Where no
        sequence is left, rows have no labels, so that nobody counts them.

        Args:
            sequences: how many; at most as many as there are.
            rounds: the number of parts is a multiple of it.
        """
        count = self.sequences if sequences is None else min(sequences, self.sequences)
        parts = math.ceil(count / self._rows / rounds) * rounds
        firsts = range(0, parts * self._rows, self._rows)
        return [self._part([self.sequence(first + row) for row in range(self._rows)], count - first) for first in firsts]

    def sequence(self, index: int) -> int:
        """The number of the sequence (0 to ``sequences - 1``) at place ``index`` of the order of training.

        The order is the permutation of epoch 0, then that of epoch 1, and so on; ``index`` counts from 0 through all of them.
        """
        epoch, offset = divmod(index, self.sequences)
        return int(_permutation(self._seed, epoch, self.sequences)[offset])

    def _part(self, sequences: Sequence[int], counted: int | None = None) -> Part:
        """This rank's part of some sequences, of which the first ``counted`` (None: all; below 1: none) have labels."""
        my_rows = consecutive(split(len(sequences), self._coordinate.data))[self._coordinate.data_rank]
        starts = [sequences[i] * self._tokens for i in my_rows]
        mine = part(self._stream, starts, self._tokens, self._mine)
        kept = len(my_rows) if counted is None else min(max(counted - my_rows.start, 0), len(my_rows))
        return mine if kept == len(my_rows) else _with_labels_in(mine, kept)


def part(stream: Stream, starts: Sequence[int], tokens: int, positions: Runs) -> Part:
    """Read one rank's part of some rows of a token stream.

    Equals ``shard_local({"input_ids": rows, "labels": rows}, coordinate)`` of the whole rows, but reads only this rank's
    tokens and the successor of each. The BatchInfo differs in what needs the whole rows: ``digest`` hashes the stream's
    fingerprint, ``starts`` and ``tokens`` instead of the content, and is equal on all ranks of a sequence too;
    ``largest_token_or_label`` and ``largest_label`` are those of this rank's tokens until ``sync_batches`` compares them.

    Args:
        stream: the tokens.
        starts: the first token of each row in the stream.
        tokens: the number of tokens of a row.
        positions: the positions in a row that this rank holds.

    Returns:
        ``input_ids``, ``labels`` (equal to ``input_ids``), ``shift_labels`` (the next token of each; -100 for the last of a
        row) and ``position_ids``, all int64 [rows, my tokens]; and ``longspan``, the BatchInfo.
    """
    rows = [[_with_successors(stream, start, tokens, run) for run in positions] for start in starts]
    mine = sum(map(len, positions))
    ids, following = (
        torch.stack([torch.cat([run[i] for run in row]) for row in rows])
        if rows
        else torch.empty(0, mine, dtype=torch.int64, device="cpu")
        for i in range(2)
    )
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "shift_labels": following,
        "position_ids": torch.cat([torch.arange(run.start, run.stop, device="cpu") for run in positions]).repeat(len(rows), 1),
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
            largest_label=max(-1, int(following.max())) if following.numel() else -1,
            last_counted_position=tokens - 1 if rows else -1,
            last_given_position=-1,
            counted_rows_have_ids=True,
            rows_have_masks=not rows,
            num_local_labels=int((following != IGNORE).sum()),
        ),
    }


def _with_labels_in(part: Part, rows: int) -> Part:
    """``part`` with labels in its first ``rows`` rows only."""
    labels = {name: part[name].clone() for name in ("labels", "shift_labels")}
    for held in labels.values():
        held[rows:] = IGNORE
    info: BatchInfo = part["longspan"]
    mine = int((labels["shift_labels"] != IGNORE).sum())
    return part | labels | {"longspan": replace(info, num_labels=rows * (info.tokens - 1), num_local_labels=mine)}


def _with_successors(stream: Stream, start: int, tokens: int, run: range) -> tuple[Tensor, Tensor]:
    """(ids, next ids), both [len(run)], at the positions ``run`` of the row of ``tokens`` tokens that begins at ``start``.

    The next token of the row's last one is -100.
    """
    read = stream.read(start + run.start, start + min(run.stop + 1, tokens))
    ids, following = read[: len(run)], read[1:]
    return ids, following if run.stop < tokens else torch.cat([following, following.new_tensor([IGNORE])])


@lru_cache(maxsize=4)  # the current epoch, the next one where a step takes rows of both, and those of an evaluation
def _permutation(seed: int, epoch: int, count: int) -> Int64[Tensor, "count"]:
    """A random permutation of 0 to ``count - 1``, a function of its arguments alone; the last four are cached, 8 bytes an
    element."""
    return torch.randperm(count, generator=torch.Generator("cpu").manual_seed(_digest(f"{seed} {epoch}")), device="cpu")


def _digest(text: str) -> int:
    """A hash of ``text`` as an integer of 56 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _too_short(stream: Stream, tokens: int) -> str:
    """The text of the error of a stream with fewer tokens than one sequence."""
    name = stream.name.replace("_", "-")
    fits = f"use --tokens {stream.tokens} or fewer, or give more text" if stream.tokens > 1 else "give more text"
    return f"the {name} text has {stream.tokens:,} tokens, fewer than one sequence of tokens={tokens:,}; {fits}"

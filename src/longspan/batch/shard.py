"""Cut a batch to a rank's tokens, agree on it, and put tensors together again. Knows nothing of attention or models.

    shard_batch = sync_batches(shard_local(...))

    whole batch  --shard_local-->  my tokens + BatchInfo  --sync_batches-->  the same, with num_labels of all ranks
       [B, N]       (no ranks)        [B, n]               (one all-reduce)

    ids        a  b  c  d  e  f        rank 0: a b c    labels predict b c d       shifted on the whole, then cut: my last
    shifted    b  c  d  e  f  .        rank 1: d e f    labels predict e f .       token predicts the next rank's first

Everything that changes from step to step is in the one frozen ``BatchInfo``, which reaches attention and the loss as the
keyword ``longspan`` of the model's call (step.py). An encoder-decoder has two rows of tokens, each cut by its own length: the
BatchInfo of the decoder's is the ``target`` of the encoder's.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int, Num
from torch import Tensor

from longspan.batch.context import TARGET, BatchInfo
from longspan.batch.padding import VARLEN, documents_of, padding_of, restarts_of
from longspan.distributed.collectives import all_gather
from longspan.distributed.consensus import exchange_integers, raise_failed
from longspan.distributed.layout import Runs
from longspan.distributed.mesh import MeshCoordinate, ParallelMesh
from longspan.errors import BatchError, LongspanError
from longspan.masks import constructors as masks
from longspan.masks.bands import blind_rows
from longspan.masks.constructors import Full, Mask

IGNORE = -100
"""The label of a token that nothing is learned from, as in ``F.cross_entropy``."""

TOKEN_DIM = {
    "input_ids": 1,
    "labels": 1,
    "position_ids": 1,
    "token_type_ids": 1,
    "inputs_embeds": 1,
}
"""Which dimension of the batch's well-known tensors is the tokens (of ``position_ids`` with three, [3, batch, tokens], the
last); others are declared by ``dims=``."""

Part = dict[str, Any]
"""A rank's tensors by name, and under ``longspan`` the BatchInfo: ``model(**part)``."""


def shard_batch(
    batch: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    mesh: ParallelMesh,
    *,
    shift: bool = True,
    mask: Mask | Sequence[Mask] | None = None,
    dims: Mapping[str, int] | None = None,
) -> Any:
    """A rank's part of a batch, or its parts of the micro-batches of one accumulated step; every rank calls it once a step.

    The ranks of a sequence pass the same whole batch, each data replica its own rows; a replica without a row passes
    ``input_ids`` of shape [0, N] (and ``decoder_input_ids`` [0, M], where the others do) and still joins. Over a list the
    labels are counted once for all, so the sum of the losses is the loss of one device. ``shift=False`` is for models that
    predict a token in its own place: masked LMs, and encoder-decoders, whose batch has ``decoder_input_ids`` (``shift_right``
    makes them of the labels).

    Raises the same error on every rank: BatchError for a batch that cannot be cut or that differs between the ranks of a
    sequence, LayoutError for fewer tokens than ranks, MaskError for a mask of another length.
    """
    micro_batches = [batch] if isinstance(batch, Mapping) else batch
    parts: list[Part] = []
    problem: LongspanError | None = None
    try:
        if not micro_batches:
            raise BatchError("shard_batch was given no micro-batch; pass at least one, without rows one of shape [0, tokens]")
        parts = [shard_local(one, mesh.coordinate, shift=shift, mask=mask, dims=dims) for one in micro_batches]
    except Exception as error:
        problem = error if isinstance(error, LongspanError) else BatchError(f"{type(error).__name__}: {error}")
    agreed = sync_batches(parts, mesh, error=problem)
    return agreed[0] if isinstance(batch, Mapping) else agreed


def shard_local(
    batch: Mapping[str, Any],
    coordinate: MeshCoordinate,
    *,
    shift: bool = True,
    mask: Mask | Sequence[Mask] | None = None,
    dims: Mapping[str, int] | None = None,
) -> Part:
    """The tensors of ``batch`` [batch, tokens, ...] cut to the tokens of the rank at ``place``; pure, so a worker may call it.

    Adds ``position_ids`` (global) where there are none, and with ``shift`` the ``shift_labels``: labels shifted on the whole
    row, then cut. ``BatchInfo.num_labels`` counts this batch alone until ``sync_batches``.
    """
    if any(name in batch for name in (f"{TARGET}input_ids", f"{TARGET}inputs_embeds")):
        return _cut_pair(batch, coordinate, shift, mask, dims or {})
    ids = batch.get("input_ids", batch.get("inputs_embeds"))
    if not isinstance(ids, Tensor) or ids.ndim < 2:
        raise BatchError("the batch has no input_ids of shape [batch, tokens] (nor inputs_embeds); it needs one of them")
    rows, tokens = ids.shape[:2]
    positions = coordinate.layout(tokens).mine(coordinate.ring_rank, coordinate.ulysses_rank)
    whole = dict(batch)
    step_mask = mask if isinstance(mask, Mask) or mask is None else tuple(mask)
    padding = padding_of(whole.get("attention_mask"), rows, tokens)
    documents = documents_of(whole, rows, tokens)
    masked_otherwise = mask is not None or documents is not None or "attention_mask" in whole
    restarts = None if masked_otherwise else restarts_of(whole.get("position_ids"), rows, tokens)
    whole = {name: value for name, value in whole.items() if name not in ("attention_mask", *VARLEN)}
    if "position_ids" not in whole:
        whole["position_ids"] = _positions(step_mask, rows, tokens).to(ids.device)
    last_position = int(whole["position_ids"].max()) if rows else tokens - 1
    learned = _learned_labels(whole, rows, tokens, shift)
    declared = TOKEN_DIM | {"shift_labels": 1, "position_ids": max(1, whole["position_ids"].ndim - 1)} | dict(dims or {})
    part: Part = {name: _cut_one(name, value, declared, tokens, positions) for name, value in whole.items()}
    num_labels = 0 if learned is None else int((learned != IGNORE).sum())
    counted, masked = "position_ids" not in batch, rows == 0 or "attention_mask" in batch
    named = rows == 0 or not counted or "input_ids" in batch
    furthest = (last_position, -1) if counted else (-1, last_position)
    part["longspan"] = step = BatchInfo(
        tokens, rows, positions, counted, named, masked, last_position, step_mask, padding, documents, restarts, num_labels,
        _digest(batch, step_mask, shift, dims), *_largest(batch, learned), *(furthest if rows else (-1, -1)),
    )  # fmt: skip
    _refuse_blind_labels(learned, step, shift)
    return part


def sync_batches(parts: Sequence[Part], mesh: ParallelMesh, *, error: LongspanError | None = None) -> list[Part]:
    """Complete the parts of one step with what all micro-batches and replicas hold, by one small all-reduce.

    Args:
        parts: what ``shard_local`` returned on this rank. A rank whose data has ended passes none; then no other may have any.
        error: what kept this rank from making its parts. Every rank raises the first rank's error.

    Raises:
        BatchError: on every rank alike, where the ranks of a sequence were given different batches, or ranks different
            numbers of micro-batches.
    """
    steps: list[BatchInfo] = [part["longspan"] for part in parts]
    facts = _facts(steps)._replace(failed=int(error is not None))
    table = [_Facts(*row) for row in exchange_integers(facts, mesh.world_group)]
    raise_failed(table, error, mesh.world_group)
    _refuse_disagreement(table, mesh.coordinate)
    num_labels = sum(facts.num_labels for facts in table[:: mesh.coordinate.sequence_ranks])
    most = _Facts(*map(max, zip(*table)))

    def agreed(step: BatchInfo) -> BatchInfo:
        target = step.target and replace(
            step.target, largest=most.target_largest, furthest=most.target_furthest, furthest_placed=most.target_placed
        )
        return replace(
            step, largest=most.largest, furthest=most.furthest, furthest_placed=most.placed, num_labels=num_labels,
            largest_label=most.largest_label, named=not most.nameless, masked=not most.unmasked, target=target,
        )  # fmt: skip

    return [{**part, "longspan": agreed(step)} for part, step in zip(parts, steps)]


class _Facts(NamedTuple):
    """What a rank brings to the agreement on a step, of all its micro-batches: the first six are those of its sequence."""

    failed: int
    micro_batches: int
    rows: int
    tokens: int
    num_labels: int
    digest: int
    largest: int
    furthest: int
    placed: int
    target_largest: int
    target_furthest: int
    target_placed: int
    largest_label: int
    targets: int
    nameless: int
    unmasked: int


def _facts(steps: Sequence[BatchInfo]) -> _Facts:
    rows, tokens = (steps[0].rows, steps[0].tokens) if steps else (0, 0)
    digest = _hash(repr([(step.digest, step.tokens, step.rows) for step in steps]).encode())
    targets = [step.target for step in steps if step.target is not None]
    return _Facts(
        0, len(steps), rows, tokens, sum(step.num_labels for step in steps), digest, *_most(steps), *_most(targets),
        max((step.largest_label for step in steps), default=-1), len(targets), sum(not step.named for step in steps),
        sum(not step.masked for step in steps),
    )  # fmt: skip


def _most(steps: Sequence[BatchInfo]) -> tuple[int, int, int]:
    """The largest token, the furthest position that is counted, and that is given: -1 without any."""
    each = [(step.largest, step.furthest, step.furthest_placed) for step in steps]
    largest, furthest, placed = map(max, zip((-1, -1, -1), *each))
    return largest, furthest, placed


def unshard(tensor: Num[Tensor, "*part"], mesh: ParallelMesh, dim: int = 1, tokens: int | None = None) -> Num[Tensor, "*whole"]:
    """Every rank's tokens of its sequence along ``dim``, in the order of the whole row; the inverse of the cut.

    ``tokens`` is the whole length (``BatchInfo.tokens``); without it every rank must hold equally many. Differentiable: the
    gradient of a rank's part is the sum of what all ranks ask of it.
    """
    coordinate = mesh.coordinate
    sequence = coordinate.sequence_ranks
    layout = coordinate.layout(tokens if tokens is not None else tensor.shape[dim] * sequence)
    owned = [layout.mine(ring, ulysses) for ring in range(coordinate.ring) for ulysses in range(coordinate.ulysses)]
    sizes = [sum(map(len, runs)) for runs in owned]
    mine = sizes[coordinate.sequence_rank]
    if tensor.shape[dim] != mine:
        raise BatchError(
            f"unshard was given {tensor.shape[dim]} tokens in dim {dim}, but this rank holds {mine} of tokens={layout.tokens}; "
            f"pass tokens= the length of the whole row (BatchInfo.tokens)"
        )
    gathered = all_gather(tensor, mesh.sequence_group, mesh.transport, dim, sizes)
    if not coordinate.zigzag:
        return gathered
    order = torch.cat([torch.arange(run.start, run.stop) for runs in owned for run in runs])
    return gathered.index_select(dim, order.argsort().to(gathered.device))


def take(x: Num[Tensor, "*whole"], runs: Runs, dim: int) -> Num[Tensor, "*part"]:
    """The positions ``runs`` of ``x`` along ``dim``, contiguous in memory."""
    return torch.cat([x.narrow(dim, run.start, len(run)) for run in runs], dim)


def shift_right(labels: Int[Tensor, "batch tokens"], start: int | None, padding: int | None) -> Int[Tensor, "batch tokens"]:
    """What an encoder-decoder's decoder is given to predict ``labels``: ``start``, then all but the last, -100 as padding.

    ``start`` and ``padding`` are the model's ``config.decoder_start_token_id`` and ``config.pad_token_id``. Made of the whole
    row, before the cut: ``shard_batch({"input_ids": ..., "decoder_input_ids": ..., "labels": labels}, mesh, shift=False)``.
    Equals ``model.prepare_decoder_input_ids_from_labels(labels)`` of BART, Marian, Pegasus and T5; models that begin otherwise
    (mBART and PLBart: with the language, which stands last) say so there. Raises BatchError where either is None.
    """
    if start is None or padding is None:
        raise BatchError(
            f"shift_right was given start={start} and padding={padding}, and needs both; a model without them makes its "
            f"decoder_input_ids by model.prepare_decoder_input_ids_from_labels(labels)"
        )
    shifted = F.pad(labels[:, :-1], (1, 0), value=start)
    return shifted.masked_fill(shifted == IGNORE, padding)


def _cut_pair(
    batch: Mapping[str, Any],
    coordinate: MeshCoordinate,
    shift: bool,
    mask: Mask | Sequence[Mask] | None,
    dims: Mapping[str, int],
) -> Part:
    """The batch of an encoder-decoder: the decoder's tensors and labels by their own length, all else by the encoder's."""
    if shift and "labels" in batch:
        raise BatchError(
            "labels of an encoder-decoder stand where they are predicted, its decoder_input_ids are what is shifted; "
            "use shard_batch(batch, mesh, shift=False)"
        )
    if mask is not None:
        raise BatchError(
            "mask= says who may look at whom in one row of tokens, and an encoder-decoder has two; say padding by "
            "attention_mask and decoder_attention_mask"
        )
    if any(name in batch for name in VARLEN):
        raise BatchError("cu_seq_lens_q says documents in one row of tokens, and an encoder-decoder has two; pass one a row")
    theirs = {name: name.removeprefix(TARGET) for name in (*batch, *dims) if name.startswith(TARGET) or name == "labels"}
    encoder = {name: value for name, value in batch.items() if name not in theirs}
    decoder = {theirs[name]: value for name, value in batch.items() if name in theirs}
    mine = shard_local(encoder, coordinate, shift=False, dims={name: dim for name, dim in dims.items() if name not in theirs})
    try:
        wanted = {theirs[name]: dim for name, dim in dims.items() if name in theirs}
        other = shard_local(decoder, coordinate, shift=False, dims=wanted)
    except LongspanError as error:
        raise type(error)(f"of the decoder's tensors ({TARGET}..., labels): {error}") from error
    source, target = mine.pop("longspan"), other.pop("longspan")
    _refuse_unfit(source, target, decoder.get("labels"))
    digest = _hash(repr((source.digest, target.digest)).encode())
    step = replace(
        source, target=target, num_labels=target.num_labels, largest_label=target.largest_label, digest=digest,
        masked=source.masked and target.masked,
    )  # fmt: skip
    renamed = {name if name == "labels" else f"{TARGET}{name}": value for name, value in other.items()}
    return mine | renamed | {"longspan": step}


def _refuse_unfit(source: BatchInfo, target: BatchInfo, labels: Any) -> None:
    if source.rows != target.rows:
        raise BatchError(f"the encoder was given {source.rows} rows and the decoder {target.rows}; pass as many of each")
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return
    if labels.shape[1] != target.tokens:
        raise BatchError(
            f"labels of shape {list(labels.shape)} do not stand beside decoder_input_ids of [{target.rows}, {target.tokens}]; "
            f"give each token of the decoder one, {IGNORE} where nothing is learned"
        )
    for row, real in enumerate(source.padding or ()):
        if real.start == real.stop and bool((labels[row] != IGNORE).any()):
            raise BatchError(
                f"row {row} is padding alone, so that its decoder sees nothing of it, but it has labels; set them to "
                f"{IGNORE}, or give it a token"
            )


def _positions(mask: Mask | tuple[Mask, ...] | None, rows: int, tokens: int) -> Tensor:
    """0, 1, 2, ... [rows, tokens], from 0 again in each document that the mask keeps apart."""
    counted = torch.arange(tokens).expand(rows, tokens)
    each = mask if isinstance(mask, tuple) else (mask,) * rows
    packed = [masks.documents_of(one) for one in each]
    if not any(packed) or len(each) != rows:
        return counted
    restarted = [
        of_row
        if documents is None or sum(documents.lengths) != tokens
        else torch.cat([torch.arange(n) for n in documents.lengths])
        for of_row, documents in zip(counted, packed)
    ]
    return torch.stack(restarted)


def _learned_labels(whole: dict[str, Any], rows: int, tokens: int, shift: bool) -> Tensor | None:
    """The labels that the loss will see, on the whole row; adds ``shift_labels`` to the batch where they are shifted."""
    labels = whole.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != (rows, tokens):
        return None
    if shift:
        whole["shift_labels"] = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    return whole["shift_labels"] if shift else labels


def _largest(batch: Mapping[str, Any], learned: Tensor | None) -> tuple[int, int]:
    """The largest token or label of the whole rows, and the largest label; -1 where there is none.

    Raises BatchError for a negative one.
    """
    labels = None if learned is None else learned[learned != IGNORE]
    found = {"input_ids": -1, "labels": -1}
    for name, values in {"input_ids": batch.get("input_ids"), "labels": labels}.items():
        if isinstance(values, Tensor) and values.numel():
            if (least := int(values.min())) < 0:
                raise BatchError(f"{name} holds {least}; tokens are 0 or more, and labels too, or {IGNORE}")
            found[name] = int(values.max())
    return max(found.values()), found["labels"]


def _refuse_blind_labels(learned: Tensor | None, step: BatchInfo, shift: bool) -> None:
    if step.mask is None and step.padding is None and step.documents is None:
        return
    bands = masks.rows(step.mask_for(Full()), step.rows, step.tokens, step.tokens)  # refuses a mask of another length too
    if learned is None:
        return
    flat = learned.flatten()
    for run in blind_rows(bands, step.rows * step.tokens):
        asked = (flat[run.start : run.stop] != IGNORE).nonzero()
        if len(asked):
            row, token = divmod(run.start + int(asked[0]), step.tokens)
            raise BatchError(
                f"token {token} of row {row} is asked for a prediction, but sees nothing, itself included; "
                f"set labels[{row}, {token + shift}] to {IGNORE}, or let it see itself"
            )


def _cut_one(name: str, value: Any, declared: Mapping[str, int], tokens: int, positions: Runs) -> Any:
    if not isinstance(value, Tensor) or (name == "labels" and value.shape[1:2] != (tokens,)):
        return value
    if name not in declared:
        raise BatchError(
            f"the batch's tensor {name!r} of shape {list(value.shape)} is unknown; say which of its dimensions is the tokens "
            f"by dims={{{name!r}: 1}}, or take it out of the batch"
        )
    dim = declared[name]
    if value.ndim <= dim or value.shape[dim] != tokens:
        raise BatchError(
            f"{name!r} of shape {list(value.shape)} does not have the row's {tokens} tokens in dim {dim}; "
            f"declare its token dimension by dims={{{name!r}: ...}}"
        )
    return take(value, positions, dim)


def _digest(batch: Mapping[str, Any], mask: Mask | tuple[Mask, ...] | None, shift: bool, dims: Mapping[str, int] | None) -> int:
    described = (sorted(batch), masks.full_repr(mask), shift, sorted((dims or {}).items()))
    content = hashlib.blake2b(repr(described).encode(), digest_size=7)
    for name in sorted(batch):
        value = batch[name]
        if isinstance(value, Tensor):
            content.update(repr((name, value.shape, value.dtype)).encode())
            content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return int.from_bytes(content.digest(), "big")


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "big")


def _refuse_disagreement(table: Sequence[_Facts], coordinate: MeshCoordinate) -> None:
    if len(counts := {facts.micro_batches for facts in table}) > 1:
        raise BatchError(
            f"ranks were given different numbers of micro-batches ({', '.join(map(str, sorted(counts)))}); every rank must "
            f"pass as many, a replica without rows empty ones"
        )
    if len({facts.targets for facts in table}) > 1:
        raise BatchError(
            "some ranks' batches have decoder_input_ids and some have none; pass them on every rank, where there is no row of "
            "shape [0, tokens]"
        )
    sequence = coordinate.sequence_ranks
    for first in range(0, len(table), sequence):
        for rank in range(first + 1, first + sequence):
            if table[rank][:6] != table[first][:6]:  # a loader knows the largest token of its own part alone
                raise BatchError(
                    f"ranks {first} and {rank} share a sequence but were given different batches: "
                    f"{_describe(table[first])} and {_describe(table[rank])}; pass the same whole batch and mask to both"
                )


def _describe(facts: _Facts) -> str:
    return f"{facts.rows} rows of {facts.tokens} tokens, {facts.num_labels} labelled, content {facts.digest:014x}"

"""The one agreement of a step: every rank's facts of its parts, by one all-reduce of integers on the gloo group.

    rank 0   parts of shard_local   \\                       / num_labels, largest ids and positions of all ranks
    rank 1   parts of shard_local    >  table of StepFacts  <  or one error, the same on every rank
    rank 2   an error               /                        \\

Compared are the ranks of one sequence, which must have been given the same whole batch.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from longspan.batch.context import BatchInfo, Part
from longspan.batch.cut import content_hash
from longspan.distributed.consensus import exchange_integers, raise_failed
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.mesh import ParallelMesh, refuse_no_mesh
from longspan.errors import BatchError, LongspanError

LOADERS_HINT = (
    "Where the loaders of data replicas end at different steps, a replica without rows goes on calling shard_batch with "
    "input_ids and labels of shape [0, tokens], until num_labels of the step is 0 on all"
)


class StepFacts(NamedTuple):
    """What one rank reports about its micro-batches of a step: integers, which one all-reduce gives to every rank.

    Attributes:
        failed: 1 if this rank has an error to raise, else 0.
        micro_batches: the number of micro-batches.
        rows, tokens: rows of the first micro-batch, and tokens of a whole row of it; 0 without a micro-batch.
        num_labels: tokens of all its micro-batches that are learned from.
        digest: a hash of the content and shapes of all its micro-batches.
        largest_token_or_label, largest_label, last_counted_position, last_given_position: the largest values of these fields of
            BatchInfo; -1 without any.
        targets: the number of micro-batches that have a decoder's row; those named ``target_...`` are of these rows.
        counted_rows_without_ids, rows_without_masks: micro-batches for which ``counted_rows_have_ids`` or ``rows_have_masks``
            of BatchInfo is False.
        labelled: a hash of which micro-batches have ``labels``, or ``shift_labels`` alone, whatever these are.
    """

    failed: int
    micro_batches: int
    rows: int
    tokens: int
    num_labels: int
    digest: int
    largest_token_or_label: int
    largest_label: int
    last_counted_position: int
    last_given_position: int
    targets: int
    target_largest_token_or_label: int
    target_last_counted_position: int
    target_last_given_position: int
    counted_rows_without_ids: int
    rows_without_masks: int
    labelled: int

    @property
    def content(self) -> tuple[int, ...]:
        """The facts that must be equal on all ranks of a sequence, which must be given the same whole batch: a hash and the
        numbers."""
        return self.micro_batches, self.rows, self.tokens, self.num_labels, self.digest


def sync_batches(parts: Sequence[Part], mesh: ParallelMesh, *, error: LongspanError | None = None) -> list[Part]:
    """Complete the parts of one step with what all micro-batches and replicas hold, by one small all-reduce.

    Args:
        parts: what ``shard_local`` returned on this rank, one for each micro-batch. A rank whose data has ended passes an empty
            list, and is refused unless every rank does.
        mesh: the ranks; every one of them calls it once a step.
        error: the error that kept this rank from making its parts, if any. Every rank then raises the first such rank's error.

    Returns:
        The parts, with the fields of their BatchInfo that are "by agreement" completed.

    Raises:
        LayoutError: ``mesh`` is no ParallelMesh.
        BatchError: on every rank alike, where the ranks of a sequence were given different batches, or ranks different numbers
            of micro-batches.
        LostRankError: where another rank has ended or does not call it, as a replica does whose loader ended earlier.
    """
    refuse_no_mesh(mesh)
    infos: list[BatchInfo] = [part["longspan"] for part in parts]
    facts = _facts(parts)._replace(failed=int(error is not None))
    table = [StepFacts(*row) for row in exchange_integers(facts, mesh.world_group, LOADERS_HINT)]
    raise_failed(table, error, mesh.world_group)
    _refuse_disagreement(table, mesh.coordinate)
    one_stage = table[: len(table) // mesh.coordinate.pipeline]  # every pipeline stage has the same rows
    num_labels = sum(facts.num_labels for facts in one_stage[:: mesh.coordinate.sequence_ranks])
    most = StepFacts(*map(max, zip(*table)))
    return [{**part, "longspan": _agreed(info, most, num_labels)} for part, info in zip(parts, infos)]


def _facts(parts: Sequence[Part]) -> StepFacts:
    """The facts of this rank's micro-batches, from their parts; an empty list gives 0, or -1 where a largest value is
    asked."""
    infos: list[BatchInfo] = [part["longspan"] for part in parts]
    targets = [info.target for info in infos if info.target is not None]
    return StepFacts(
        failed=0,
        micro_batches=len(infos),
        rows=infos[0].rows if infos else 0,
        tokens=infos[0].tokens if infos else 0,
        num_labels=sum(info.num_labels for info in infos),
        digest=content_hash(repr([(info.digest, info.tokens, info.rows) for info in infos]).encode()),
        largest_token_or_label=max((info.largest_token_or_label for info in infos), default=-1),
        largest_label=max((info.largest_label for info in infos), default=-1),
        last_counted_position=max((info.last_counted_position for info in infos), default=-1),
        last_given_position=max((info.last_given_position for info in infos), default=-1),
        targets=len(targets),
        target_largest_token_or_label=max((target.largest_token_or_label for target in targets), default=-1),
        target_last_counted_position=max((target.last_counted_position for target in targets), default=-1),
        target_last_given_position=max((target.last_given_position for target in targets), default=-1),
        counted_rows_without_ids=sum(not info.counted_rows_have_ids for info in infos),
        rows_without_masks=sum(not info.rows_have_masks for info in infos),
        labelled=content_hash(repr([_named(part) for part in parts]).encode()),
    )


def _named(part: Part) -> str | None:
    """The name under which ``part`` has labels, "shift_labels" where it has those alone; None without any."""
    return next((name for name in ("labels", "shift_labels") if part.get(name) is not None), None)


def _agreed(info: BatchInfo, most: StepFacts, num_labels: int) -> BatchInfo:
    """A copy of ``info`` with the values of all ranks in the fields that are "by agreement".

    Args:
        info: of one micro-batch of this rank.
        most: for each fact the largest value of any rank.
        num_labels: the labels of the whole step.
    """
    target = info.target and replace(
        info.target,
        largest_token_or_label=most.target_largest_token_or_label,
        last_counted_position=most.target_last_counted_position,
        last_given_position=most.target_last_given_position,
    )
    return replace(
        info,
        num_labels=num_labels,
        largest_token_or_label=most.largest_token_or_label,
        largest_label=most.largest_label,
        last_counted_position=most.last_counted_position,
        last_given_position=most.last_given_position,
        counted_rows_have_ids=not most.counted_rows_without_ids,
        rows_have_masks=not most.rows_without_masks,
        target=target,
    )


def _refuse_disagreement(table: Sequence[StepFacts], coordinate: MeshCoordinate) -> None:
    """Raise BatchError on every rank if the ranks' batches do not fit each other.

    That is: different numbers of micro-batches, decoder rows or labels on some ranks only, or different batches within one
    sequence.

    Args:
        table: the facts of each rank, in rank order.
        coordinate: the degrees of the mesh, which say which ranks hold one sequence.
    """
    if len(counts := {facts.micro_batches for facts in table}) > 1:
        raise BatchError(
            f"ranks were given different numbers of micro-batches ({', '.join(map(str, sorted(counts)))}); every rank must "
            f"pass as many, a replica without rows empty ones, with input_ids of shape [0, tokens]"
        )
    if len({facts.targets for facts in table}) > 1:
        raise BatchError(
            "some ranks' batches have decoder_input_ids and some have none; pass them on every rank, where there is no row of "
            "shape [0, tokens]"
        )
    if len({facts.labelled for facts in table}) > 1:
        raise BatchError(
            "some ranks' batches have labels and some have none, or shift_labels alone, and those would not join the loss; "
            "pass labels on every rank: -100 where nothing is learned, and [0, tokens] beside input_ids of that shape"
        )
    sequence, stage = coordinate.sequence_ranks, len(table) // coordinate.pipeline
    for rank, facts in enumerate(table):
        first = rank % stage // sequence * sequence  # the rank of the first stage that begins this sequence
        if facts.content != table[first].content:
            raise BatchError(
                f"ranks {first} and {rank} share a sequence but were given different batches: "
                f"{_describe(table[first])} and {_describe(facts)}; pass the same whole batch and mask to both"
            )


def _describe(facts: StepFacts) -> str:
    """What a rank was given, by its ``facts``, as text for an error: rows, tokens, labels and the hash of the content."""
    return f"{facts.rows} rows of {facts.tokens} tokens, {facts.num_labels} labelled, content {facts.digest:014x}"

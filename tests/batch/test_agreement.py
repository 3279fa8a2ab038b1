"""The ranks agree on a step by one all-reduce; what is wrong on one of them is the same text on every rank."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longspan.batch.agreement import StepFacts, sync_batches
from longspan.batch.labels import IGNORE
from longspan.batch.shard import shard_batch, shard_local
from longspan.distributed.consensus import raise_first_error, refuse_difference
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError, LongspanError
from longspan.masks.constructors import Causal, Documents
from tests.helpers.launched import free_port, started
from tests.helpers.ranks import on_ranks

IDS = torch.zeros(2, 8, dtype=torch.long)


def test_labels_are_counted_over_replicas_and_micro_batches(tmp_path: Path) -> None:
    assert on_ranks(4, _labelled, tmp_path=tmp_path) == [3 * (7 + 2 * 7)] * 4


def _labelled() -> int:
    mesh = ParallelMesh(ulysses=2)
    rows = mesh.coordinate.data_rank + 1
    ids = torch.randint(9, (rows, 8), generator=torch.Generator().manual_seed(rows))
    parts = shard_batch([{"input_ids": ids, "labels": ids}] * 3, mesh)
    counts = {part["longspan"].num_labels for part in parts}
    assert len(counts) == 1
    return int(counts.pop())


def test_a_replica_without_a_row_joins(tmp_path: Path) -> None:
    assert on_ranks(4, _without_a_row, tmp_path=tmp_path) == [(1, 7), (1, 7), (0, 7), (0, 7)]


def _without_a_row() -> tuple[int, int]:
    mesh = ParallelMesh(ulysses=2)
    ids = torch.zeros(1 - mesh.coordinate.data_rank, 8, dtype=torch.long)
    part = shard_batch({"input_ids": ids, "labels": ids}, mesh)
    return len(part["input_ids"]), part["longspan"].num_labels


def test_two_lengths_of_which_some_ranks_see_a_new_share_do_not_hang(tmp_path: Path) -> None:
    shares = on_ranks(4, _two_lengths, tmp_path=tmp_path)
    assert shares == [(3, 3), (2, 3), (2, 2), (2, 2)]


def _two_lengths() -> tuple[int, ...]:
    mesh = ParallelMesh(ulysses=4)
    return tuple(shard_batch({"input_ids": torch.zeros(1, n, dtype=torch.long)}, mesh)["input_ids"].shape[1] for n in (9, 10))


def test_every_rank_knows_the_largest_ids_and_positions_of_all(tmp_path: Path) -> None:
    expected = {
        "largest_token_or_label": 11,
        "largest_label": 10,
        "last_counted_position": 7,
        "last_given_position": 16,
        "counted_rows_have_ids": False,
        "rows_have_masks": False,
    }
    assert on_ranks(2, _facts_of_all, list(expected), tmp_path=tmp_path) == [expected] * 2


def _facts_of_all(names: list[str]) -> dict[str, Any]:
    mesh, ids = ParallelMesh(), torch.full((1, 8), 10)
    none = torch.full((1, 8), IGNORE)
    batch = {"inputs_embeds": torch.zeros(1, 8, 2), "labels": none} if dist.get_rank() else {"input_ids": ids, "labels": ids}
    given = {"input_ids": ids + 1, "position_ids": torch.arange(9, 17).unsqueeze(0), "attention_mask": ids > 0}
    info = shard_batch([batch, given], mesh)[0]["longspan"]
    return {name: getattr(info, name) for name in names}


def test_the_columns_that_a_sequence_shares_are_named() -> None:
    facts = StepFacts(**{name: number for number, name in enumerate(StepFacts._fields)})
    assert facts.content == (facts.micro_batches, facts.rows, facts.tokens, facts.num_labels, facts.digest)


def _cut_differently(rank: int) -> None:
    ids = torch.zeros(1, 8 + (rank == 1), dtype=torch.long)
    shard_batch({"input_ids": ids}, ParallelMesh(ulysses=2))


def _other_content(rank: int) -> None:
    shard_batch({"input_ids": torch.full((1, 8), rank)}, ParallelMesh(ulysses=2))


def _other_mask(rank: int) -> None:
    shard_batch({"input_ids": IDS}, ParallelMesh(ulysses=2), mask=Causal() if rank else Documents((4, 4)))


def _other_count(rank: int) -> None:
    shard_batch([{"input_ids": IDS}] * (1 + rank), ParallelMesh(ulysses=2))


def _one_is_wrong(rank: int) -> None:
    shard_batch({"input_ids": IDS} | ({"odd": IDS} if rank == 1 else {}), ParallelMesh(ulysses=2))


class _Broken(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("the storage is gone")


def _one_breaks(rank: int) -> None:
    shard_batch(_Broken() if rank == 1 else {"input_ids": IDS}, ParallelMesh(ulysses=2))


def test_the_rank_that_broke_has_the_cause(tmp_path: Path) -> None:
    assert on_ranks(2, _cause, tmp_path=tmp_path) == ["NoneType", "RuntimeError"]


def _cause() -> str:
    with pytest.raises(BatchError, match="RuntimeError: the storage is gone") as caught:
        _one_breaks(dist.get_rank())
    return type(caught.value.__cause__).__name__


def _one_disk_is_full(rank: int) -> None:
    raise_first_error(BatchError("the disk of rank 1 is full") if rank == 1 else None, ParallelMesh(ulysses=2).world_group)


def _another_of_many_documents(rank: int) -> None:
    shard_batch({"input_ids": IDS}, ParallelMesh(ulysses=2), mask=Documents((1,) * 6 + ((2, 0) if rank else (1, 1))))


def _another_shift(rank: int) -> None:
    shard_batch({"input_ids": IDS}, ParallelMesh(ulysses=2), shift=rank == 0)


def _a_tensor(rank: int) -> None:
    shard_batch(IDS if rank else {"input_ids": IDS}, ParallelMesh(ulysses=2))  # type: ignore[call-overload]


def _a_list_of_tensors(rank: int) -> None:
    shard_batch([IDS], ParallelMesh(ulysses=2))  # type: ignore[list-item]


def _labels_of_one_rank(rank: int) -> None:
    shard_batch({"input_ids": IDS, "labels": IDS[:, rank:]}, ParallelMesh(ulysses=2))


def _labels_of_one_replica(rank: int) -> None:
    shard_batch({"input_ids": IDS} if rank else {"input_ids": IDS, "labels": IDS}, ParallelMesh())


def _shifted_labels_of_one_replica(rank: int) -> None:
    shard_batch({"input_ids": IDS} if rank else {"input_ids": IDS, "shift_labels": IDS}, ParallelMesh())


def _no_labels_beside_no_rows(rank: int) -> None:
    shard_batch({"input_ids": IDS[:0]} if rank else {"input_ids": IDS, "labels": IDS}, ParallelMesh())


def _no_micro_batch(rank: int) -> None:
    shard_batch([] if rank else [{"input_ids": IDS}], ParallelMesh(ulysses=2))


def _another_text(rank: int) -> None:
    refuse_difference("the text", f"f{rank}", ParallelMesh().world_group, "give every machine the same files")


def _part_of_another_step(rank: int) -> None:
    part = shard_local({"input_ids": IDS + rank}, MeshCoordinate(ulysses=2, ulysses_rank=rank))
    sync_batches([part], ParallelMesh(ulysses=2))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (_cut_differently, "ranks 0 and 1 share a sequence but were given different batches: 1 rows of 8 tokens"),
        (_other_content, "ranks 0 and 1 share a sequence but were given different batches"),
        (_other_mask, "ranks 0 and 1 share a sequence but were given different batches"),
        (_another_of_many_documents, "ranks 0 and 1 share a sequence but were given different batches"),
        (_another_shift, "ranks 0 and 1 share a sequence but were given different batches"),
        (_no_micro_batch, "shard_batch was given no micro-batch; pass at least one"),
        (_a_tensor, "shard_batch was given a Tensor of shape [2, 8] as a batch; pass tensors by name"),
        (_a_list_of_tensors, "shard_batch was given a Tensor of shape [2, 8] as a batch"),
        (
            _labels_of_one_rank,
            "labels of shape [2, 7] do not stand beside input_ids of shape [2, 8], but are one",
        ),
        (_labels_of_one_replica, "some ranks' batches have labels and some have none"),
        (_shifted_labels_of_one_replica, "some ranks' batches have labels and some have none, or shift_labels alone"),
        (_no_labels_beside_no_rows, "some ranks' batches have labels and some have none"),
        (_other_count, "ranks were given different numbers of micro-batches (1, 2)"),
        (_one_is_wrong, "the batch's tensor 'odd' of shape [2, 8] is unknown"),
        (_one_breaks, "RuntimeError: the storage is gone"),
        (_one_disk_is_full, "the disk of rank 1 is full"),
        (_another_text, "the text differs between ranks: f0 on rank 0 and f1 on rank 1; give every machine the same files"),
        (_part_of_another_step, "ranks 0 and 1 share a sequence but were given different batches"),
    ],
)
def test_what_one_rank_alone_knows_is_raised_by_all(body: Callable[[int], None], text: str, tmp_path: Path) -> None:
    texts = on_ranks(2, _refusal, body, tmp_path=tmp_path)
    assert texts[0].startswith(text)
    assert texts[0] == texts[1]


def _refusal(body: Callable[[int], None]) -> str:
    try:
        body(dist.get_rank())
    except Exception as error:
        return str(error) if isinstance(error, LongspanError) else f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was refused")


LOADERS = """
import sys, torch
from longspan import LongspanError, ParallelMesh, shard_batch
mesh = ParallelMesh()
ids = torch.zeros(1, 8, dtype=torch.long)
try:
    for step in range(2 + (mesh.coordinate.data_rank == 0)):
        shard_batch({"input_ids": ids, "labels": ids}, mesh)
except LongspanError as error:
    sys.exit(f"step {step}: {type(error).__name__}: {error}")
"""


def test_a_replica_that_waits_for_one_whose_loader_has_ended_gets_a_sentence(tmp_path: Path) -> None:
    base = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    (code, text), (other, _) = started([base | {"RANK": rank} for rank in "01"], [sys.executable, "-c", LOADERS], tmp_path)
    assert (code, other) == (1, 0)
    assert "step 2: LostRankError: rank 0 waited for the other ranks, and one has ended" in text
    assert "a replica without rows goes on calling shard_batch with input_ids and labels of shape [0, tokens]" in text


def test_loaders_that_end_at_different_steps_end_together(tmp_path: Path) -> None:
    assert on_ranks(2, _until_all_have_ended, tmp_path=tmp_path) == [[14, 7, 7]] * 2


def _until_all_have_ended() -> list[int]:
    mesh, ids = ParallelMesh(), torch.zeros(1, 8, dtype=torch.long)
    batches, counts = iter([ids] * (1 + 2 * mesh.coordinate.data_rank)), []
    while True:
        mine = next(batches, ids[:0])
        part = shard_batch({"input_ids": mine, "labels": mine}, mesh)
        if part["longspan"].num_labels == 0:
            return counts
        counts.append(part["longspan"].num_labels)

"""A batch is cut by declared dimensions, agreed on once, put together again; what is wrong is the same text on every rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longspan.batch.shard import IGNORE, shard_batch, shard_local, sync_batches, unshard
from longspan.distributed.consensus import raise_first_error, refuse_difference
from longspan.distributed.mesh import MeshCoordinate, ParallelMesh
from longspan.errors import BatchError, LayoutError, LongspanError, MaskError
from longspan.masks.constructors import Causal, Documents, Full, Span
from tests.helpers.ranks import on_ranks

LAYOUTS = [(1, 1, False), (2, 1, False), (3, 1, False), (1, 2, True), (2, 2, True), (2, 2, False)]


@pytest.mark.parametrize(("ulysses", "ring", "zigzag"), LAYOUTS)
@pytest.mark.parametrize("tokens", [4, 9, 16, 31])
def test_the_parts_of_all_ranks_are_the_whole(ulysses: int, ring: int, zigzag: bool, tokens: int) -> None:
    ids = torch.arange(2 * tokens).view(2, tokens)
    batch = {"input_ids": ids, "labels": ids, "inputs_embeds": torch.randn(2, tokens, 3), "name": "kept as it is"}
    places = [MeshCoordinate(1, ring, ulysses, 0, r, u, zigzag) for r in range(ring) for u in range(ulysses)]
    parts = [shard_local(batch, coordinate) for coordinate in places]
    positions = torch.cat([part["position_ids"] for part in parts], 1)
    order = positions[0].argsort()
    assert torch.equal(positions[0].sort().values, torch.arange(tokens))
    for name in ("input_ids", "labels", "inputs_embeds"):
        assert torch.equal(torch.cat([part[name] for part in parts], 1)[:, order], batch[name])
    shifted = torch.cat([part["shift_labels"] for part in parts], 1)[:, order]
    assert torch.equal(shifted[:, :-1], ids[:, 1:])  # a rank's last token predicts the next rank's first
    assert (shifted[:, -1] == IGNORE).all()
    assert all(part["longspan"].num_labels == 2 * (tokens - 1) and part["name"] == "kept as it is" for part in parts)
    assert all(part["input_ids"].is_contiguous() for part in parts)


def test_models_that_predict_in_place_keep_their_labels() -> None:
    ids = torch.arange(8).view(1, 8)
    part = shard_local({"input_ids": ids, "labels": ids}, MeshCoordinate(ulysses=2, ulysses_rank=1), shift=False)
    assert part["labels"].tolist() == [[4, 5, 6, 7]]
    assert "shift_labels" not in part
    assert part["longspan"].num_labels == 8


def test_labels_without_a_token_dimension_stay_whole() -> None:
    part = shard_local(
        {"input_ids": torch.zeros(3, 8, dtype=torch.long), "labels": torch.tensor([0, 1, 2])}, MeshCoordinate(ulysses=2)
    )
    assert part["labels"].tolist() == [0, 1, 2]


def test_other_tensors_are_cut_where_their_dimension_is_declared() -> None:
    mrope = torch.arange(3 * 8).view(3, 1, 8)
    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.long), "grid": mrope}
    part = shard_local(batch, MeshCoordinate(ulysses=2, ulysses_rank=1), dims={"grid": 2})
    assert torch.equal(part["grid"], mrope[:, :, 4:])


IDS = torch.zeros(2, 8, dtype=torch.long)
VARLEN = {"cu_seq_lens_q": torch.tensor([0, 3, 3, 8]), "cu_seq_lens_k": torch.tensor([0, 3, 3, 8]), "max_length_q": 5}


def test_documents_are_read_from_the_keywords_of_varlen_kernels() -> None:
    numbers = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    part = shard_local({"input_ids": IDS[:1], **VARLEN, "seq_idx": numbers}, MeshCoordinate(ulysses=2))
    assert part["longspan"].mask_for(Full()) == (Full() & Documents((3, 5)),)
    assert part["longspan"].restarts is None
    assert set(part) == {"input_ids", "position_ids", "longspan"}


@pytest.mark.parametrize(
    ("batch", "keywords", "error", "text"),
    [
        ({"labels": IDS}, {}, BatchError, r"no input_ids of shape \[batch, tokens\]"),
        ({"input_ids": IDS, "pixels": IDS}, {}, BatchError, r"tensor 'pixels' of shape \[2, 8\] is unknown; .* dims="),
        ({"input_ids": IDS, "token_type_ids": torch.zeros(2, 7)}, {}, BatchError, r"does not have the row's 8 tokens in dim 1"),
        ({"input_ids": IDS[:, :1]}, {}, LayoutError, r"tokens=1 is fewer than the 2 ranks"),
        ({"input_ids": IDS}, {"mask": Documents((3, 4))}, MaskError, r"7"),
        ({"input_ids": IDS, "labels": IDS}, {"mask": Span(0, 4)}, BatchError, r"token 4 of row 0.* set labels\[0, 5\]"),
        ({"input_ids": IDS, "attention_mask": 1 - torch.eye(8)[3:5]}, {}, BatchError, r"attention_mask has a hole in row 0"),
        ({"input_ids": IDS, **VARLEN}, {}, BatchError, r"the same beginnings of documents in one row, from 0 to its 8 tokens"),
        ({"input_ids": IDS[:1], **VARLEN, "cu_seq_lens_k": torch.tensor([0, 8])}, {}, BatchError, r"the same beginnings"),
        ({"input_ids": IDS[:1], **VARLEN, "seq_idx": torch.arange(8).view(1, 8) // 4}, {}, BatchError, r"the same beginnings"),
        ({"input_ids": IDS[:1], **VARLEN, "position_ids": torch.arange(8).view(1, 8) % 4}, {}, BatchError, r"the same beginn"),
        ({"input_ids": IDS[:1, :7], **VARLEN}, {}, BatchError, r"the same beginnings of documents .* its 7 tokens"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 8, 8)}, {}, BatchError, r"must be \[2, 8\] like input_ids"),
        ({"input_ids": IDS, "attention_mask": torch.arange(8).expand(2, 8)}, {}, BatchError, r"1 for a token and 0 for pad"),
        (
            {"input_ids": IDS, "labels": IDS, "attention_mask": (torch.arange(8) > 1).repeat(2, 1)},
            {},
            BatchError,
            r"token 0 of row 0 is asked for a prediction, but sees nothing",
        ),
    ],
)
def test_refusals_say_what_is_legal(batch: Any, keywords: Any, error: type[LongspanError], text: str) -> None:
    with pytest.raises(error, match=text):
        shard_local(batch, MeshCoordinate(ulysses=2), **keywords)


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


@pytest.mark.parametrize(("ulysses", "ring"), [(3, 1), (1, 3), (2, 2)])
def test_unshard_is_the_inverse_and_its_adjoint_sums(ulysses: int, ring: int, tmp_path: Path) -> None:
    on_ranks(ulysses * ring, _unshard, ulysses, ring, tmp_path=tmp_path)


def _unshard(ulysses: int, ring: int) -> None:
    mesh = ParallelMesh(ulysses, ring)
    torch.manual_seed(0)
    whole = torch.randn(2, 11, 3, dtype=torch.float64)
    asks = torch.randn(ulysses * ring, *whole.shape, dtype=torch.float64)
    batch = {"input_ids": torch.zeros(2, 11, dtype=torch.long), "x": whole, "asked": asks.sum(0)}
    part = shard_batch(batch, mesh, dims={"x": 1, "asked": 1})
    x = part["x"].requires_grad_()
    together = unshard(x, mesh, tokens=11)
    assert torch.equal(together, whole)
    (together * asks[dist.get_rank()]).sum().backward()
    torch.testing.assert_close(x.grad, part["asked"], rtol=1e-12, atol=1e-12)
    one = torch.ones(1, part["input_ids"].shape[1], dtype=torch.float64, requires_grad=True)
    unshard(one, mesh, tokens=11).sum(1).sum().backward()  # a gradient without memory of its own
    assert torch.equal(one.grad, torch.full_like(one, ulysses * ring))


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
    def get(self, *_: Any) -> Any:
        raise RuntimeError("the storage is gone")


def _one_breaks(rank: int) -> None:
    shard_batch(_Broken() if rank == 1 else {"input_ids": IDS}, ParallelMesh(ulysses=2))


def _one_disk_is_full(rank: int) -> None:
    raise_first_error(BatchError("the disk of rank 1 is full") if rank == 1 else None, ParallelMesh(ulysses=2).world_group)


def _another_of_many_documents(rank: int) -> None:
    shard_batch({"input_ids": IDS}, ParallelMesh(ulysses=2), mask=Documents((1,) * 6 + ((2, 0) if rank else (1, 1))))


def _another_shift(rank: int) -> None:
    shard_batch({"input_ids": IDS}, ParallelMesh(ulysses=2), shift=rank == 0)


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

"""The order is a function of (seed, epoch, index); the parts of all ranks are the whole; a rank reads its own tokens only."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Int64
from torch import Tensor

from longspan.batch.agreement import sync_batches
from longspan.batch.context import Part
from longspan.batch.labels import labelled_first, labelled_rows
from longspan.batch.shard import shard_local
from longspan.data.loader import Loader, part
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.layout import Layout
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError, DataError, LayoutError
from tests.helpers.ranks import on_ranks

OWN = ("digest", "largest_label", "largest_token_or_label")
"""The fields of a BatchInfo in which ``part`` differs from ``shard_local``."""
LAYOUTS = [(1, 1, False), (1, 2, False), (1, 3, False), (2, 1, True), (2, 2, True), (3, 2, True), (2, 2, False)]


class Tokens:
    """A stream whose token at t is 3 t + 1, which notes what is read of it."""

    name = "train"

    def __init__(self, tokens: int, fingerprint: str = "some text") -> None:
        self.tokens, self.fingerprint = tokens, fingerprint
        self.touched: list[int] = []

    def read(self, start: int, stop: int) -> Int64[Tensor, "tokens"]:
        self.touched += range(start, stop)
        return 3 * torch.arange(start, stop, device="cpu") + 1


def places(ring: int, ulysses: int, zigzag: bool, data: int = 1) -> list[MeshCoordinate]:
    return [
        MeshCoordinate(data=data, ring=ring, ulysses=ulysses, data_rank=d, ring_rank=r, ulysses_rank=u, zigzag=zigzag)
        for d in range(data)
        for r in range(ring)
        for u in range(ulysses)
    ]


def whole(starts: Sequence[int], tokens: int) -> dict[str, Tensor]:
    ids = torch.tensor([[3 * (start + t) + 1 for t in range(tokens)] for start in starts], dtype=torch.int64)
    return {"input_ids": ids.view(-1, tokens), "labels": ids.view(-1, tokens)}


def tensors(of: Part) -> dict[str, Tensor]:
    return {name: value for name, value in of.items() if name != "longspan"}


def assert_same(one: Part, other: Part) -> None:
    assert one.keys() == other.keys()
    for name, value in tensors(one).items():
        assert torch.equal(value, other[name]), name
        assert value.dtype == other[name].dtype == torch.int64
        assert value.is_contiguous()


@pytest.mark.parametrize(("ring", "ulysses", "zigzag"), LAYOUTS)
@pytest.mark.parametrize("starts", [[0], [40, 3], []])
@pytest.mark.parametrize("tokens", [6, 13, 32])
def test_a_part_is_the_cut_of_the_whole(ring: int, ulysses: int, zigzag: bool, starts: list[int], tokens: int) -> None:
    for coordinate in places(ring, ulysses, zigzag):
        mine = part(Tokens(99), starts, tokens, coordinate.layout(tokens).mine(coordinate.ring_rank, coordinate.ulysses_rank))
        oracle = shard_local(whole(starts, tokens), coordinate)
        assert_same(mine, oracle)
        found, expected = mine["longspan"], oracle["longspan"]
        assert max(-1, found.largest_label) == found.largest_label <= expected.largest_label
        assert found.largest_token_or_label <= expected.largest_token_or_label
        assert replace(found, **{name: getattr(expected, name) for name in OWN}) == expected


def test_a_default_device_is_not_asked_for_the_tokens_of_a_step() -> None:
    """``torch.set_default_device("cuda")`` in a program; the meta device, which has no numbers, stands for it."""
    (coordinate,) = places(1, 1, False)
    with torch.device("meta"):
        (found,) = Loader(Tokens(99), tokens=8, rows=3, seed=31, coordinate=coordinate).step(0)
    (expected,) = Loader(Tokens(99), tokens=8, rows=3, seed=31, coordinate=coordinate).step(0)
    assert_same(found, expected)


@pytest.mark.parametrize(("ring", "ulysses", "zigzag"), LAYOUTS)
def test_a_rank_reads_its_own_tokens_and_the_next_of_each_run(ring: int, ulysses: int, zigzag: bool) -> None:
    tokens = 13
    for coordinate in places(ring, ulysses, zigzag):
        stream, positions = Tokens(99), coordinate.layout(tokens).mine(coordinate.ring_rank, coordinate.ulysses_rank)
        part(stream, [20, 50], tokens, positions)
        needed = {start + t for start in (20, 50) for run in positions for t in range(run.start, min(run.stop + 1, tokens))}
        assert set(stream.touched) == needed
        assert len(stream.touched) <= 2 * (sum(map(len, positions)) + len(positions))


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(1, 12), st.integers(0, 4))
def test_every_epoch_is_a_permutation_of_its_own(seed: int, sequences: int, epoch: int) -> None:
    loader = Loader(Tokens(8 * sequences + 7), tokens=8, rows=1, seed=seed, coordinate=MeshCoordinate())
    order = [loader.sequence(epoch * sequences + index) for index in range(sequences)]
    assert sorted(order) == list(range(sequences))


def test_the_order_is_a_function_of_seed_epoch_and_index() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        loader = Loader(Tokens(800), tokens=8, rows=1, seed=seed, coordinate=MeshCoordinate())
        return [loader.sequence(100 * epoch + index) for index in range(100)]

    orders = [order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len(set(map(tuple, orders))) == 9
    assert orders == [order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert order(0, 0)[:5] == [89, 64, 6, 83, 2]  # a run of last year must be able to resume


def starts_of(parts: Sequence[Part]) -> list[int]:
    return [(int(row[0]) - 1) // 3 for one in parts for row in one["input_ids"]]


def test_a_step_that_is_asked_for_alone_is_that_of_a_run_from_the_start() -> None:
    def loader() -> Loader:
        return Loader(
            Tokens(100), tokens=8, rows=5, seed=3, coordinate=MeshCoordinate(ulysses=2, ulysses_rank=1), micro_batches=2
        )

    running = loader()
    run = [running.step(step) for step in range(12)]
    for step in (11, 0, 7, 7):
        for one, other in zip(loader().step(step), run[step]):
            assert_same(one, other)
            assert one["longspan"] == other["longspan"]


def test_epochs_run_on_without_a_gap_or_a_missing_row() -> None:
    loader = Loader(Tokens(56 + 7), tokens=8, rows=5, seed=0, coordinate=MeshCoordinate())
    seen = [start // 8 for step in range(7) for start in starts_of(loader.step(step))]
    assert len(seen) == 35
    assert all(sorted(seen[first : first + 7]) == list(range(7)) for first in range(0, 35, 7))


@pytest.mark.parametrize("data", [1, 2, 3, 7])
@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_the_rows_of_a_step_do_not_depend_on_replicas_or_micro_batches(data: int, micro_batches: int) -> None:
    oracle = Loader(Tokens(800), tokens=8, rows=5, seed=1, coordinate=MeshCoordinate())
    replicas = [
        Loader(
            Tokens(800),
            tokens=8,
            rows=5,
            seed=1,
            coordinate=MeshCoordinate(data=data, data_rank=rank),
            micro_batches=micro_batches,
        )
        for rank in range(data)
    ]
    for step in (0, 9):
        parts = [replica.step(step) for replica in replicas]
        assert [len(of_replica) for of_replica in parts] == [micro_batches] * data
        in_order = [parts[rank][micro] for micro in range(micro_batches) for rank in range(data)]
        assert starts_of(in_order) == starts_of(oracle.step(step))
        for one in in_order:
            rows = one["input_ids"].shape[0]
            assert one["longspan"].rows == rows
            assert one["longspan"].num_labels == 7 * rows
            assert all(value.shape == (rows, 8) for value in tensors(one).values())


def test_the_digest_says_which_text_and_which_rows() -> None:
    def digests(fingerprint: str = "some text", seed: int = 0, **coordinate: int) -> list[int]:
        loader = Loader(Tokens(800, fingerprint), tokens=8, rows=4, seed=seed, coordinate=MeshCoordinate(**coordinate))
        return [loader.step(step)[0]["longspan"].digest for step in range(3)]

    assert digests() == digests(ulysses=2, ulysses_rank=0) == digests(ulysses=2, ulysses_rank=1)
    different = [digests(), digests("another"), digests(seed=1), digests(data=2), digests(data=2, data_rank=1)]
    assert len({digest for some in different for digest in some}) == 15
    assert all(0 <= digest < 2**63 for some in different for digest in some)


@pytest.mark.parametrize(("rounds", "parts"), [(1, 3), (2, 4)])
def test_an_evaluation_counts_every_sequence_once_in_parts_of_one_shape(rounds: int, parts: int) -> None:
    def of(rank: int, sequences: int | None = None) -> list[Part]:
        coordinate = MeshCoordinate(data=3, data_rank=rank)
        return Loader(Tokens(8 * 10), tokens=8, rows=4, seed=0, coordinate=coordinate).epoch(sequences, rounds)

    def counted(replicas: list[list[Part]]) -> list[int]:
        found = []
        for of_step in zip(*replicas, strict=True):
            for one, starts in zip(of_step, (starts_of([one]) for one in of_step)):
                labelled = [(row >= 0).sum().item() for row in one["shift_labels"]]
                assert set(labelled) <= {0, 7}
                assert one["longspan"].num_labels == one["longspan"].num_local_labels == sum(labelled)
                assert torch.equal(one["labels"] >= 0, (one["shift_labels"][:, :1] >= 0).expand(-1, 8))
                found += [start // 8 for start, labels in zip(starts, labelled, strict=True) if labels]
        return found

    replicas = [of(rank) for rank in range(3)]
    assert [[one["longspan"].rows for one in replica] for replica in replicas] == [[2] * parts, [1] * parts, [1] * parts]
    order = counted(replicas)
    assert sorted(order) == list(range(10))
    assert counted([of(rank, 5) for rank in range(3)]) == order[:5]
    assert len(of(0, 999)) == parts


@pytest.mark.parametrize("sequences", [1, 3, 5])
def test_the_labelled_tokens_of_an_evaluation_are_counted_on_the_host(sequences: int) -> None:
    """An accelerator trusts the count; the meta device, which has no numbers to count, stands for it."""
    for coordinate in places(2, 2, True):
        for one in Loader(Tokens(8 * 9), tokens=8, rows=4, seed=0, coordinate=coordinate).epoch(sequences):
            wanted = one["shift_labels"].flatten() >= 0
            count = one["longspan"].num_local_labels
            assert labelled_rows(wanted.to("meta"), count).shape == labelled_rows(wanted, None).shape
            assert labelled_first(wanted, count).tolist() == wanted.nonzero().flatten().tolist()


def test_text_shorter_than_a_sequence_is_refused_with_what_would_fit() -> None:
    def refusal(tokens: int, name: str) -> str:
        stream = Tokens(tokens)
        stream.name = name
        with pytest.raises(DataError) as caught:
            Loader(stream, tokens=8192, rows=1, seed=0, coordinate=MeshCoordinate())
        return str(caught.value)

    too_short = "text has {} tokens, fewer than one sequence of tokens=8,192;"
    fits = "use --tokens 8191 or fewer, or give more text"
    assert refusal(8191, "train") == f"the train {too_short.format('8,191')} {fits}"
    assert refusal(1, "held_out") == f"the held-out {too_short.format(1)} give more text"
    assert Loader(Tokens(8192), tokens=8192, rows=1, seed=0, coordinate=MeshCoordinate()).sequences == 1


def test_a_sequence_shorter_than_its_ranks_is_refused() -> None:
    with pytest.raises(LayoutError, match="tokens=3 is fewer than the 4 ranks"):
        Loader(Tokens(99), tokens=3, rows=1, seed=0, coordinate=MeshCoordinate(ulysses=4))


def agreed(seed_of_the_last: int) -> Any:
    mesh = ParallelMesh(ulysses=2)
    last = mesh.coordinate.data_rank == mesh.coordinate.ulysses_rank == 1
    stream, seed = Tokens(800), seed_of_the_last if last else 0
    loader = Loader(stream, tokens=9, rows=3, seed=seed, coordinate=mesh.coordinate, micro_batches=2)
    try:
        return [part["longspan"] for part in sync_batches(loader.step(1), mesh)]
    except BatchError as error:
        return str(error)


def test_ranks_agree_on_a_step_and_notice_another_order(tmp_path: Path) -> None:
    steps = on_ranks(4, agreed, 0, tmp_path=tmp_path)
    assert [[step.rows for step in of_rank] for of_rank in steps] == [[1, 1], [1, 1], [1, 0], [1, 0]]
    assert {step.num_labels for of_rank in steps for step in of_rank} == {3 * 8}
    assert steps[0][0].positions == Layout(9, ulysses=2).mine(0, 0)
    refused = on_ranks(4, agreed, 1, tmp_path=tmp_path)
    assert len(set(refused)) == 1
    assert "ranks 2 and 3 share a sequence but were given different batches" in refused[0]

"""A data replica without rows joins the collectives of the others, and changes no number."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from longspan import MemoryOptions, parallelize, shard_batch
from tests.helpers.hf_models import KINDS, assert_gradients, batches, build, forward_alone
from tests.helpers.ranks import Ranks, mesh_of


@pytest.mark.parametrize("empty", [False, True])
def test_replicas_and_micro_batches_are_one_device(empty: bool, pool: Callable[[int], Ranks]) -> None:
    pool(4).run(replicas, empty)


@pytest.mark.parametrize(
    ("name", "chunked_loss"),
    [("gemma3", False), ("gemma3", True), ("qwen3_moe", False), ("qwen3_moe", True), ("phi3, longrope", False), ("opt", False)],
)
def test_a_replica_without_a_row_joins(name: str, chunked_loss: bool, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(one_row_in_two_replicas, name, chunked_loss)


def one_row_in_two_replicas(name: str, chunked_loss: bool) -> None:
    mesh, kind = mesh_of(1, 1), KINDS[name]
    reference = build(name)
    model = parallelize(deepcopy(reference), mesh, memory=MemoryOptions(chunked_loss=chunked_loss))
    ids = batches("odd length", False)["input_ids"]
    forward_alone(reference, {"input_ids": ids, "labels": ids}, False)[0].backward()
    mine = ids if mesh.coordinate.data_rank == 0 else ids[:0]
    model(**shard_batch({"input_ids": mine, "labels": mine}, mesh)).loss.backward()
    assert_gradients(model, reference, kind.tolerance)


def replicas(empty: bool) -> None:
    """Two replicas of two ranks, two micro-batches; in the second of them the second replica may have no row."""
    mesh = mesh_of(2, 1)
    reference = build("llama")
    model = parallelize(deepcopy(reference), mesh)
    ids = torch.randint(3, 97, (2, 2, 2, 23), generator=torch.Generator().manual_seed(2))  # micro-batch, replica, row, token
    rows = [[ids[micro, data][: 0 if empty and (micro, data) == (1, 1) else 2] for data in range(2)] for micro in range(2)]
    whole = [torch.cat(replica) for replica in rows]
    num_labels = sum(row.numel() - len(row) for row in whole)
    expected = 0.0
    for row in whole:
        logits = reference(input_ids=row, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), row[:, 1:].flatten(), reduction="sum") / num_labels
        loss.backward()
        expected += loss.item()
    mine = [{"input_ids": replica[mesh.coordinate.data_rank], "labels": replica[mesh.coordinate.data_rank]} for replica in rows]
    found = 0.0
    for part in shard_batch(mine, mesh):
        output = model(**part)
        assert output.logits.shape[0] == len(part["input_ids"])
        loss = output.loss
        loss.backward()
        found += loss.item()
    assert found == pytest.approx(expected, rel=1e-10)
    assert_gradients(model, reference, 1e-10)

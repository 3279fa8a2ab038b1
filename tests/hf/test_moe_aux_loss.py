"""The balance loss of experts is that of every token of the batch."""

from collections.abc import Callable

import pytest

from longspan import BatchError, ModelError, ParallelMesh, cross_entropy, parallelize, shard_batch
from tests.helpers.hf_models import KINDS, assert_gradients, batches, build, targets
from tests.helpers.ranks import Ranks, mesh_of

BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


@pytest.mark.parametrize(
    ("name", "batch", "ulysses", "ring", "zero"),
    [
        ("mixtral", "odd length", 2, 1, 3),
        ("qwen3_moe", "left padding", 1, 2, 0),
        ("gpt_oss", "right padding", 2, 1, 0),
        ("mixtral", "left padding", 1, 1, 0),
    ],
)
def test_the_balance_loss_is_that_of_every_token(
    name: str, batch: str, ulysses: int, ring: int, zero: int, pool: Callable[[int], Ranks]
) -> None:
    """On one mesh of each kind; where the ranks are replicas, each has one of the two rows."""
    pool(2).run(balance, name, batch, ulysses, ring, zero)


def balance(name: str, batch: str, ulysses: int, ring: int, zero: int, empty: bool = False) -> None:
    mesh, reference, whole = mesh_of(ulysses, ring), build(name, **BALANCED), batches(batch, False)
    output = reference(**{key: value for key, value in whole.items() if key != "labels"}, use_cache=False)
    expected = cross_entropy(output.logits, targets(whole["labels"], False)) + 0.5 * output.aux_loss
    expected.backward()
    model = parallelize(build(name, **BALANCED), mesh, zero=zero)
    rows = slice(mesh.coordinate.data_rank, mesh.coordinate.data_rank + 1) if mesh.coordinate.data > 1 else slice(0, 2)
    if empty:
        rows = slice(0, 2) if mesh.coordinate.data_rank == 0 else slice(0, 0)
    found = model(**shard_batch({key: value[rows] for key, value in whole.items()}, mesh))
    found.loss.backward()
    assert found.aux_loss.item() == pytest.approx(output.aux_loss.item(), rel=1e-6)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert {len(logits) for logits in found.router_logits} == {found.logits.shape[:2].numel() or whole["input_ids"].shape[1]}
    assert_gradients(model, reference, KINDS[name].tolerance)


def test_a_replica_without_a_row_has_no_routes(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(balance, "qwen3_moe", "right padding", 1, 1, 0, True)


def test_a_micro_batch_without_a_token_is_refused(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(no_token)


def no_token() -> None:
    mesh, ids = ParallelMesh(), batches("even", False)["input_ids"]
    model = parallelize(build("mixtral", **BALANCED), mesh)
    _, empty = shard_batch([{"input_ids": x, "labels": x} for x in (ids, ids[:0])], mesh)
    with pytest.raises(BatchError, match="a micro-batch has no token in any replica, and the balance loss"):
        model(**empty)


def test_a_balance_loss_of_anything_else_is_refused() -> None:
    model = build("mixtral", **BALANCED)
    model.register_forward_hook(lambda module, args, out: out | {"aux_loss": out.logits.mean()} if "aux_loss" in out else out)
    with pytest.raises(ModelError, match="the balance loss of MixtralForCausalLM is not its own function of all tokens"):
        parallelize(model, ParallelMesh())
    mesh = ParallelMesh()
    model = parallelize(build("mixtral"), mesh)
    with pytest.raises(ModelError, match=r"set config\.output_router_logits before parallelize"):
        model(**shard_batch(batches("even", False), mesh), output_router_logits=True)

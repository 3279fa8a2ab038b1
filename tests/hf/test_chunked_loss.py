"""The loss without logits, a tile of tokens at a time, by the model's own head."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from transformers import LlamaConfig, LlamaForTokenClassification

from longspan import MemoryOptions, ParallelMesh, parallelize, shard_batch
from tests.helpers.encoder_decoders import build_pair, pair_alone, pair_batches
from tests.helpers.hf_models import BASE, assert_gradients, batches, build, squared_error
from tests.helpers.memory_models import loss_alone, model_of
from tests.helpers.ranks import Ranks, mesh_of


def test_the_loss_of_a_model_that_calls_its_own_can_be_formed_in_tiles(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(without_logits)


def without_logits() -> None:
    mesh, reference = mesh_of(2), build_pair("t5gemma")
    whole = pair_batches("t5gemma", "odd lengths")
    model = parallelize(deepcopy(reference), mesh, memory=MemoryOptions(chunked_loss=True))
    expected = pair_alone(reference, whole).loss
    expected.backward()
    output = model(**shard_batch(whole, mesh, shift=False))
    output.loss.backward()
    assert output.logits is None
    assert abs(output.loss.item() - expected.item()) <= 1e-5 * expected.item()
    assert_gradients(model, reference, 1e-5)


def test_a_balance_loss_beside_a_loss_without_logits(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(balanced)


def balanced() -> None:
    mesh, reference = mesh_of(2, 1), build("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    ids = batches("odd length", False)["input_ids"]
    expected = reference(input_ids=ids, labels=ids, use_cache=False)
    expected.loss.backward()
    model = parallelize(
        build("mixtral", output_router_logits=True, router_aux_loss_coef=0.5), mesh, memory=MemoryOptions(chunked_loss=True)
    )
    found = model(**shard_batch({"input_ids": ids, "labels": ids}, mesh))
    found.loss.backward()
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert found.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=1e-5)
    assert_gradients(model, reference, 1e-5)


def test_a_rank_without_labels_joins_a_loss_without_logits_in_bf16(pool: Callable[[int], Ranks]) -> None:
    for ours, theirs in pool(2).run(half_without_labels):
        assert (ours / theirs) ** 0.5 <= 1.5


def half_without_labels() -> tuple[float, float]:
    """The squared errors of all gradients, without logits on two ranks and with logits on one device."""
    mesh, exact, whole = mesh_of(2, 1), model_of("llama"), batches("a rank without labels", False)
    expected = loss_alone(exact, "llama", whole)
    expected.backward()
    half = deepcopy(exact).bfloat16()
    model = parallelize(deepcopy(half), mesh, memory=MemoryOptions(chunked_loss=True))
    loss_alone(half, "llama", whole).backward()
    loss = model(**shard_batch(whole, mesh)).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    return squared_error(model, exact), squared_error(half, exact)


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"tensor": 2}, {}], ids=str)
def test_a_head_that_trains_alone_where_a_rank_has_no_label(degrees: dict[str, int], pool: Callable[[int], Ranks]) -> None:
    pool(2).run(head_alone, degrees)


def head_alone(degrees: dict[str, int]) -> None:
    """The first rank has all labels; of replicas, the second has a row without one."""
    mesh, reference, whole = ParallelMesh(**degrees), build("llama"), batches("odd length", False)
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head"))
    model = parallelize(deepcopy(reference), mesh, memory=MemoryOptions(chunked_loss=True))
    whole["labels"][:, 8:] = -100
    whole["labels"][1] = -100
    loss_alone(reference, "llama", whole).backward()
    data = mesh.coordinate.data
    mine = {name: value.chunk(data)[mesh.coordinate.data_rank] for name, value in whole.items()}
    model(**shard_batch(mine, mesh)).loss.backward()
    assert_gradients(model, reference, 1e-10)


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"tensor": 2}, {}], ids=str)
def test_a_token_classifier_of_two_classes_forms_its_loss_in_tiles(
    degrees: dict[str, int], pool: Callable[[int], Ranks]
) -> None:
    pool(2).run(classified, degrees)


def classified(degrees: dict[str, int]) -> None:
    """Each token has one of two labels, and the second row has none at its end."""
    mesh, whole = ParallelMesh(**degrees), batches("right padding", True)
    whole["labels"] = torch.where(whole["labels"] < 0, whole["labels"], whole["labels"] % 2)
    torch.manual_seed(0)
    reference = LlamaForTokenClassification(LlamaConfig(**BASE, num_labels=2, classifier_dropout=0.0))  # type: ignore[arg-type]
    model = parallelize(deepcopy(reference), mesh, memory=MemoryOptions(chunked_loss=True))
    replica = slice(mesh.coordinate.data_rank, mesh.coordinate.data_rank + 1) if mesh.coordinate.data > 1 else slice(0, 2)
    expected = reference(**whole).loss
    expected.backward()
    found = model(**shard_batch({name: value[replica] for name, value in whole.items()}, mesh, shift=False))
    found.loss.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients(model, reference, 1e-5)

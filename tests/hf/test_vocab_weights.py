"""Embedding and head of Hugging Face models, cut by rows of the vocabulary: exact, with and without logits, and saved whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from longspan import MemoryOptions, ParallelMesh, parallel_state, parallelize, shard_batch
from longspan.distributed.collectives import CountingTransport, TorchTransport
from longspan.distributed.traffic import (
    Traffic,
    embedding_traffic,
    head_traffic,
    tensor_region_traffic,
    vocabulary_loss_traffic,
)
from longspan.hf import load, save
from longspan.hf.attention_layers import attention_named
from longspan.hf.chunked_loss import ChunkedLoss
from longspan.hf.probe import proving
from longspan.hf.vocab_weights import Vocabulary, vocabulary_of
from tests.helpers.hf_models import KINDS, assert_gradients, batches, build, forward_alone, forward_cut
from tests.helpers.ranks import Ranks

TENSOR, BOTH = {"tensor": 2}, {"tensor": 2, "ulysses": 2}
CHUNKED = MemoryOptions(chunked_loss=True)
UNTIED, TIED = {"vocab_size": 98, "tie_word_embeddings": False}, {"vocab_size": 98, "tie_word_embeddings": True}


def found_in(model: Any, ranks: int = 2) -> Vocabulary:
    with attention_named([(module, module.config) for module in model.modules() if hasattr(module, "config")]), proving(model):
        return vocabulary_of(model, ranks)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_what_is_cut(name: str) -> None:
    found = found_in(build(name, **TIED))
    assert found.embeddings == ("model.embed_tokens",)
    assert found.heads == ("lm_head",)
    assert set(found.cuts) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_an_embedding_that_works_on_whole_rows_of_ids_is_not_cut() -> None:
    model = build("llama", **UNTIED)
    model.model.embed_tokens.max_norm = 1.0
    assert found_in(model) == Vocabulary(heads=("lm_head",), cuts=found_in(model).cuts)
    tied = build("llama", **TIED)
    tied.model.embed_tokens.max_norm = 1.0
    assert found_in(tied) == Vocabulary()
    twice = build("llama", **UNTIED)
    twice.register_forward_pre_hook(lambda own, *_: (own.model.embed_tokens(torch.zeros(1, 14, dtype=torch.long)), None)[1])
    assert found_in(twice).embeddings == ()
    assert not found_in(build("llama", **UNTIED), 99).cuts


class Centred(nn.Embedding):
    """What is looked up depends on all rows of the table."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) - self.weight.mean(0)


def test_an_embedding_whose_rows_do_not_add_up_is_not_cut() -> None:
    model = build("llama", **UNTIED)
    own = model.model.embed_tokens
    model.model.embed_tokens = Centred(*own.weight.shape, _weight=own.weight.detach().clone())
    assert found_in(model).embeddings == ()
    assert found_in(model).heads == ("lm_head",)


class OfOneId(nn.Embedding):
    """What is looked up for one id, no first and no last of a rank's rows, is not its row."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).masked_fill((ids == 20)[..., None], 0.0)


def test_an_embedding_that_reads_its_ids_is_not_cut(pool: Callable[[int], Ranks]) -> None:
    model = build("llama", **UNTIED)
    model.model.embed_tokens.__class__ = OfOneId
    assert found_in(model).embeddings == ()
    assert found_in(model).heads == ("lm_head",)
    pool(2).run(hooked)


def hooked() -> None:
    mesh, reference, model = ParallelMesh(tensor=2), build("llama", **UNTIED), build("llama", **UNTIED)
    whole = batches("odd length", False)
    whole["input_ids"][:, 3::4] = 20
    for each in (reference, model):
        own = each.model.embed_tokens
        own.register_forward_hook(lambda at, args, out: out * at.weight[20].norm() * (args[0] != 20)[..., None])
    loss, _ = forward_alone(reference, whole, False)
    found = parallelize(model, mesh)(**shard_batch(whole, mesh)).loss
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    found.backward()
    assert_gradients(model, reference, 2e-5)


CASES = [
    ("llama", TENSOR, 0, "odd length", CHUNKED, UNTIED), ("llama", BOTH, 3, "a rank without labels", CHUNKED, TIED),
    ("llama", BOTH, 0, "a rank without labels", MemoryOptions(), TIED), ("llama", TENSOR, 3, "packed", MemoryOptions(), UNTIED),
    ("llama", TENSOR, 0, "a rank without labels", CHUNKED, {"vocab_size": 97}),
    ("gemma2", TENSOR, 0, "a rank without labels", CHUNKED, TIED), ("gemma2", BOTH, 3, "odd length", CHUNKED, UNTIED),
    ("gemma2", TENSOR, 3, "right padding", MemoryOptions(), TIED),
]  # fmt: skip


@pytest.mark.parametrize(("name", "degrees", "zero", "batch", "memory", "config"), CASES, ids=lambda value: str(value)[:40])
def test_it_is_one_device(
    name: str, degrees: dict[str, int], zero: int, batch: str, memory: MemoryOptions, config: dict[str, Any],
    pool: Callable[[int], Ranks],
) -> None:  # fmt: skip
    pool(2 * degrees.get("ulysses", 1)).run(equals_one_device, name, degrees, zero, batch, memory, config)


def equals_one_device(
    name: str, degrees: dict[str, int], zero: int, batch: str, memory: MemoryOptions, config: dict[str, Any]
) -> None:
    """Loss and gradients; without a chunked loss with a weighted sum of the logits. Then logits without labels."""
    mesh, reference, model = ParallelMesh(**degrees), build(name, **config), build(name, **config)
    parallelize(model, mesh, zero=zero, memory=memory)
    whole = batches(batch, False)
    loss, logits = forward_alone(reference, whole, False)
    seen = whole.get("attention_mask", torch.ones_like(whole["input_ids"]))[..., None]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=logits.dtype) * seen
    if memory.chunked_loss:
        output = model(**shard_batch(whole, mesh))
        assert output.logits is None
        total, expected = output.loss, loss
    else:
        my_loss, my_logits = forward_cut(model, whole, False, mesh, True)
        total, expected = my_loss + (my_logits * weight).mean(), loss + (logits * weight).mean()
    expected.backward()
    total.backward()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)  # Transformers forms its loss in fp32
    assert_gradients(model, reference, max(KINDS[name].tolerance, 2e-5 * (KINDS[name].tolerance > 1e-9)))
    with torch.no_grad():
        alone = {label: x for label, x in whole.items() if label != "labels"} | {
            "labels": torch.full_like(whole["labels"], -100)
        }
        _, found = forward_cut(model, alone, False, mesh, False)
    torch.testing.assert_close(found * seen, logits * seen, rtol=1e-5, atol=1e-5)


DEPENDENT: dict[str, Callable[[Tensor], Tensor]] = {
    "normalised": lambda logits: 5 * logits / logits.norm(dim=-1, keepdim=True),
    "scaled a little by the first": lambda logits: logits * (1 + 4e-4 * logits[..., :1].tanh()),
}


@pytest.mark.parametrize("kind", ["normalised", "scaled a little by the first"])
def test_a_head_whose_logits_depend_on_one_another_is_gathered(kind: str, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(dependent_logits, kind)


def dependent_logits(kind: str) -> None:
    """A model whose logits depend on all of a token's, and one rank without a label, whose gradient the other waits for."""
    mesh, reference, model = ParallelMesh(tensor=2), build("llama", **UNTIED), build("llama", **UNTIED)
    for each in (reference, model):
        each.lm_head.register_forward_hook(lambda own, args, output: DEPENDENT[kind](output))
    whole = batches("a rank without labels", False)
    loss, _ = forward_alone(reference, whole, False)
    loss.backward()
    parallelize(model, mesh, memory=CHUNKED)
    state = parallel_state(model)
    assert state is not None
    assert not state.adapter._found(ChunkedLoss).works_on_rows  # type: ignore[attr-defined]
    found = model(**shard_batch(whole, mesh)).loss
    found.backward()
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    assert_gradients(model, reference, 1e-10)


@pytest.mark.parametrize("chunked", [True, False])
def test_the_traffic_is_the_formula(chunked: bool, pool: Callable[[int], Ranks]) -> None:
    for counted, expected in pool(2).run(traffic, chunked):
        assert counted == expected


def traffic(chunked: bool) -> tuple[Traffic, Traffic]:
    """What a step sends, counted and by the closed forms: regions, position ids, the embedding, the loss."""
    mesh = ParallelMesh(tensor=2)
    mesh.transport = transport = CountingTransport(TorchTransport())
    model = parallelize(build("llama", **TIED), mesh, memory=MemoryOptions(chunked_loss=chunked))
    part = shard_batch(batches("odd length", False), mesh)
    transport.traffic = Traffic()
    model(**part).loss.backward()
    shares, rank = mesh.coordinate.tensor_sizes(23), mesh.coordinate.tensor_rank
    one: dict[str, Any] = {"hidden": 32, "itemsize": 8}
    region, embedding = (of(shares, rank, rows=2, **one) for of in (tensor_region_traffic, embedding_traffic))
    words = vocabulary_loss_traffic(shares, rank, rows=2, **one) if chunked else head_traffic(98, 2, **one)
    positions = Traffic(1, 2 * shares[rank] * 8) if "position_ids" in part else Traffic()
    parts = [*region * 4, *embedding, *words, positions]  # two regions in each of two layers
    return transport.traffic, sum(parts, Traffic())


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_saved_on_tensor_ranks_and_loaded_on_one(config: dict[str, Any], tmp_path: Path, pool: Callable[[int], Ranks]) -> None:
    pool(4).run(saved, config, str(tmp_path))
    pool(1).run(loaded, config, str(tmp_path))


def saved(config: dict[str, Any], folder: str) -> None:
    mesh = ParallelMesh(**BOTH)
    model = parallelize(build("llama", **config), mesh, zero=3)
    weight = model.model.embed_tokens.weight
    assert isinstance(weight, DTensor)
    assert weight.placements[-1] == Shard(0)
    save(model, folder, mesh)


def loaded(config: dict[str, Any], folder: str) -> None:
    wanted, model = build("llama", **config), parallelize(load(folder), ParallelMesh())
    for (name, theirs), mine in zip(wanted.named_parameters(), model.parameters()):
        assert torch.equal(mine, theirs), name

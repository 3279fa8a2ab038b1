"""Changes after ``parallelize``, keywords of the loss and masks of a step: one device's numbers, or refused by name."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from longspan import Causal, Documents, LongspanError, MaskError, PrefixLM, parallelize, shard_batch, unshard
from tests.helpers.ranks import Ranks, mesh_of

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "use_cache": False,
}  # fmt: skip
IDS = torch.randint(0, 97, (1, 23), generator=torch.Generator().manual_seed(1))


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).double()


def mistral() -> Any:
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=4)).double()


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, use_cache=False)).double()


def opt() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    config = transformers.OPTConfig(**sizes, word_embed_proj_dim=32, dropout=0.0, max_position_embeddings=64, use_cache=False)
    return transformers.OPTForCausalLM(config).double()


def new_head(model: Any) -> None:
    model.lm_head = nn.Linear(32, 97, bias=False).double()


def new_parameter(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(torch.ones(32).double())


def window(model: Any) -> None:
    model.config.sliding_window = 3


def attention(model: Any) -> None:
    model.set_attn_implementation("sdpa")


def resized(model: Any) -> None:
    model.resize_token_embeddings(101)


def is_causal(model: Any) -> None:
    model.model.layers[1].self_attn.is_causal = False


def forward(model: Any) -> None:
    model.model.layers[1].mlp.forward = lambda x: x.cumsum(1)


def whole_forward(model: Any) -> None:
    """What libraries of fused losses do."""
    model.forward = partial(type(model).forward, model)


class Cumulative(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


def kind(model: Any) -> None:
    model.model.layers[0].mlp.__class__ = Cumulative


def loss_function(model: Any) -> None:
    model.loss_function = lambda logits, labels, **_: logits.sum()


def loss_type(model: Any) -> None:
    model.loss_type = "ForMaskedLM"


CHANGES: dict[Callable[[Any], None], str] = {
    new_head: r"module 'lm_head' was added or replaced after parallelize; call unparallelize\(model\)",
    new_parameter: r"parameter 'model.norm.weight' was added or replaced after parallelize",
    window: r"config.sliding_window was added after parallelize",
    attention: r"config._attn_implementation was 'longspan' when the model was proven and is 'sdpa' now",
    forward: r"the forward of 'model.layers.1.mlp' was replaced after parallelize",
    whole_forward: r"the forward of the model was replaced after parallelize",
    kind: r"'model.layers.0.mlp' was a LlamaMLP when the model was proven and is a Cumulative",
    loss_function: r"'loss_function' was set to another value after parallelize",
    loss_type: r"'loss_type' was set to another value after parallelize",
    is_causal: r"'model.layers.1.self_attn.is_causal' was True when the model was proven and is False now",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("zero", [0, pytest.param(2, marks=pytest.mark.long), 3])  # 2 gathers what 3 gathers
def test_a_change_after_the_proof_is_refused_on_every_rank(change: Any, zero: int, pool: Callable[[int], Ranks]) -> None:
    for text in pool(2).run(refused_change, change, zero):
        assert re.search(CHANGES[change], text), text


def test_a_resized_embedding_is_refused(pool: Callable[[int], Ranks]) -> None:
    for text in pool(2).run(refused_change, resized, 0):
        assert "after parallelize" in text


def refused_change(change: Callable[[Any], None], zero: int) -> str:
    """Two forwards before the change: FSDP2 has gathered parameters in the place of its own."""
    mesh = mesh_of(2)
    model = parallelize(llama(), mesh, zero=zero)
    part = shard_batch({"input_ids": IDS, "labels": IDS}, mesh)
    losses = [model(**part).loss, model(**part).loss]
    sum(losses).backward()
    model(**part)
    change(model)
    try:
        model(**part)
    except LongspanError as error:
        return str(error)
    return "nothing was refused"


def test_the_base_model_of_a_changed_model_is_refused_too(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(base_of_changed)


def base_of_changed() -> None:
    mesh = mesh_of(2)
    model = parallelize(llama(), mesh)
    part = shard_batch({"input_ids": IDS}, mesh)
    hidden = model.model(**part).last_hidden_state
    torch.testing.assert_close(unshard(hidden, mesh, tokens=23), llama().model(input_ids=IDS).last_hidden_state)
    attention(model)
    with pytest.raises(LongspanError, match=r"config\._attn_implementation was 'longspan' when the model was proven"):
        model.model(**part)


def test_a_part_that_is_called_by_itself_is_refused_as_the_whole_is(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(changed_parts)


def changed_parts() -> None:
    """As after peft's ``merge_and_unload``, or with a head outside of the base model."""
    mesh = mesh_of(2)
    part = shard_batch({"input_ids": IDS}, mesh)
    model = parallelize(llama(), mesh)
    model.lm_head = nn.Linear(32, 5).double()  # no part of the base model
    model.model(**part)
    forward(model)
    with pytest.raises(LongspanError, match=r"the forward of 'model.layers.1.mlp' was replaced after parallelize"):
        model.model(**part)
    model = llama()
    model.model.requires_grad_(False)
    parallelize(model, mesh).model(**part)
    model.model.norm.requires_grad_()
    with pytest.raises(LongspanError, match=r"parameter 'model.norm.weight' was unfrozen or replaced after parallelize"):
        model.model(**part)
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    merged = parallelize(adapted, mesh).merge_and_unload()
    with pytest.raises(LongspanError, match=r"module '.*layers.0.self_attn.q_proj' was added or replaced after parallelize"):
        merged(**part)


def test_a_second_reduction_of_the_gradients_is_refused(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(reduced_twice)


def reduced_twice() -> None:
    mesh = mesh_of(2)
    model = parallelize(llama(), mesh)
    part = shard_batch({"input_ids": IDS, "labels": IDS}, mesh)
    with pytest.raises(LongspanError, match="DistributedDataParallel around a parallel model would reduce gradients that"):
        nn.parallel.DistributedDataParallel(model)(**part)
    model(**part).loss.backward()


def test_a_forward_that_is_wrapped_is_followed(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(wrapped_forward)


def wrapped_forward() -> None:
    """As accelerate wraps the model's forward, and a decorator one of its modules."""
    mesh = mesh_of(2)
    model = parallelize(llama(), mesh)
    part = shard_batch({"input_ids": IDS, "labels": IDS}, mesh)
    expected = model(**part).loss.item()
    for module in (model, model.model.layers[0].mlp):
        module.forward = torch.no_grad()(torch.inference_mode()(module.forward))
    assert model(**part).loss.item() == expected


@pytest.mark.parametrize("zero", [2, 3])
def test_inference_mode_of_a_sharded_model_is_refused_and_training_goes_on(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(inference_then_training, zero)


def inference_then_training(zero: int) -> None:
    mesh = mesh_of(2)
    model = parallelize(llama(), mesh, zero=zero)
    part = shard_batch({"input_ids": IDS, "labels": IDS}, mesh)
    with torch.inference_mode(), pytest.raises(LongspanError, match=r"use torch\.no_grad"):
        model(**part)
    model(**part).loss.backward()


def test_num_items_in_batch_divides_the_loss_and_ignore_index_is_refused(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(loss_keywords)


def loss_keywords() -> None:
    mesh, reference = mesh_of(2), llama()
    model = parallelize(llama(), mesh)
    for items in (100, torch.tensor(100)):
        expected = reference(input_ids=IDS, labels=IDS, num_items_in_batch=items).loss
        found = model(**shard_batch({"input_ids": IDS, "labels": IDS}, mesh), num_items_in_batch=items).loss
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        expected.backward()
        found.backward()
    for mine, theirs in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    part = shard_batch({"input_ids": IDS, "labels": IDS}, mesh)
    for items, text in (
        (0, "0 is no number of labels"),
        (1.5, "1.5 is no number"),
        (50 + mesh.coordinate.ulysses_rank, "differs between ranks: 50"),
    ):
        with pytest.raises(LongspanError, match=text):
            model(**part, num_items_in_batch=items)
    with pytest.raises(LongspanError, match="ignore_index=5 is another than -100"):
        model(**shard_batch({"input_ids": IDS, "labels": IDS}, mesh), ignore_index=5)


@pytest.mark.parametrize("build", [mistral, gpt2, opt])
def test_documents_of_a_mask_are_each_document_alone(build: Any, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(documents_alone, build)


def documents_alone(build: Callable[[], Any]) -> None:
    """Windows of the model survive, and its positions restart."""
    mesh, lengths, reference = mesh_of(2), (9, 14), build()
    expected = sum(reference(input_ids=d, labels=d).loss * (d.shape[1] - 1) for d in IDS.split(lengths, 1)) / 21
    expected.backward()
    model = parallelize(build(), mesh)
    labels = IDS.index_fill(1, torch.tensor([0, 9]), -100)
    found = model(**shard_batch({"input_ids": IDS, "labels": labels}, mesh, mask=Documents(lengths) & Causal())).loss
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for mine, theirs in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-8)


def test_a_mask_that_shows_what_the_layers_hide_is_refused(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(wider_mask)


def wider_mask() -> None:
    mesh = mesh_of(2)
    model = parallelize(llama(), mesh)
    with pytest.raises(MaskError, match=r"mask=PrefixLM\(.*7\) lets tokens see later ones, and the model's layers are Causal"):
        model(**shard_batch({"input_ids": IDS}, mesh, mask=PrefixLM(7)))

"""Private symbols of Transformers, each used through one function: what each does on the installed version."""

import torch
from torch import nn
from transformers import LlamaForCausalLM

from longspan.hf import _compat
from tests.helpers.hf_models import build


def test_a_loss_function_is_set_and_taken_back() -> None:
    model, given = build("llama"), []
    own = model.loss_function

    def loss(*args: object, **keywords: object) -> torch.Tensor:
        given.append(keywords)
        return torch.tensor(7.0)

    _compat.set_loss_function(model, loss)
    ids = torch.ones(1, 4, dtype=torch.long)
    assert model(input_ids=ids, labels=ids).loss.item() == 7.0
    assert len(given) == 1
    assert _compat.loss_kind(model) is None, "another function than that of the class is of no known kind"
    with _compat.loss_function_set_to(model, own):
        assert model.loss_function is own
    assert model.loss_function is loss
    _compat.reset_loss_function(model)
    assert not _compat.has_loss_function(model)
    with _compat.loss_function_set_to(model, loss):
        assert _compat.has_loss_function(model)
    assert not _compat.has_loss_function(model)


def test_the_kind_of_a_loss_is_its_name_in_the_library_s_table() -> None:
    assert {name: _compat.loss_kind(build(name)) for name in ("llama", "gpt2", "bert")} == {
        "llama": "ForCausalLM", "gpt2": "ForCausalLM", "bert": "ForMaskedLM"
    }  # fmt: skip
    assert {"logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels"} <= _compat.loss_keywords(
        "ForCausalLM"
    )
    assert _compat.loss_keywords(None) == set()


def test_an_attention_is_named_without_the_library_s_checks() -> None:
    config = build("llama").config
    _compat.set_attention_name(config, "of nobody")
    assert _compat.attention_name(config) == "of nobody"


def test_the_layers_of_a_model_are_known_by_class() -> None:
    model = build("llama")
    assert _compat.block_class_names(model) == {type(model.model.layers[0]).__name__}


def test_a_forward_that_was_set_is_taken_from_the_model() -> None:
    model = build("llama")
    model.forward, model._original_forward = print, print
    _compat.remove_forward(model)
    assert model.forward.__func__ is LlamaForCausalLM.forward
    assert not hasattr(model, "_original_forward")
    _compat.remove_forward(model)


def test_weights_are_drawn_as_the_class_draws_them() -> None:
    model, layer = build("llama", initializer_range=1e-4), nn.Linear(50, 50)
    _compat.draw_weights(model, layer)
    assert layer.weight.std().item() < 2e-4
    assert not layer.bias.any()
    _compat.mark_initialized(layer.weight, True)
    before = layer.weight.clone()
    model._initialize_weights(layer)
    assert torch.equal(layer.weight, before), "a tensor that has its values already is left as it is"

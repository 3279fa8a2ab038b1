"""The layers of a model, by name."""

from longspan.hf.blocks import blocks, own_embedding
from tests.helpers.hf_models import build


def test_the_layers_are_those_that_the_class_says_not_to_split() -> None:
    assert list(blocks(build("llama"))) == ["model.layers.0", "model.layers.1"]


def test_a_layer_that_shares_a_parameter_with_the_rest_is_none() -> None:
    """BERT names its embeddings too, whose table is that of the head."""
    assert list(blocks(build("bert"))) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]


def test_an_embedding_whose_weight_others_may_read_is_no_unit_of_its_own() -> None:
    llama = build("llama")
    assert own_embedding(llama) is llama.model.embed_tokens
    assert own_embedding(llama.model) is None  # it has no head, whose product may be with the embedding's weight
    assert own_embedding(build("llama", tie_word_embeddings=True)) is None
    assert own_embedding(build("bert")) is None
    assert own_embedding(build("gemma3", tie_word_embeddings=False)) is None  # its class scales what it looks up
    llama.model.embed_tokens.forward = lambda ids: ids
    assert own_embedding(llama) is None

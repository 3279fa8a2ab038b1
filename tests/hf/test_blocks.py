"""The layers of a model, by name."""

from longspan.hf.blocks import blocks
from tests.helpers.hf_models import build


def test_the_layers_are_those_that_the_class_says_not_to_split() -> None:
    assert list(blocks(build("llama"))) == ["model.layers.0", "model.layers.1"]


def test_a_layer_that_shares_a_parameter_with_the_rest_is_none() -> None:
    """BERT names its embeddings too, whose table is that of the head."""
    assert list(blocks(build("bert"))) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]

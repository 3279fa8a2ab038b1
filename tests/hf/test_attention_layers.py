"""Each attention layer's own mask, read from the model."""

from typing import Any

import pytest

from longspan import ParallelMesh
from longspan.hf.adapter import PretrainedAdapter
from longspan.masks.constructors import Causal, Full, Window
from longspan.memory.options import MemoryOptions
from tests.helpers.hf_models import build


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("llama", [Causal(), Causal()]),
        ("qwen2", [Causal(), Window(4)]),
        ("mistral", [Window(4), Window(4)]),
        ("gemma2", [Window(4), Causal()]),
        ("bert", [Full(), Full()]),
        ("modernbert", [Full(), Window(4, 4)]),
    ],
)
def test_a_layer_s_own_mask_is_read_from_the_model(name: str, masks: list[Any]) -> None:
    model = build(name)
    offer = PretrainedAdapter(model, model)
    offer.prove(ParallelMesh(), MemoryOptions())
    assert [layer.own for _, layer in offer.layers] == masks

"""Each attention layer's own mask, read from the model."""

from typing import Any

import pytest
import torch

from longspan import MaskError, ModelError, ParallelMesh, PrefixLM, parallelize, shard_batch
from longspan.hf.adapter import PretrainedAdapter
from longspan.masks.constructors import Causal, Full, Window
from longspan.memory.options import MemoryOptions
from tests.helpers.hf_models import BASE, build, small

IDS = torch.arange(3, 26).unsqueeze(0)


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


def test_a_mask_that_no_layer_can_have_is_refused_before_anything_is_computed() -> None:
    """Sharded parameters are gathered as the layers are reached: an error of the first layer would come after a collective."""
    model, reached = parallelize(build("llama"), mesh := ParallelMesh()), []
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: reached.append("embeddings"))
    with pytest.raises(MaskError, match="lets tokens see later ones"):
        model(**shard_batch({"input_ids": IDS}, mesh, mask=PrefixLM(7)))
    assert not reached


def test_chunks_that_each_document_counts_anew_are_refused_only_where_documents_begin() -> None:
    model = parallelize(chunked(), mesh := ParallelMesh())
    model(**shard_batch({"input_ids": IDS, "attention_mask": (torch.arange(23) < 20).long().unsqueeze(0)}, mesh))
    left = {"input_ids": IDS, "attention_mask": (torch.arange(23) > 3).long().unsqueeze(0)}
    packed = {"input_ids": IDS, "position_ids": (torch.arange(23) % 12).unsqueeze(0)}
    for batch in (left, packed):
        with pytest.raises(ModelError, match=r"self_attn' restarts its chunks .* one document a row, padded on the right"):
            model(**shard_batch(batch, mesh))


def chunked() -> Any:
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8, "use_qk_norm": False}
    return small("Llama4TextConfig", "Llama4ForCausalLM", **BASE, **experts, attention_chunk_size=5, no_rope_layers=[1, 1])()

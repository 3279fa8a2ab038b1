"""Parameters, FLOPs and refusals of ModelShape, against Transformers' own models on the meta device and by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longspan.errors import ModelError
from longspan.models.decoder_config import PRESETS as DECODERS
from longspan.planner.model import PRESETS, LayerKind, dense
from longspan.planner.model_config import PLAIN, TRAITS, read_config

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 300, "intermediate_size": 96,
         "num_key_value_heads": 4}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT = EXPERTS | {"n_routed_experts": 8, "kv_lora_rank": 12, "num_key_value_heads": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 16},
    "qwen3_moe": SMALL | EXPERTS | {"num_experts": 6, "head_dim": 16, "mlp_only_layers": [1]},
    "qwen2_moe": SMALL | EXPERTS | {"num_experts": 6, "shared_expert_intermediate_size": 40},
    "deepseek_v2": SMALL | LATENT | {"q_lora_rank": None},
    "deepseek_v3": SMALL | LATENT | {"n_group": 2, "topk_group": 1, "q_lora_rank": 20, "first_k_dense_replace": 1},
    "gemma3_text": SMALL | {"head_dim": 16},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300},
    "gpt_oss": SMALL | {"num_local_experts": 4, "head_dim": 16, "num_experts_per_tok": 2},
    "llama4_text": SMALL
    | {"intermediate_size_mlp": 200, "num_local_experts": 4, "interleave_moe_layer_step": 2, "head_dim": 16},
    "mixtral": SMALL | {"num_local_experts": 4},
    "olmo2": SMALL,
    "cohere2": SMALL | {"head_dim": 8},
    "phi3": SMALL | {"pad_token_id": 0},
    "smollm3": SMALL | {"pad_token_id": 0},
    **dict.fromkeys(("cwm", "ernie4_5", "gemma", "glm4_moe", "granite", "internlm3", "ministral3", "mistral"), SMALL),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_parameters_are_those_of_the_model_of_transformers(kind: str) -> None:
    config = AutoConfig.for_model(kind, **CONFIGS[kind])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = read_config(config.to_dict())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert not shape.assumed


def test_every_plain_class_is_compared_with_its_model() -> None:
    assert set(PLAIN) <= set(CONFIGS)
    assert {kind for kind in CONFIGS if not TRAITS.get(kind)} == set(PLAIN)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_decoder_of_that_name(name: str) -> None:
    shape, decoder = PRESETS[name], DECODERS[name]
    assert shape.parameters == decoder.parameters
    assert shape.training_flops(4096) == decoder.flops_per_token(4096) * 4096


def test_attention_is_counted_by_the_area_of_the_bands() -> None:
    config = SMALL | {"model_type": "llama", "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * 2}
    shape = read_config(config)
    assert [kind.count for kind in shape.kinds] == [2, 2]
    assert shape.attention_pairs(10) == 2 * (1 + 2 + 8 * 3) + 2 * 55
    chunked = read_config(SMALL | {"layer_types": ["chunked_attention"] * 4, "attention_chunk_size": 4})
    assert chunked.attention_pairs(10) == 4 * (10 + 10 + 3)


def test_a_token_goes_through_its_active_experts_only() -> None:
    shape = read_config(CONFIGS["mixtral"] | {"model_type": "mixtral", "num_experts_per_tok": 2})
    (kind,) = shape.kinds
    assert (kind.experts, kind.active_experts) == (4, 2)
    assert shape.ffn_weights(kind, active=True) == 2 * 3 * 64 * 96 + 4 * 64


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"num_attention_heads": 7}, "multiple"), ({"num_key_value_heads": 3}, "cannot share 3"),
     ({"hidden_size": -1}, "at least"),
     ({"vocab_size": None}, "names no vocab"),
     ({"is_encoder_decoder": True}, "encoder-decoder"),
     ({"model_type": "mamba"}, "recurrence"),
     ({"layer_types": ["linear_attention"] * 4}, "linear_attention")],
)  # fmt: skip
def test_an_impossible_config_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        read_config(SMALL | change)


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="head_dim"):
        dense("x", layers=1, hidden=10, heads=3, ffn=4, vocab=9)
    kind = LayerKind(count=1, experts=2, active_experts=3, expert_ffn=4)
    with pytest.raises(ModelError, match="3 of 2 experts"):
        replace(PRESETS["tiny"], kinds=(kind,))

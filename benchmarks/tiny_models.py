"""Language models of Transformers at a tiny size, built from their config classes alone.

    classes()              every (kind, model type, class) of AutoModelForCausalLM, ...MaskedLM and ...Seq2SeqLM
    build(type, class)     the class with a config whose widths, layers, heads and vocabulary are small, random weights

Sizes are recognised by their field names (``SIZES``); what a model type needs besides stands in ``SPECIAL``. Nested configs are
shrunk in the same way.
"""

from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48,
    "ffn_dim": 48, "d_model": 32, "d_inner": 48, "n_heads": 4, "n_layers": 2, "num_layers": 2, "num_heads": 4,
    "embedding_size": 32, "word_embed_proj_dim": 32, "max_seq_len": 64, "max_sequence_length": 64, "max_position": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
    "moe_num_experts": 4, "moe_k": 2, "moe_top_k": 2, "moe_topk": 2, "ffn_hidden_size": 48, "dim": 32, "hidden_dim": 48,
    "emb_dim": 32, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "sliding_window": 5, "window_size": 5, "attention_window_size": 5, "rotary_dim": 8, "n_group": 2, "topk_group": 1,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_ff": 48, "d_kv": 8, "num_decoder_layers": 2,
    "num_encoder_layers": 2, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    "decoder_start_token_id": 2, "shared_expert_intermediate_size": 16, "first_k_dense_replace": 1, "max_window_layers": 1,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "text_vocab_size": VOCABULARY,
    "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "decoder_vocab_size": VOCABULARY,
    "encoder_hidden_dim": 32, "decoder_hidden_dim": 32, "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_n_heads": 4, "mamba_d_head": 16, "n_mamba_heads": 2,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_shared_experts": 1, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "attention_hidden_size": 32, "lru_width": 32, "chunk_size": 8, "image_size": 16, "patch_size": 8, "num_channels": 3,
    "sinusoidal_pos_embds_max": 64, "nb_layers": 2, "global_head_dim": 8, "swa_head_dim": 8, "swa_v_head_dim": 8,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "num_global_key_value_heads": 2, "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0, "num_kv_shared_layers": 0, "hidden_size_cross": 32, "laurel_rank": 8, "max_source_positions": 64,
    "max_target_positions": 64, "entity_vocab_size": 20, "entity_emb_size": 16, "shared_intermediate_size": 16,
    "dense_intermediate_size": 48, "d_expert": 16, "expert_dim": 16, "ngram": 2, "max_2d_position_embeddings": 64,
    "pronunciation_vocab_size": 20, "shape_vocab_size": 20, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    "num_dense_layers": 1, "decoder_ffn_size": 48, "num_codebooks": 2, "audio_vocab_size": VOCABULARY,
}  # fmt: skip
"""What an integer field of this name is set to."""
SPECIAL: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3],
        "patcher_config": {"hidden_size": 32, "num_hidden_layers": 1}, "global_config": {"hidden_size": 64},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 4, "position_embedding_type": "rotary"},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "nemotron_h": {"n_groups": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "neomme": {"head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 50, "split_ngram_parts": 1, "hc_lowrank": 8,
    },
    "reformer": {
        "axial_pos_embds": False, "attention_head_size": 8, "feed_forward_size": 48,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
"""What a model type needs besides, by its field."""
REQUIRED = {"head_dim": 8, "num_key_value_heads": 2}
"""What fields of these names are set to where their default is None."""
SAMPLING = ("phimoe",)
"""Model types that draw at random in training whatever their config holds; built in evaluation mode."""
LARGEST = 4_000_000
"""Parameters of a model that is still tiny."""
KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}


class Class(NamedTuple):
    """A class of one of Transformers' tables: causal, masked or seq2seq; the model type of its config; its name."""

    kind: str
    type: str
    name: str

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.type}/{self.name}"


def classes() -> list[Class]:
    """Every class of the three tables; one that stands in two of them is taken as what its last table says."""
    found: dict[tuple[str, str], Class] = {}
    for kind, table in KINDS.items():
        for config, names in table.items():
            for name in (names,) if isinstance(names, str) else names:
                found[config, name] = Class(kind, config, name)
    return list(found.values())


def build(one: Class) -> Any:
    """A tiny model with random weights, in training mode where it draws nothing at random, at dropout 0.

    Raises:
        ValueError: it cannot be made small enough.
    """
    torch.manual_seed(0)
    config = config_of(transformers.CONFIG_MAPPING[one.type], SPECIAL.get(one.type, {}))
    if one.kind == "causal":
        _be_decoder(config)
    kind = getattr(transformers, one.name)
    if not isinstance(config, kind.config_class):
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind._from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"its smallest size has {size:,} parameters")
    model = kind._from_config(config)
    draw(model)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    return model.float().train(one.type not in SAMPLING)


def draw(model: nn.Module) -> None:
    """Random weights that no test of a gradient can miss: no parameter is zero, none is small."""
    own = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=own).to(parameter)
                parameter.copy_(0.15 * noise if parameter.ndim > 1 else parameter + 0.05 * noise)


def config_of(kind: Any, special: dict[str, Any]) -> Any:
    """A config of the class ``kind`` with small sizes and without dropout."""
    return kind(**_settings(kind(), special))


def _settings(default: Any, special: dict[str, Any]) -> dict[str, Any]:
    fields = {key: value for key, value in vars(default).items() if not key.startswith("_")}
    settings: dict[str, Any] = {}
    for key, value in (fields | _mapped(default, fields)).items():
        if isinstance(value, int) and not isinstance(value, bool) and key in SIZES:
            settings[key] = SIZES[key]
        elif value is None and key in REQUIRED and key in fields:
            settings[key] = REQUIRED[key]
        elif isinstance(value, float) and is_dropout(key):
            settings[key] = 0.0
        elif isinstance(value, transformers.PreTrainedConfig):
            settings[key] = type(value)(**_settings(value, special.get(key, {})))
    if "kv_lora_rank" in fields:  # latent attention has a key head for each query head
        settings["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name in ("layer_types", "layers_block_type"):
        if isinstance(fields.get(name), list) and fields[name]:
            settings[name] = _some_of_each(fields[name])
            settings["num_hidden_layers"] = len(settings[name])
    return settings | {key: value for key, value in special.items() if key not in settings or not isinstance(value, dict)}


def _mapped(default: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields under the names that Transformers gives them in every config."""
    names = getattr(default, "attribute_map", {}).items()
    return {name: fields[own] for name, own in names if own in fields}


def _some_of_each(kinds: list[str]) -> list[str]:
    each = list(dict.fromkeys(kinds))
    return each if len(each) > 1 else each * 2


def is_dropout(field: str) -> bool:
    """Whether a config field holds the rate of something random."""
    return "drop" in field or "jitter" in field


def _be_decoder(config: Any) -> None:
    """Encoders with a causal form (BertLMHeadModel) are causal only where their config says so."""
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True

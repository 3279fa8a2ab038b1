"""A Hugging Face config.json read into a ModelShape: dense, GQA, MLA, MoE, sliding and chunked layers. No Transformers.

Sizes stand under several names in the configs of Transformers (``hidden_size``, ``n_embd``, ``d_model``); ``NAMES`` lists them.
What a class of model adds without an entry in its config, such as the biases of GPT-2 or the four norms of Gemma, is a row of
``TRAITS`` under its ``model_type``. A class that has no row is read by the common entries, and the plan says what is assumed.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.errors import ModelError
from longspan.masks.constructors import Causal, Chunked, Mask, Window
from longspan.planner.model import LayerKind, ModelShape
from longspan.planner.model_classes import ENCODERS, axes_left_whole

NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "model_dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocab": ("vocab_size",),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "positions": ("max_position_embeddings", "n_positions", "max_seq_len"),
    "experts": ("n_routed_experts", "num_local_experts", "num_experts"),
    "active": ("num_experts_per_tok", "num_experts_per_token", "moe_topk"),
}
"""The names in configs of each size."""

_GPT: dict[str, Any] = {"gated": False, "norm_bias": True, "qkv_bias": True, "out_bias": True, "ffn_bias": True}
PLAIN = (
    "cwm", "deepseek_v2", "deepseek_v3", "ernie4_5", "gemma", "glm4_moe", "granite", "internlm3", "llama", "llama4_text",
    "ministral3", "mistral", "mixtral", "phi3", "smollm3",
)  # fmt: skip
"""Classes that have nothing which their config does not name."""
TRAITS: dict[str, dict[str, Any]] = {kind: {} for kind in PLAIN} | {
    "gpt2": _GPT | {"learned": True},
    "opt": _GPT | {"learned": True, "extra_positions": 2},
    "gpt_neox": _GPT,
    "bloom": _GPT,
    "starcoder2": _GPT,
    "falcon": {"gated": False, "norm_bias": True},
    "mpt": {"gated": False},
    "phi": _GPT | {"norms": 1, "head_bias": True},
    "qwen2": {"qkv_bias": True},
    "qwen2_moe": {"qkv_bias": True, "shared_gate": True},
    "qwen3": {"qk_norm": "head"},
    "qwen3_moe": {"qk_norm": "head"},
    "exaone4": {"qk_norm": "head"},
    "hunyuan_v1_dense": {"qk_norm": "head"},
    "nemotron": {"gated": False},
    "stablelm": {"norm_bias": True},
    "gemma2": {"norms": 4},
    "gemma3_text": {"norms": 4, "qk_norm": "head"},
    "olmo2": {"qk_norm": "width"},
    "olmo3": {"qk_norm": "width"},
    "cohere": {"norms": 1},
    "cohere2": {"norms": 1},
    "gpt_oss": {"qkv_bias": True, "out_bias": True, "router_bias": True, "expert_bias": True, "sinks": True},
}
"""What a ``model_type`` has that its config does not name. ``qk_norm``: over a head, or over the whole width."""

RECURRENT = ("mamba", "mamba2", "rwkv", "jamba", "falcon_mamba", "recurrent_gemma", "xlstm", "zamba", "zamba2", "bamba")
"""Classes with state spaces or recurrences over tokens."""


def read_config(source: str | Path | Mapping[str, Any], name: str = "") -> ModelShape:
    """Read the shape of a model from its Hugging Face config.

    Args:
        source: a config.json, the folder that holds it, or its contents as a dict.
        name: what messages call the model (default: the file's folder, or the class of the model).

    Returns:
        The ModelShape. Dropout and initialisation are not part of it.

    Raises:
        ModelError: the file cannot be read, a size is missing or impossible, or the model is no decoder of attention layers.
    """
    if isinstance(source, Mapping):
        return _shape(source, name or str(source.get("model_type", "the model")))
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the config {path} cannot be read ({error}); name a config.json, or the folder that holds it"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"the config {path} holds a {type(config).__name__}; it must hold names and values")
    return _shape(config, name or path.parent.name or str(path))


def _shape(config: Mapping[str, Any], name: str) -> ModelShape:
    """The ModelShape of a config's contents; ``name`` is for messages. Raises ModelError for a model that is no decoder."""
    if isinstance(config.get("text_config"), Mapping):  # a vision-language model: its decoder
        config = config["text_config"]
    kind = str(config.get("model_type", ""))
    if config.get("is_encoder_decoder") or kind in RECURRENT:
        what = "an encoder-decoder" if config.get("is_encoder_decoder") else f"a {kind} model with a recurrence over tokens"
        raise ModelError(f"{name} is {what}, whose time and memory the plan does not know; pass a decoder of attention layers")
    if kind in ENCODERS:
        raise ModelError(
            f"{name} is an encoder ({kind}), whose layers the plan does not know; pass a decoder of attention layers"
        )
    traits = TRAITS.get(kind, {})
    layers, hidden = _size(config, "layers", name), _size(config, "hidden", name)
    heads = _size(config, "heads", name)
    kv_heads = _size(config, "kv_heads", name, default=heads)
    if kind == "falcon" and config.get("multi_query") and not config.get("new_decoder_architecture"):
        kv_heads = 1
    if not config.get("head_dim") and not config.get("kv_lora_rank") and hidden % heads:
        raise ModelError(f"{name}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}; give head_dim")
    dim = int(config.get("head_dim") or hidden // heads)
    mla = int(config.get("kv_lora_rank") or 0)
    rope = int(config.get("qk_rope_head_dim") or 0) if mla else 0
    qk_dim = int(config["qk_nope_head_dim"]) + rope if mla else dim
    qk_norm = {None: 0, "head": 2 * dim, "width": (heads + kv_heads) * dim}[traits.get("qk_norm")]
    positions = _size(config, "positions", name, default=0) or None
    bias = bool(config.get("attention_bias", False))
    return ModelShape(
        name=name,
        hidden=hidden,
        heads=heads,
        kv_heads=heads if mla else kv_heads,
        qk_dim=qk_dim,
        v_dim=int(config.get("v_head_dim") or dim) if mla else dim,
        vocab=_size(config, "vocab", name),
        kinds=_kinds(config, kind, layers, hidden, name),
        gated=traits.get("gated", True),
        tied=bool(config.get("tie_word_embeddings", _TIED_BY_DEFAULT.get(kind, False))),
        q_rank=int(config.get("q_lora_rank") or 0) if mla else 0,
        kv_rank=mla,
        rope_dim=rope,
        qkv_bias=not mla and (traits.get("qkv_bias", False) or bias),
        out_bias=not mla and (traits.get("out_bias", False) or bias),
        ffn_bias=traits.get("ffn_bias", False) or bool(config.get("mlp_bias", False)),
        router_bias=traits.get("router_bias", False),
        expert_bias=traits.get("expert_bias", False),
        head_bias=traits.get("head_bias", False),
        norms=traits.get("norms", 2),
        norm_bias=traits.get("norm_bias", False),
        qk_norm=qk_norm,
        extra_layer=heads * traits.get("sinks", False) + hidden * traits.get("shared_gate", False),
        learned_positions=(positions or 0) + traits.get("extra_positions", 0) if traits.get("learned") else 0,
        positions=positions,
        whole=axes_left_whole(config),
        assumed=kind not in TRAITS,
    )


_TIED_BY_DEFAULT = dict.fromkeys(
    ("gpt2", "opt", "bloom", "falcon", "mpt", "gemma", "gemma2", "gemma3_text", "cohere", "cohere2"), True
)
"""Classes whose head is tied where the config leaves it out."""


def _size(config: Mapping[str, Any], what: str, name: str, default: int | None = None) -> int:
    """The size ``what`` (a key of ``NAMES``) of a config, under any of its names; ``default`` if it has none.

    Raises:
        ModelError: it is missing without a default, or below 1; the message begins with ``name``.
    """
    for key in NAMES[what]:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{name}: {key}={value!r} is not a size; it must be an integer of at least 1")
        return value
    if default is None:
        raise ModelError(f"the config of {name} names no {what}; it must have {' or '.join(NAMES[what])}")
    return default


def _kinds(config: Mapping[str, Any], kind: str, layers: int, hidden: int, name: str) -> tuple[LayerKind, ...]:
    """The layers of a config as LayerKinds: layers with the same mask and feed-forward are one.

    Args:
        config: the contents of the config.
        kind: its ``model_type``.
        layers, hidden: the number of layers, and the hidden size.
        name: of the model, for messages.
    """
    masks = _masks(config, layers, name)
    feeds = [_feed_forward(config, kind, layer, hidden, name) for layer in range(layers)]
    counted = Counter(zip(masks, feeds))
    return tuple(
        LayerKind(count=count, mask=mask, ffn=ffn, experts=experts, active_experts=active, expert_ffn=width)
        for (mask, (ffn, experts, active, width)), count in counted.items()
    )


def _masks(config: Mapping[str, Any], layers: int, name: str) -> list[Mask]:
    """For each layer the mask that the config gives it: causal, a sliding window, or chunks.

    Raises:
        ModelError: a layer is of another type; the message begins with ``name``.
    """
    window, chunk = config.get("sliding_window"), config.get("attention_chunk_size")
    types = config.get("layer_types")
    if types is None:
        windowed = window and config.get("use_sliding_window", True)
        types = ["sliding_attention" if windowed else "full_attention"] * layers
    if len(types) < layers:
        raise ModelError(f"{name}: layer_types names {len(types)} layers of {layers}; it must name every layer")
    known: dict[str, Mask] = {"full_attention": Causal()}
    if window:
        known["sliding_attention"] = Window(int(window) - 1)
    if chunk:
        known["chunked_attention"] = Chunked(int(chunk)) & Causal()
    for layer_type in types[:layers]:
        if layer_type not in known:
            raise ModelError(
                f"{name}: a layer is {layer_type!r}, whose work the plan does not know; known are {', '.join(sorted(known))} "
                f"(sliding_attention needs sliding_window, chunked_attention needs attention_chunk_size)"
            )
    return [known[layer_type] for layer_type in types[:layers]]


def _feed_forward(config: Mapping[str, Any], kind: str, layer: int, hidden: int, name: str) -> tuple[int, int, int, int]:
    """The feed-forward of layer number ``layer``: (width that every token goes through, experts, active experts, width of an
    expert).

    A dense layer has 0 experts; of an MoE layer the first width is that of its shared experts.
    """
    wide = _size(config, "ffn", name, default=int(config.get("expansion_ratio", 4)) * hidden)
    experts = _size(config, "experts", name, default=0)
    if not experts or not _is_moe(config, kind, layer):
        return (config.get("intermediate_size_mlp") or wide) if kind == "llama4_text" else wide, 0, 0, 0
    active = _size(config, "active", name, default=1)
    width = int(config.get("moe_intermediate_size") or wide)
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    shared = shared or int(config.get("n_shared_experts") or 0) * width or (wide if kind == "llama4_text" else 0)
    return shared, experts, active, width


def _is_moe(config: Mapping[str, Any], kind: str, layer: int) -> bool:
    """Whether layer number ``layer`` of a model of the type ``kind`` has experts, by the entries of its config."""
    if "moe_layers" in config and config["moe_layers"] is not None:
        return layer in config["moe_layers"]
    if layer < int(config.get("first_k_dense_replace") or 0) or layer in (config.get("mlp_only_layers") or ()):
        return False
    step = int(config.get("decoder_sparse_step") or config.get("moe_layer_freq") or 1)
    return (layer + 1) % step == 0 if kind.startswith("qwen") else layer % step == 0

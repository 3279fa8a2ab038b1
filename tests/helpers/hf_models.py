"""Tiny Hugging Face models of many kinds, their batches, their forward on one device and over ranks, and the comparison."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

from longspan import ParallelMesh, cross_entropy, shard_batch, unshard
from longspan.batch.labels import IGNORE

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]

BASE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "attention_dropout": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
}  # fmt: skip


class Kind(NamedTuple):
    """How to build a tiny model of one architecture, and the tolerance with which it is compared.

    ``config``, ``model``: names of classes of Transformers. ``settings``: arguments of the config, added to BASE if ``base``.
    ``dtype``: what one device and the ranks compute in; ``tolerance``: of gradients, as ``assert_gradients`` takes it.
    """

    config: str
    model: str
    settings: Mapping[str, Any] = MappingProxyType({})
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10
    base: bool = True


FP32: dict[str, Any] = {"dtype": torch.float32, "tolerance": 1e-5}

KINDS = {
    "llama": Kind("LlamaConfig", "LlamaForCausalLM"),
    "llama, dynamic rope": Kind(
        "LlamaConfig", "LlamaForCausalLM",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "qwen2": Kind(
        "Qwen2Config", "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen3": Kind("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
    "mistral": Kind("MistralConfig", "MistralForCausalLM", {"sliding_window": 5}),
    "gemma2": Kind(
        "Gemma2Config", "Gemma2ForCausalLM",
        {
            "head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 6.0,
            "attn_implementation": "eager",  # before 5.21 the default drops the softcap on one device
        },
        **FP32,  # its own attention with softcap is the eager one, whose softmax is fp32
    ),
    "gemma3": Kind(
        "Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 8, "sliding_window": 5, "num_hidden_layers": 3,
        "sliding_window_pattern": 2}, **FP32,
    ),
    "gpt_oss": Kind(
        "GptOssConfig", "GptOssForCausalLM",
        {"head_dim": 8, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2}, **FP32,
    ),
    "phi3, longrope": Kind(
        "Phi3Config", "Phi3ForCausalLM", {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE}
    ),
    "mixtral": Kind("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}, **FP32),
    "qwen3_moe": Kind("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"head_dim": 8, **EXPERTS}, **FP32),
    "deepseek_v3": Kind(
        "DeepseekV3Config", "DeepseekV3ForCausalLM",
        {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
         "v_head_dim": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
         "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16}, **FP32,
    ),
    "olmo2": Kind("Olmo2Config", "Olmo2ForCausalLM"),
    "starcoder2": Kind(
        "Starcoder2Config", "Starcoder2ForCausalLM", {"residual_dropout": 0.0, "embedding_dropout": 0.0}
    ),
    "gpt_neox": Kind("GPTNeoXConfig", "GPTNeoXForCausalLM", {"hidden_dropout": 0.0}),
    "gpt2": Kind(
        "GPT2Config", "GPT2LMHeadModel",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0,
         "embd_pdrop": 0.0, "resid_pdrop": 0.0}, base=False,
    ),
    "opt": Kind(
        "OPTConfig", "OPTForCausalLM",
        {"num_hidden_layers": 2, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
    "bert": Kind("BertConfig", "BertForMaskedLM", NO_DROPOUT),
    "roberta": Kind("RobertaConfig", "RobertaForMaskedLM", {**NO_DROPOUT, "pad_token_id": 5}),
    "modernbert": Kind(
        "ModernBertConfig", "ModernBertForMaskedLM", {"local_attention": 8, "global_attn_every_n_layers": 2}
    ),
}  # fmt: skip

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

OWN_KINDS = {
    "gptj": Kind("GPTJConfig", "GPTJForCausalLM", {"rotary_dim": 4, **GPT}, **FP32),
    "bloom, ALiBi": Kind("BloomConfig", "BloomForCausalLM", {"n_layer": 2, "n_head": 4}, **FP32),
    "mpt, ALiBi": Kind("MptConfig", "MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, **FP32),
    "falcon, one key/value head": Kind("FalconConfig", "FalconForCausalLM", {"multi_query": True}, **FP32),
    "gpt_neo": Kind(
        "GPTNeoConfig", "GPTNeoForCausalLM",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]], "window_size": 64, "intermediate_size": 48,
         "embed_dropout": 0.0, "resid_dropout": 0.0}, **FP32,
    ),
    "gpt_neo, windows": Kind(
        "GPTNeoConfig", "GPTNeoForCausalLM",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5,
         "intermediate_size": 48, "embed_dropout": 0.0, "resid_dropout": 0.0}, **FP32,
    ),
    "gpt_neo, a window longer than the proof's rows": Kind(
        "GPTNeoConfig", "GPTNeoForCausalLM",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 17,
         "intermediate_size": 48, "embed_dropout": 0.0, "resid_dropout": 0.0}, **FP32,
    ),
    "openai, gates": Kind("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", GPT),
    "megatron, both directions": Kind("MegatronBertConfig", "MegatronBertForMaskedLM", NO_DROPOUT),
    "stablelm, no keywords": Kind("StableLmConfig", "StableLmForCausalLM"),
    "diffllama, two attentions a layer": Kind("DiffLlamaConfig", "DiffLlamaForCausalLM", **FP32),
    "bart, a decoder alone": Kind(
        "BartConfig", "BartForCausalLM",
        {"d_model": 32, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
         "dropout": 0.0},
    ),
}  # fmt: skip
"""Those that attend in their own code, or hand their attention no keywords."""

FEW_KEYS = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "phi3, longrope", "mixtral", "qwen3_moe",
            "olmo2", "starcoder2"}  # fmt: skip
"""The names in KINDS that can be built with one key/value head."""

TOKENS = 24


def build(name: str, **more: Any) -> Any:
    """A model of KINDS or OWN_KINDS, with the same random weights in every call, in train mode; ``more``: of its config."""
    kind = (KINDS | OWN_KINDS)[name]
    torch.manual_seed(0)
    settings = {**(BASE if kind.base else {}), **kind.settings, **more}
    model = getattr(transformers, kind.model)(getattr(transformers, kind.config)(**deepcopy(settings)))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.to(kind.dtype).train()


def in_place(model: Any) -> bool:
    """Whether the logits at position t predict ``labels[t]`` (masked LM) and not the next label."""
    return type(model).__name__.endswith("ForMaskedLM")


def batches(batch: str, encoder: bool) -> dict[str, Tensor]:
    """A batch of two whole rows of the kind ``batch`` of BATCHES, as one device and ``shard_batch`` take it.

    ``encoder``: the model is a masked LM; for other models the label of the first token after left padding is -100.
    """
    tokens = 23 if batch == "odd length" else TOKENS
    ids = torch.randint(3, 97, (2, tokens), generator=torch.Generator().manual_seed(1))
    labels, whole = ids.clone(), {"input_ids": ids}
    if batch == "left padding":
        whole["attention_mask"] = torch.ones_like(ids)
        whole["attention_mask"][0, :5] = 0
        labels[0, : 5 + (not encoder)] = IGNORE
    if batch == "right padding":
        whole["attention_mask"] = torch.ones_like(ids)
        whole["attention_mask"][1, -7:] = 0
        labels[1, -7:] = IGNORE
    if batch == "packed":
        lengths = ((7, 12, 5), (3, 20, 1))
        whole["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    if batch == "a rank without labels":
        labels[:, tokens // 2 :] = IGNORE
    return whole | {"labels": labels}


BATCHES = ["even", "odd length", "packed", "left padding", "right padding", "a rank without labels", "one key/value head"]


def targets(labels: Tensor, encoder: bool) -> Tensor:
    """What each position's logits predict: ``labels`` of a masked LM (``encoder``), else the next label, -100 at the end."""
    return labels if encoder else F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def forward_alone(model: Any, whole: dict[str, Tensor], encoder: bool) -> tuple[Tensor, Tensor]:
    """(loss, logits) of the model on one device; the loss is ``cross_entropy`` of the logits, not the model's own."""
    given = {name: value for name, value in whole.items() if name != "labels"}
    logits = model(**given, **({} if encoder else {"use_cache": False})).logits
    return cross_entropy(logits, targets(whole["labels"], encoder)), logits


def forward_cut(model: Any, whole: dict[str, Tensor], encoder: bool, mesh: ParallelMesh, knows_loss: bool) -> tuple[Any, Any]:
    """(loss, logits of all tokens) of a parallel model on ``shard_batch`` of ``whole``, equal on every rank.

    The loss is the model's own if ``knows_loss``, else ``cross_entropy`` of the logits of a call without labels.
    """
    part = shard_batch(whole, mesh, shift=not encoder)
    wanted = part["labels" if encoder else "shift_labels"]
    if not knows_loss:
        part = {name: value for name, value in part.items() if "labels" not in name}
    output = model(**part)
    loss = (
        output.loss if knows_loss else cross_entropy(output.logits, wanted, mesh=mesh, num_labels=part["longspan"].num_labels)
    )
    return loss, unshard(output.logits, mesh, tokens=part["longspan"].tokens)


def assert_gradients(model: Any, reference: Any, tolerance: float) -> None:
    """Assert guarantee 1 for every parameter's gradient: error <= tolerance * max(own norm, 1e-3 * norm of all)."""
    total = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm().item()
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters()):
        want = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        got = torch.zeros_like(theirs) if mine.grad is None else mine.grad
        got = got.full_tensor() if isinstance(got, DTensor) else got
        error = (got - want).norm().item()
        assert error <= tolerance * max(want.norm().item(), 1e-3 * total), f"{name} is off by {error:.1e}"


def squared_error(model: Any, exact: Any) -> float:
    """The sum of the squared differences of all elements of all gradients of two models."""
    pairs = zip(model.parameters(), exact.parameters())
    return sum(float((p.grad - true.grad).square().sum()) for p, true in pairs)


def small(config: str, model: str, **settings: Any) -> Callable[[], Any]:
    """A function that builds the model class ``model`` from the config class ``config``, both named as in Transformers."""
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**settings))

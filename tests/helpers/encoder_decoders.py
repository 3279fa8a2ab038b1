"""Tiny encoder-decoders of Transformers, their batches of two rows, and their forward on one device."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from longspan import ModelError, parallelize, shift_right
from longspan.batch.labels import IGNORE
from tests.helpers.ranks import mesh_of

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]

COMMON: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 2, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
}  # fmt: skip

GEMMA: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "dropout_rate": 0.0, "attention_dropout": 0.0,
    "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": 64,
}  # fmt: skip

TINY_T5: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}  # fmt: skip

PAIR_KINDS = {
    "bart": "Bart", "mbart": "MBart", "pegasus": "Pegasus", "marian": "Marian", "plbart": "PLBart", "t5gemma": "T5Gemma",
    "t5": "T5", "mt5": "MT5", "umt5": "UMT5", "m2m_100": "M2M100",
}  # fmt: skip

FP32_PAIRS = ("t5gemma", "t5", "mt5", "umt5")

PAIR_BATCHES = [
    "even", "odd lengths", "few targets", "left padding", "right padding", "a rank without labels", "packed targets",
]  # fmt: skip


def build_pair(name: str, **more: Any) -> Any:
    """The encoder-decoder ``name`` of PAIR_KINDS with random weights in train mode; ``more``: settings of its config."""
    torch.manual_seed(0)
    if name == "t5gemma":
        sides: Any = {side: transformers.T5GemmaModuleConfig(**GEMMA) for side in ("encoder", "decoder")}
        more = {"attn_implementation": "eager"} | more  # before 5.21 the default drops the softcap on one device
        config = transformers.T5GemmaConfig(**sides, vocab_size=97, **more)
        config.pad_token_id, config.decoder_start_token_id = 1, 2
        model: Any = transformers.T5GemmaForConditionalGeneration(config)
    else:
        config = getattr(transformers, f"{PAIR_KINDS[name]}Config")(**(TINY_T5 if "t5" in name else COMMON) | more)
        kind = "MarianMTModel" if name == "marian" else f"{PAIR_KINDS[name]}ForConditionalGeneration"
        model = getattr(transformers, kind)(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.to(torch.float32 if name in FP32_PAIRS else torch.float64).train()


def tolerance_of(name: str) -> float:
    """The tolerance of the guarantee for the dtype in which the model is compared: 1e-5 (fp32) or 1e-10 (fp64)."""
    return 1e-5 if name in FP32_PAIRS else 1e-10


def pair_batches(name: str, batch: str) -> dict[str, Tensor]:
    """A batch of two whole rows of the kind ``batch`` of PAIR_BATCHES, as one device and ``shard_batch`` take it."""
    tokens, targets = {"odd lengths": (23, 17), "few targets": (24, 5)}.get(batch, (24, 16))
    own = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(4, 97, (2, count), generator=own) for count in (tokens, targets))
    masks = {"attention_mask": torch.ones_like(ids), "decoder_attention_mask": torch.ones_like(labels)}
    if batch == "left padding":
        masks["attention_mask"][0, :5] = 0
    if batch == "right padding":
        masks["attention_mask"][1, -7:] = 0
        masks["decoder_attention_mask"][0, -6:] = 0
        labels[0, -6:] = IGNORE
    if batch == "a rank without labels":
        labels[:, targets // 2 :] = IGNORE
    whole = {"input_ids": ids, "labels": labels, "decoder_input_ids": shift_right(labels, 2, 4)}
    if batch == "packed targets":
        whole["decoder_position_ids"] = torch.stack([torch.arange(targets) % 7, torch.arange(targets)])
    return whole | (masks if "padding" in batch or name == "t5gemma" else {})


def pair_alone(model: Any, whole: dict[str, Tensor]) -> Any:
    """The output of the model on one device, with its loss."""
    return model(**whole, use_cache=False)


def refused_pair(model: Any) -> str:
    """Assert that ``parallelize`` raises ModelError for the model on one rank, and return the message."""
    with pytest.raises(ModelError) as error:
        parallelize(model, mesh_of())
    return str(error.value)

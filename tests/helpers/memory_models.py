"""The models with which the memory options are tested, the tolerance of each, and the loss on one device."""

from typing import Any

import torch
import torch.nn.functional as F

from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig
from tests.helpers.hf_models import build, forward_alone

ALL: dict[str, Any] = {
    "recompute": "selective", "tile_tokens": 5, "head_chunks": 2, "offload_activations": True, "chunked_loss": True,
}  # fmt: skip

MODELS = {"decoder": {}, "llama": {}, "qwen3_moe": {"decoder_sparse_step": 2}, "gemma2": {}}

SHAPE = DecoderConfig(vocab=97, layers=3, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=48)

TOLERANCE = {"decoder": 1e-10, "llama": 1e-10, "qwen3_moe": 1e-5, "gemma2": 1e-5}


def model_of(name: str) -> Any:
    """A model of MODELS: longspan's decoder in fp64, or a tiny Hugging Face model of ``hf_models``."""
    if name != "decoder":
        return build(name, **MODELS[name])
    model = Decoder(SHAPE).double()
    for parameter in model.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)  # else attention is uniform
    return model


def loss_alone(model: Any, name: str, whole: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean next-token loss of ``model_of(name)`` on one device, from its logits."""
    if name != "decoder":
        return forward_alone(model, whole, False)[0]
    logits = model(whole["input_ids"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), whole["labels"][:, 1:].flatten())

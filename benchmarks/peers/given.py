"""What every contestant is given: the same tensors, the same Llama with the same weights, the same rows and labels.

A case is a dict of plain values, because it travels to processes as JSON. Nothing here belongs to one library.

    exchange    q, k and v [1, my tokens, heads, dim]
    layer       the same, and a gradient of the output; mask "causal", "window" or "packed"
    step        a Hugging Face model (Llama, or Mistral where there is a window), ids and labels of one row
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100


def qkv(case: dict[str, Any], mine: int) -> list[Tensor]:
    """q, k and v of this rank's ``mine`` tokens, which require gradients."""
    generator = torch.Generator().manual_seed(1)
    heads = (case["heads"], case["kv_heads"], case["kv_heads"])
    return [torch.randn(1, mine, each, case["dim"], generator=generator).requires_grad_() for each in heads]


def documents(case: dict[str, Any]) -> tuple[int, ...]:
    """The lengths of the documents of a packed row: about ``document`` tokens each, unequal, their sum is the row."""
    tokens, mean = case["tokens"], case["document"]
    count = max(2, round(tokens / mean))
    weights = torch.rand(count, generator=torch.Generator().manual_seed(2)) + 0.5
    ends = (weights.cumsum(0) / weights.sum() * tokens).round().long().tolist()
    ends[-1] = tokens
    return tuple(end - start for start, end in zip([0, *ends], ends))


def model(case: dict[str, Any]) -> nn.Module:
    """A Hugging Face model with random weights, equal in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    sizes = {
        "vocab_size": case["vocab"], "hidden_size": case["hidden"], "intermediate_size": case["ffn"],
        "num_hidden_layers": case["layers"], "num_attention_heads": case["heads"], "num_key_value_heads": case["kv_heads"],
        "max_position_embeddings": case["tokens"], "tie_word_embeddings": False, "use_cache": False,
    }  # fmt: skip
    torch.manual_seed(0)
    if case.get("window"):
        return MistralForCausalLM(MistralConfig(sliding_window=case["window"], attn_implementation="sdpa", **sizes))
    return LlamaForCausalLM(LlamaConfig(attn_implementation="sdpa", **sizes))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of tokens, [1, tokens] each; labels are not shifted, -100 is ignored."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor


def row(case: dict[str, Any]) -> Row:
    """The row of a case: labels by ``labels`` ("all", "unequal", "half"), positions that restart where it has ``document``.

    "unequal": a tenth of the labels of the second half; "half": none there. The first token of a document has no label.
    """
    tokens, generator = case["tokens"], torch.Generator().manual_seed(3)
    ids = torch.randint(case["vocab"], (1, tokens), generator=generator)
    labels, positions, half = ids.clone(), torch.arange(tokens), (tokens + 1) // 2
    kind = case.get("labels", "all")
    if kind == "unequal":
        dropped = torch.rand(tokens - half, generator=generator) > 0.1
        labels[0, half:][dropped] = IGNORED
    if kind == "half":
        labels[0, half:] = IGNORED
    if case.get("document"):
        lengths = documents(case)
        positions = torch.cat([torch.arange(length) for length in lengths])
        labels[0, positions == 0] = IGNORED
    return Row(input_ids=ids, labels=labels, position_ids=positions.unsqueeze(0))


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of every step that is timed: AdamW, one fused kernel for each parameter."""
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)

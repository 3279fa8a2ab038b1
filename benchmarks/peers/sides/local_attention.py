"""What runs between a peer's exchanges: the attention function that its user passes, as a user would write it.

Each takes and returns what Transformers' attention functions do: (module, query [B, H, S, D], key, value, mask, ...) ->
([B, S, H, D], None). "sdpa" is Transformers' own.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import given

Attention = Callable[..., tuple[Tensor, None]]


def attention_for(case: dict[str, Any], api: str | None) -> Attention | str:
    """The function for a case, or "sdpa".

    "identity" returns the queries; "loop" calls causal attention for each document; "dense" builds the window as a mask [S, S].
    """
    if case["kind"] == "exchange":
        return identity
    if api == "loop":
        return loop_over(given.documents(case))
    if api == "dense":
        return dense_window(case["tokens"], case["window"])
    return "sdpa"


def identity(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """No attention: the exchange alone."""
    return query.transpose(1, 2), None


def loop_over(lengths: tuple[int, ...]) -> Attention:
    """Causal attention within each document, one fused call for each."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        pieces = zip(*(x.split(lengths, 2) for x in (query, key, value)))
        outs = [F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True) for qkv in pieces]
        return torch.cat(outs, 2).transpose(1, 2), None

    return attend


def dense_window(tokens: int, window: int) -> Attention:
    """Fused attention with a mask [tokens, tokens], which PyTorch's operator for the CPU takes as numbers."""
    mask, positions = torch.zeros(tokens, tokens), torch.arange(tokens)
    for rows, queries in zip(mask.split(256), positions.split(256)):  # the distances take twice the mask's memory
        distance = queries[:, None] - positions[None, :]
        rows.masked_fill_((distance < 0) | (distance >= window), float("-inf"))

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2), None

    return attend


def layer_module(case: dict[str, Any]) -> Any:
    """What Transformers' attention functions read of the module that calls them."""
    groups = case["heads"] // case["kv_heads"]
    return SimpleNamespace(is_causal=True, num_key_value_groups=groups, training=True, config=None, layer_idx=0)


def positions_of(case: dict[str, Any], ranks: int, rank: int) -> Tensor:
    """This rank's positions [1, my tokens], which restart in every document of a packed row."""
    lengths = given.documents(case) if case.get("document") else (case["tokens"],)
    return torch.cat([torch.arange(length) for length in lengths]).chunk(ranks)[rank].unsqueeze(0)

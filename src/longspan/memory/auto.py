"""The tools that cost least time of those with which a step fits into a budget. Knows configs and the closed form, not tensors.

config of a model  -->  sizes  -->  no tool                          |  the first whose footprint fits,
                                    tiles                            |  in the order of what they cost
                                    tiles, zero=2                    |
                                    tiles, attention kept  ...       v
"""

import inspect
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from longspan.errors import ModelError
from longspan.memory.checkpointing import Tools
from longspan.planner.memory import Footprint, Sizes, footprint

TILE_TOKENS = 4_096
"""Of a tile, where nobody says how many: large enough to keep matrix products fast."""
THEIR_NAMES = {
    "vocab": "vocab_size", "layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "ffn": "intermediate_size",
}  # fmt: skip
"""Where the configs of Transformers say the sizes of a decoder."""


class Choice(NamedTuple):
    """Tools as keywords of ``parallelize``, what a step needs with them, and why it is these."""

    tools: dict[str, Any]
    needs: Footprint
    why: str


def refuse_half_asked(
    memory: str | None, budget_gib: float | None, tokens: int | None, zero: int, tools: Tools
) -> dict[str, str]:
    """Raise ModelError for a budget that nobody keeps, and for a tool beside the choice of all tools; returns who chooses."""
    if memory not in (None, "auto"):
        raise ModelError(f'memory={memory!r} is unknown; use memory="auto", or leave it out and name the tools')
    if memory is None:
        for name, value in {"memory_budget_gib": budget_gib, "tokens": tokens}.items():
            if value is not None:
                raise ModelError(f'{name}= is for memory="auto", which chooses the tools; give that too, or leave both out')
    else:
        default = {"zero": 0} | vars(Tools())
        for name, value in ({"zero": zero} | vars(replace(tools, put_away=False))).items():
            if value != default[name]:
                raise ModelError(f'memory="auto" chooses {name}, which was given as {value!r}; leave one of the two out')
    return {"memory": str(memory)}


def choose(
    model: nn.Module,
    *,
    tokens: int | None,
    ranks: int,
    budget_gib: float | None,
    itemsize: int,
    sharded: bool = False,
    shares: int | None = None,
) -> Choice:
    """The tools of ``memory="auto"``. Raises ModelError where budget or length is missing, or a size in the config.

    ``sharded``: what else was asked wants zero=2 or zero=3; ``shares`` as in ``footprint``.
    """
    if budget_gib is None or tokens is None or budget_gib <= 0 or tokens < 1:
        raise ModelError(
            f'memory="auto" needs memory_budget_gib= (of a rank, more than 0) and tokens= (of the longest row, at least 1), '
            f"not {budget_gib} and {tokens}"
        )
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f'memory="auto" knows models of one row of tokens, and {type(model).__name__} has two; name the tools')
    ours = isinstance(config, Sizes)
    return cheapest(
        config if ours else _sizes(model, config),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=tokens,
        ranks=ranks,
        budget=int(budget_gib * 2**30),
        whole_logits=not ours and "labels" in inspect.signature(model.forward).parameters,
        itemsize=itemsize,
        sharded=sharded,
        shares=shares,
    )


def cheapest(
    sizes: Sizes,
    *,
    parameters: int,
    tokens: int,
    ranks: int,
    budget: int,
    whole_logits: bool = False,
    itemsize: int = 4,
    sharded: bool = False,
    shares: int | None = None,
) -> Choice:
    """The first of the sets of tools whose step fits into ``budget`` bytes a rank; the smallest where none does."""
    tiles = {"tile_tokens": TILE_TOKENS} | ({"return_logits": False} if whole_logits else {})
    kept = tiles | {"recompute": "selective"}
    tried: list[dict[str, Any]] = [{}, tiles, {"zero": 2} | tiles, kept, {"zero": 2} | kept, {"zero": 3} | kept]
    if sharded:
        tried = [{"zero": 2}, *(tools for tools in tried if "zero" in tools)]
    if sizes.heads % 2 == sizes.kv_heads % 2 == 0 and sizes.heads // 2 >= ranks:
        tried.append({"zero": 3, "head_chunks": 2} | kept)
    choices = []
    for tools in tried:
        given = {name: value for name, value in tools.items() if name != "return_logits"}
        if "zero" in tools:
            given["shares"] = shares
        logits = ("tiles" if "return_logits" in tools else "whole") if whole_logits else "blocks"
        needs = footprint(sizes, parameters=parameters, tokens=tokens, ranks=ranks, logits=logits, itemsize=itemsize, **given)
        said = ", ".join(f"{name}={value!r}" for name, value in tools.items()) or "no tool"
        fits = "fits into" if needs.peak <= budget else "is the nearest to"
        gib, cap = needs.peak / 2**30, budget / 2**30
        choices.append(Choice(tools, needs, f"{said}: {gib:.2f} GiB a rank for {tokens:,} tokens {fits} {cap:.2f}"))
        if needs.peak <= budget:
            return choices[-1]
    return min(choices, key=lambda choice: choice.needs.peak)


def _sizes(model: nn.Module, config: Any) -> Sizes:
    text = None if config is None else config.get_text_config()
    found: dict[str, Any] = {name: getattr(text, theirs, None) for name, theirs in THEIR_NAMES.items()}
    found["kv_heads"] = found["kv_heads"] or found["heads"]
    if found["head_dim"] is None and found["hidden"] and found["heads"]:
        found["head_dim"] = found["hidden"] // found["heads"]
    if missing := [THEIR_NAMES[name] for name, value in found.items() if not value]:
        raise ModelError(f'memory="auto" finds no {", ".join(missing)} in the config of {type(model).__name__}; name the tools')
    return Sizes(**found)

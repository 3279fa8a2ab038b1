"""AutoMemory: the fastest ZeRO stage and memory options whose estimated peak fits a budget. Reads configs, not tensors.

config of a model  -->  sizes  -->  no option                      |  the first one whose footprint
                                    tiles                          |  (planner/memory.py) fits the budget,
                                    tiles, zero=2                  |  in the order of their time
                                    tiles, selective recomputation |
                                    ...                            v
"""

import inspect
from dataclasses import fields, replace
from typing import Any, NamedTuple

from torch import nn

from longspan.errors import ModelError
from longspan.memory.options import AutoMemory, MemoryOptions
from longspan.planner.memory import Footprint, Sizes, footprint

TILE_TOKENS = 4_096
"""The ``tile_tokens`` that is chosen: large enough for an efficient GEMM."""
THEIR_NAMES = {
    "vocab": "vocab_size", "layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "ffn": "intermediate_size",
}  # fmt: skip
"""The names of a decoder's sizes (``Sizes``) in the configs of Transformers."""


class Choice(NamedTuple):
    """A ZeRO stage and memory options with which a step may run, and what it then needs; ``str`` gives the options as text.

    Attributes:
        zero: the ZeRO stage, 0 to 3.
        memory: the options.
        needs: the estimated memory of a step on one rank, in bytes.
    """

    zero: int
    memory: MemoryOptions
    needs: Footprint

    def __str__(self) -> str:
        defaults = MemoryOptions()
        named = {"zero": self.zero} if self.zero else {}
        named |= {f.name: v for f in fields(defaults) if (v := getattr(self.memory, f.name)) != getattr(defaults, f.name)}
        return ", ".join(f"{name}={value!r}" for name, value in named.items()) or "no option"


def choose(
    model: nn.Module, budget: AutoMemory, *, ranks: int, itemsize: int, sharded: bool = False, fsdp_ranks: int | None = None
) -> tuple[Choice, str]:
    """The fastest ZeRO stage and memory options with which a step fits into a budget.

    Args:
        model: a model whose config has the sizes of a decoder.
        budget: GiB of one rank, and tokens of the longest row.
        ranks: ranks that hold one row.
        itemsize: bytes of an element of the activations.
        sharded: consider only zero=2 and 3, because another argument of ``parallelize`` needs sharded parameters.
        fsdp_ranks: ranks that shard the parameters at zero > 0; None: all of ``ranks``.

    Returns:
        The choice, and one sentence with the reason.

    Raises:
        ModelError: the model is an encoder-decoder, its config lacks a size, or nothing fits into the budget.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"AutoMemory knows models of one row of tokens, and {type(model).__name__} has two; pass MemoryOptions(...)"
        )
    ours = isinstance(config, Sizes)
    found = fastest_that_fits(
        config if ours else _sizes(model, config),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=budget.tokens,
        ranks=ranks,
        budget=int(budget.budget_gib * 2**30),
        whole_logits=not ours and "labels" in inspect.signature(model.forward).parameters,
        linear_head=ours or isinstance(_head_of(model), nn.Linear),
        itemsize=itemsize,
        sharded=sharded,
        fsdp_ranks=fsdp_ranks,
    )
    gib = found.needs.peak / 2**30
    if gib > budget.budget_gib:
        raise ModelError(
            f"AutoMemory(budget_gib={budget.budget_gib:g}, tokens={budget.tokens}) cannot be kept: the least that a step needs "
            f"by the closed form is {gib:.2f} GiB a rank, with {found}; use a larger budget, shorter rows, more ranks, or, to "
            f"try it all the same, pass zero= and MemoryOptions(...)"
        )
    return found, f"{found}: {gib:.2f} GiB a rank for {budget.tokens:,} tokens fit into {budget.budget_gib:.2f}"


def fastest_that_fits(
    sizes: Sizes,
    *,
    parameters: int,
    tokens: int,
    ranks: int,
    budget: int,
    whole_logits: bool = False,
    linear_head: bool = True,
    itemsize: int = 4,
    sharded: bool = False,
    fsdp_ranks: int | None = None,
) -> Choice:
    """The first of a list of settings, ordered from fastest to slowest, whose estimated peak memory is within ``budget``.

    A setting is a ZeRO stage with MemoryOptions. Its peak is computed from the sizes (planner/memory.py); nothing is measured.

    Args:
        sizes: sizes of the decoder.
        parameters: number of parameters.
        tokens: tokens of a row.
        ranks: ulysses and ring ranks that hold a row.
        budget: bytes of one rank.
        whole_logits: whether the model's own loss forms all logits at once (Transformers) unless ``chunked_loss`` is set.
        linear_head: whether ``chunked_loss`` then forms them in blocks; otherwise in tiles, by the model's own code.
        itemsize: bytes of an element of the activations.
        sharded: consider only zero=2 and 3.
        fsdp_ranks: ranks that shard the parameters at zero > 0; None: all of ``ranks``.

    Returns:
        The setting and its estimated memory; if none fits, the one with the smallest estimated peak.
    """
    choices = []
    for zero, options in _in_order_of_time(sizes, ranks, whole_logits, sharded):
        chunked = "blocks" if linear_head or not whole_logits else "tiles"
        logits = "whole" if whole_logits and not options.chunked_loss else chunked
        needs = footprint(
            sizes, parameters=parameters, tokens=tokens, ranks=ranks, zero=zero, fsdp_ranks=fsdp_ranks if zero else None,
            recompute=options.recompute, tile_tokens=options.tile_tokens, head_chunks=options.head_chunks, logits=logits,
            itemsize=itemsize,
        )  # fmt: skip
        choices.append(Choice(zero, options, needs))
        if needs.peak <= budget:
            return choices[-1]
    return min(choices, key=lambda choice: choice.needs.peak)


def _in_order_of_time(sizes: Sizes, ranks: int, whole_logits: bool, sharded: bool) -> list[tuple[int, MemoryOptions]]:
    """The settings (ZeRO stage, MemoryOptions) that are tried, from fastest to slowest.

    Args:
        sizes: sizes of the decoder; two head chunks are tried only if the heads allow it.
        ranks: ranks that hold a row.
        whole_logits: whether to try ``chunked_loss``.
        sharded: leave out zero=0.
    """
    tiles = MemoryOptions(tile_tokens=TILE_TOKENS, chunked_loss=whole_logits)
    selective = replace(tiles, recompute="selective")
    tried = [(0, MemoryOptions()), (0, tiles), (2, tiles), (0, selective), (2, selective), (3, selective)]
    if sharded:
        tried = [(2, MemoryOptions()), *((zero, options) for zero, options in tried if zero)]
    if sizes.heads % 2 == sizes.kv_heads % 2 == 0 and sizes.heads // 2 >= ranks:
        tried.append((3, replace(selective, head_chunks=2)))
    return tried


def _head_of(model: Any) -> nn.Module | None:
    """The head of a Transformers model; None if it has none."""
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    return head


def _sizes(model: nn.Module, config: Any) -> Sizes:
    """The sizes of a Transformers model, read from ``config``, its config.

    Raises:
        ModelError: the config lacks one of them; the message names it and the class of ``model``.
    """
    text = None if config is None else config.get_text_config()
    found: dict[str, Any] = {name: getattr(text, theirs, None) for name, theirs in THEIR_NAMES.items()}
    found["kv_heads"] = found["kv_heads"] or found["heads"]
    if found["head_dim"] is None and found["hidden"] and found["heads"]:
        found["head_dim"] = found["hidden"] // found["heads"]
    if missing := [THEIR_NAMES[name] for name, value in found.items() if not value]:
        raise ModelError(
            f"AutoMemory finds no {', '.join(missing)} in the config of {type(model).__name__}; pass MemoryOptions(...)"
        )
    return Sizes(**found)

"""Embedding and head of a Hugging Face model that are cut by rows of the vocabulary over the tensor axis.

    get_output_embeddings()    an nn.Linear ("colwise_gather_output" in Transformers' plans): logits of each rank's rows
    get_input_embeddings()     an nn.Embedding, called once a forward with the ids of the model's tokens
    both one tensor (tied)     cut if both can be

That the ranks' looked-up rows are those of the whole embedding is tested on one rank. What cannot be cut is replicated, which
changes no number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from longspan import _compat
from longspan.distributed.tensor_cuts import Cut
from longspan.distributed.vocab_parallel import EmbeddingRows, vocabulary_cut
from longspan.hf.probe import TOKENS, forward

CHUNK = 4096
"""Ids with which an embedding is called at once, so that the proof takes little memory."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Which modules of a model are cut by rows of the vocabulary: the entries of its ``TensorPlan``.

    Attributes:
        embeddings, heads: names of modules.
        cuts: how their parameters are cut, by name.
    """

    embeddings: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    cuts: Mapping[str, Cut] = field(default_factory=dict)


def vocabulary_of(model: Any, ranks: int) -> Vocabulary:
    """The embedding and the head of ``model`` that ``ranks`` tensor ranks can cut; without either where they cannot.

    Called inside ``proving``: it runs a test forward.
    """
    names = {module: name for name, module in model.named_modules()}
    users: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(parameter, []).append(name)
    embed, head = _module(model, "get_input_embeddings"), _module(model, "get_output_embeddings")
    found = dict[str, nn.Embedding | nn.Linear]()
    if type(head) is nn.Linear and len(head.weight) >= ranks:
        found[names[head]] = head
    if isinstance(embed, nn.Embedding) and len(embed.weight) >= ranks and _adds_up(model, names[embed], embed, ranks):
        found[names[embed]] = embed
    owned = {name: {f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)} for name, module in found.items()}
    every = set[str]().union(*owned.values())
    shared = {name for uses in users.values() if not set(uses) <= every for name in uses}
    found = {name: module for name, module in found.items() if not owned[name] & shared}
    if len(found) == 1 and embed is not None and head is not None and embed.weight is head.weight:
        found = {}
    cuts = {leaf: vocabulary_cut(len(module.weight)) for name, module in found.items() for leaf in sorted(owned[name])}
    return Vocabulary(
        embeddings=tuple(name for name, module in found.items() if module is embed),
        heads=tuple(name for name, module in found.items() if module is head),
        cuts=cuts,
    )


def _module(model: Any, getter: str) -> Any:
    """What ``model.getter()`` returns, a module; None for a model that has none."""
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _adds_up(model: Any, name: str, embed: nn.Embedding, ranks: int) -> bool:
    """Whether a forward calls ``embed`` once, with the ids of its tokens, and what ``ranks`` ranks look up in their rows adds
    up to what it returns.

    One that changes its table (``max_norm``), whose gradient is sparse or scaled by how often an id occurs, or that has forward
    hooks, which could read the table, is not cut.
    """
    hooks = [hook for kind in ("forward pre-hook", "forward hook") for hook in _compat.MODULE_HOOKS[kind](embed)]
    if hooks or embed.max_norm is not None or embed.sparse or embed.scale_grad_by_freq:
        return False
    calls: list[tuple[Any, Any]] = []
    handle = embed.register_forward_hook(lambda _, args, output: calls.append((args, output)))
    try:
        forward(model)
    finally:
        handle.remove()
    if len(calls) != 1 or not calls[0][0] or not isinstance(ids := calls[0][0][0], Tensor) or ids.shape != (1, TOKENS):
        return False
    try:
        return all(_is_row_wise(embed, EmbeddingRows(name, embed), own) for own in _parts(embed, ranks))
    except Exception:  # whatever the model's code makes of fewer rows
        return False


def _is_row_wise(embed: nn.Embedding, rows: EmbeddingRows, own: range) -> bool:
    """Whether the forward of ``embed`` gives for each id in ``own`` what it gives with these rows of the table alone.

    A forward other than PyTorch's may treat any id in its own way, so it is called with all.
    """
    is_plain, padding = type(embed) is nn.Embedding and "forward" not in vars(embed), embed.padding_idx
    called = [each for each in (own.start, own.stop - 1, padding) if each in own] if is_plain else list(own)
    for some in torch.tensor(called, device=embed.weight.device).split(CHUNK):
        ids = some[None]
        wanted = embed.forward(ids)
        mine, _, embed.padding_idx = rows.rows(ids, len(own), own.start)
        vars(embed)["weight"] = embed.weight[own.start : own.stop]
        try:
            found = embed.forward(mine)
        finally:
            del vars(embed)["weight"]
            embed.padding_idx = padding
        if not torch.equal(found, wanted):
            return False
    return True


def _parts(embed: nn.Embedding, ranks: int) -> list[range]:
    """The rows of the table of ``embed`` that each of ``ranks`` tensor ranks would have."""
    rows = len(embed.weight)
    return [vocabulary_cut(rows).pieces(rows, ranks, rank)[0] for rank in range(ranks)]

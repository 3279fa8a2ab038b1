"""How a model counts positions, and what it hides, where it is told neither: shown on one rank.

    positions   0 1 2 3 ...      from the first token, from behind padding (OPT), from ids (RoBERTa); by tables that end
    hidden      pad a b pad      tokens that are padding by their ids, where no mask is given (T5Gemma)

A rank would count and hide its own part of the tokens otherwise than all of them. So it is given what all of them say
(positions.py), or refused, on every rank. Knows nothing of attention or losses.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan.batch.context import TARGET, BatchInfo, refuse_unknown_tokens
from longspan.errors import BatchError, ModelError
from longspan.hf.mask_functions import Said
from longspan.hf.position_ids import handed_over, is_table, of_ids
from longspan.hf.probe import TOKENS, Probe, all_equal, ask, ids_of, proving, rows, special, whole

LEFT = 3
"""Tokens of padding on the left, where the proof has some."""


@dataclass(frozen=True)
class Counting:
    """What was found. Rows are told apart by how the names of their tensors begin: "", or "decoder_".

    ``hides_padding``: by ids, where no mask is given. ``handed_over``: rows whose positions it counts whatever it is given.
    ``known``: how many positions the tables of a row have. ``behind_padding``: whether its own positions begin there.
    ``padding_id``: that of the ids that it counts positions from, or None.
    """

    hides_padding: bool
    handed_over: set[str]
    known: dict[str, int]
    behind_padding: bool
    padding_id: int | None

    def refuse(self, model: Any, step: BatchInfo) -> None:
        """Raise, on every rank alike, for rows that ``model`` would count or hide in another way than over all tokens."""
        name = type(model).__name__
        if self.hides_padding and not step.masked:
            masks = "attention_mask and decoder_attention_mask" if step.target else "attention_mask"
            raise ModelError(
                f"{name} hides the padding token by itself where no mask is given, and of each rank's part it would not be "
                f"known to the others; give shard_batch {masks}, 1 for a token and 0 for padding"
            )
        if self.padding_id is not None and not step.named:
            raise ModelError(
                f"{name} counts its positions from input_ids; with inputs_embeds, give shard_batch position_ids too"
            )
        for prefix, row in {"": step, TARGET: step.target}.items():
            if row is not None:
                embeddings = (model.get_decoder() if prefix else model).get_input_embeddings()
                refuse_unknown_tokens(row, getattr(embeddings, "num_embeddings", None), name)
                self._refuse_positions(row, prefix, name)

    def _refuse_positions(self, row: BatchInfo, prefix: str, name: str) -> None:
        if prefix in self.handed_over and row.furthest_placed >= 0:
            raise ModelError(f"{name} counts its positions itself and ignores {prefix}position_ids; give shard_batch none")
        before = 0 if self.padding_id is None else self.padding_id + 1
        for furthest, first in ((row.furthest, before), (row.furthest_placed, 0)):
            known = self.known.get(prefix, first + furthest + 1) - first
            if furthest >= known:
                raise BatchError(
                    f"the step has {prefix}positions up to {furthest}, and the table of {name} has {known} of them; use "
                    f"shorter rows, or a model with more positions"
                )


def prove_counting(model: Any, base: Any) -> Counting:
    """How ``model`` counts and hides; ``base`` is the one inside an adapter's wrapper, or the same. Changes nothing.

    Raises ModelError for a model that counts its positions in a way that is none of these.
    """
    with proving(model):
        return Counting(_hides_padding(model), handed_over(model), _positions_known(model), *_prove_positions(model, base))


def _hides_padding(model: Any) -> bool:
    """Whether some layer is told to hide tokens that are padding by their ids, though no mask was given."""
    known = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    padding, probe = sorted(token for token in special(model, "pad") if 0 <= token < known), Probe()
    changed: dict[str, Any] = {name: x for name, x in whole(model).items() if name.endswith("input_ids")} if padding else {}
    for ids in changed.values():
        ids[0, 1 : 1 + len(padding)] = torch.tensor(padding, device=ids.device)
    ask(model, probe=probe, **changed)
    return any(isinstance(call.said, Said) and call.said.hides for call in probe.calls)


def _positions_known(model: Any) -> dict[str, int]:
    """The length of the shortest table that is looked up by the positions of the tokens, of each row that has one."""
    lengths: dict[str, int] = {}
    row_of = {count: name for name, count in rows(model).items()}

    def note(table: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("position_ids") if is_table(table) else args[0] if args else kwargs.get("input")
        if isinstance(ids, Tensor) and ids.numel() in row_of and bool((ids.flatten().diff() == 1).all()):
            first = getattr(table, "offset", 0) if is_table(table) else int(ids.min())
            row = row_of[ids.numel()]
            lengths[row] = min(table.num_embeddings - first, lengths.get(row, table.num_embeddings))

    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [table.register_forward_pre_hook(note, with_kwargs=True) for table in tables]
    try:
        ask(model)
    finally:
        for handle in handles:
            handle.remove()
    return lengths


def _prove_positions(model: Any, base: Any) -> tuple[bool, int | None]:
    """How positions are counted where none are given: from 0, or True, behind padding on the left (OPT), or from the ids,
    whose padding is this one (RoBERTa)."""
    given = ask(model)
    uncounted: dict[str, Any] = {f"{name}position_ids": None for name in rows(model)}
    if not all_equal(given, ask(model, **uncounted)):
        padding_id = model.config.get_text_config().pad_token_id
        if padding_id is not None and _counts_ids(model, padding_id):
            return False, padding_id
        raise ModelError(
            f"{type(model).__name__} does not count its positions 0, 1, 2, ..., which shard_batch gives it; such a model is "
            f"not supported yet"
        )
    if "attention_mask" not in inspect.signature(base.forward).parameters:
        return False, None
    places = {name: torch.arange(count, device=model.device).unsqueeze(0) for name, count in rows(model).items()}
    padding: dict[str, Any] = {f"{name}attention_mask": (at >= LEFT).long() for name, at in places.items()}
    counted = _behind_padding(ask(model, **uncounted, **padding))
    if all_equal(_behind_padding(given), counted):
        return False, None
    behind: dict[str, Any] = {f"{name}position_ids": (at - LEFT).clamp(min=0) for name, at in places.items()}
    moved = ask(model, **behind, **padding)
    if not all_equal(_behind_padding(moved), counted):
        raise ModelError(f"{type(model).__name__} counts its positions from padding in its own way, which is not supported yet")
    return True, None


def _counts_ids(model: Any, padding_id: int) -> bool:
    """Whether the model gives the same where its positions are those of ``of_ids``, with and without a mask of padding."""
    ids = ids_of(model).unsqueeze(0)
    ids[0, [0, 1, LEFT + 1, TOKENS - 1]] = padding_id
    counted = ask(model, input_ids=ids, position_ids=of_ids(ids, padding_id))
    masks: tuple[dict[str, Any], ...] = ({}, {"attention_mask": (ids != padding_id).long()})
    return all(all_equal(counted, ask(model, input_ids=ids, position_ids=None, **mask)) for mask in masks)


def _behind_padding(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x[:, LEFT:] for name, x in given.items()}

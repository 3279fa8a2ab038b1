"""How a model counts positions, and which tokens it hides as padding, where the batch gives neither: proven on one rank.

    positions   0 1 2 3 ...      from the first token, from behind padding (OPT), from ids (RoBERTa); by tables that end
    hidden      pad a b pad      tokens that are padding by their ids, where no mask is given (T5Gemma)

A rank would count and hide otherwise over its part of the tokens than over all of them. So it is given positions of the whole
row (position_ids.py), or refused, on every rank. Independent of attention and losses.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longspan.batch.context import TARGET, BatchInfo
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError, ModelError
from longspan.hf.candidate import Candidate, Undo, remove_all
from longspan.hf.mask_functions import MaskFunction
from longspan.hf.names import is_position_table
from longspan.hf.position_ids import model_positions, positions_of_ids, rows_counted_by_stacks
from longspan.hf.probe import TOKENS, Probe, all_equal, batch_of, forward, ids_of, proving, row_lengths, special_ids

LEFT = 3
"""The number of padding tokens on the left in the test forwards that have padding."""


@dataclass(frozen=True)
class Counting:
    """How a model counts positions and hides padding, as ``probe`` found it; ``install`` makes each rank do it for whole rows.

    "Row" is "" for the tokens of ``input_ids``, "decoder_" for those of the decoder.

    Attributes:
        hides_padding: whether attention hides tokens with the padding id if no attention_mask is given.
        given_ones: whether other modules hide them too; then each call gets an attention_mask of ones, which prevents it.
        ignoring: the rows whose ``position_ids`` the model ignores, because it counts them by itself.
        known: for each row with a table of learned positions, how many positions the table has.
        behind_padding: whether positions that the model counts begin after the padding on the left (OPT).
        padding_id: the id of padding, for a model that counts positions from ids (RoBERTa); else None.
    """

    hides_padding: bool
    given_ones: bool
    ignoring: set[str]
    known: dict[str, int]
    behind_padding: bool
    padding_id: int | None

    def install(self, model: Any, mesh: ParallelMesh) -> Undo:
        """Register a hook that, before each forward, sets the ``position_ids`` of this rank's tokens as the model would count
        them.

        It refuses a call whose positions cannot be counted.

        Returns:
            A function that removes the hook.
        """
        return remove_all([model.register_forward_pre_hook(partial(self._before, mesh), with_kwargs=True)])

    def _before(self, mesh: ParallelMesh, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: refuse what cannot be counted, and set the position ids of this rank's tokens."""
        step = kwargs["longspan"]
        self.refuse(model, step)
        behind, padding_id = self.behind_padding, self.padding_id
        if self.given_ones:
            kwargs = kwargs | {"attention_mask": torch.ones_like(kwargs["input_ids"])}
        return args, kwargs | model_positions(kwargs, step, mesh, behind_padding=behind, padding_id=padding_id)

    def refuse(self, model: Any, step: BatchInfo) -> None:
        """Raise on every rank if the model would count positions or hide padding otherwise than on one device.

        Args:
            model: the model.
            step: the BatchInfo of the call.

        Raises:
            ModelError: a mask or position_ids are missing, or position_ids are given that the model ignores.
            BatchError: a position is behind the end of the model's table.
        """
        name = type(model).__name__
        if self.hides_padding and not step.rows_have_masks:
            masks = "attention_mask and decoder_attention_mask" if step.target else "attention_mask"
            raise ModelError(
                f"{name} hides the padding token by itself where no mask is given, and of each rank's part it would not be "
                f"known to the others; give shard_batch {masks}, 1 for a token and 0 for padding"
            )
        if self.padding_id is not None and not step.counted_rows_have_ids:
            raise ModelError(
                f"{name} counts its positions from input_ids; with inputs_embeds, give shard_batch position_ids too"
            )
        for prefix, row in {"": step, TARGET: step.target}.items():
            if row is not None:
                self._refuse_positions(row, prefix, name)

    def _refuse_positions(self, row: BatchInfo, prefix: str, name: str) -> None:
        """Raise an error for position ids of ``row`` that the model ignores, or that its table does not have.

        ``prefix`` is that of the row's keywords, and ``name`` the model's class.
        """
        if prefix in self.ignoring and row.last_given_position >= 0:
            raise ModelError(f"{name} counts its positions itself and ignores {prefix}position_ids; give shard_batch none")
        before = 0 if self.padding_id is None else self.padding_id + 1
        for furthest, first in ((row.last_counted_position, before), (row.last_given_position, 0)):
            known = self.known.get(prefix, first + furthest + 1) - first
            if furthest >= known:
                raise BatchError(
                    f"the step has {prefix}positions up to {furthest}, and the table of {name} has {known} of them; use "
                    f"shorter rows, or a model with more positions"
                )


def probe(candidate: Candidate) -> Counting:
    """How the model in ``candidate`` counts positions and hides padding, found by test forwards.

    Raises:
        ModelError: it does so in a way that longspan does not know.
    """
    model, base = candidate.called, candidate.model
    with proving(model):
        ignoring, known = rows_counted_by_stacks(model), _positions_known(model)
        return Counting(*_hides_padding(model), ignoring, known, *_prove_positions(model, base))


def _hides_padding(model: Any) -> tuple[bool, bool]:
    """Whether the model hides padding tokens without being given a mask, by a test forward.

    Returns:
        (whether attention hides them, whether other modules do, which a mask of ones prevents).

    Raises:
        ModelError: other modules hide them even with a mask of ones.
    """
    known = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    padding, probe = sorted(token for token in special_ids(model, "pad") if 0 <= token < known), Probe()
    changed: dict[str, Any] = {name: x for name, x in batch_of(model).items() if name.endswith("input_ids")} if padding else {}
    for ids in changed.values():
        ids[0, 1 : 1 + len(padding)] = torch.tensor(padding, device=ids.device)
    plain, found = (_beside(len(padding), each) for each in (forward(model), forward(model, probe=probe, **changed)))
    hides = any(isinstance(call.mask, MaskFunction) and call.mask.hides_padding for call in probe.calls)
    if all_equal(plain, found):
        return hides, False
    ones: dict[str, Any] = {"attention_mask": torch.ones(1, TOKENS, dtype=torch.long, device=model.device)}
    if len(row_lengths(model)) > 1 or not all_equal(plain, _beside(len(padding), forward(model, **changed, **ones))):
        raise ModelError(
            f"{type(model).__name__} computes other tokens otherwise where one is padding, which a rank would not know of "
            f"another's; such a model is not supported"
        )
    return hides, True


def _beside(count: int, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of ``given`` in which every tensor [1, tokens, ...] lacks the tokens 1 to ``count``."""
    return {name: torch.cat([x[:, :1], x[:, 1 + count :]], 1) for name, x in given.items() if x.ndim > 1}


def _positions_known(model: Any) -> dict[str, int]:
    """For each row of tokens ("" or "decoder_") the number of positions of its shortest position table.

    A row without such a table has no entry.
    """
    lengths: dict[str, int] = {}
    row_of = {count: name for name, count in row_lengths(model).items()}

    def note(table: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("position_ids") if is_position_table(table) else args[0] if args else kwargs.get("input")
        if isinstance(ids, Tensor) and ids.numel() in row_of and bool((ids.flatten().diff() == 1).all()):
            first = getattr(table, "offset", 0) if is_position_table(table) else int(ids.min())
            row = row_of[ids.numel()]
            lengths[row] = min(table.num_embeddings - first, lengths.get(row, table.num_embeddings))

    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [table.register_forward_pre_hook(note, with_kwargs=True) for table in tables]
    try:
        forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return lengths


def _prove_positions(model: Any, base: Any) -> tuple[bool, int | None]:
    """How a model counts positions that it is not given, found by test forwards.

    Args:
        model: what the user calls.
        base: the Transformers model in it.

    Returns:
        (whether it begins behind padding on the left, the padding id if it counts from the ids as RoBERTa does, else None).

    Raises:
        ModelError: the model counts positions in another way.
    """
    given = forward(model)
    uncounted: dict[str, Any] = {f"{name}position_ids": None for name in row_lengths(model)}
    if not all_equal(given, forward(model, **uncounted)):
        padding_id = model.config.get_text_config().pad_token_id
        if padding_id is not None and _counts_ids(model, padding_id):
            return False, padding_id
        raise ModelError(
            f"{type(model).__name__} does not count its positions 0, 1, 2, ..., which shard_batch gives it; such a model is "
            f"not supported yet"
        )
    if "attention_mask" not in inspect.signature(base.forward).parameters:
        return False, None
    places = {name: torch.arange(count, device=model.device).unsqueeze(0) for name, count in row_lengths(model).items()}
    padding: dict[str, Any] = {f"{name}attention_mask": (at >= LEFT).long() for name, at in places.items()}
    counted = _behind_padding(forward(model, **uncounted, **padding))
    if all_equal(_behind_padding(given), counted):
        return False, None
    behind: dict[str, Any] = {f"{name}position_ids": (at - LEFT).clamp(min=0) for name, at in places.items()}
    moved = forward(model, **behind, **padding)
    if not all_equal(_behind_padding(moved), counted):
        raise ModelError(f"{type(model).__name__} counts its positions from padding in its own way, which is not supported yet")
    return True, None


def _counts_ids(model: Any, padding_id: int) -> bool:
    """Whether the model's own positions are those of ``positions_of_ids``, with and without an attention_mask."""
    ids = ids_of(model).unsqueeze(0)
    ids[0, [0, 1, LEFT + 1, TOKENS - 1]] = padding_id
    counted = forward(model, input_ids=ids, position_ids=positions_of_ids(ids, padding_id))
    masks: tuple[dict[str, Any], ...] = ({}, {"attention_mask": (ids != padding_id).long()})
    return all(all_equal(counted, forward(model, input_ids=ids, position_ids=None, **mask)) for mask in masks)


def _behind_padding(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a test forward without the tokens that were padding on the left."""
    return {name: x[:, LEFT:] for name, x in given.items()}

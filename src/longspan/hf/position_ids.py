"""The positions of a rank's tokens, counted as the model counts them over the whole row; and position tables of a model.

    0 1 2 3 ...                       what shard_batch gives, and most models count themselves
    0 0 0 | 0 1 2 ...                 counted from the first token behind padding                          (OPT)
    5 6 1 7 8 1 ...                   from padding_id + 1, and only tokens that are not padding_id         (RoBERTa)

The last needs the ids of the whole row, which one all-gather brings. A rotary table that is chosen by the longest position
sees that of the whole batch behind this rank's. A table of positions that its stack of layers counts by itself (BART) looks up
those of the call. Independent of attention and losses.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longspan.batch.context import TARGET, BatchInfo
from longspan.batch.cut import take
from longspan.batch.shard import unshard
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError
from longspan.hf.candidate import Candidate, Undo, remove_all
from longspan.hf.names import counts_from_ids, is_encoder_decoder, is_position_table
from longspan.hf.step_scope import scope_of
from longspan.masks.constructors import documents_in_mask


@dataclass(frozen=True)
class PositionTables:
    """Makes position tables look up the positions of this rank's tokens, and lengthens those that depend on the whole row.

    It has no fields; ``install`` finds the tables.
    """

    def install(self, model: Any, mesh: ParallelMesh) -> Undo:
        """Register hooks with which a rank's tokens get the positions that they have on one device.

        A table of positions that the model counts by itself is called with the positions of the call in place of its own.
        A rotary table whose frequencies depend on the length of the row takes the largest position of the batch as that.

        Returns:
            A function that removes the hooks.
        """
        return remove_all([*lengthen_tables(model), *pass_positions_to_tables(model)])


def probe(candidate: Candidate) -> PositionTables:
    """A PositionTables, which every model gets; nothing is tested here. (position_probe.py tests how a model counts
    positions.)"""
    return PositionTables()


def positions_of_ids(ids: Tensor, padding_id: int) -> Tensor:
    """Positions as RoBERTa counts them: ``padding_id`` at padding, ``padding_id`` + 1, + 2, ... at the other tokens of a row.

    ``ids`` and the result are [rows, tokens] of whole rows.
    """
    real = (ids != padding_id).long()
    return real.cumsum(1) * real + padding_id


def model_positions(
    kwargs: dict[str, Any], step: BatchInfo, mesh: ParallelMesh, *, behind_padding: bool, padding_id: int | None
) -> dict[str, Tensor]:
    """Count the positions of this rank's tokens as the model would over whole rows. It may gather ids over the mesh.

    Args:
        kwargs: the keywords of the call.
        step: the call's BatchInfo.
        mesh: where the ids of the whole row are gathered.
        behind_padding: whether the model counts from the first token behind padding.
        padding_id: the id of padding, for a model that counts from ids; else None.

    Returns:
        {"position_ids": ..., "decoder_position_ids": ...}, [rows, my tokens], as far as the call has them. Each tensor has the
        attribute ``_longspan_last``, the largest position of the batch.
    """
    found = {}
    for prefix, row in {"": step, TARGET: step.target}.items():
        positions, ids = kwargs.get(f"{prefix}position_ids"), kwargs.get(f"{prefix}input_ids")
        if row is not None and isinstance(positions, Tensor):
            if padding_id is not None and row.positions_counted:
                assert ids is not None  # or refused by Counting
                positions = take(_of_whole_rows(unshard(ids, mesh, tokens=row.tokens), padding_id, row), row.positions, 1)
            if behind_padding and row.positions_counted and row.padding is not None:
                place = torch.cat([torch.arange(run.start, run.stop, device=positions.device) for run in row.positions])
                starts = torch.tensor([real.start for real in row.padding], device=positions.device).unsqueeze(1)
                positions = (place - torch.maximum(place - positions, starts)).clamp(min=0)  # place - positions: the document's
            positions = positions.view_as(positions)  # carries the attribute, the caller's tensor does not
            positions._longspan_last = row.last_position  # type: ignore[attr-defined]
            found[f"{prefix}position_ids"] = positions
    return found


def _of_whole_rows(ids: Tensor, padding_id: int, step: BatchInfo) -> Tensor:
    """Positions of whole rows as RoBERTa counts them, restarting in each document that the step's mask separates.

    Args:
        ids: token ids of whole rows, [rows, tokens].
        padding_id: the id of padding, which has the position ``padding_id``; other tokens count on from it.
        step: the BatchInfo, whose mask has the documents.

    Returns:
        Positions [rows, tokens].
    """
    each = step.mask if isinstance(step.mask, tuple) else (step.mask,) * len(ids)
    counted = []
    for row, mask in zip(ids.split(1), each):
        documents = documents_in_mask(mask)
        pieces = row.split(list(documents.lengths), 1) if documents is not None else (row,)
        counted.append(torch.cat([positions_of_ids(piece, padding_id) for piece in pieces], 1))
    return torch.cat(counted)


def pass_positions_to_tables(model: Any) -> list[Any]:
    """Register hooks with which position tables look up the call's positions, in encoders or decoders without ``position_ids``.

    Returns:
        The handles of the hooks; [] for a model in which every encoder and decoder takes ``position_ids``.
    """
    handles: list[Any] = []
    for stack in _counting(model):
        name = f"{TARGET}position_ids" if is_encoder_decoder(model) and stack is model.get_decoder() else "position_ids"
        held: list[Tensor | None] = []
        handles.append(stack.register_forward_pre_hook(partial(_hold, held, name), with_kwargs=True))
        for table in filter(is_position_table, stack.children()):
            handles.append(table.register_forward_pre_hook(partial(_look_up, held), with_kwargs=True))
            handles.append(table.register_forward_hook(partial(_into_rows, held)))
        handles.append(stack.register_forward_hook(partial(_forget, held), always_call=True))
    return handles


def rows_counted_by_stacks(model: Any) -> set[str]:
    """Which rows of tokens have an encoder or decoder that counts positions by itself, as prefixes of the keywords.

    "" is the row of ``input_ids``, "decoder_" that of ``decoder_input_ids``. Such an encoder or decoder accepts no
    ``position_ids``.
    """
    return {"" if stack is not model.get_decoder() or not is_encoder_decoder(model) else TARGET for stack in _counting(model)}


def _counting(model: Any) -> list[nn.Module]:
    """The modules that have a position table as a child and whose forward accepts no ``position_ids``."""
    stacks = [stack for stack in model.modules() if any(is_position_table(child) for child in stack.children())]
    return [stack for stack in stacks if "position_ids" not in inspect.signature(stack.forward).parameters]


def _hold(held: list[Tensor | None], name: str, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an encoder or decoder: keep the call's positions ``name`` in ``held``, and drop them as keywords."""
    held.append(kwargs.get(name, scope_of(stack).call.positions.get(name)))
    return args, {key: value for key, value in kwargs.items() if not key.endswith("position_ids")}


def _look_up(held: list[Tensor | None], table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a position table: give it the positions in ``held``, those of all rows one after another."""
    if counts_from_ids(table):
        return args, kwargs
    return args, kwargs if not held or held[-1] is None else kwargs | {"position_ids": held[-1].flatten()}


def _into_rows(held: list[Tensor | None], table: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Forward hook of a position table that was given the positions of all rows: its output as [rows, tokens, dim].

    A table that was called with a shape instead of positions returns [tokens, dim], as its caller expects; all rows must then
    have equal positions. ``held`` ends with the positions [rows, tokens] of the call, or is empty outside of one.
    """
    positions = held[-1] if held else None
    if positions is None:
        return output
    if counts_from_ids(table):
        return _of_sinusoids(table, positions)
    rows = output.view(*positions.shape, -1)
    given_a_shape = bool(args) and isinstance(args[0], torch.Size)
    return rows[0] if given_a_shape and bool((positions == positions[:1]).all()) else rows


def _of_sinusoids(table: Any, positions: Tensor) -> Tensor:
    """The rows of a sinusoidal table for ``positions``; the table is first lengthened to the largest position of the batch."""
    needed = getattr(positions, "_longspan_last", int(positions.max())) + table.padding_idx + 2
    if needed > len(table.weights):
        table.make_weights(needed + table.offset, table.embedding_dim, table.padding_idx)
    found: Tensor = table.weights[positions].detach()
    return found


def _forget(held: list[Tensor | None], *_: Any) -> None:
    """Forward hook of an encoder or decoder: drop the positions that ``_hold`` kept."""
    held.clear()


def has_counting_stacks(model: Any) -> bool:
    """Whether an encoder or decoder of the model has a position table but accepts no ``position_ids``."""
    return bool(_counting(model))


def lengthen_tables(model: nn.Module) -> list[Any]:
    """Register hooks with which rotary tables that depend on the longest position of the row use that of the whole batch.

    Returns:
        The handles of the hooks.
    """
    handles: list[Any] = []
    for name, rotary in model.named_modules():
        if _chooses_by_length(rotary):
            handles.append(rotary.register_forward_pre_hook(partial(_lengthen, name), with_kwargs=True))
            handles.append(rotary.register_forward_hook(_shorten))
    return handles


def _chooses_by_length(module: nn.Module) -> bool:
    """Whether the rotary table of ``module`` depends on the longest position: with the RoPE types dynamic and longrope."""
    kinds = getattr(module, "rope_type", None)
    named = kinds.values() if isinstance(kinds, dict) else [kinds or ""]
    return any("dynamic" in kind or kind == "longrope" for kind in named)


def _lengthen(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the rotary module ``name``: append the batch's largest position to its ``position_ids``.

    ``_shorten`` removes what that adds to the output.
    """
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    positions = bound["position_ids"]
    last_position = getattr(positions, "_longspan_last", None)
    if last_position is None:
        raise ModelError(f"'{name}' chooses its table by the longest position, but was not given the step's position_ids")
    last = positions.new_full((*positions.shape[:-1], 1), last_position)
    return (), bound | {"position_ids": torch.cat([positions, last], -1)}


def _shorten(module: nn.Module, args: Any, output: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Forward hook of a rotary module: remove the entry of the position that ``_lengthen`` appended from its tables."""
    return tuple(table[..., :-1, :] for table in output)

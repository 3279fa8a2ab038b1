"""The T5 family's relative position bias: one number for each head and distance instead of a tensor [heads, queries, keys].

    model     compute_bias(n, n)[head, q, k]  ==  distances[head, k - q + n - 1]                        proven on one rank
    here      distances = compute_bias(1, 2 n - 1) of a query behind n - 1 others: the model's own function and table;
              layers pass it on as they pass on their bias, and attention evaluates a tile of it at a time

n is the length of the whole row: linear in memory, where the model's own tensor is not. Cross-attention has no such bias, and
would form zeros [heads, queries, keys]: layers that take one are given an empty one.
Source: T5, arXiv:1910.10683, section 2.1.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longspan.batch.context import BatchInfo
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError
from longspan.hf.candidate import Candidate, Undo, remove_all

PROVEN_TOKENS = 9
"""Tokens of the row on which ``compute_bias`` is proven to depend on distances alone."""


@dataclass(frozen=True)
class RelativeBias:
    """What ``probe`` found: the model has layers that add a bias by relative position (T5). It has no fields."""

    def install(self, model: Any, mesh: ParallelMesh) -> Undo:
        """Make the layers that add a bias by relative position compute it for all distances of the whole row.

        Returns:
            A function that undoes it.
        """
        return remove_all(compute_biases_by_distance(model))


def probe(candidate: Candidate) -> RelativeBias | None:
    """A RelativeBias if the model has a layer that adds a bias by relative position, else None.

    Raises:
        ModelError: such a bias depends on more than the distance of query and key.
    """
    prove_distances(candidate.model)
    return RelativeBias() if any(map(_computes, candidate.model.modules())) else None


class Distances:
    """A ``Bias`` for ``attend(bias=)``: distances[head, k - q + n - 1] for query position q and key position k.

    Args:
        distances: [heads, 2 n - 1], for keys from n - 1 before the query to n - 1 behind it, with n the tokens of a row.
    """

    def __init__(self, distances: Float[Tensor, "heads distances"]) -> None:
        self.parameters = (distances,)

    def __call__(
        self, heads: range, q_positions: Tensor, k_positions: Tensor, parameters: tuple[Tensor, ...]
    ) -> Float[Tensor, "_ queries keys"]:
        (distances,) = parameters
        own = distances.shape[1] // 2
        return distances[heads.start : heads.stop, k_positions - q_positions.unsqueeze(1) + own]


def distances_of(module: nn.Module, position_bias: Tensor, tokens: int) -> Distances:
    """The ``Bias`` of a layer whose code passes ``position_bias`` [1, heads, 1, 2 * tokens - 1], the bias of all distances.

    Raises:
        ModelError: ``position_bias`` has another shape.
    """
    if position_bias.shape[2:] != (1, 2 * tokens - 1):
        _refuse(module, position_bias)
    return Distances(position_bias[0, :, 0])


def refuse_bias_across(module: nn.Module, position_bias: Tensor) -> None:
    """Raise ModelError if ``position_bias``, that of a cross-attention layer, has a non-zero element.

    Only self-attention may add one.
    """
    if bool(position_bias.any()):
        _refuse(module, position_bias)


def _refuse(module: nn.Module, position_bias: Tensor) -> None:
    """Raise ModelError: ``module`` adds a bias to its scores that is not one by relative position alone."""
    raise ModelError(
        f"{type(module).__name__} adds a bias of shape {list(position_bias.shape)} to its scores, which is not one by relative "
        f"position alone and counted over this rank's tokens; such a layer is not supported"
    )


def compute_biases_by_distance(model: nn.Module) -> list["ByDistance"]:
    """Replace ``compute_bias`` of every layer that has one by a function that computes the bias of all distances of the row.

    Returns:
        An object for each such layer, whose ``remove`` undoes the replacement.
    """
    return [ByDistance(module) for module in model.modules() if _computes(module)]


def prove_distances(model: nn.Module) -> None:
    """Raise ModelError if the bias of a layer depends on more than the distance of query and key. Changes nothing."""
    for name, module in model.named_modules():
        if _computes(module) and getattr(module, "has_relative_attention_bias", False):
            compute: Any = module.compute_bias
            bias = Distances(compute(1, 2 * PROVEN_TOKENS - 1, past_seen_tokens=PROVEN_TOKENS - 1)[0, :, 0])
            places, own = (
                torch.arange(PROVEN_TOKENS, device=bias.parameters[0].device),
                compute(PROVEN_TOKENS, PROVEN_TOKENS)[0],
            )
            if not torch.equal(bias(range(len(own)), places, places, bias.parameters), own):
                raise ModelError(f"{type(module).__name__} '{name}' adds a bias that is not of distances alone: not supported")


class ByDistance:
    """Replaces one layer's ``compute_bias`` by the bias of all distances, [1, heads, 1, 2 n - 1]; ``remove`` undoes it.

    n is the number of tokens of the whole row of the current call.

    Args:
        module: the layer, a T5 attention module.
    """

    def __init__(self, module: Any) -> None:
        self._module, self._own, self._tokens = module, module.compute_bias, 0
        self._had = vars(module).get("compute_bias")
        self._takes_one = "position_bias" in inspect.signature(module.forward).parameters
        self._handle = module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.compute_bias = self._compute

    def remove(self) -> None:
        """Undo the replacement."""
        self._handle.remove()
        del self._module.compute_bias
        if self._had is not None:
            self._module.compute_bias = self._had

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the layer: note the tokens of its row; give a layer that adds no bias of its own an empty one."""
        step, hidden = kwargs.get("longspan"), args[0] if args else kwargs["hidden_states"]
        row = step.target if isinstance(step, BatchInfo) and module.is_decoder and step.target is not None else step
        self._tokens = row.tokens if isinstance(row, BatchInfo) else hidden.shape[1]
        given = kwargs.get("position_bias")
        if given is not None:
            kwargs = kwargs | {"position_bias": given.clone()}  # FSDP2 hooks the outputs of a block, which may be no views
        elif self._takes_one and not module.has_relative_attention_bias:
            kwargs = kwargs | {"position_bias": hidden.new_zeros(1, module.n_heads, 1, 0)}
        return args, kwargs

    def _compute(self, query_length: int, key_length: int, device: Any = None, past_seen_tokens: int = 0) -> Tensor:
        """In place of ``compute_bias``: the bias of all distances; the lengths that the layer asks for are not used."""
        bias: Tensor = self._own(1, 2 * self._tokens - 1, device=device, past_seen_tokens=self._tokens - 1)
        return bias.clone()


def _computes(module: nn.Module) -> bool:
    """Whether ``module`` computes a bias by relative position, by a ``compute_bias`` like that of T5."""
    compute: Any = getattr(module, "compute_bias", None)
    if compute is None or not hasattr(module, "has_relative_attention_bias"):
        return False
    return "past_seen_tokens" in inspect.signature(compute).parameters

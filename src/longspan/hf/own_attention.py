"""Attention that a model computes in its own code, by softmax(q k + mask + bias) v, as attention over the mesh.

    proof      the module's forward, its products recorded (own_scores.py)   ->   a Recipe: what each of its terms means
    later      the same forward on this rank's tokens, the same terms        ->   attend(q, k, v) with the layer's mask and bias

Masks and ALiBi that the module adds to its scores are counted over this rank's tokens when it computes them: the mask that was
proven and the proven slopes take their place. The step comes from the model's scope (step_scope.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError
from longspan.hf.attention import attend_layer
from longspan.hf.attention_layers import AttentionLayers
from longspan.hf.candidate import Candidate, Undo, remove_all
from longspan.hf.loss import Loss
from longspan.hf.own_recipe import shape_like
from longspan.hf.own_scores import Attention, Recorded
from longspan.hf.position_ids import has_counting_stacks
from longspan.hf.step_scope import ScopedModel, Stripped, needs_scope, scope_of

ROLES = {"cap": ("cap",), "scale": ("scale", "gate"), "add": ("mask", "bias"), "hide": ("mask",), "show": ("mask",)}
"""For each kind of Term, the roles that it may have in a Recipe."""


@dataclass(frozen=True)
class OwnAttention:
    """What ``probe`` found: the model must hold the BatchInfo of its call for its layers (step_scope.py).

    Attributes:
        modules: those that compute attention in their own code; it may be empty.
    """

    modules: Sequence[nn.Module]

    def install(self, model: Any, mesh: ParallelMesh) -> Undo:
        """Make the model hold the BatchInfo of its call while it computes, and ``modules`` compute attention over the mesh.

        Returns:
            A function that undoes it.
        """
        recorded = [Recorded(module, attend_in_step) for module in self.modules]
        return remove_all([ScopedModel(model), Stripped(model), *recorded])


def probe(candidate: Candidate) -> OwnAttention | None:
    """An OwnAttention if the model must hold the BatchInfo of its call, else None.

    It must if a module computes attention in its own code, if the keyword ``longspan`` does not reach every attention and the
    loss, if the model's forward does not accept what ``shard_batch`` adds, or if a stack counts positions by itself.
    """
    found, loss = candidate.finding(AttentionLayers), candidate.finding(Loss)
    layers = () if found is None else found.layers
    own = [module for module, layer in layers if layer.recipe is not None]
    handed = all(layer.handed for _, layer in layers) and (loss is None or loss.handed)
    if not own and handed and not needs_scope(candidate.model) and not has_counting_stacks(candidate.model):
        return None
    return OwnAttention(own)


class Slopes:
    """ALiBi as a ``Bias`` for ``attend(bias=)``: ``slopes`` [heads] times the position of the key relative to the query.

    Source: arXiv:2108.12409.
    """

    def __init__(self, slopes: Float[Tensor, " heads"]) -> None:
        self.parameters = (slopes,)

    def __call__(
        self, heads: range, q_positions: Tensor, k_positions: Tensor, parameters: tuple[Tensor, ...]
    ) -> Float[Tensor, "_ queries keys"]:
        (slopes,) = parameters
        return slopes[heads.start : heads.stop, None, None] * (k_positions - q_positions.unsqueeze(1))


@partial(torch.compiler.disable, reason="records the scores of a module's own code")
def attend_in_step(module: Any, attention: Attention) -> Tensor:
    """The output of one recorded attention of ``module``, computed over the mesh with the layer's mask, slopes and kernel.

    It replaces the module's own product of probabilities and values, in every forward of a parallel model.

    Args:
        module: the attention module.
        attention: its q, k and v, and the recorded operations on its scores.

    Returns:
        The output, in the shape that the module's code expects.

    Raises:
        ModelError: the call has no BatchInfo, or the operations on its scores are not those of the test forward.
    """
    layer, step = module._longspan_layer, scope_of(module).call.step
    recipe = layer.recipe
    if step is None:
        raise ModelError(f"{layer.name} was not handed a step; call its model by model(**shard_batch(batch, mesh))")
    fits = [role in ROLES[term.kind] for role, term in zip(recipe.roles, attention.terms)]
    if not all(fits) or len(recipe.roles) != len(attention.terms):
        raise ModelError(
            f"{layer.name} attends in its own code and does something else with its scores than when it was proven; such a "
            f"layer is not supported"
        )
    scale, softcap = recipe.scale_and_softcap(attention.terms)
    bias = None if recipe.slopes is None else Slopes(recipe.slopes.to(attention.q.device))
    beside: dict[str, Any] = {"scale": scale, "softcap": softcap, "bias": bias}
    out = attend_layer(module, layer, step, recipe.operands(attention), attention.dropout, beside)
    return shape_like(out, attention)

"""Make a model parallel from the outside: its attention, its loss, its gradients, its parameters. Knows no model by name.

    what the model offers          what it is given
    model.attention                the same, over the mesh: tokens are traded for heads and back
    model.cross_entropy            the same, over the mesh: the mean over the labels of all ranks
    model.parameters()             zero=0  each rank keeps all; MeanGradients after every backward
    model.blocks                   zero=3  each rank keeps 1/P of every block (FSDP2), gathered while the block computes

All ranks first exchange what they hold, in one small agreement: a model that differs on one rank would train on, and be
wrong on all of them.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.hooks import RemovableHandle

from longspan.errors import LongspanError, ModelError
from longspan.gradients import MeanGradients
from longspan.layout import Heads
from longspan.mesh import ParallelMesh

Model = TypeVar("Model", bound=nn.Module)


def parallelize(model: Model, mesh: ParallelMesh, zero: int = 0) -> Model:
    """Change ``model`` in place so that law 1 holds on ``mesh``, and return it: loss and gradients are those of one device.

    Every rank calls it, with equal parameters (the same seed, or the same checkpoint), before it builds its optimizer;
    afterwards each calls ``model(**shard(batch, mesh))``. ``zero=0`` keeps all parameters on each rank, ``zero=3`` a share.

    Raises on every rank alike: LayoutError (fewer heads than ulysses ranks), ModelError (a model that offers no attention, that
    is parallel already, or whose parameters differ between the ranks; an unknown ``zero``).
    """
    _agree(model, mesh, zero)
    offers: Any = model
    state = offers._longspan = _Parallel(offers.attention, offers.cross_entropy)
    offers.attention = partial(state.attention, mesh=mesh)
    offers.cross_entropy = partial(state.cross_entropy, mesh=mesh)
    if mesh.place.ring * mesh.place.ulysses > 1:
        state.guard = model.register_forward_pre_hook(_refuse_what_is_not_cut, prepend=True, with_kwargs=True)
    if zero == 3:
        _shard_parameters(model, mesh)
    else:
        state.gradients = MeanGradients(model, mesh)
    return model


def unparallelize(model: Model) -> Model:
    """Undo ``parallelize(model, mesh, zero=0)`` in place and return the model: it is one device's again, weights kept.

    Raises ModelError for a model that is not parallel, or whose parameters are sharded (zero=3).
    """
    state = getattr(model, "_longspan", None)
    if not isinstance(state, _Parallel):
        raise ModelError("unparallelize was given a model that is not parallel; call parallelize(model, mesh) first")
    if state.gradients is None:
        raise ModelError(
            "a model with zero=3 cannot be made whole in place: FSDP2 does not undo its sharding; build the model anew and "
            "load a checkpoint of this one"
        )
    state.gradients.remove()
    if state.guard is not None:
        state.guard.remove()
    offers: Any = model
    offers.attention, offers.cross_entropy = state.attention, state.cross_entropy
    del offers._longspan
    return model


@dataclass
class _Parallel:
    """What parallelize changed, for the way back."""

    attention: Any
    cross_entropy: Any
    gradients: MeanGradients | None = None
    guard: RemovableHandle | None = None


def _agree(model: nn.Module, mesh: ParallelMesh, zero: int) -> None:
    """Raise on every rank what any rank finds: one exchange of each rank's error and of what it holds."""
    error: LongspanError | None = None
    facts: dict[str, str] = {}
    try:
        _refuse_what_cannot_be(model, mesh, zero)
        facts = {"zero": str(zero)} | _fingerprints(model)
    except LongspanError as found:
        error = found
    everyone: list[Any] = [(error, facts)]
    if mesh.degree > 1:
        everyone = [None] * mesh.degree
        dist.all_gather_object(everyone, (error, facts), group=mesh.agreement_group)
    for theirs, _ in everyone:
        if theirs is not None:
            raise theirs
    _refuse_differences([held for _, held in everyone])


def _refuse_what_cannot_be(model: nn.Module, mesh: ParallelMesh, zero: int) -> None:
    if zero not in (0, 3):
        raise ModelError(f"zero={zero} is not supported; legal are zero=0 (every rank keeps all) and zero=3 (each a share)")
    missing = [name for name in ("attention", "cross_entropy", "blocks", "config") if not hasattr(model, name)]
    if missing:
        raise ModelError(
            f"{type(model).__name__} offers no {', '.join(missing)}, so its attention cannot be made parallel; use longspan's "
            f"Decoder, or a model with the attributes attention, cross_entropy, blocks and config"
        )
    if hasattr(model, "_longspan"):
        raise ModelError("the model is parallel already; call unparallelize(model) first, or build another one")
    config: Any = model.config
    Heads(config.heads, config.kv_heads, mesh.place.ulysses)


def _fingerprints(model: nn.Module) -> dict[str, str]:
    """Of every parameter and buffer: its kind and a hash of its content."""
    held = [*model.named_parameters(), *model.named_buffers()]
    return {name: f"{list(t.shape)} {t.dtype} trained={t.requires_grad} {_hash(t)}" for name, t in held}


def _hash(tensor: Tensor) -> str:
    if tensor.is_meta:
        raise ModelError("the model is on the meta device; give it weights first: model.to_empty(device=...), then initialize")
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _refuse_differences(everyone: list[dict[str, str]]) -> None:
    for rank, held in enumerate(everyone):
        # What one rank lacks comes first: it explains why the rest differs.
        for name in sorted(everyone[0] | held, key=lambda name: name in everyone[0] and name in held):
            first, other = everyone[0].get(name, "nothing"), held.get(name, "nothing")
            if first != other:
                raise ModelError(
                    f"the model differs between ranks: {name} is {first} on rank 0 and {other} on rank {rank}; "
                    f"build it with the same config and seed, or load the same checkpoint, on every rank"
                )


def _refuse_what_is_not_cut(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("longspan") is None:
        raise ModelError(
            "each sequence of this model lies on several ranks, but the batch was not cut: its positions and labels would be "
            "wrong; call model(**shard(batch, mesh))"
        )


def _shard_parameters(model: nn.Module, mesh: ParallelMesh) -> None:
    exact = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    policy = MixedPrecisionPolicy() if exact else MixedPrecisionPolicy(reduce_dtype=torch.float32)
    blocks: Any = model.blocks
    for block in blocks:
        fully_shard(block, mesh=mesh.fsdp_mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh.fsdp_mesh, mp_policy=policy)

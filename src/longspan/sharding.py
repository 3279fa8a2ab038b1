"""Make a model parallel from the outside: its attention, its loss, its gradients, its parameters.

    what the model offers          what it is given
    attention, cross_entropy       the same, over the mesh: tokens are traded for heads and back, labels of all ranks counted
                                   (a Hugging Face model offers them by models/transformers.py, which proves it first)
    parameters                     zero=0  each rank keeps all; MeanGradients after every backward
    blocks                         zero=3  each rank keeps 1/P of every block (FSDP2), gathered while the block computes

All ranks first exchange what they hold, in one small agreement: a model that differs on one rank would train on, and be
wrong on all of them.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

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
    offer = _offer(model)
    _agree(model, offer, mesh, zero)
    offer.install(mesh)
    state = _Parallel(offer)
    if zero == 3:
        _shard_parameters(model, offer.blocks(), mesh)
    else:
        state.gradients = MeanGradients(model, mesh)
    vars(model)["_longspan"] = state
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
    state.offer.undo()
    del vars(model)["_longspan"]
    return model


@runtime_checkable
class Offer(Protocol):
    """A kind of model, as ``parallelize`` wants it."""

    def blocks(self) -> Sequence[nn.Module]:
        """What FSDP2 gathers one after the other."""
        ...

    def prove(self, mesh: ParallelMesh) -> None:
        """Raise what stands against the mesh. Changes nothing, and has no collective."""
        ...

    def install(self, mesh: ParallelMesh) -> None: ...

    def undo(self) -> None: ...


@dataclass
class _Parallel:
    """What parallelize changed, for the way back."""

    offer: Offer
    gradients: MeanGradients | None = None


class _Given:
    """A model that is given its attention and its loss, as the Decoder is."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.guard: RemovableHandle | None = None

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.blocks)

    def prove(self, mesh: ParallelMesh) -> None:
        missing = [name for name in ("attention", "cross_entropy", "blocks", "config") if not hasattr(self.model, name)]
        if missing:
            raise ModelError(
                f"{type(self.model).__name__} offers no {', '.join(missing)}, so its attention cannot be made parallel; use "
                f"a Hugging Face model, the Decoder, or a model with attention, cross_entropy, blocks and config as attributes"
            )
        Heads(self.model.config.heads, self.model.config.kv_heads, mesh.place.ulysses)

    def install(self, mesh: ParallelMesh) -> None:
        self.attention, self.cross_entropy = self.model.attention, self.model.cross_entropy
        self.model.attention = partial(self.attention, mesh=mesh)
        self.model.cross_entropy = partial(self.cross_entropy, mesh=mesh)
        if mesh.place.ring * mesh.place.ulysses > 1:
            self.guard = self.model.register_forward_pre_hook(_refuse_what_is_not_cut, prepend=True, with_kwargs=True)

    def undo(self) -> None:
        if self.guard is not None:
            self.guard.remove()
        self.model.attention, self.model.cross_entropy = self.attention, self.cross_entropy


def _offer(model: nn.Module) -> Offer:
    if "transformers" in sys.modules:  # whoever has such a model has imported it
        from longspan.models.adapters import inner
        from longspan.models.transformers import Pretrained

        base = inner(model)
        if base is not None:
            return Pretrained(model, base)
    return _Given(model)


def _agree(model: nn.Module, offer: Offer, mesh: ParallelMesh, zero: int) -> None:
    """Raise on every rank what any rank finds: one exchange of each rank's error and of what it holds."""
    error: LongspanError | None = None
    facts: dict[str, str] = {}
    try:
        _refuse_what_cannot_be(model, zero)
        offer.prove(mesh)
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


def _refuse_what_cannot_be(model: nn.Module, zero: int) -> None:
    if zero not in (0, 3):
        raise ModelError(f"zero={zero} is not supported; legal are zero=0 (every rank keeps all) and zero=3 (each a share)")
    if hasattr(model, "_longspan"):
        raise ModelError("the model is parallel already; call unparallelize(model) first, or build another one")
    for name, parameter in model.named_parameters():
        if zero and not (parameter.is_floating_point() or parameter.is_complex()):
            raise ModelError(
                f"zero={zero} would cut {name!r} of {parameter.dtype}, quantised, which its layer unpacks whole; use zero=0"
            )


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


def _shard_parameters(model: nn.Module, blocks: Sequence[nn.Module], mesh: ParallelMesh) -> None:
    exact = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    policy = MixedPrecisionPolicy() if exact else MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh.fsdp_mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh.fsdp_mesh, mp_policy=policy)

"""Make a model parallel from the outside: its attention, its loss, its gradients, its parameters, its memory.

    what the model offers          what it is given
    attention, cross_entropy       the same, over the mesh: tokens are traded for heads and back, labels of all ranks counted
                                   (a Hugging Face model offers them by models/transformers.py, which proves it first)
    parameters                     zero=0  each rank keeps all; MeanGradients after every backward
    blocks                         zero=2  each rank keeps 1/P of gradients and optimizer states, of parameters between steps
                                   zero=3  of parameters always: a block is gathered while it computes (both by FSDP2)
                                   recomputation, what they keep put away on the host
    feed-forwards, norms           tiles

All ranks first exchange what they hold, in one small agreement: a model that differs on one rank would train on, and be
wrong on all of them.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from longspan.attention.api import attend, refuse_kernel
from longspan.batch.context import refuse_unknown_tokens
from longspan.distributed.consensus import first_difference, gather_or_raise
from longspan.distributed.fsdp import Shares, refuse_what_cannot_be, shard_parameters
from longspan.distributed.grad_sync import MeanGradients
from longspan.distributed.layout import Heads
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError
from longspan.hf import adapter_for
from longspan.kernels.protocol import Kernel
from longspan.kernels.user_function import KernelFunction
from longspan.memory.auto import Choice, choose, refuse_half_asked
from longspan.memory.checkpointing import Recompute, Tools, put_away, recompute, refuse_unknown
from longspan.memory.tiling import refuse_to_tile, tiled
from longspan.models.decoder import FeedForward, chunk_rows

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    mesh: ParallelMesh,
    zero: int = 0,
    *,
    recompute: Recompute = "none",
    tile_tokens: int | None = None,
    head_chunks: int = 1,
    offload_activations: bool = False,
    return_logits: bool = True,
    dtype: torch.dtype | None = None,
    offload_parameters: bool = False,
    shard_ranks: int | None = None,
    memory: Literal["auto"] | None = None,
    memory_budget_gib: float | None = None,
    tokens: int | None = None,
    kernel: str | Kernel | KernelFunction = "auto",
) -> Model:
    """Change ``model`` in place so that law 1 holds on ``mesh``, and return it: loss and gradients are those of one device.

    Every rank calls it, with equal parameters (the same seed, or the same checkpoint), before it builds its optimizer;
    afterwards each calls ``model(**shard_batch(batch, mesh))``. A model whose weights are still on the disk
    (``models.pretrained.load``), or a Decoder on the meta device, is sharded first; then each rank reads or draws its share.

    What each rank keeps of the parameters: ``zero=0`` all; ``zero=2`` a share of gradients and optimizer states, and all
    parameters from their first use in a step to its end (``zero=1`` is the same: FSDP2 has no smaller step); ``zero=3`` a share
    of everything. For 2 and 3, ``dtype`` is what blocks compute in (parameters and their gradients keep their own),
    ``shard_ranks`` keeps shares among so many neighbouring ranks, a node's, and copies beyond them, and
    ``offload_parameters`` keeps them and the optimizer's states on the host.

    What a step needs beside them: ``recompute`` "full" or "selective" (see ``memory``), ``tile_tokens`` for each tile of
    feed-forwards and norms, ``head_chunks`` shares of the heads to attend one after the other, ``offload_activations`` for
    what all blocks but the last keep, and ``return_logits=False`` for a loss of a Hugging Face model that never forms all
    logits. No tool changes a number.

    ``memory="auto"`` chooses ``zero`` and these but the offload, so that a step on a row of ``tokens`` needs at most
    ``memory_budget_gib`` a rank by the closed form of ``footprint``; a line of the log says why.

    ``kernel`` is what attention computes with, as ``attend(kernel=)`` takes it: one of longspan's own by name, a Kernel, or a
    function. A Hugging Face model can have one of Transformers' registry, on the whole sequence for this rank's heads:
    "hf:sdpa", "hf:eager", "hf:flash_attention_2" (which has never been run), a hub kernel or one of yours that is registered.

    Raises on every rank alike: KernelError (an unknown kernel, or one that the model or a ring cannot have), LayoutError
    (fewer heads than ulysses ranks), ModelError (a model that offers no attention, that
    is parallel already, or whose parameters differ between the ranks; an optimizer that was built before; a tool that it
    cannot be given).
    """
    tools = Tools(recompute, tile_tokens, head_chunks, offload_activations, return_logits)
    _agree(mesh, lambda: refuse_half_asked(memory, memory_budget_gib, tokens, zero, tools))
    if memory is not None:
        chosen = _choose(model, mesh, tokens, memory_budget_gib, Shares(0, dtype, offload_parameters, shard_ranks))
        return parallelize(
            model, mesh, kernel=kernel, dtype=dtype, offload_activations=offload_activations,
            offload_parameters=offload_parameters, shard_ranks=shard_ranks, **chosen,
        )  # fmt: skip
    shares = Shares(zero, dtype, offload_parameters, shard_ranks)
    offer = _offer(model, kernel)
    unread = _unread(model)
    if unread is not None:
        _agree(mesh, lambda: _refuse_what_cannot_be(model, mesh, tools, shares) | unread.facts(model))
        _read(model, unread, offer, mesh, shares)
    _agree(mesh, lambda: _look(model, offer, mesh, tools, shares, read_alike=unread is not None) | {"kernel": _name(kernel)})
    offer.install(mesh, tools)
    state = _Parallel(offer, _equip(offer, tools))
    if zero == 0:
        state.gradients = MeanGradients(model, mesh)
    elif unread is None:
        shard_parameters(model, offer.blocks(), mesh, shares)
    vars(model)["_longspan"] = state
    return model


def _choose(
    model: nn.Module, mesh: ParallelMesh, tokens: int | None, budget_gib: float | None, asked: Shares
) -> dict[str, Any]:
    """The tools of ``memory="auto"``, on every rank the same or none; the first rank says why."""
    chosen: list[Choice] = []
    ranks, itemsize = mesh.coordinate.sequence_ranks, (asked.dtype or next(model.parameters()).dtype).itemsize

    def look() -> dict[str, str]:
        found = choose(
            model, tokens=tokens, ranks=ranks, budget_gib=budget_gib, itemsize=itemsize, sharded=asked != Shares(0),
            shares=asked.ranks,
        )  # fmt: skip
        chosen.append(found)
        return {'memory="auto"': chosen[0].why}

    _agree(mesh, look)
    if mesh.loss_group.rank() == 0:
        logging.getLogger(__name__).warning('memory="auto" takes %s', chosen[0].why)
    return chosen[0].tools


def unparallelize(model: Model) -> Model:
    """Undo ``parallelize(model, mesh, zero=0)`` in place and return the model: it is one device's again, weights kept.

    Raises ModelError for a model that is not parallel, or whose parameters are sharded (zero=2 and 3).
    """
    state = getattr(model, "_longspan", None)
    if not isinstance(state, _Parallel):
        raise ModelError("unparallelize was given a model that is not parallel; call parallelize(model, mesh) first")
    if state.gradients is None:
        raise ModelError(
            "a model with sharded parameters cannot be made whole in place: FSDP2 does not undo it; build the model anew and "
            "load a checkpoint of this one"
        )
    state.gradients.remove()
    for module, forward in state.equipped:
        vars(module).pop("forward", None)
        if forward is not None:
            vars(module)["forward"] = forward
    state.offer.undo()
    del vars(model)["_longspan"]
    return model


@runtime_checkable
class Offer(Protocol):
    """A kind of model, as ``parallelize`` wants it."""

    def blocks(self) -> Sequence[nn.Module]:
        """What computes one after the other: what FSDP2 gathers, and recomputation computes again."""
        ...

    def token_wise(self) -> Sequence[nn.Module]:
        """What works token by token and may do so in tiles."""
        ...

    def prove(self, mesh: ParallelMesh, tools: Tools) -> None:
        """Raise what stands against the mesh or the tools. Changes nothing, and has no collective."""
        ...

    def install(self, mesh: ParallelMesh, tools: Tools) -> None:
        """Give the model its attention and its loss."""
        ...

    def undo(self) -> None: ...


@runtime_checkable
class Unread(Protocol):
    """The weights of a model on the meta device, wherever they wait until it is sharded."""

    def facts(self, model: Any) -> dict[str, str]:
        """What all ranks must have alike. Raises ModelError for weights that are not the model's; has no collective."""
        ...

    def read_into(self, model: Any, device: torch.device) -> None:
        """Give the model, sharded or not, its weights. Every rank calls it."""
        ...


@dataclass
class _Parallel:
    """What parallelize changed, for the way back."""

    offer: Offer
    equipped: Sequence[tuple[nn.Module, Any]]
    gradients: MeanGradients | None = None


def _equip(offer: Offer, tools: Tools) -> list[tuple[nn.Module, Any]]:
    """Give blocks and feed-forwards their tools; returns each that has one with the forward that hung on it before."""
    blocks = offer.blocks()
    before = [(module, vars(module).get("forward")) for module in (*offer.token_wise(), *blocks)]
    if tools.tile_tokens is not None:
        for module in offer.token_wise():
            tiled(module, tools.tile_tokens)
    for block in blocks:
        recompute(block, tools.recompute)
    if tools.put_away:
        for block in blocks[:-1]:  # the last block's backward comes first
            put_away(block)
    return [(module, forward) for module, forward in before if vars(module).get("forward") is not forward]


class _Given:
    """A model that is given its attention and its loss, as the Decoder is."""

    def __init__(self, model: Any, kernel: str | Kernel | KernelFunction) -> None:
        self.model, self.kernel = model, kernel
        self.guards: list[RemovableHandle] = []

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.blocks)

    def token_wise(self) -> Sequence[nn.Module]:
        return [module for module in self.model.modules() if type(module) in (FeedForward, nn.RMSNorm)]

    def prove(self, mesh: ParallelMesh, tools: Tools) -> None:
        missing = [name for name in ("attention", "cross_entropy", "blocks", "config") if not hasattr(self.model, name)]
        if missing:
            raise ModelError(
                f"{type(self.model).__name__} offers no {', '.join(missing)}, so its attention cannot be made parallel; use "
                f"a Hugging Face model, the Decoder, or a model with attention, cross_entropy, blocks and config as attributes"
            )
        refuse_kernel(self.kernel, mesh.coordinate)
        Heads(self.model.config.heads, self.model.config.kv_heads, mesh.coordinate.ulysses)
        if tools.head_chunks != 1:
            if not hasattr(self.model, "chunk_heads"):
                raise ModelError(f"{type(self.model).__name__} has no chunk_heads(count); leave out head_chunks")
            chunk_rows(self.model.config, tools.head_chunks)
            heads, ulysses = self.model.config.heads, mesh.coordinate.ulysses
            if heads // tools.head_chunks < ulysses:
                raise ModelError(
                    f"head_chunks={tools.head_chunks} leaves {heads // tools.head_chunks} query heads to a chunk, and each of "
                    f"ulysses={ulysses} ranks needs one; use head_chunks up to {heads // ulysses}"
                )

    def install(self, mesh: ParallelMesh, tools: Tools) -> None:
        self.attention, self.cross_entropy = self.model.attention, self.model.cross_entropy
        attention = self.attention
        if attention is attend and (tools.recompute == "selective" or tools.head_chunks > 1):
            attention = partial(attend, recomputable=True)
        self.chunks = {block: block.chunks for block in self.model.blocks} if tools.head_chunks > 1 else {}
        if self.chunks:
            self.model.chunk_heads(tools.head_chunks)
        chosen: dict[str, Any] = {} if self.kernel == "auto" else {"kernel": self.kernel}
        self.model.attention = partial(attention, mesh=mesh, **chosen)
        self.model.cross_entropy = partial(self.cross_entropy, mesh=mesh)
        self.guards = [self.model.register_forward_pre_hook(_refuse_unknown_tokens, with_kwargs=True)]
        if mesh.coordinate.sequence_ranks > 1:
            guard = self.model.register_forward_pre_hook(_refuse_what_is_not_cut, prepend=True, with_kwargs=True)
            self.guards.append(guard)

    def undo(self) -> None:
        for guard in self.guards:
            guard.remove()
        self.model.attention, self.model.cross_entropy = self.attention, self.cross_entropy
        for block, chunks in self.chunks.items():
            block.chunks = chunks


def _offer(model: nn.Module, kernel: str | Kernel | KernelFunction) -> Offer:
    return adapter_for(model, kernel) or _Given(model, kernel)


def _name(kernel: str | Kernel | KernelFunction) -> str:
    """The same text on every rank for the same kernel."""
    if isinstance(kernel, str):
        return kernel
    return str(getattr(kernel, "name", getattr(kernel, "__name__", type(kernel).__name__)))


def _agree(mesh: ParallelMesh, look: Callable[[], dict[str, str]]) -> None:
    """Raise on every rank what any rank finds: one exchange of each rank's error and of what it holds."""
    difference = first_difference(gather_or_raise(look, mesh.world_group))
    if difference is not None:
        name, first, rank, other = difference
        raise ModelError(
            f"the model differs between ranks: {name} is {first} on rank 0 and {other} on rank {rank}; "
            f"build it with the same config and seed, or load the same checkpoint, on every rank"
        )


def _refuse_what_cannot_be(model: nn.Module, mesh: ParallelMesh, tools: Tools, shares: Shares) -> dict[str, str]:
    if hasattr(model, "_longspan"):
        raise ModelError("the model is parallel already; call unparallelize(model) first, or build another one")
    refuse_what_cannot_be(shares, model, mesh)
    refuse_unknown(tools.recompute)
    return {name: str(value) for name, value in (vars(tools) | vars(shares)).items()}


def _look(model: nn.Module, offer: Offer, mesh: ParallelMesh, tools: Tools, shares: Shares, read_alike: bool) -> dict[str, str]:
    """Prove the model, and say what it holds, unless all ranks have read their shares of the same."""
    facts = _refuse_what_cannot_be(model, mesh, tools, shares)
    offer.prove(mesh, tools)
    if tools.tile_tokens is not None:
        _refuse_to_tile(offer.token_wise(), tools.tile_tokens)
    return facts if read_alike else facts | _fingerprints(model)


def _refuse_to_tile(feeds: Sequence[nn.Module], tokens: int) -> None:
    if not feeds:
        raise ModelError(
            f"tile_tokens={tokens} finds no feed-forward or norm that works token by token in one tensor (experts do not); "
            f"leave it out, or change modules of your own by longspan.tiled(module, tokens)"
        )
    for module in feeds:
        refuse_to_tile(module, tokens)


def _unread(model: nn.Module) -> "Unread | None":
    """Where the weights wait of a model that has none yet."""
    waiting: Unread | None = vars(model).get("_longspan_unread")
    if waiting is None and hasattr(model, "initialize") and any(parameter.is_meta for parameter in model.parameters()):
        return _Seed()
    return waiting


class _Seed:
    """The weights of a model that draws them itself, as the Decoder does."""

    def facts(self, model: Any) -> dict[str, str]:
        return {"the seed": str(model.seed)}

    def read_into(self, model: Any, device: torch.device) -> None:
        model.to_empty(device=device)
        model.initialize(model.seed)


def _read(model: nn.Module, unread: Unread, offer: Offer, mesh: ParallelMesh, shares: Shares) -> None:
    """Shard a model that has no weights yet, then let each rank read its own."""
    vars(model).pop("_longspan_unread", None)
    if shares.zero:
        shard_parameters(model, offer.blocks(), mesh, shares)
    unread.read_into(model, mesh.device)


def _fingerprints(model: nn.Module) -> dict[str, str]:
    """Of every parameter and buffer: its kind and a hash of its content."""
    held = [*model.named_parameters(), *model.named_buffers()]
    return {name: f"{list(t.shape)} {t.dtype} trained={t.requires_grad} {_hash(t)}" for name, t in held}


def _hash(tensor: Tensor) -> str:
    if isinstance(tensor, DTensor):
        raise ModelError("the model is sharded already; give it to parallelize whole, which shards it with zero=3")
    if tensor.is_meta:
        raise ModelError("the model is on the meta device; give it weights first: model.to_empty(device=...), then initialize")
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _refuse_what_is_not_cut(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("longspan") is None:
        raise ModelError(
            "each sequence of this model lies on several ranks, but the batch was not cut: its positions and labels would be "
            "wrong; call model(**shard_batch(batch, mesh))"
        )


def _refuse_unknown_tokens(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    step = kwargs.get("longspan")
    if step is not None:
        refuse_unknown_tokens(step, getattr(model.config, "vocab", None), type(model).__name__)

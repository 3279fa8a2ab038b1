"""The attention layers of a Hugging Face model: found by one forward, each with its mask, heads and row of tokens.

    every attention module of the model     reached longspan in a forward, each time in the same way
    its mask function                       is causal, full, a sliding window or chunked: something that bands can express
    positions that restart                  mean another document to it, or do not

``install`` names longspan's attention in copies of the model's configs, and attaches to each module a ``Layer``, which
attention.py reads at every call. Independent of losses.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from longspan.attention.api import attend
from longspan.batch.context import BatchInfo
from longspan.distributed.layout import Heads
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError
from longspan.hf._compat import set_attention_name
from longspan.hf.attention import NAME
from longspan.hf.candidate import Candidate, Undo
from longspan.hf.mask_functions import MaskFunction
from longspan.hf.names import is_attention
from longspan.hf.own_recipe import Recipe
from longspan.hf.probe import TARGETS, TOKENS, Call, Probe, batch_of, forward, prove_token_wise, proving
from longspan.masks.constructors import And, Chunked, Full, Mask, Or

SOURCE, TARGET, ACROSS = "source", "target", "across"
"""The tokens that a layer attends over: the batch's, its decoder's in an encoder-decoder, or from the latter to the former."""


class Layer(NamedTuple):
    """What longspan knows of an attention module, attached to it as ``_longspan_layer`` and read by attention.py at every call.

    Attributes:
        own: the layer's mask.
        name: its class and its name in the model, for messages.
        packs: whether the layer treats positions that restart at 0 as the start of another document, as most decoders do.
        attend: ``attend`` with the mesh, kernel and memory options bound.
        over: "source" for self-attention of the (encoder's) tokens, "target" for the decoder's, "across" for cross-attention.
        recipe: how it computes attention in its own code; None if it calls Transformers' registry.
        handed: whether the model passes the keyword ``longspan`` (the BatchInfo) on to the registered attention.
        per_document: whether its chunks are counted from the start of each document and from behind padding on the left.
        heads: the numbers of query heads and of key/value heads, of all ranks together.
    """

    own: Mask
    name: str
    packs: bool
    attend: Callable[..., Tensor]
    over: str
    recipe: Recipe | None
    handed: bool
    per_document: bool
    heads: tuple[int, int]

    @property
    def crosses(self) -> bool:
        """Whether it is cross-attention, from the decoder's tokens to the encoder's."""
        return self.over == ACROSS

    def is_like(self, other: "Layer") -> bool:
        """Whether two descriptions of one module are equal in all fields, tensors in them by value: a later look compares
        them so."""
        mine, theirs = self.recipe, other.recipe
        alike = mine is theirs if mine is None or theirs is None else mine.is_like(theirs)
        return alike and self._replace(recipe=None) == other._replace(recipe=None)

    def refuse_mask(self, row: BatchInfo) -> None:
        """Raise MaskError or ModelError if the mask, padding or documents of ``row``, a BatchInfo, cannot be combined with
        this layer's."""
        begins = row.padding is not None and any(real.start > 0 for real in row.padding)
        if self.per_document and (begins or row.mask is not None or row.documents is not None or row.restarts is not None):
            raise ModelError(
                f"{self.name} restarts its chunks in each packed document and behind padding on the left, which is not "
                f"supported; pass one document a row, padded on the right"
            )
        row.mask_for(self.own, restarts=self.packs)

    def row(self, step: BatchInfo) -> BatchInfo:
        """The BatchInfo of the queries' tokens: ``step``, or ``step.target`` for a layer of the decoder."""
        return step if self.over == SOURCE or step.target is None else step.target


@dataclass(frozen=True)
class AttentionLayers:
    """What ``probe`` found: all attention modules of a model.

    Attributes:
        layers: (module, its Layer), in the order of calls.
        configs: every module that has a config, with that config.
        fixed: keywords of ``attend`` that are equal for all layers and steps.
    """

    layers: tuple[tuple[Any, Layer], ...]
    configs: Sequence[tuple[Any, Any]]
    fixed: dict[str, Any]

    def install(self, model: Any, mesh: ParallelMesh) -> Undo:
        """Make every attention module in ``layers`` call ``attend`` over the mesh.

        Each gets its ``Layer`` (its mask, and how its keywords are passed on) as an attribute.

        Returns:
            A function that undoes it.
        """
        restore = name_attention(self.configs)
        over_mesh = partial(attend, mesh=mesh, **self.fixed)
        for module, layer in self.layers:
            module._longspan_layer = layer._replace(attend=over_mesh)

        handle = model.register_forward_pre_hook(self._refuse_masks, with_kwargs=True)

        def undo() -> None:
            handle.remove()
            for module, _ in self.layers:
                del module._longspan_layer
            restore()

        return undo

    def _refuse_masks(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: raise the error of a batch whose mask some layer cannot use, before any collective."""
        step = kwargs.get("longspan")
        if step is None or step.is_plain:
            return
        for layer in {(layer.own, layer.packs, layer.over, layer.per_document): layer for _, layer in self.layers}.values():
            if not layer.crosses:
                layer.refuse_mask(layer.row(step))


def probe(candidate: Candidate) -> AttentionLayers:
    """Find the attention layers of the model by test forwards on one rank, and test that every other module is token-wise.

    Raises:
        ModelError: a layer that does not reach longspan, that attends in two ways, or whose mask no bands express; a module
            that mixes tokens outside attention.
        LayoutError: heads that do not fit the mesh.
    """
    head_chunks = candidate.memory.head_chunks
    with proving(candidate.called):
        layers = tuple(_layers_of(candidate.called, candidate.mesh, head_chunks))
        prove_token_wise(candidate.called)
    registered = isinstance(candidate.kernel, str) and candidate.kernel.startswith("hf:")  # installed by registry_kernel.py
    fixed: dict[str, Any] = {"head_chunks": head_chunks, "recomputable": candidate.memory.recompute == "selective"}
    if not registered:
        fixed["kernel"] = candidate.kernel
    return AttentionLayers(layers, candidate.configs, fixed)


def name_attention(configs: Sequence[tuple[Any, Any]]) -> Undo:
    """Give each module a copy of its config in which longspan's attention is the attention implementation.

    Modules that shared a config share its copy. The original configs are not changed, because other models may share them.

    Args:
        configs: (module, its config).

    Returns:
        A function that gives every module its original config again.
    """
    copies: dict[int, Any] = {}
    for module, config in configs:
        module.config = deepcopy(config, copies)
    for module, _ in configs:
        set_attention_name(module.config, NAME)
        if hasattr(module.config, "use_cache"):
            module.config.use_cache = False

    def undo() -> None:
        for module, config in configs:
            module.config = config

    return undo


@contextmanager
def attention_named(configs: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Context manager: inside, the modules' configs name longspan's attention, and the balance loss of experts is off.

    On exit the modules have their original configs again.
    """
    undo = name_attention(configs)
    for module, _ in configs:
        if hasattr(module.config, "output_router_logits"):
            module.config.output_router_logits = False
    try:
        yield
    finally:
        undo()


def _layers_of(model: Any, mesh: ParallelMesh, head_chunks: int) -> list[tuple[Any, Layer]]:
    """Every attention module of a model with its Layer, found by two test forwards.

    In the first forward positions count through the row, in the second they restart.

    Args:
        model: the model, its configs naming longspan's attention.
        mesh: the ranks over which heads are split.
        head_chunks: the chunks into which a rank's heads are cut.

    Raises:
        ModelError: a layer that does not reach longspan, that attends in two ways, or whose mask no bands express.
        LayoutError: heads that do not fit the mesh.
    """
    plain, restarted = Probe(), Probe()
    with _noting_calls(model) as called:
        forward(model, probe=plain)
    positions = {name: x for name, x in batch_of(model).items() if name.endswith("position_ids")}
    restarting: dict[str, Any] = {name: x % (x.shape[1] // 2) for name, x in positions.items()}
    forward(model, probe=restarted, **restarting)
    names = {module: name for name, module in model.named_modules()}
    reached = [call.module for call in plain.calls]
    for name, module in model.named_modules():
        apart = not any(_is_within(name, names[other]) or _is_within(names[other], name) for other in reached)
        if module in called and apart and any(True for _ in module.parameters()):
            raise ModelError(
                f"{type(module).__name__} '{name}' did not reach longspan: it computes no softmax attention, neither through "
                f"Transformers' attention registry nor by products of queries and keys in its own code, and would see this "
                f"rank's tokens only; such a model is not supported"
            )
    if not reached:
        prove_token_wise(model)
        raise ModelError(f"no layer of {type(model).__name__} attends; there is nothing to make parallel")
    layers: dict[Any, Layer] = {}
    for call, again in zip(plain.calls, restarted.calls):
        if mesh.coordinate.tensor == 1:  # else tensor_weights.py knows which heads a rank has
            Heads(*call.heads, mesh.coordinate.ulysses, head_chunks)
        layer = _layer(call, again, f"{type(call.module).__name__} '{names[call.module]}'")
        if not layers.setdefault(call.module, layer).is_like(layer):
            raise ModelError(
                f"{layer.name} attends {reached.count(call.module)} times in a forward, each time in another way: as "
                f"{layers[call.module].own} and {layer.own}; such a layer is not supported"
            )
    return list(layers.items())


@contextmanager
def _noting_calls(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Context manager: yields a set to which every attention module that a forward calls is added."""
    called: set[nn.Module] = set()
    attending = filter(is_attention, model.modules())
    handles = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in attending]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _layer(call: Call, restarted: Call, name: str) -> Layer:
    """The Layer of the attention module called ``name``.

    Args:
        call: what was recorded of its call in a test forward with positions that count through the row.
        restarted: the same for a forward whose positions restart within the row.
        name: the module's name in the model.

    Raises:
        ModelError: its mask is not causal, full, sliding or chunked, or its queries and keys are not a row of the batch.
    """
    own = call.mask.mask if isinstance(call.mask, MaskFunction) else None
    known = {(TOKENS, TOKENS): SOURCE, (TARGETS, TARGETS): TARGET, (TARGETS, TOKENS): ACROSS}
    over = known.get(call.tokens)
    if own is None or (over == ACROSS and own != Full()):
        raise ModelError(
            f"{name} was given a mask that is none of causal, full, sliding or chunked: what it lets tokens see cannot "
            f"be expressed in bands, and such a layer is not supported"
        )
    if over is None:
        raise ModelError(
            f"{name} lets {call.tokens[0]} queries look at {call.tokens[1]} keys, which are neither all tokens nor all of an "
            f"encoder; such a layer is not supported"
        )
    middle = call.tokens[0] // 2
    packs = not restarted.mask.sees(middle, middle - 1)  # the first token of a document, the last of the one before
    return Layer(own, name, packs, attend, over, call.recipe, call.handed, _is_chunked(own), call.heads)


def _is_chunked(mask: Mask) -> bool:
    """Whether ``mask`` is ``Chunked``, or a combination of masks that contains it."""
    return isinstance(mask, Chunked) or (isinstance(mask, And | Or) and any(map(_is_chunked, (mask.left, mask.right))))


def _is_within(name: str, other: str) -> bool:
    """Whether the module called ``name`` is the one called ``other``, or inside it; "" is the model."""
    return name == other or name.startswith(f"{other}.") or not other

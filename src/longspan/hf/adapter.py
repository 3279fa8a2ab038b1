"""Any Hugging Face model, unmodified: its attention over the mesh, its loss over all ranks. Needs the extra ``hf``.

    model(**part)   ->   embeddings, norms, MLPs, experts: this rank's tokens, the model's own code
                              |
                         attention(module, query, key, value, mask, ..., longspan=BatchInfo)      by the *name* "longspan" in
                              |                                                              Transformers' public registries
                         attend(...) over the mesh that hangs on the module
                              |
                    ->   loss_function(logits, labels, ...)   the mean over the labels of all ranks

Nothing of the process or of another model changes: this model gets a copy of its config that names the attention, and
attributes and hooks on itself, which ``undo`` takes away. Before that the model is proven on one rank: proof.py.

B batch   H heads   K key/value heads   S my tokens   D head dim
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from longspan.attention.api import attend, refuse_kernel
from longspan.batch.context import BatchInfo
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError, KernelError, ModelError
from longspan.hf.chunked_loss import forward_without_logits, refuse_without_logits
from longspan.hf.dummy_row import stand_in, take_out
from longspan.hf.loss import OWN, forward_with_loss, is_in_place, labels_known, loss_over_ranks, prove_loss
from longspan.hf.mask_functions import Said, is_pair
from longspan.hf.moe_aux_loss import gather_routers, prove_balance
from longspan.hf.peft import refuse_adapters
from longspan.hf.position_ids import hand_over, lengthen_tables, place
from longspan.hf.position_probe import prove_counting
from longspan.hf.probe import ACROSS, Layer, Probe, prove, refuse_by_config
from longspan.hf.registry_kernel import PREFIX, Registered, refuse_name
from longspan.hf.t5_bias import bias_of, hand_distances, refuse_bias_across
from longspan.kernels.protocol import Kernel
from longspan.kernels.user_function import KernelFunction
from longspan.memory.checkpointing import Tools
from longspan.memory.tiling import routes_to_experts

NAME = "longspan"
"""The attention that a parallel model's config names."""


def _attention(
    module: nn.Module, query_BHSD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, attention_mask: Any, *,
    dropout: float = 0.0, scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    position_bias: Tensor | None = None, longspan: "BatchInfo | Probe | None" = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention that Transformers calls by name: (out [batch, my tokens, heads, dim], no weights)."""
    _refuse_additions(module, more)
    q, k, v = (x.transpose(1, 2) for x in (query_BHSD, key_BKSD, value_BKSD))
    if isinstance(longspan, Probe):
        if position_bias is not None and q.shape[1] == k.shape[1]:
            bias_of(module, position_bias, q.shape[1])
        elif position_bias is not None:
            refuse_bias_across(module, position_bias)
        return longspan.note(module, q, k, v, attention_mask), None
    layer: Any = getattr(module, "_longspan", None)
    if layer is None or longspan is None:
        raise ModelError(
            f"the attention 'longspan' of {type(module).__name__} was not handed a step: its model hands it no keywords, "
            f"and is not supported, or was not called by model(**shard_batch(batch, mesh)) after parallelize(model, mesh)"
        )
    if dropout:
        _refuse_dropout(module, layer)
    go = _attend if longspan.is_plain else _attend_uncompiled
    beside: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sink_logits": s_aux}
    if position_bias is not None and layer.over != ACROSS:
        beside["bias"] = bias_of(module, position_bias, layer.row(longspan).tokens)
    return go(q, k, v, layer, longspan, beside), None


def _attend(q: Tensor, k: Tensor, v: Tensor, layer: Layer, step: BatchInfo, more: dict[str, Any]) -> Tensor:
    if layer.over == ACROSS and step.target is not None:
        return layer.attend(q, k, v, mask=step.mask_across(), tokens=step.target.tokens, key_tokens=step.tokens, **more)
    row = layer.row(step)
    return layer.attend(q, k, v, mask=row.mask_for(layer.own, restarts=layer.packs), tokens=row.tokens, **more)


# A mask that is another at each step would make torch.compile begin anew at each step: between its graphs it is left alone.
_attend_uncompiled = torch.compiler.disable(_attend, reason="the mask is another at each step")


def _refuse_additions(module: nn.Module, more: dict[str, Any]) -> None:
    """What a layer adds to its scores would be dropped without a word."""
    for name, value in more.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            raise ModelError(
                f"{type(module).__name__} hands its attention {name} of shape {list(value.shape)}, counted over this rank's "
                f"tokens; such a layer is not supported"
            )


def _refuse_dropout(module: nn.Module, layer: Layer) -> None:
    config: Any = getattr(module, "config", None)
    fields = [name for name, value in vars(config).items() if "dropout" in name and value] if config is not None else []
    raise ModelError(
        f"{layer.name} asks for attention dropout, which would differ on every layout; set "
        f"{' or '.join(f'config.{name}' for name in fields) or 'its attention dropout'} to 0 before the model is built"
    )


def _mask(
    *_: Any, mask_function: Callable[..., Tensor], device: torch.device, attention_mask: Tensor | None = None, **__: Any
) -> Said:
    """The mask that Transformers asks for by name. Padding and documents come from the BatchInfo, this from the layer."""
    return Said(mask_function, device, attention_mask)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that the model's class says not to split, by name; of those that lie in another one, the outer.

    Without those that share a parameter with the rest (BERT's embeddings with its head): FSDP2 gathers shared ones together.
    """
    kinds = set(model._no_split_modules or ())
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in found)
        shares = any(not other.startswith(f"{name}.") for parameter in module.parameters() for other in names[parameter])
        if type(module).__name__ in kinds and not inner and not shares:
            found[name] = module
    return found


class Pretrained:
    """A Transformers model as ``parallelize`` wants it: proven, with its blocks, and the way to give it a mesh and back.

    ``called`` is what the user calls: the model, or peft's wrapper of it. ``kernel`` is one of ``attend``'s, or "hf:" and the
    name of an attention in Transformers' registry.
    """

    def __init__(self, called: nn.Module, model: PreTrainedModel, kernel: str | Kernel | KernelFunction = "auto") -> None:
        self.called, self.model, self.kernel = called, cast(Any, model), kernel
        configured = [module for module in called.modules() if isinstance(getattr(module, "config", None), PreTrainedConfig)]
        self.configs: list[tuple[Any, Any]] = [(module, module.config) for module in configured]
        self._handles: list[Any] = []

    def blocks(self) -> list[nn.Module]:
        """The layers that FSDP2 shards one by one."""
        return list(blocks(self.model).values())

    def token_wise(self) -> list[nn.Module]:
        """The norms and the feed-forwards of the layers, but those of attention and experts."""
        attending = {module for module, _ in self.layers}
        inside = {part for module in attending for part in module.modules()}
        norms = [module for module in self.model.modules() if "Norm" in type(module).__name__ and module not in inside]
        children = [child for block in self.blocks() for child in block.children()]
        feeds = [child for child in children if _is_feed_forward(child) and not attending & set(child.modules())]
        return [module for module in (*norms, *feeds) if _takes_one(module)]

    def prove(self, mesh: ParallelMesh, tools: Tools) -> None:
        """Raise ModelError by name for what cannot be parallel, LayoutError for heads that do not fit. Changes nothing."""
        registered = isinstance(self.kernel, str) and self.kernel.startswith(PREFIX)
        if registered:
            refuse_name(cast(str, self.kernel), self.model, mesh.coordinate)
        else:
            refuse_kernel(self.kernel, mesh.coordinate)
        refuse_by_config(self.model)
        refuse_adapters(self.called, self.model)
        balanced = any(getattr(config, "output_router_logits", False) for _, config in self.configs)
        with self._renamed():
            self.layers: tuple[tuple[Any, Layer], ...] = prove(self.called, self.model, mesh, tools.head_chunks)
            self.counting = prove_counting(self.called, self.model)
            if registered and any(layer.over == ACROSS for _, layer in self.layers):
                raise KernelError(
                    f"kernel={self.kernel!r} attends within one row of tokens, an encoder-decoder has two; use kernel='auto'"
                )
            self.kernels = [
                Registered(cast(str, self.kernel), module, layer.name, layer.own) if registered else self.kernel
                for module, layer in self.layers
            ]
            self.loss_kind, self.classes = prove_loss(self.called, self.model), labels_known(self.called)
            self.routers = prove_balance(self.called, self.model, self.loss_kind) if balanced else None
            if not tools.return_logits:
                refuse_without_logits(self.model, self.called, self.loss_kind)

    def install(self, mesh: ParallelMesh, tools: Tools) -> None:
        """Give the model its mesh: copies of its configs, its attention layers' mesh, its loss, its hooks."""
        self._rename()
        recomputable = tools.recompute == "selective"
        chosen = partial(attend, mesh=mesh, head_chunks=tools.head_chunks, recomputable=recomputable)
        for (module, layer), kernel in zip(self.layers, self.kernels):
            over_mesh = partial(kernel.attend, by=chosen) if isinstance(kernel, Registered) else partial(chosen, kernel=kernel)
            module._longspan = layer._replace(attend=over_mesh)
        self._install_loss(mesh, tools.return_logits)
        self._handles = [
            self.model.register_forward_pre_hook(stand_in, with_kwargs=True),
            self.model.register_forward_pre_hook(partial(_check_call, self, mesh), with_kwargs=True),
            self.model.register_forward_pre_hook(partial(_check_routers, self.routers), with_kwargs=True),
            self.model.register_forward_hook(take_out, with_kwargs=True),
        ]
        if self.routers is not None:
            self._handles += gather_routers(self.routers, self.model, mesh)
        self._handles += [*lengthen_tables(self.model), *hand_over(self.model), *hand_distances(self.model)]

    def _install_loss(self, mesh: ParallelMesh, return_logits: bool) -> None:
        in_place = is_in_place(self.loss_kind)
        if self.loss_kind not in (None, OWN):
            self.model._loss_function = partial(loss_over_ranks, mesh=mesh, in_place=in_place)
        self.gave_forward = self.loss_kind == OWN or not return_logits
        if self.gave_forward:
            asked = inspect.signature(self.model.forward)  # trainers look at it for the columns that a model takes
            own = partial(forward_with_loss, self.model, mesh)
            self.model.forward = own if return_logits else partial(forward_without_logits, self.model, mesh, in_place)
            self.model.forward.__signature__ = asked

    def with_targets(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A whole ``batch`` with what an encoder-decoder would make of its labels by itself: its decoder's ids, and which of
        them it would hide from one another. As it is for other models. Raises ModelError for a model that makes none."""
        labels = batch.get("labels")
        if not is_pair(self.model) or not isinstance(labels, Tensor) or labels.ndim != 2:
            return batch
        if not any(name in batch for name in ("decoder_input_ids", "decoder_inputs_embeds")):
            make = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
            if make is None:
                raise ModelError(f"{type(self.model).__name__} makes no decoder_input_ids of labels; put them into the batch")
            batch = batch | {"decoder_input_ids": make(labels)}
        padding = self.model.get_decoder().config.pad_token_id
        if self.counting.hides_padding and padding is not None and "decoder_input_ids" in batch:
            batch = {"decoder_attention_mask": (batch["decoder_input_ids"] != padding).long()} | batch
        return batch

    def undo(self) -> None:
        """Take away everything that ``install`` gave."""
        for handle in self._handles:
            handle.remove()
        for module, _ in self.layers:
            del module._longspan
        if self.gave_forward:
            for name in ("forward", "_original_forward"):  # the second is accelerate's, which wraps what it finds
                vars(self.model).pop(name, None)
        if self.loss_kind not in (None, OWN):
            del self.model._loss_function
        for module, config in self.configs:
            module.config = config

    def _rename(self) -> None:
        """Name our attention in copies of the configs, one for all modules that share one: other models share the originals."""
        copies: dict[int, Any] = {}
        for module, config in self.configs:
            module.config = deepcopy(config, copies)
        for module, _ in self.configs:
            module.config._attn_implementation = NAME
            if hasattr(module.config, "use_cache"):
                module.config.use_cache = False

    @contextmanager
    def _renamed(self) -> Iterator[None]:
        """For the proof, in which a loss of all tokens together would be one that lets tokens meet."""
        self._rename()
        for module, _ in self.configs:
            if hasattr(module.config, "output_router_logits"):
                module.config.output_router_logits = False
        try:
            yield
        finally:
            for module, config in self.configs:
                module.config = config


WHOLE = (
    "past_key_values", "output_attentions", "logits_to_keep", "use_cache", "attention_mask", "decoder_attention_mask",
    "encoder_outputs", "start_positions", "end_positions",
)  # fmt: skip
"""Keywords of a call that mean the whole sequence."""


def _check_call(offer: Pretrained, mesh: ParallelMesh, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Refuse what a part of the tokens cannot honour; give positions as the model counts them."""
    step, name = kwargs.get("longspan"), type(model).__name__
    if step is None:
        raise ModelError(
            "each sequence of this model lies on several ranks, but the batch was not cut; call "
            "model(**shard_batch(batch, mesh)), and to generate, unparallelize(model) first"
        )
    for keyword in WHOLE:
        value = kwargs.get(keyword)
        if value is not None and value is not False and not (isinstance(value, int) and value == 0):
            raise ModelError(f"{keyword}= means the whole sequence, and a rank has a part of it; leave it out of model(...)")
    _refuse_other_rows(model, name, step)
    offer.counting.refuse(model, step)
    if kwargs.get("labels") is not None:
        _refuse_labels(offer, name, step)
    return args, kwargs | place(kwargs, step, offer.counting.behind_padding, offer.counting.padding_id, mesh)


def _refuse_other_rows(model: Any, name: str, step: BatchInfo) -> None:
    if is_pair(model) and step.target is None:
        raise ModelError(
            f"{name} is an encoder-decoder, and the batch had no decoder_input_ids; make them before the cut, by "
            f"model.prepare_decoder_input_ids_from_labels(labels) or longspan.shift_right(labels, start, padding)"
        )
    if step.target is not None and not is_pair(model):
        raise ModelError(
            f"the batch had decoder_input_ids, and {name} has no decoder apart; leave them out of shard_batch(...)"
        )


def _refuse_labels(offer: Pretrained, name: str, step: BatchInfo) -> None:
    if offer.classes is not None and step.largest_label >= offer.classes:
        raise BatchError(f"the step holds label {step.largest_label}, and {name} tells 0 to {offer.classes - 1} apart")
    if offer.loss_kind is None:
        raise ModelError(
            f"{name} computes its loss from labels by itself, over this rank's tokens; leave labels out of the call, and use "
            f"longspan.cross_entropy(outputs.logits, labels, mesh=mesh, num_labels=part['longspan'].num_labels)"
        )


def _check_routers(routers: nn.Module | None, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_router_logits") and routers is None:
        raise ModelError(
            "output_router_logits= was not proven for this model, and its balance loss would be that of this rank's tokens; "
            "set config.output_router_logits before parallelize"
        )


def _is_feed_forward(module: nn.Module) -> bool:
    return sum(parameter.ndim > 1 for parameter in module.parameters()) > 1 and not routes_to_experts(module)


def _takes_one(module: nn.Module) -> bool:
    asked = inspect.signature(module.forward).parameters.values()
    return sum(each.default is each.empty for each in asked) == 1

"""The attention and the mask function that are registered with Transformers under the name "longspan".

    model.forward(..., longspan=BatchInfo)
        create_causal_mask(...)   -->  _mask       -->  MaskFunction(the layer's mask function)     what the model passes on
        attention layer           -->  _attention  -->  attend(...) over the mesh of the layer      my tokens, every head

The module's attribute ``_longspan_layer`` holds its ``Layer`` (attention_layers.py); what changes per step is the keyword
``longspan`` of the call. A module without either is refused.

B batch   H heads   K key/value heads   S my tokens   D head dim
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longspan.batch.context import BatchInfo
from longspan.errors import ModelError
from longspan.hf._compat import AttentionInterface, AttentionMaskInterface
from longspan.hf.mask_functions import MaskFunction
from longspan.hf.names import is_dropout_field
from longspan.hf.own_recipe import mask_of
from longspan.hf.probe import Probe
from longspan.hf.step_scope import scope_of
from longspan.hf.t5_bias import distances_of, refuse_bias_across

if TYPE_CHECKING:
    from longspan.hf.attention_layers import Layer

NAME = "longspan"
"""The attention that a parallel model's configs name."""


def _attention(
    module: nn.Module, query_BHSD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, attention_mask: Any, *,
    dropout: float = 0.0, scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    position_bias: Tensor | None = None, longspan: "BatchInfo | Probe | None" = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention that Transformers calls by the name "longspan", once for each attention layer of a parallel model.

    Args:
        module: the attention module, which has its Layer as ``_longspan_layer``.
        query_BHSD, key_BKSD, value_BKSD: of this rank's tokens.
        attention_mask: not read, because the layer's mask is known, except in test forwards, which record it.
        dropout, scaling, softcap, s_aux (sinks), position_bias: what the model asks for.
        longspan: the BatchInfo of the call, or the ``Probe`` of a test forward.
        more: other keywords of the model; a floating-point tensor among them is refused.

    Returns:
        (output [batch, my tokens, heads, dim], None in place of attention weights).

    Raises:
        ModelError: the call has no BatchInfo, or the layer asks for dropout or adds a tensor to its scores.
    """
    _refuse_additions(module, more)
    handed = longspan is not None
    longspan = longspan if handed else scope_of(module).call.step
    q, k, v = (x.transpose(1, 2) for x in (query_BHSD, key_BKSD, value_BKSD))
    if isinstance(longspan, Probe):
        if position_bias is not None and q.shape[1] == k.shape[1]:
            distances_of(module, position_bias, q.shape[1])
        elif position_bias is not None:
            refuse_bias_across(module, position_bias)
        mask = mask_of(module, q, k, attention_mask, scope_of(module).configs)
        return longspan.attend(module, q, k, v, mask, handed=handed), None
    layer: Any = getattr(module, "_longspan_layer", None)
    if layer is None or longspan is None:
        raise ModelError(
            f"the attention 'longspan' of {type(module).__name__} was not handed a step: its model hands it no keywords, "
            f"and is not supported, or was not called by model(**shard_batch(batch, mesh)) after parallelize(model, mesh)"
        )
    beside: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sink_logits": s_aux}
    if position_bias is not None and not layer.crosses:
        beside["bias"] = distances_of(module, position_bias, layer.row(longspan).tokens)
    return attend_layer(module, layer, longspan, (q, k, v), dropout, beside), None


def attend_layer(
    module: nn.Module, layer: "Layer", step: BatchInfo, qkv: tuple[Tensor, Tensor, Tensor], dropout: float,
    beside: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The attention of one layer over the mesh, with the layer's own mask combined with the mask of this step.

    Args:
        module: the attention module.
        layer: its Layer.
        step: the BatchInfo of the call.
        qkv: q, k and v, each [batch, my tokens, heads, dim].
        dropout: the rate of attention dropout.
        beside: further keywords of ``attend``: scale, softcap, sink_logits, bias.

    Returns:
        [batch, my tokens, heads, dim].

    Raises:
        ModelError: ``dropout`` is not 0.
    """
    if dropout:
        _refuse_dropout(module, layer)
    function = _attend if step.is_plain else _attend_uncompiled
    return function(*qkv, layer, step, beside)


def _attend(q: Tensor, k: Tensor, v: Tensor, layer: "Layer", step: BatchInfo, more: dict[str, Any]) -> Tensor:
    """Attention of q, k, v [batch, my tokens, heads, dim] over the mesh of ``layer``, with the mask that it has in this step.

    ``more`` are further keywords of ``attend``.
    """
    if layer.crosses and step.target is not None:
        return layer.attend(q, k, v, mask=step.mask_across(), tokens=step.target.tokens, key_tokens=step.tokens, **more)
    row = layer.row(step)
    return layer.attend(q, k, v, mask=row.mask_for(layer.own, restarts=layer.packs), tokens=row.tokens, **more)


# A mask that differs from step to step would make torch.compile recompile at each step: it is left out of the graphs.
_attend_uncompiled = torch.compiler.disable(_attend, reason="the mask differs from step to step")


def _refuse_additions(module: nn.Module, more: dict[str, Any]) -> None:
    """Raise ModelError if ``more``, the keywords of an attention call that longspan does not know, has a floating-point tensor.

    Such a tensor is usually added to the attention scores, and leaving it out would change the result.
    """
    for name, value in more.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            raise ModelError(
                f"{type(module).__name__} hands its attention {name}, a tensor counted over this rank's "
                f"tokens; such a layer is not supported"
            )


def _refuse_dropout(module: nn.Module, layer: "Layer") -> None:
    """Raise ModelError: ``layer`` asks for attention dropout; the text names the config fields of its ``module`` that set
    it."""
    config: Any = getattr(module, "config", None)
    fields = [name for name, value in vars(config).items() if is_dropout_field(name) and value] if config is not None else []
    raise ModelError(
        f"{layer.name} asks for attention dropout, which would differ on every layout; set "
        f"{' or '.join(f'config.{name}' for name in fields) or 'its attention dropout'} to 0 before the model is built"
    )


def _mask(
    *_: Any, mask_function: Callable[..., Tensor], device: torch.device, attention_mask: Tensor | None = None, **sizes: Any
) -> MaskFunction:
    """The object that layers get as their attention mask: Transformers' ``mask_function``, not evaluated yet.

    Transformers calls it by the name "longspan" once a forward for each kind of layer. Attention later reads bands from the
    object.

    Args:
        mask_function: Transformers' function (batch, head, query, key) -> whether the query sees the key.
        device: where the mask would be made if a layer evaluated it by itself.
        attention_mask: the padding [batch, tokens], kept for such layers; None without padding. The bands do not need it,
            because the BatchInfo has padding and documents.
        sizes: batch_size, q_length and kv_length, the shape of the mask; what else Transformers passes is ignored.
    """
    shape = (sizes.get("batch_size", 1), 1, sizes.get("q_length", 0), sizes.get("kv_length", 0))
    return MaskFunction(mask_function, device, attention_mask, shape)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)

"""Private and version-dependent symbols of Transformers, each used through one function (Transformers 5.4 to 5.23).

Nothing else in the package touches a private name of Transformers, so that a new release is followed in this file.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, fixed_cross_entropy
from transformers.masking_utils import eager_mask, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = [
    "ALL_ATTENTION_FUNCTIONS", "LOSS_MAPPING", "AttentionInterface", "AttentionMaskInterface", "eager_mask",
    "fixed_cross_entropy", "flash_attention_mask", "sdpa_mask",
]  # fmt: skip


def mask_functions() -> Any:
    """The registry of mask functions, by the name of the attention."""
    return AttentionMaskInterface()  # type: ignore[no-untyped-call]


def attention_name(config: Any) -> str | None:
    """The attention that a config names."""
    name: str | None = config._attn_implementation
    return name


def set_attention_name(config: Any, name: str) -> None:
    """Let a config name an attention, without the checks that belong to Transformers' own."""
    config._attn_implementation = name


def block_class_names(model: PreTrainedModel) -> set[str]:
    """The class names of the layers that a model's class says not to split."""
    return set(model._no_split_modules or ())


def has_loss_function(model: Any) -> bool:
    """Whether a loss function other than that of the model's class was set on the model."""
    return "_loss_function" in vars(model)


def set_loss_function(model: Any, loss: Callable[..., Tensor]) -> None:
    """Let ``model.loss_function`` be ``loss``."""
    model._loss_function = loss


def reset_loss_function(model: Any) -> None:
    """Let ``model.loss_function`` be that of the model's class again."""
    del model._loss_function


@contextmanager
def loss_function_set_to(model: Any, loss: Callable[..., Tensor]) -> Iterator[None]:
    """Within the context ``model.loss_function`` is ``loss``."""
    before = vars(model).get("_loss_function")
    set_loss_function(model, loss)
    try:
        yield
    finally:
        if before is None:
            reset_loss_function(model)
        else:
            set_loss_function(model, before)


def loss_kind(model: Any) -> str | None:
    """The name in Transformers' table of the loss function that the model calls; None for one that is not in the table.

    A class whose name contains no entry of the table (GPT2LMHeadModel) calls the default, ForCausalLM, and logs that.
    """
    kind = getattr(model, "loss_type", None)
    kind = kind if kind in LOSS_MAPPING else "ForCausalLM"
    return None if has_loss_function(model) else kind


def loss_keywords(kind: str | None) -> set[str]:
    """The arguments that a loss function of Transformers' table names, and the cross-entropy behind it."""
    functions: list[Any] = [LOSS_MAPPING[kind], fixed_cross_entropy] if kind in LOSS_MAPPING else []
    parameters = [each for function in functions for each in inspect.signature(function).parameters.values()]
    return {each.name for each in parameters if each.kind is not each.VAR_KEYWORD} - {"source", "target"}


@contextmanager
def checkpoint_within(block: Any, context: Callable[[], Any]) -> Iterator[None]:
    """While entered, what the block gives to Transformers' gradient checkpointing is computed, and computed again, within
    a context of its own; nothing where it has no checkpointing."""
    own = vars(block).get("_gradient_checkpointing_func")

    def function(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def within(*args: Any, **kwargs: Any) -> Any:
            with context():
                return forward(*args, **kwargs)

        return own(within, *args, **kwargs)

    if own is None:
        yield
        return
    block._gradient_checkpointing_func = function
    try:
        yield
    finally:
        block._gradient_checkpointing_func = own


def remove_forward(model: Any) -> None:
    """Let a model have the forward of its class again, also where accelerate wrapped the one that was set on it."""
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)


def build(kind: Any, config: PreTrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    """A model of the class ``kind`` from its config alone."""
    model: PreTrainedModel = kind._from_config(config, dtype=dtype)
    return model


def draw_weights(owner: Any, module: nn.Module) -> None:
    """Draw the weights of ``module`` as the class of ``owner``, the model it lies in, draws them."""
    owner._init_weights(module)


def mark_initialized(tensor: Tensor, done: bool) -> None:
    """Tell ``initialize_weights`` whether a tensor has its values already."""
    tensor._is_hf_initialized = done  # type: ignore[attr-defined]


def ignored_on_load(model: PreTrainedModel) -> list[str]:
    """Patterns of the tensor names in files that the model's class does not load."""
    return [*(model._keys_to_ignore_on_load_unexpected or ())]

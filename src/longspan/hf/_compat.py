"""Private and version-dependent symbols of Transformers, each used through one function (Transformers 5.4 to 5.23).

Nothing else in the package touches a private name of Transformers, so that a new release is followed in this file.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
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
    """Transformers' registry of functions that build attention masks, keyed by the name of an attention implementation."""
    return AttentionMaskInterface()  # type: ignore[no-untyped-call]


def attention_name(config: Any) -> str | None:
    """The name of the attention implementation in a config (such as "sdpa"); None if it names none."""
    name: str | None = config._attn_implementation
    return name


def set_attention_name(config: Any, name: str) -> None:
    """Set the name of the attention implementation in a config, without Transformers' checks of that name."""
    config._attn_implementation = name


def block_class_names(model: PreTrainedModel) -> set[str]:
    """The class names of a model's layers, as its class lists them in ``_no_split_modules``."""
    return set(model._no_split_modules or ())


def has_loss_function(model: Any) -> bool:
    """Whether a loss function other than that of the model's class was set on the model."""
    return "_loss_function" in vars(model)


def set_loss_function(model: Any, loss: Callable[..., Tensor]) -> None:
    """Set ``model.loss_function`` to ``loss``; ``reset_loss_function`` undoes it."""
    model._loss_function = loss


def reset_loss_function(model: Any) -> None:
    """Undo ``set_loss_function``: ``model.loss_function`` is that of the model's class again."""
    del model._loss_function


@contextmanager
def loss_function_set_to(model: Any, loss: Callable[..., Tensor]) -> Iterator[None]:
    """Context manager: inside, ``model.loss_function`` is ``loss``; on exit it is what it was before."""
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
    """The name in Transformers' table of the loss function that ``model`` calls, such as "ForCausalLM".

    A class whose name contains no entry of the table (GPT2LMHeadModel) calls the default, ForCausalLM, and logs that. None for
    a loss function that is not in the table.
    """
    kind = getattr(model, "loss_type", None)
    kind = kind if kind in LOSS_MAPPING else "ForCausalLM"
    return None if has_loss_function(model) else kind


@cache
def loss_keywords(kind: str | None) -> frozenset[str]:
    """The names of the arguments that a loss function takes, and of those of the cross-entropy that it calls.

    ``kind`` is the function's name in Transformers' table of losses; None gives an empty set.
    """
    functions: list[Any] = [LOSS_MAPPING[kind], fixed_cross_entropy] if kind in LOSS_MAPPING else []
    parameters = [each for function in functions for each in inspect.signature(function).parameters.values()]
    return frozenset(each.name for each in parameters if each.kind is not each.VAR_KEYWORD) - {"source", "target"}


@contextmanager
def checkpoint_within(block: Any, context: Callable[[], Any]) -> Iterator[None]:
    """Context manager: each run of ``block`` by Transformers' gradient checkpointing is inside a context that ``context()``
    makes.

    That holds for the forward and for the recomputation in the backward. Nothing happens for a block without gradient
    checkpointing.
    """
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
    """Remove a forward that was set on the instance ``model``, so that a call runs the forward of its class again.

    It also works where accelerate has wrapped the forward that was set.
    """
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)


def build(kind: Any, config: PreTrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    """A new model of the class ``kind`` with random weights, built from ``config`` in ``dtype``."""
    model: PreTrainedModel = kind._from_config(config, dtype=dtype)
    return model


def draw_weights(owner: Any, module: nn.Module) -> None:
    """Fill ``module``, a part of the Transformers model ``owner``, with random weights, by the rule of the class of
    ``owner``."""
    owner._init_weights(module)


def mark_initialized(tensor: Tensor, done: bool) -> None:
    """Set the flag by which Transformers' ``initialize_weights`` leaves ``tensor`` as it is (``done``) or draws its values."""
    tensor._is_hf_initialized = done  # type: ignore[attr-defined]


def ignored_on_load(model: PreTrainedModel) -> list[str]:
    """Regular expressions of the names of stored tensors that the model's class does not load."""
    return [*(model._keys_to_ignore_on_load_unexpected or ())]

"""The code of a Hugging Face model behind its base model, its head above all, as a function of hidden states.

    model.forward   =   base model, here a stub that gives the hidden states   ->   head, scale, softcap, ...   ->   logits

M hidden
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from longspan.hf.step_scope import own_forward
from longspan.models.unchanged import STANDS_IN


def parameters_beside_base(model: Any) -> dict[str, Tensor]:
    """{"model." and the name of a parameter: the parameter}, of those that are not in the base model."""
    base = model.base_model
    inside = tuple(f"{name}." for name, module in model.named_modules() if module is base)
    every = model.named_parameters(remove_duplicate=False)  # a tied head has two names
    return {f"model.{name}": parameter for name, parameter in every if not name.startswith(inside)}


def logits_of(model: Any, output_of_base: type[Any], hidden: Tensor) -> Tensor:
    """The logits of hidden states [1, tokens, M] by the code of ``model`` behind its base model, which returns that class."""
    with forward_giving(model.base_model, output_of_base(last_hidden_state=hidden)):
        logits: Tensor = Head(model)(None)
    return logits


class OwnForward(nn.Module):
    """``model``, called by its own forward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **given: Any) -> Any:
        return own_forward(self.model)(*args, **given)


class Head(OwnForward):
    """The part of ``model`` after its base model, as a module: its forward gives the logits.

    The base model must be replaced meanwhile by one that returns the hidden states; ``step`` is the BatchInfo of the call.
    """

    def forward(self, step: Any) -> Tensor:
        keywords: dict[str, Any] = {"return_dict": True}
        if hasattr(self.model.config, "output_router_logits"):
            keywords["output_router_logits"] = False  # a balance loss needs the tokens of all tiles
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        logits: Tensor = super().forward(input_ids=ids, longspan=step, **keywords).logits
        return logits


@contextmanager
def forward_giving(base: Any, output: Any) -> Iterator[None]:
    """Context manager: inside, calling ``base`` returns ``output`` instead of computing."""

    def give(*_: Any, **__: Any) -> Any:
        return output

    had = vars(base).get("forward")
    setattr(give, STANDS_IN, True)
    base.forward = give
    try:
        yield
    finally:
        del base.forward
        if had is not None:
            base.forward = had


@contextmanager
def catching(module: nn.Module) -> Iterator[list[Any]]:
    """Context manager: yields a list to which the output of each call of ``module`` is added."""
    caught: list[Any] = []
    handle = module.register_forward_hook(lambda *call: caught.append(call[2]))
    try:
        yield caught
    finally:
        handle.remove()

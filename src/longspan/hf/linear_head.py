"""A linear head: one whose logits are hidden times weight plus bias, scaled and capped, as the loss in blocks forms them.

    hidden [tokens, M]   --the model's own code behind its base model-->   logits [tokens, V]
                                                                           equal, for small and large hidden states,
    hidden [tokens, M]   --weight, bias, scale, softcap------------->      in evaluation and in training mode

Then kernels/linear_loss.py forms logits in blocks of tokens and vocabulary entries, with one gradient of the head. Through any
other head a tile of tokens has the logits of the whole vocabulary, and autograd copies of them (chunked_loss.py).

B batch   R tokens   L of them with a label   M hidden   V vocabulary
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan import _compat
from longspan.kernels.linear_loss import LogitOptions, logit_terms, product_dtype_of

TOKENS = 3
DEVIATIONS = (1.0, 100.0)
"""The standard deviations of the logits that are compared: a softcap of 30 hardly changes small ones."""


@dataclass(frozen=True)
class LinearHead:
    """How a model's logits are formed.

    Attributes:
        name: of the ``nn.Linear`` in the model.
        scale: factor of the logits.
        softcap: c turns a logit x into c·tanh(x/c); None: none.
    """

    name: str
    scale: float
    softcap: float | None

    def is_called_alone(self, model: nn.Module) -> bool:
        """Whether nothing but the head itself would run where ``model`` calls it: no hook of the user."""
        head = model.get_submodule(self.name)
        return not any(hooks_of(head) for hooks_of in _compat.MODULE_HOOKS.values())

    def terms(self, hidden_RM: Tensor, rows: Tensor, targets: Tensor, held: Mapping[str, Tensor]) -> Tensor:
        """The log-sum-exp and the label's logit of each token that has a label, [2, L].

        Args:
            hidden_RM: hidden states.
            rows: the tokens that have a label.
            targets: for each of them the row of its label in the head; one that is not among the rows has the logit 0.
            held: the head's parameters, or some of its rows, by "model." and their name.
        """
        weight, bias = held[f"model.{self.name}.weight"], held.get(f"model.{self.name}.bias")
        options = LogitOptions(self.scale, self.softcap, False, product_dtype_of(hidden_RM))
        return logit_terms(hidden_RM, weight, bias, rows, targets, options=options)

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """The logits of ``hidden``, all at once, as a model's own code forms them."""
        head: Any = model.get_submodule(self.name)
        logits = F.linear(hidden, head.weight, head.bias) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def linear_head_of(model: Any, logits_of: Callable[[Tensor], Tensor]) -> LinearHead | None:
    """The linear head of ``model``; None if its logits are formed in another way, or not by its ``get_output_embeddings()``.

    Args:
        model: a Transformers model.
        logits_of: gives the logits of hidden states [1, tokens, M] by the model's own code behind its base model.
    """
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if type(head) is not nn.Linear or name is None:
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    found = LinearHead(name, scale, getattr(config, "final_logit_softcapping", None))
    return found if all(_is_equal(found, model, logits_of, deviation) for deviation in DEVIATIONS) else None


def _is_equal(found: LinearHead, model: Any, logits_of: Callable[[Tensor], Tensor], deviation: float) -> bool:
    """Whether the model forms the same logits, which have about this standard deviation, in evaluation and in training."""
    weight = model.get_submodule(found.name).weight
    own = torch.Generator().manual_seed(0)
    hidden_BRM = torch.randn(1, TOKENS, weight.shape[1], generator=own).to(weight)
    hidden_BRM *= deviation / (weight.float().norm(dim=1).mean() * abs(found.scale)).clamp(min=1e-6).to(weight.dtype)
    wanted = found.logits(model, hidden_BRM)
    for training in (False, True):
        try:
            with _outside_base_in_mode(model, training):
                logits = logits_of(hidden_BRM)
        except Exception:  # whatever the model's code makes of a call like this
            return False
        if logits.shape != wanted.shape or not torch.allclose(logits, wanted, rtol=torch.finfo(weight.dtype).eps, atol=0):
            return False
    return True


@contextmanager
def _outside_base_in_mode(model: Any, training: bool) -> Iterator[None]:
    """Context manager: the modules of ``model`` outside its base model are in training mode or not; restored on exit."""
    inside = set(model.base_model.modules())
    before = {module: module.training for module in model.modules() if module not in inside}
    for module in before:
        module.training = training
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was

"""A linear head: one whose logits are hidden times weight plus bias, scaled and capped, as the loss in blocks forms them.

    hidden [tokens, M]   --the model's own code behind its base model-->   logits [tokens, V]      equal, and their gradients,
                                                                           for small and large hidden states,
    hidden [tokens, M]   --weight, bias, scale, softcap------------->      in evaluation and in training mode

Then kernels/linear_loss.py forms logits in blocks of tokens and vocabulary entries, with one gradient of the head. Through any
other head a tile of tokens has the logits of the whole vocabulary, and autograd copies of them (chunked_loss.py).

B batch   R tokens   L of them with a label   M hidden   V vocabulary
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan import _compat
from longspan.kernels.linear_loss import LogitOptions, logit_terms, product_dtype_of
from longspan.models.later_hooks import is_trusted

TOKENS = 3
DEVIATIONS = (1.0, 100.0)
"""The standard deviations of the logits that are compared: a softcap of 30 hardly changes small ones."""
PLAIN = (bool, int, float, str, type(None))
"""The types of attributes whose values a model's own code may use for its logits, and which may be set at any time."""


@dataclass(frozen=True)
class LinearHead:
    """How a model's logits are formed.

    Attributes:
        name: of the ``nn.Linear`` in the model; beside it and the base model there is no other module.
        scale: factor of the logits.
        softcap: c turns a logit x into c·tanh(x/c); None: none.
        attributes: the plain attributes of the model and its class at the proof.
    """

    name: str
    scale: float
    softcap: float | None
    attributes: Mapping[str, Any]

    def is_as_proved(self, model: nn.Module, hidden: Tensor) -> bool:
        """Whether ``model`` still forms the logits of ``hidden`` so.

        Not if a hook was registered on its head, or on all modules; if the head's forward was replaced, or an attribute of the
        model set; or if head and hidden states have two dtypes.
        """
        head = model.get_submodule(self.name)
        hooks = [hook for hooks_of in _compat.MODULE_HOOKS.values() for hook in hooks_of(head).values()]
        alone = all(map(is_trusted, hooks)) and "forward" not in vars(head) and not _compat.has_hooks_on_all_modules()
        alike = head.weight.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type)
        return alone and alike and all(getattr(model, name, None) == value for name, value in self.attributes.items())

    def terms(
        self, hidden_RM: Tensor, rows: Tensor, targets: Tensor, held: Mapping[str, Tensor], first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The log-sum-exp and the label's logit of each token that has a label, [L].

        Args:
            hidden_RM: hidden states.
            rows: the tokens that have a label.
            targets: their labels.
            held: the head's parameters, or some of its rows, by "model." and their name.
            first: the first of these rows. A label of another row has the logit 0.
        """
        weight, bias = held[f"model.{self.name}.weight"], held.get(f"model.{self.name}.bias")
        options = LogitOptions(self.scale, self.softcap, False, product_dtype_of(hidden_RM))
        lse, hit = logit_terms(hidden_RM, weight, bias, rows, targets - first, options=options)
        return lse, hit

    def logits(self, model: nn.Module, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """The logits of ``hidden``, all at once, scaled and capped in ``dtype``."""
        head: Any = model.get_submodule(self.name)
        logits = F.linear(hidden, head.weight, head.bias).to(dtype) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def linear_head_of(model: Any, like: Tensor, logits_of: Callable[[Tensor], Tensor]) -> LinearHead | None:
    """The linear head of ``model``; None if its logits are formed in another way, or not by its ``get_output_embeddings()``.

    Args:
        model: a Transformers model whose parameters are whole.
        like: hidden states that its base model has returned, for device and dtype.
        logits_of: gives the logits of hidden states [1, tokens, M] by the model's own code behind its base model.
    """
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if type(head) is not nn.Linear or name is None or not _is_all_beside_base(model, head) or head.weight.dtype != like.dtype:
        return None
    config = model.config.get_text_config()
    scale = _number(config, "logit_scale") or 1 / (_number(config, "logits_scaling") or 1)
    found = LinearHead(name, scale, _number(config, "final_logit_softcapping"), _plain_attributes(model))
    try:
        equal = all(_is_equal(found, model, like, logits_of, deviation) for deviation in DEVIATIONS)
    except Exception:  # whatever the model's code makes of a call like this
        return None
    return found if equal else None


def _is_all_beside_base(model: Any, head: nn.Module) -> bool:
    """Whether ``model`` consists of its base model and ``head``: no other module, parameter or buffer takes part."""
    inside = set(model.base_model.modules())
    beside = [module for module in model.modules() if module not in inside and next(module.children(), None) is None]
    own = [*model.parameters(recurse=False), *model.buffers(recurse=False)]
    return beside == [head] and not own


def _number(config: Any, name: str) -> float | None:
    """The field of ``config`` if it is a finite number other than 0, else None."""
    value = getattr(config, name, None)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number and value else None


def _plain_attributes(model: nn.Module) -> dict[str, Any]:
    """The attributes of ``model`` itself and of its class whose types are in PLAIN, without its mode."""
    found = {name: value for kind in reversed(type(model).__mro__) for name, value in vars(kind).items()} | vars(model)
    found = {name: value for name, value in found.items() if isinstance(value, PLAIN) and not name.startswith("__")}
    return {name: value for name, value in found.items() if name != "training"}


def _is_equal(found: LinearHead, model: Any, like: Tensor, logits_of: Callable[[Tensor], Tensor], deviation: float) -> bool:
    """Whether the model forms the same logits and gradients, in evaluation and in training.

    Args:
        found: the head.
        model: the model.
        like: hidden states, for device and dtype.
        logits_of: the model's own code.
        deviation: about the standard deviation of the logits.
    """
    weight: Any = model.get_submodule(found.name).weight
    own = torch.Generator().manual_seed(0)
    hidden_BRM = torch.randn(1, TOKENS, weight.shape[1], generator=own).to(like)
    hidden_BRM *= deviation / (weight.float().norm(dim=1).mean() * abs(found.scale)).clamp(min=1e-6).to(weight.dtype)
    cotangent = torch.randn(1, TOKENS, len(weight), generator=own).to(like)
    for training in (False, True):
        with torch.enable_grad(), _in_mode(model, training):
            mine = hidden_BRM.clone().requires_grad_()
            logits = logits_of(mine)
            if logits.dtype != like.dtype and (logits.dtype != torch.float32 or like.dtype == torch.float64):
                return False
            wanted = found.logits(model, mine, logits.dtype)
            if logits.shape != wanted.shape or not torch.allclose(logits, wanted, rtol=torch.finfo(like.dtype).eps, atol=0):
                return False
            inputs = [mine, *([weight] if weight.requires_grad else [])]
            grads = (torch.autograd.grad(each, inputs, cotangent.to(each), allow_unused=True) for each in (logits, wanted))
            if not all(_is_near(grad, expected) for grad, expected in zip(*grads)):
                return False
    return True


def _is_near(grad: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two gradients are equal but for rounding."""
    if grad is None or expected is None:
        return grad is expected
    return bool((grad - expected).abs().max() <= 8 * torch.finfo(grad.dtype).eps * expected.abs().max())


@contextmanager
def _in_mode(model: Any, training: bool) -> Iterator[None]:
    """Context manager: ``model`` itself and its head are in training mode or not; restored on exit."""
    parts = (model, model.get_output_embeddings())
    before = [part.training for part in parts]
    for part in parts:
        part.training = training
    try:
        yield
    finally:
        for part, was in zip(parts, before):
            part.training = was

"""Balanced routing of experts: every expert gets equally many tokens, whatever the router's weights say. For rehearsals.

    router's output   (logits, weights [tokens, k], indices [tokens, k])
    replaced          indices: token t goes to experts t·k, t·k + 1, ... (modulo their number); the weights stay the router's

Routers of Transformers share no base class: one is known by what it returns, a tuple with one integer tensor [tokens, k].
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longspan.hf.names import number_of_experts


class Balanced:
    """The routers of a model whose choice is replaced by a balanced one. ``undo()`` removes the hooks.

    Args:
        model: a Transformers model; without experts it is left as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else None
        self.experts = (text is not None and number_of_experts(text)) or 0
        self._found: set[str] = set()
        self._hooks = [
            module.register_forward_hook(partial(self._balance, name))
            for name, module in (model.named_modules() if self.experts else ())
        ]

    def undo(self) -> None:
        """Give the routers their own choice again."""
        for hook in self._hooks:
            hook.remove()

    @property
    def routers(self) -> int:
        """How many routers have been balanced so far: those whose forward has run."""
        return len(self._found)

    def _balance(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        chosen = [x for x in output if _are_indices(x)] if isinstance(output, tuple) else []
        if len(chosen) != 1:
            return None
        self._found.add(name)
        indices = chosen[0]
        even = torch.arange(indices.numel(), device=indices.device).remainder(self.experts)
        balanced = even.view(indices.shape).to(indices.dtype)
        return tuple(balanced if x is indices else x for x in output)


def _are_indices(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 2 and x.dtype in (torch.int64, torch.int32)

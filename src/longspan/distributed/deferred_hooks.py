"""Hooks of the user on the gradients of parameters, called with the mean over the ranks instead of this rank's part of it.

    one device      gradient --hooks--> .grad += --hooks after accumulation-->
    ranks, zero=0   this rank's part --all-reduce--> mean --the same hooks--> .grad += --the same hooks-->

A hook that masks rows gives the same either way; one that clips, or steps an optimizer, does not. The hook stays where it was
registered, in a wrapper that autograd finds and that does nothing, so that its handle removes it. FSDP2 (zero=2 and 3) calls
no ``register_hook`` of a sharded parameter: it is refused.
"""

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from longspan import _compat
from longspan.errors import ModelError


class DeferredHooks:
    """The hooks on the gradients of parameters whose gradients are averaged over ranks.

    Args:
        model: the model whose parameters these are, before any hook of longspan is on them.
        cut: whether it is cut over tensor ranks: then every hook is refused.
    """

    def __init__(self, model: nn.Module, cut: bool) -> None:
        self._model, self._cut, self._seen = model, cut, -1
        self.find(ours=())

    def __bool__(self) -> bool:
        return any(True for _ in self._all())

    def find(self, ours: Iterable[RemovableHandle]) -> None:
        """Defer the hooks that were registered since the last call.

        Args:
            ours: the handles of longspan's own hooks, which are left as they are.

        Raises:
            ModelError: a hook on a parameter that is cut over tensor ranks.
        """
        if RemovableHandle.next_id == self._seen:
            return
        mine, self._seen = {handle.id for handle in ours}, RemovableHandle.next_id
        for name, parameter in self._model.named_parameters():
            for hooks in _hooks_of(parameter):
                for key, hook in hooks.items():
                    if key not in mine and not isinstance(hook, _Deferred):
                        if self._cut:
                            self._seen = -1  # the next call looks again
                            raise ModelError(_text(name))
                        hooks[key] = _Deferred(hook)

    def of_gradient(self, parameter: nn.Parameter, mean: Tensor) -> Tensor:
        """The gradient that the hooks of ``register_hook`` make of ``mean``, in the order of their registration."""
        hooks = [hook for hook in _hooks_of(parameter)[0].values() if isinstance(hook, _Deferred)]
        if hooks:
            mean = mean.to(parameter.dtype, copy=True)  # it is part of a bucket, and a hook may keep it
        for deferred in hooks:
            changed = deferred.hook(mean)
            mean = mean if changed is None else changed
        return mean

    def after_accumulation(self, parameter: nn.Parameter) -> None:
        """Call the hooks of ``register_post_accumulate_grad_hook`` of ``parameter``, whose ``.grad`` has its final value."""
        for deferred in list(_hooks_of(parameter)[1].values()):
            if isinstance(deferred, _Deferred):
                deferred.hook(parameter)

    def restore(self) -> None:
        """Let autograd call all hooks again."""
        for hooks, key, deferred in list(self._all()):
            hooks[key] = deferred.hook

    def _all(self) -> Iterator[tuple[MutableMapping[int, Any], int, "_Deferred"]]:
        for parameter in self._model.parameters():
            for hooks in _hooks_of(parameter):
                for key, hook in hooks.items():
                    if isinstance(hook, _Deferred):
                        yield hooks, key, hook


def _hooks_of(parameter: Tensor) -> list[MutableMapping[int, Any]]:
    """The hooks of ``register_hook`` and those of ``register_post_accumulate_grad_hook``, each {number: hook}."""
    return [held(parameter) or {} for held in _compat.GRADIENT_HOOKS]


class _Deferred:
    """A hook that autograd calls without effect; ``DeferredHooks`` calls ``hook`` later."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def __call__(self, _: Tensor) -> None:
        return None


def refuse_hooks_of_shards(named: Iterable[tuple[str, Tensor]], to_be_sharded: bool = False) -> None:
    """Raise ModelError if a parameter of ``named`` that is sharded, or is ``to_be_sharded``, has a hook on its gradient.

    A hook of ``register_post_accumulate_grad_hook`` on a parameter that is sharded already is called by FSDP2.
    """
    for name, parameter in named:
        before, after = _hooks_of(parameter)
        if (before or (after and to_be_sharded)) and (to_be_sharded or isinstance(parameter, DTensor)):
            raise ModelError(_text(name))


def _text(name: str) -> str:
    """The text of the error for the parameter called ``name``."""
    return (
        f"parameter {name!r} has a hook on its gradient, which would get a shard of it or none where the parameter is sharded "
        f"(zero=2, zero=3, tensor > 1); change .grad between the backward and the step of the optimizer, or use zero=0 and "
        f"tensor=1"
    )

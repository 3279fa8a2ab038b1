"""Hooks of the user on the gradients of parameters, called with the mean over the ranks instead of this rank's part of it.

    one device      gradient --hooks--> .grad += --hooks after accumulation-->
    ranks, zero=0   this rank's part --all-reduce--> mean --the same hooks--> .grad += --the same hooks-->

A hook that masks rows gives the same either way; one that clips, or steps an optimizer, does not. The hook stays where it was
registered, in a wrapper that autograd finds and that does nothing, so that its handle removes it. FSDP2 (zero=2 and 3) calls
no ``register_hook`` of a sharded parameter: it is refused.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from longspan import _compat
from longspan.errors import ModelError


class DeferredHooks:
    """The hooks on the gradients of parameters whose gradients are averaged over ranks.

    Args:
        model: the model whose parameters these are, before any hook of longspan is on them.
        ours: the handles of longspan's own hooks, which are left as they are; a list that the caller extends.
        cut: whether it is cut over tensor ranks: then every hook is refused.
    """

    def __init__(self, model: nn.Module, ours: list[RemovableHandle], cut: bool) -> None:
        self._model, self._ours, self._cut, self._seen = model, ours, cut, -1
        self.find()

    def exist(self) -> bool:
        """Whether a hook of the user is on a parameter, also one that is not deferred yet."""
        return any(True for _ in self._of_user())

    def find(self, running: nn.Parameter | None = None) -> bool:
        """Defer the hooks that were registered since the last call; return whether there were any.

        Args:
            running: the parameter whose hooks autograd is calling, from a list that it copied before; None: no parameter's.

        Raises:
            ModelError: a hook on a parameter that is cut over tensor ranks, or a new one on ``running``, which autograd is
                about to call with this rank's part of the gradient.
        """
        if RemovableHandle.next_id == self._seen:
            return False
        new = [each for each in self._of_user() if not isinstance(each.hook, _Deferred)]
        self._seen = -1  # if this raises, the next call looks again
        for name, parameter, hooks, key, hook in new:
            if self._cut:
                raise ModelError(_text(name))
            if parameter is running and hooks is _hooks_of(parameter)[0]:
                raise ModelError(
                    f"parameter {name!r} got a hook on its gradient after the forward, and this backward computes its gradient "
                    f"first: the hook would get this rank's part of it; register the hook before the forward, and do not "
                    f"compile the model: a compiled forward looks for no hooks"
                )
            hooks[key] = _Deferred(hook)
        self._seen = RemovableHandle.next_id
        return bool(new)

    def of_gradient(self, parameter: nn.Parameter, mean: Tensor) -> Tensor:
        """The gradient that the hooks of ``register_hook`` make of ``mean``, in the order of their registration."""
        hooks = [hook for hook in _hooks_of(parameter)[0].values() if isinstance(hook, _Deferred)]
        if hooks:
            mean = mean.to(parameter.dtype, copy=True)  # it is part of a bucket, and a hook may keep it
        for deferred in hooks:
            changed = deferred.hook(mean)
            mean = mean if changed is None else changed
        return mean.clone() if hooks else mean  # a hook may keep it, and later gradients are added to .grad in place

    def after_accumulation(self, parameter: nn.Parameter) -> None:
        """Call the hooks of ``register_post_accumulate_grad_hook`` of ``parameter``, whose ``.grad`` has its final value."""
        for deferred in list(_hooks_of(parameter)[1].values()):
            if isinstance(deferred, _Deferred):
                deferred.hook(parameter)

    def restore(self) -> None:
        """Let autograd call all hooks again."""
        for _, _, hooks, key, hook in list(self._of_user()):
            hooks[key] = hook.hook if isinstance(hook, _Deferred) else hook

    def _of_user(self) -> Iterator["_Hook"]:
        """The hooks on parameters that are not longspan's own."""
        ours = {handle.id for handle in self._ours}
        for name, parameter in self._model.named_parameters():
            for hooks in _hooks_of(parameter):
                for key, hook in hooks.items():
                    if key not in ours:
                        yield _Hook(name, parameter, hooks, key, hook)


class _Hook(NamedTuple):
    """A hook of the user: the parameter and its name, the hooks among which it is registered, its number there, and it."""

    name: str
    parameter: nn.Parameter
    hooks: MutableMapping[int, Any]
    key: int
    hook: Any


def _hooks_of(parameter: Tensor) -> list[MutableMapping[int, Any]]:
    """The hooks of ``register_hook`` and those of ``register_post_accumulate_grad_hook``, each {number: hook}."""
    return [held(parameter) or {} for held in _compat.GRADIENT_HOOKS]


class _Deferred:
    """A hook that autograd calls without effect; ``DeferredHooks`` calls ``hook`` later."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def __call__(self, _: Tensor) -> None:
        return None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings, without those of inference mode, which count no changes."""
    if isinstance(value, Tensor) and not value.is_inference():
        yield value
    elif isinstance(value, tuple | list | Mapping):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(each)


def refuse_hooks_of_shards(named: Iterable[tuple[str, Tensor]], to_be_sharded: bool = False) -> None:
    """Raise ModelError if a parameter of ``named`` that is sharded, or is ``to_be_sharded``, has a hook on its gradient.

    A hook of ``register_post_accumulate_grad_hook`` on a parameter that is sharded already is called by FSDP2.
    """
    for name, parameter in named:
        before, after = _hooks_of(parameter)
        if (before or (after and to_be_sharded)) and (to_be_sharded or isinstance(parameter, DTensor)):
            raise ModelError(_text(name))


def refuse_hooks_of_copies(named: Iterable[tuple[str, Tensor]], ours: Iterable[RemovableHandle] = ()) -> None:
    """Raise ModelError if a parameter of ``named``, of which two pipeline stages have a copy, has a hook on its gradient.

    Args:
        named: the parameters by name.
        ours: the handles of longspan's own hooks, which do not count.
    """
    own = {handle.id for handle in ours}
    for name, parameter in named:
        if any(set(hooks) - own for hooks in _hooks_of(parameter)):
            raise ModelError(
                f"parameter {name!r} has a hook on its gradient, and is one weight with another on the first or last pipeline "
                f"stage: the hook would get the part of one stage; change .grad after forward_backward, or use pipeline=1"
            )


def _text(name: str) -> str:
    """The text of the error for the parameter called ``name``."""
    return (
        f"parameter {name!r} has a hook on its gradient, which would get a shard of it or none where the parameter is sharded "
        f"(zero=2, zero=3, tensor > 1); change .grad between the backward and the step of the optimizer, or use zero=0 and "
        f"tensor=1"
    )

"""Gives layers that receive no keywords the BatchInfo of the call: the model holds it while it, or a block, computes.

    model(..., longspan=step)   holds its call   ->   block(..., longspan_call=call)   ->   attention reads the step
                                                          |
                                      computed again in the backward with the same keywords: it holds the call again

Each model has a scope of its own, which its modules name; it is empty when no forward of the model runs. A model or
block whose forward does not accept what ``shard_batch`` adds to a batch is called without it. Independent of attention.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from longspan.batch.context import TARGET, BatchInfo
from longspan.hf._compat import checkpoint_within, remove_forward
from longspan.hf.blocks import blocks

SCOPE = "_longspan_scope"
"""The attribute by which a model and its modules name their scope."""
STEP = "longspan"
OUTER = "longspan_call"
"""The keyword of a block's call that holds the call of its model."""


@dataclass(frozen=True)
class Call:
    """What ``shard_batch`` added to one call of a model, in one object, which layers read from the model's ``Scope``.

    (One object, because FSDP2 looks for tensors in keywords and would not find them in this one.)

    Attributes:
        step: the BatchInfo, or the Probe of a test forward; None outside of a call.
        shift_labels: the labels shifted over the whole row, or None.
        positions: ``position_ids`` and ``decoder_position_ids`` of the call by name, as far as it has them.
    """

    step: Any = None
    shift_labels: Tensor | None = None
    positions: Mapping[str, Tensor] = field(default_factory=dict)


class Scope:
    """The stack of calls that one model is computing, for layers to which the model does not pass on the call's keywords.

    The wrapper of the forward enters a call by ``during`` (or ``push``); a layer reads ``scope_of(layer).call``, the innermost.

    Args:
        configs: the configs of the model and its parts, with which the mask of a layer is read; an attribute of the scope.
    """

    def __init__(self, configs: Sequence[Any] = ()) -> None:
        self.configs, self._calls = configs, list[Call]()

    @property
    def call(self) -> Call:
        """The innermost call that is being computed; an empty Call if there is none."""
        return self._calls[-1] if self._calls else Call()

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """Context manager: inside, ``call`` is the innermost call of this scope; on exit it is what it was before."""
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.pop()

    def push(self, call: Call) -> None:
        """Make ``call`` the innermost call until ``clear`` is called: for hooks, which cannot be a context."""
        self._calls.append(call)

    def clear(self) -> None:
        """Remove every call from the stack."""
        self._calls.clear()


def scope_of(module: nn.Module) -> Scope:
    """The Scope of the model that ``module`` belongs to; a new, empty Scope if the model has none."""
    scope: Scope | None = vars(module).get(SCOPE)
    return Scope() if scope is None else scope


def own_forward(model: Any) -> Callable[..., Any]:
    """The forward of the model's class, bound to ``model``; keywords of ``shard_batch`` that it does not accept are dropped."""
    return partial(_without_additions, partial(type(model).forward, model), _named(type(model).forward))


def set_forward(model: Any, function: Callable[..., Any]) -> None:
    """Set ``function`` as the forward of the instance ``model``, with the signature of the forward of its class.

    Trainers read the signature to find which columns of a dataset the model takes.
    """
    signature = inspect.signature(model.forward)
    model.forward = function
    model.forward.__signature__ = signature


def needs_scope(model: Any) -> bool:
    """Whether a model cannot pass the keyword ``longspan`` on to its layers by itself.

    That is so if the forward of its class has no ``**kwargs`` and no parameter ``longspan`` or ``position_ids``.
    """
    named = _named(type(model).forward)
    return named is not None and not {STEP, "position_ids"} <= named


class ScopedModel:
    """Gives a model a Scope that holds each call while the model, or one of its blocks, computes; ``remove`` undoes it.

    A block that is computed again in the backward holds the same call again.

    Args:
        model: the Transformers model.
    """

    def __init__(self, model: Any) -> None:
        scope = Scope([module.config for module in model.modules() if hasattr(module, "config")])
        self._scoped = list(model.modules())
        for module in self._scoped:
            vars(module)[SCOPE] = scope
        self._handles: list[Any] = [
            model.register_forward_pre_hook(partial(_push, scope), with_kwargs=True),
            model.register_forward_hook(partial(_clear, scope), always_call=True),
        ]
        self._replaced: list[tuple[Any, Any]] = []
        for block in blocks(model).values():
            self._handles.append(block.register_forward_pre_hook(partial(_name_call, scope), with_kwargs=True))
            self._replace(block, partial(_hold, scope, block, block.forward))

    def remove(self) -> None:
        """Remove the scope, the hooks and the replaced forwards."""
        for handle in self._handles:
            handle.remove()
        for module in self._scoped:
            vars(module).pop(SCOPE, None)
        for module, had in self._replaced:
            vars(module).pop("forward", None)
            if had is not None:
                vars(module)["forward"] = had

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Set ``forward`` as the forward of the instance ``module``, until ``remove``."""
        self._replaced.append((module, vars(module).get("forward")))
        vars(module)["forward"] = forward


class Stripped:
    """Replaces the model's forward by one that drops keywords of ``shard_batch`` that it does not accept; ``remove`` undoes it.

    A model whose forward is replaced already is left as it is.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        if "forward" not in vars(model):
            set_forward(model, own_forward(model))

    def remove(self) -> None:
        """Undo the replacement: the model computes by the forward of its class again."""
        remove_forward(self._model)


def strip_additions(model: Any) -> Any:
    """Register a forward pre-hook on ``model`` that drops the keywords of ``shard_batch`` that its forward does not accept.

    Returns:
        The handle of the hook.
    """
    named = _named(type(model).forward)

    def strip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, _taken(kwargs, named)

    return model.register_forward_pre_hook(strip, with_kwargs=True)


def _named(forward: Callable[..., Any]) -> set[str] | None:
    """The names of the parameters of ``forward``; None if it takes any keyword (``**kwargs``)."""
    parameters = inspect.signature(forward).parameters.values()
    return None if any(each.kind is each.VAR_KEYWORD for each in parameters) else {each.name for each in parameters}


def _taken(kwargs: dict[str, Any], named: set[str] | None) -> dict[str, Any]:
    """``kwargs`` without the keywords that ``shard_batch`` added and that the forward does not accept.

    ``named`` are the names that the forward accepts; None means that it accepts any.
    """
    if named is None:
        return kwargs
    step = kwargs.get(STEP)
    added = {STEP, "shift_labels"}
    for prefix, row in {"": step, TARGET: getattr(step, "target", None)}.items():
        if not isinstance(row, BatchInfo) or row.positions_counted:
            added.add(f"{prefix}position_ids")
    return {name: value for name, value in kwargs.items() if name in named or name not in added}


def _without_additions(forward: Callable[..., Any], named: set[str] | None, *args: Any, **kwargs: Any) -> Any:
    """Call ``forward`` without the keywords of ``shard_batch`` that are not among ``named``; None: it accepts any."""
    return forward(*args, **_taken(kwargs, named))


def _push(scope: Scope, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the model: make its call, read off the keywords, the innermost of ``scope``."""
    positions = {name: value for name, value in kwargs.items() if name.endswith("position_ids") and value is not None}
    scope.push(Call(kwargs.get(STEP), kwargs.get("shift_labels"), positions))


def _clear(scope: Scope, *_: Any) -> None:
    """Forward hook of the model: remove every call from ``scope``."""
    scope.clear()


def _name_call(scope: Scope, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a block: return its arguments with the model call that is running (``scope.call``) under the keyword
    ``OUTER``, which ``_hold`` takes off again.

    Activation checkpointing passes the keyword again when it recomputes the block, perhaps during another call.
    """
    return args, kwargs | {OUTER: scope.call}


def _hold(scope: Scope, block: nn.Module, forward: Callable[..., Any], *args: Any, longspan_call: Call, **kwargs: Any) -> Any:
    """The forward of a block, run while ``scope`` holds ``longspan_call``; a recomputation by Transformers' checkpointing
    too."""
    with scope.during(longspan_call), checkpoint_within(block, partial(scope.during, longspan_call)):
        return forward(*args, **kwargs)

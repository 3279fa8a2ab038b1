"""A look at each call that a parallel model is still the one that was proven: its modules, forwards, parameters and config.

    parallelize(model, ...)      snapshot: which module and parameter has which name and shape, which forward, loss function
                                 and functions of its classes and modeling files are called, what each config field holds
    model(**part)                the same look again; whatever differs is refused by name, before the first collective

What changed afterwards was neither proven nor given a mesh: an attention that is set again attends to this rank's tokens alone,
a new parameter gets another gradient on every rank. The look takes about 2 µs a module. ``torch.compile`` of a model traces
no such look: there only the first call is checked, by the compiler's own guards.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from longspan import _compat
from longspan.errors import ModelError
from longspan.models.later_hooks import LaterHooks

LAYER = "_longspan_layer"
"""The attribute of an attention module that holds what longspan knows of it."""
STANDS_IN = "_longspan_stands_in"
"""The attribute of a function that longspan sets for the moment as the forward of a part, which computes nothing then."""

WAY_OUT = "call unparallelize(model), change it, then parallelize it again"
HARMLESS_FIELDS = frozenset({
    "use_cache", "return_dict", "output_hidden_states", "architectures", "dtype", "transformers_version", "pad_token_id",
    "bos_token_id", "eos_token_id", "id2label", "label2id", "_name_or_path", "_commit_hash",
    "_experts_implementation_internal",
})  # fmt: skip
"""Config fields that change no number of a forward over given tokens, or are refused as keywords of the call."""
PLAIN = (bool, int, float, str)
HARMLESS_ATTRIBUTES = frozenset({"training", "gradient_checkpointing"})
SHARED = ("torch.", "builtins", "transformers.", "typing")
"""Beginnings of the names of Python modules whose classes are not those of one architecture."""
LOSS_ATTRIBUTES = ("_loss_function", "loss_type")
"""Attributes by which a Transformers model chooses its loss function."""


class _Module(NamedTuple):
    """What a ``Snapshot`` records of one module: its name and class, the forward of its own (None: that of the class), the ids
    of its children and parameters, and the parameters' names, shapes and dtypes."""

    name: str
    module: nn.Module
    kind: type[nn.Module]
    forward: Any
    children: tuple[int, ...]
    names: tuple[str, ...]
    parameters: tuple[int, ...]
    shapes: tuple[torch.Size | None, ...]
    dtypes: tuple[torch.dtype | None, ...]


class Snapshot:
    """A record of a model's modules, parameters, config fields and plain attributes, to which later calls are compared.

    Args:
        model: what the user calls, after ``parallelize`` has installed and sharded everything.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_modules())
        self._modules = [_look(name, module) for name, module in named]
        self._alive = [*model.modules(), *model.parameters()]  # else a new object could have the id of an old one
        self._configs = [(module, config) for _, module in named if (config := vars(module).get("config")) is not None]
        unique = {id(config): config for _, config in self._configs}
        self._fields = [(config, _fields(config)) for config in unique.values()]
        attending = [name for name, module in named if LAYER in vars(module)]
        watched = [(name, module) for name, module in named if name and any(_within(each, name) for each in attending)]
        self._attributes = [
            (name, vars(module), key, value)
            for name, module in watched
            for key, value in vars(module).items()
            if type(value) in PLAIN and not key.startswith("_") and key not in HARMLESS_ATTRIBUTES
        ]
        configured = {module: name for name, module in named if vars(module).get("config") is not None}
        self._losses = [
            (_join(name, key.removeprefix("_")), vars(module), key, vars(module).get(key))
            for module, name in configured.items()
            for key in LOSS_ATTRIBUTES
        ]
        self._sharded = isinstance(model, FSDPModule)
        self._functions = [
            (f"{owner.__name__}.{name}", vars(owner), name, function)
            for owner in _sources(type(module) for _, module in named)
            for name, function in vars(owner).items()
            if isinstance(function, FunctionType)
        ]
        self._hooks = LaterHooks(named)
        self._is_running = False

    def watch(self, model: nn.Module, beside: Callable[..., None] | None = None) -> list[RemovableHandle]:
        """Register the look before each forward of ``model``, and before one of a part with layers that is called by itself.

        A part (the base model without its head, the model inside peft's wrapper) is then as changed as the whole. Within a
        forward of ``model`` the configs alone are looked at, because a chunked loss replaces some modules while it computes.

        Args:
            model: the model of this record.
            beside: what ``model`` checks in a forward pre-hook of its own, and a part would not.

        Returns:
            The handles of the hooks.
        """
        parts = [part for part, _ in self._configs if part is not model and self._has_layers(part)]
        handles = [
            model.register_forward_pre_hook(self._enter, prepend=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        for part in parts:
            inside = set(part.modules())
            look = partial(self._look_at_part, tuple(each for each in self._modules if each.module in inside), beside)
            handles.append(part.register_forward_pre_hook(look, prepend=True))
        return handles

    def _enter(self, *_: object) -> None:
        """Forward pre-hook of the model: look at it, and remember that its parts are called by its own forward now."""
        self.refuse_changes()
        if not torch.compiler.is_compiling():
            self._is_running = True

    def _leave(self, *_: object) -> None:
        """Forward hook of the model, also after an error in its forward."""
        if not torch.compiler.is_compiling():
            self._is_running = False

    def _look_at_part(
        self, modules: tuple[_Module, ...], beside: Callable[..., None] | None, part: nn.Module, *_: object
    ) -> None:
        """Forward pre-hook of a part: look at it as at the model, unless the model or a backward (a checkpoint) calls it.

        In a compiled model a chunked loss runs outside of the graph, and calls parts that another forward stands in for.
        """
        within = self._is_running or hasattr(vars(part).get("forward"), STANDS_IN)
        if torch.compiler.is_compiling() or within or _compat.backward_id() != -1:
            self._refuse_config()
            return
        self.refuse_changes(modules)
        if beside is not None:
            beside(part)

    def _has_layers(self, part: nn.Module) -> bool:
        return any(LAYER in vars(module) for module in part.modules() if module is not part)

    def refuse_changes(self, modules: Sequence[_Module] | None = None) -> None:
        """Compare ``model`` with the record; called before each forward.

        Args:
            model: the model, or a part of it that is called by itself.
            modules: the record of the part's modules; None: of all.

        Raises:
            ModelError: a module, parameter, forward, loss function, config field or attribute was added, removed, replaced,
                resized, converted to another dtype or set to another value since; the message names it. Also for a sharded
                model under ``torch.inference_mode``.
        """
        if torch.compiler.is_compiling():
            return
        if self._sharded and torch.is_inference_mode_enabled():
            raise ModelError(
                "torch.inference_mode would make the gathered parameters of a sharded model unfit for training; use "
                "torch.no_grad()"
            )
        for before in self._modules if modules is None else modules:
            name, module, kind, forward, children, names, parameters, shapes, dtypes = before
            if type(module) is not kind or vars(module).get("forward") is not forward:
                _refuse_forward(name, module, kind, forward)
            if tuple(map(id, _compat.own_modules(module).values())) != children:
                self._refuse_modules(name, module, children)
            held = _compat.own_parameters(module)
            if held and (tuple(map(id, held.values())) != parameters or tuple(map(_shape, held.values())) != shapes):
                self._refuse_parameters(name, module, dict(zip(names, zip(parameters, shapes))))
            if held and not self._sharded and tuple(map(_dtype, held.values())) != dtypes:  # fsdp.py looks at those of shards
                _refuse_dtypes(name, held, dict(zip(names, dtypes)))
        for name, held, key, function in self._functions:
            if held.get(key) is not function and not _wraps(held.get(key), function):
                raise ModelError(f"{name} was replaced after parallelize; {WAY_OUT}")
        self._hooks.watch()
        self._refuse_config()
        for name, attributes, key, value in self._losses:
            if attributes.get(key) != value:
                raise ModelError(f"'{name}' was set to another value after parallelize; {WAY_OUT}")
        for name, attributes, key, value in self._attributes:
            if attributes.get(key) != value:
                raise ModelError(
                    f"'{name}.{key}' was {value!r} when the model was proven and is {attributes.get(key)!r} now; {WAY_OUT}"
                )

    def _refuse_modules(self, name: str, module: nn.Module, before: tuple[int, ...]) -> None:
        """Raise ModelError if the children of ``module``, called ``name``, are not those with the ids ``before``."""
        for child, value in _compat.own_modules(module).items():
            if id(value) not in before:
                raise ModelError(f"module '{_join(name, child)}' was added or replaced after parallelize; {WAY_OUT}")
        raise ModelError(f"a module of '{name or type(module).__name__}' was removed after parallelize; {WAY_OUT}")

    def _refuse_parameters(self, name: str, module: nn.Module, before: dict[str, tuple[int, torch.Size | None]]) -> None:
        """Raise ModelError if the parameters of ``module``, called ``name``, have other ids or shapes than ``before``, which
        has both by the parameter's own name.

        Parameters that FSDP2 holds gathered for the moment are no change.
        """
        gathered = _gathered(self._modules[0].module) if self._sharded else set()
        held = _compat.own_parameters(module)
        for own, value in held.items():
            if own not in before or (id(value) != before[own][0] and id(value) not in gathered):
                raise ModelError(f"parameter '{_join(name, own)}' was added or replaced after parallelize; {WAY_OUT}")
        if removed := sorted(before.keys() - held.keys()):
            raise ModelError(f"parameter '{_join(name, removed[0])}' was removed after parallelize; {WAY_OUT}")
        for own, value in held.items():
            if _shape(value) != (shape := before[own][1]):
                raise ModelError(
                    f"parameter '{_join(name, own)}' was resized after parallelize, from {list(shape or ())} to "
                    f"{list(_shape(value) or ())}; {WAY_OUT}"
                )

    def _refuse_config(self) -> None:
        """Raise ModelError if a module has another config than before, or a field of a config another value.

        Also if DistributedDataParallel, which would average gradients again, calls the model.
        """
        if torch.compiler.is_compiling():
            return
        if _compat.is_inside_ddp():
            raise ModelError(
                "DistributedDataParallel around a parallel model would reduce gradients that parallelize reduces already; call "
                "the model itself, and for modules outside of it longspan.average_gradients(module, mesh) after the backward"
            )
        for module, config in self._configs:
            if vars(module).get("config") is not config:
                raise ModelError(f"the config of {type(module).__name__} was replaced after parallelize; {WAY_OUT}")
        for config, fields in self._fields:
            now = vars(config)
            for name, value in fields.items():
                if now.get(name) != value:
                    raise ModelError(
                        f"config.{name.removesuffix('_internal')} was {value!r} when the model was proven and is "
                        f"{now.get(name)!r} now; {WAY_OUT}"
                    )
            unknown = now.keys() - fields.keys() - HARMLESS_FIELDS
            if added := sorted(name for name in unknown if not _is_config(now[name])):
                raise ModelError(f"config.{added[0]} was added after parallelize; {WAY_OUT}")


def _look(name: str, module: nn.Module) -> _Module:
    """What a ``Snapshot`` records of ``module``, called ``name``."""
    parameters = _compat.own_parameters(module).values()
    return _Module(
        name,
        module,
        type(module),
        vars(module).get("forward"),
        tuple(map(id, _compat.own_modules(module).values())),
        tuple(_compat.own_parameters(module)),
        tuple(map(id, parameters)),
        tuple(map(_shape, parameters)),
        tuple(map(_dtype, parameters)),
    )


def _refuse_dtypes(name: str, held: Mapping[str, nn.Parameter | None], before: dict[str, torch.dtype | None]) -> None:
    """Raise ModelError if a parameter in ``held`` of the module called ``name`` has another dtype than ``before``."""
    for own, value in held.items():
        if _dtype(value) != before[own]:
            raise ModelError(
                f"parameter '{_join(name, own)}' was {before[own]} when the model was proven and is {_dtype(value)} now, and "
                f"its gradient would be averaged as that of {before[own]}; {WAY_OUT}"
            )


def _refuse_forward(name: str, module: nn.Module, kind: type[nn.Module], before: Any) -> None:
    """Raise ModelError if ``module``, called ``name``, is of another class than ``kind`` or computes by another forward.

    A forward that wraps the one before (accelerate's autocast, ``torch.compile``; by ``functools.wraps``) is no other.

    Args:
        before: the forward of the instance, or None if it had none and computed by that of its class.
    """
    what = f"'{name}'" if name else "the model"
    if type(module) is not kind:
        raise ModelError(f"{what} was a {kind.__name__} when the model was proven and is a {type(module).__name__}; {WAY_OUT}")
    if not _wraps(module.forward, before or kind.forward):
        raise ModelError(f"the forward of {what} was replaced after parallelize; {WAY_OUT}")


def _sources(kinds: Iterable[type[nn.Module]]) -> Iterator[Any]:
    """The classes ``kinds`` of modules and the modeling files that define them, without what PyTorch and all models share."""
    own = {each for kind in kinds for each in kind.__mro__ if not each.__module__.startswith(SHARED) or _is_modeling(each)}
    yield from own
    yield from {sys.modules[kind.__module__] for kind in own if _is_modeling(kind) and kind.__module__ in sys.modules}


def _is_modeling(kind: type) -> bool:
    """Whether a class is of a file of one architecture: of Transformers, or of code that came with a checkpoint."""
    return "modeling_" in kind.__module__.rpartition(".")[2] and not kind.__module__.startswith("transformers.modeling_")


def _wraps(now: Any, before: Any) -> bool:
    """Whether the forward ``now`` is the function of ``before``, or wraps it by ``functools.wraps``."""
    wanted, now = _function(before), _function(now)
    while now is not wanted and hasattr(now, "__wrapped__"):
        now = _function(now.__wrapped__)
    return now is wanted


def _function(forward: Any) -> Any:
    """The function of a bound method; anything else itself."""
    return getattr(forward, "__func__", forward)


def _fields(config: Any) -> dict[str, Any]:
    """{name: copy} of the fields of a config that can change a forward; nested configs, which are recorded by themselves,
    left out."""
    fields = {name: value for name, value in vars(config).items() if name not in HARMLESS_FIELDS}
    return {name: deepcopy(value) for name, value in fields.items() if not _is_config(value)}


def _is_config(value: Any) -> bool:
    """Whether a field of a config is another config."""
    return hasattr(value, "get_text_config")


def _gathered(root: nn.Module) -> set[int]:
    """The ids (``id()``) of the whole parameters that FSDP2 holds in the modules of ``root`` in place of their shards.

    FSDP2 does so between a module's forward and its backward; the set is empty at other times.
    """
    sharded = [part for part in root.modules() if isinstance(part, FSDPModule)]
    return {id(parameter) for part in sharded for _, parameter in _compat.fsdp_gathered_parameters(part)}


def _within(name: str, outer: str) -> bool:
    """Whether the module called ``name`` is the one called ``outer``, or inside it."""
    return name == outer or name.startswith(f"{outer}.")


def _join(name: str, child: str) -> str:
    """The dotted name of the child ``child`` of the module called ``name``; "" is the model."""
    return f"{name}.{child}" if name else child


def _shape(parameter: torch.Tensor | None) -> torch.Size | None:
    """The shape of a parameter, of a DTensor the whole shape; None for None."""
    return None if parameter is None else parameter.shape


def _dtype(parameter: torch.Tensor | None) -> torch.dtype | None:
    """The dtype of a parameter; None for None."""
    return None if parameter is None else parameter.dtype

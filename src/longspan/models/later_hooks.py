"""Module hooks that are registered after ``parallelize``: one that only reads is followed, one that changes tensors is refused.

    registered before         part of the proof, which refuses a hook that mixes tokens
    later, reads              timers, recorders of activations: they run as on one device, on this rank's tokens
    later, changes tensors    by what it returns or in place: nothing has shown that it treats each token by itself

Each hook that is found at a call is replaced by a watched one, which raises when the hook has changed something.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from longspan import _compat
from longspan.distributed.deferred_hooks import tensors_in
from longspan.errors import ModelError

WAY_OUT = "call unparallelize(model), register it, then parallelize again, which proves it"
TRUSTED = ("longspan.", "torch.")
"""Beginnings of the names of Python modules whose hooks are not watched: longspan's own and FSDP2's."""


class LaterHooks:
    """Finds the hooks that were registered on modules since this object was made, and watches them.

    Args:
        named: (name, module) of every module of a model; the first is the model itself.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Module]]) -> None:
        self._named = tuple(named)
        self._known = self._seen = RemovableHandle.next_id

    def watch(self) -> None:
        """Replace each new hook by a watched one. Costs a comparison of two integers where no hook was registered.

        Raises:
            ModelError: a hook that runs before the forward of the model itself: this call would run it unwatched.
        """
        if RemovableHandle.next_id == self._seen:
            return
        self._seen = RemovableHandle.next_id
        for number, (name, module) in enumerate(self._named):
            for kind, hooks in ((kind, held(module)) for kind, held in _compat.MODULE_HOOKS.items()):
                for key, hook in hooks.items():
                    if key < self._known or isinstance(hook, _Watched) or is_trusted(hook):
                        continue
                    if number == 0 and kind == "forward pre-hook":
                        self._seen = -1  # the next call looks again
                        raise ModelError(f"a forward pre-hook of the model was registered after parallelize; {WAY_OUT}")
                    hooks[key] = _Watched(f"{kind} of '{name}'" if name else f"{kind} of the model", hook)


class _Watched:
    """A hook of the user that raises ModelError once it has changed a tensor that it was given.

    Args:
        what: the kind of the hook and the module's name, for the message.
        hook: the user's.
    """

    def __init__(self, what: str, hook: Any) -> None:
        self._what, self._hook = what, hook

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        tensors = list(tensors_in(given))
        before = [_compat.version_counter(tensor) for tensor in tensors]
        found = self._hook(module, *given)
        replaced = {id(tensor) for tensor in tensors_in(found)} - {id(tensor) for tensor in tensors}
        if replaced or [_compat.version_counter(tensor) for tensor in tensors] != before:
            raise ModelError(
                f"a {self._what} that was registered after parallelize changes tensors, and nothing has shown that it "
                f"treats each token by itself; {WAY_OUT}"
            )
        return found


def is_trusted(hook: Any) -> bool:
    """Whether a hook is a function of longspan or PyTorch, also as a ``partial``, and no watched one of the user."""
    while isinstance(hook, partial):
        hook = hook.func
    return not isinstance(hook, _Watched) and str(getattr(hook, "__module__", "")).startswith(TRUSTED)

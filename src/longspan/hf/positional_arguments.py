"""Names the positional arguments of a call, because every check and change of a call reads its keywords.

    model(ids, mask, longspan=step)   ->   model(input_ids=ids, attention_mask=mask, longspan=step)

Independent of attention.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from longspan.distributed.mesh import ParallelMesh
from longspan.hf.candidate import Candidate, Undo, remove_all


@dataclass(frozen=True)
class PositionalArguments:
    """Turns the positional arguments of a call into keywords, before any other hook sees it. Installed in every model.

    Attributes:
        names: the names of the parameters of the model's forward, in their order.
    """

    names: tuple[str, ...]

    def install(self, model: nn.Module, mesh: ParallelMesh) -> Undo:
        """Register a hook that names the positional arguments of each call of ``model``.

        Returns:
            A function that removes the hook.
        """
        return remove_all([model.register_forward_pre_hook(partial(_name, self.names), with_kwargs=True)])


def probe(candidate: Candidate) -> PositionalArguments:
    """The names of the parameters of the model's forward."""
    return PositionalArguments(tuple(inspect.signature(candidate.model.forward).parameters))


def _name(names: tuple[str, ...], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: (no positional arguments, ``kwargs`` and the named ones).

    Arguments beyond ``names``, or named twice, are left to the forward, whose TypeError says so.
    """
    named = dict(zip(names, args))
    if len(named) < len(args) or named.keys() & kwargs.keys():
        return args, kwargs
    return (), named | kwargs

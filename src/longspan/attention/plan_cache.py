"""A bounded cache of plans: the most recently used ones of each mesh, and of one device."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from longspan.distributed.mesh import ParallelMesh

PLANS = 256
"""How many plans a mesh keeps. A run whose mask changes at every step makes a new one at every step."""

_ONE_DEVICE: dict[Hashable, Any] = {}
_MISSING = object()
T = TypeVar("T")


def cached(mesh: ParallelMesh | None, key: Hashable, make: Callable[[], T]) -> T:
    """The plan that ``make`` returned when ``key`` was first asked for on this mesh. An error of ``make`` is not kept.

    Plans live on the mesh, because they name its process groups and buffers: they are freed with it.
    """
    plans = _ONE_DEVICE if mesh is None else mesh.plans
    plan = plans.pop(key, _MISSING)
    if plan is _MISSING:
        plan = make()
        if len(plans) >= PLANS:
            plans.pop(next(iter(plans)), None)
    plans[key] = plan  # the last key is the one used last
    return cast(T, plan)


@dataclass(slots=True)
class Constant(Generic[T]):
    """A plan as torch.compile takes it from ``assume_constant_result``, which cannot return an opaque object itself."""

    plan: T

"""A bounded cache of plans (least recently used are removed), one for each mesh and one for a single device."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from longspan.distributed.mesh import ParallelMesh

PLANS = 256
"""The largest number of plans in one cache. (A mask that changes at every step adds a plan at every step.)"""

_ONE_DEVICE: dict[Hashable, Any] = {}
_MISSING = object()
T = TypeVar("T")


def cached(mesh: ParallelMesh | None, key: Hashable, make: Callable[[], T]) -> T:
    """The plan that is cached under ``key``; if there is none, ``make()`` is called, and its result cached and returned.

    The cache belongs to the mesh, because plans refer to its process groups and buffers; it is freed with the mesh. It holds at
    most ``PLANS`` plans: of more, the one used least recently is removed. An error that ``make`` raises is passed on and not
    cached.

    Args:
        mesh: the mesh; None for a single device, whose plans have one cache that lives as long as the process.
        key: everything that the plan depends on.
        make: makes the plan.
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
    """A wrapper of a plan, so that a function under ``torch.compiler.assume_constant_result`` can return it.

    Such a function cannot return an opaque object itself.
    """

    plan: T

"""Every private or version-dependent PyTorch symbol that longspan uses, under a name of its own.

    here                          PyTorch's                                                              used for
    OpaqueBase, register_opaque   torch._custom_class_base, before 2.14 torch._opaque_base               operator arguments
    autograd_below_autograd       torch._C._ForceDispatchKeyGuard and the dispatcher's thread-local keys gradients of a bias

A symbol that the installed PyTorch lacks is an ImportError whose one sentence names it. Knows nothing of the rest of longspan,
so that every folder can import it.
"""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch._library import opaque_object

if TYPE_CHECKING:

    class OpaqueBase:
        """Base of the classes whose instances an operator takes as an opaque argument."""

else:
    try:
        from torch._custom_class_base import CustomClassBase as OpaqueBase
    except ImportError:
        from torch._opaque_base import OpaqueBase


def register_opaque(cls: type[OpaqueBase], members: tuple[str, ...] = ()) -> None:
    """Let operators take instances of ``cls``; torch.compile may read their attributes ``members``, as constants."""
    read = dict.fromkeys(members, opaque_object.MemberType.USE_REAL)
    new: Any = getattr(opaque_object, "register_custom_class", None)
    if new is not None:
        new(cls, typ="symbolic", members=read)
    else:
        opaque_object.register_opaque_type(cls, typ="reference", members=read)


def autograd_below_autograd() -> AbstractContextManager[None]:
    """Let a kernel ask autograd for gradients inside an operator, where the dispatcher has switched autograd off."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        exclude = exclude.remove(key)
    guard: AbstractContextManager[None] = torch._C._ForceDispatchKeyGuard(include, exclude)
    return guard

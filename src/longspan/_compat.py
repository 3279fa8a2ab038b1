"""Every private or version-dependent PyTorch symbol that longspan uses, under a name of its own.

    here                          PyTorch's                                                               used for
    OpaqueBase, register_opaque   torch._custom_class_base, before 2.14 torch._opaque_base                operator arguments
    autograd_below_autograd       torch._C._ForceDispatchKeyGuard, the dispatcher's thread-local keys     gradients of a bias
    flash_forward, flash_backward aten._flash_attention_*, aten._scaled_dot_product_flash_*_for_cpu       kernels/flash_*.py
    backward_id                   torch._C._current_graph_task_id                                         gradient averaging
    after_backward                Variable._execution_engine.queue_callback                               gradient averaging
    accumulates_gradient          torch._C._will_engine_execute_node                                      gradient averaging
    fsdp_backward_is_unfinished   FSDPModule._get_fsdp_state()._state_ctx                                 distributed/fsdp.py
    hash_store, tcp_store         torch.distributed.HashStore, TCPStore (without type stubs)             one rank, launching
    event_tree                    profiler.kineto_results.experimental_event_tree                         memory/profiler.py

A symbol that the installed PyTorch lacks is an ImportError whose one sentence names it and what cannot work without it.
Knows nothing of the rest of longspan, so that every folder can import it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def _symbol(root: Any, path: str, purpose: str) -> Any:
    """``root.path``; ImportError with one sentence where this PyTorch has none."""
    found = root
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            raise ImportError(f"PyTorch {torch.__version__} has no {path}, which longspan needs for {purpose}")
    return found


if TYPE_CHECKING:

    class OpaqueBase:
        """Base of the classes whose instances an operator takes as an opaque argument."""

else:
    try:
        from torch._custom_class_base import CustomClassBase as OpaqueBase
    except ImportError:
        try:
            from torch._opaque_base import OpaqueBase
        except ImportError:
            raise ImportError(f"PyTorch {torch.__version__} has no opaque operator arguments, which attention needs") from None


def register_opaque(cls: type[OpaqueBase], members: tuple[str, ...] = ()) -> None:
    """Let operators take instances of ``cls``; torch.compile may read their attributes ``members``, as constants."""
    from torch._library import opaque_object

    read = dict.fromkeys(members, opaque_object.MemberType.USE_REAL)
    new: Any = getattr(opaque_object, "register_custom_class", None)
    if new is not None:
        new(cls, typ="symbolic", members=read)
    else:
        opaque_object.register_opaque_type(cls, typ="reference", members=read)


def autograd_below_autograd() -> AbstractContextManager[None]:
    """Let a kernel ask autograd for gradients inside an operator, where the dispatcher has switched autograd off."""
    purpose = "a kernel's own use of autograd"
    include = _symbol(torch._C, "_dispatch_tls_local_include_set", purpose)()
    exclude = _symbol(torch._C, "_dispatch_tls_local_exclude_set", purpose)()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        exclude = exclude.remove(key)
    guard: AbstractContextManager[None] = _symbol(torch._C, "_ForceDispatchKeyGuard", purpose)(include, exclude)
    return guard


def flash_forward(device_type: str) -> Callable[..., Any]:
    """PyTorch's flash attention operator of a device type, "cpu" or "cuda"."""
    names = {"cpu": "_scaled_dot_product_flash_attention_for_cpu", "cuda": "_flash_attention_forward"}
    operator: Callable[..., Any] = _symbol(torch.ops.aten, f"{names[device_type]}.default", "kernel='sdpa'")
    return operator


def flash_backward(device_type: str) -> Callable[..., Any]:
    """The backward of ``flash_forward``."""
    names = {"cpu": "_scaled_dot_product_flash_attention_for_cpu_backward", "cuda": "_flash_attention_backward"}
    operator: Callable[..., Any] = _symbol(torch.ops.aten, f"{names[device_type]}.default", "kernel='sdpa'")
    return operator


def backward_id() -> int:
    """The number of the backward pass that this thread is in, -1 outside of one."""
    number: int = _symbol(torch._C, "_current_graph_task_id", "the average of gradients")()
    return number


def after_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` once when the backward pass that this thread is in has finished."""
    _symbol(torch.autograd.Variable, "_execution_engine.queue_callback", "the average of gradients")(callback)


def accumulates_gradient(parameter: Tensor) -> bool:
    """Whether this backward adds to ``parameter.grad``; False under ``torch.autograd.grad``, whose engine raises instead."""
    will_execute = _symbol(torch._C, "_will_engine_execute_node", "the average of gradients")
    try:
        return bool(will_execute(get_gradient_edge(parameter).node))
    except RuntimeError:
        return False


def fsdp_backward_is_unfinished(model: Any) -> bool:
    """Whether FSDP2 began a backward of ``model`` whose final callback never ran, because the backward failed."""
    path = "_get_fsdp_state"
    state = _symbol(model, path, "ZeRO 2 and 3")()
    return _symbol(state, "_state_ctx", "ZeRO 2 and 3").post_backward_final_callback_queued is True


def hash_store() -> Any:
    """A store within this process, for a process group of one rank."""
    return _symbol(torch.distributed, "HashStore", "a world of one rank")()


def tcp_store(host: str, port: int) -> Any:
    """The store that the ranks of a launcher share, as a client."""
    return _symbol(torch.distributed, "TCPStore", "launching ranks")(host, port, is_master=False)


def event_tree(profiler: Any) -> Sequence[Any]:
    """The nested events that a ``torch.profiler.profile().profiler`` recorded, with their allocations."""
    events: Sequence[Any] = _symbol(profiler, "kineto_results.experimental_event_tree", "the memory report")()
    return events

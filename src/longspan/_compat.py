"""Every private or version-dependent PyTorch symbol that longspan uses, under a name of its own.

    here                            PyTorch's                                                               used for
    OpaqueBase, register_opaque     torch._custom_class_base, before 2.14 torch._opaque_base                operator arguments
    constant_when_compiled          torch.compiler.assume_constant_result, before 2.13 torch.compiler.disable   plans
    autograd_below_autograd         torch._C._ForceDispatchKeyGuard, the dispatcher's thread-local keys     gradients of a bias
    attention_operators             aten._flash_*, _efficient_* and _scaled_dot_product_*attention*         kernels
    has_cpu_gemm                    torch.ops.mkldnn._is_mkldnn_*_supported                                 kernels/matmul.py
    flex_lse_request                torch.nn.attention.flex_attention.AuxRequest                            kernels/flex.py
    functional_all_reduce           torch.distributed._functional_collectives.all_reduce                    collectives.py
    flattened                       DeviceMesh._flatten                                                     distributed/mesh.py
    number_of_groups                distributed_c10d._world.group_count, before 2.14 pg_names               groups.py
    backward_id                     torch._C._current_graph_task_id                                         gradient averaging
    after_backward                  Variable._execution_engine.queue_callback                               gradient averaging
    accumulates_gradient            torch._C._will_engine_execute_node                                      gradient averaging
    fsdp_*                          FSDPModule._get_fsdp_state() and what it holds                          FSDP2
    is_inside_ddp                   DistributedDataParallel._get_active_ddp_module                          models/unchanged.py
    own_parameters, own_modules     nn.Module._parameters, nn.Module._modules                               models/unchanged.py
    MODULE_HOOKS, GRADIENT_HOOKS, has_hooks_on_all_modules   nn.Module._forward_hooks, _has_any_global_hook   hooks
    version_counter, base_of_view  Tensor._version, Tensor._base                           offload.py, hf/own_recipe.py
    hash_store                      torch.distributed.HashStore (without type stubs)                        one rank
    tcp_store, hosted_store, meet_in_store   torch.distributed.TCPStore (without type stubs)                         launching
    torchrun_store                  torch.distributed.distributed_c10d.rendezvous                           torchrun's ranks
    set_group_timeout               torch.distributed.set_timeout, before 2.14 _set_pg_timeout              a mesh's timeout
    run_pipeline                    pipelining schedules' _step_microbatches                                pipeline_parallel.py
    register_fake_backend           torch.testing._internal.distributed.fake_pg                             fake_world.py
    vote_for_all_stages             PipelineStage._warmup_backward_result (2.13)                            fake_world.py
    elastic_launcher                torch.distributed.launcher, torch.distributed.elastic                   launching
    event_tree                      profiler.kineto_results.experimental_event_tree                         memory/profiler.py

A symbol that PyTorch lacks is an ImportError that names it and what needs it. Knows nothing of the rest of longspan.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from datetime import timedelta
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.device_mesh import DeviceMesh

VERSION = tuple(int(number) for number in torch.__version__.split(".")[:2])
PLANS_ARE_CONSTANTS = VERSION >= (2, 13)
"""Whether torch.compile can take an object that holds frozen dataclasses as a constant; no symbol tells."""
Function = TypeVar("Function", bound=Callable[..., Any])


def _symbol(root: Any, path: str, purpose: str) -> Any:
    """The attribute of ``root`` with the dotted name ``path``.

    Raises:
        ImportError: this PyTorch has no such attribute; the message says that ``purpose`` needs it.
    """
    found = root
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            raise ImportError(
                f"PyTorch {torch.__version__} has no {path}, which longspan needs for {purpose}; install a version that "
                f"longspan is tested with, such as torch 2.13"
            )
    return found


def _imported(module: str, path: str, purpose: str) -> Any:
    """The attribute ``path`` of the module named ``module``, which is imported by this call.

    Raises:
        ImportError: this PyTorch has no such module or attribute; the message says that ``purpose`` needs it.
    """
    try:
        root: Any = import_module(module)
    except ImportError:
        root = None
    return _symbol(root, path, purpose)


if TYPE_CHECKING:

    class OpaqueBase:
        """Base of the classes whose instances an operator takes as an opaque argument, such as ``AttentionPlan``."""

else:
    try:
        from torch._custom_class_base import CustomClassBase as OpaqueBase
    except ImportError:
        OpaqueBase = _imported("torch._opaque_base", "OpaqueBase", "the arguments of attention's operators")


def register_opaque(cls: type[OpaqueBase], members: tuple[str, ...] = ()) -> None:
    """Register ``cls`` with PyTorch, so that custom operators take its instances as arguments.

    torch.compile may read the attributes ``members`` of an instance, and treats them as constants.
    """
    module, purpose = "torch._library.opaque_object", "the arguments of attention's operators"
    read = dict.fromkeys(members, _imported(module, "MemberType.USE_REAL", purpose))
    new: Any = getattr(import_module(module), "register_custom_class", None)
    if new is not None:
        new(cls, typ="symbolic", members=read)
    else:
        _imported(module, "register_opaque_type", purpose)(cls, typ="reference", members=read)


def constant_when_compiled(function: Function) -> Function:
    """Decorator: torch.compile takes the result of ``function`` as a constant, and does not trace it.

    Before PyTorch 2.13 a result that holds frozen dataclasses cannot be one: there the call is outside of the graph, which
    breaks in two, so that ``fullgraph=True`` fails.
    """
    if not PLANS_ARE_CONSTANTS:
        outside: Function = torch.compiler.disable(function)
        return outside
    constant: Function = torch.compiler.assume_constant_result(function)
    return constant


def autograd_below_autograd() -> AbstractContextManager[None]:
    """A context manager in which autograd records, for use inside a custom operator, where PyTorch has disabled it."""
    purpose = "a kernel's own use of autograd"
    include = _symbol(torch._C, "_dispatch_tls_local_include_set", purpose)()
    exclude = _symbol(torch._C, "_dispatch_tls_local_exclude_set", purpose)()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        exclude = exclude.remove(key)
    guard: AbstractContextManager[None] = _symbol(torch._C, "_ForceDispatchKeyGuard", purpose)(include, exclude)
    return guard


_ATTENTION = {
    "flash cpu": ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"),
    "flash cuda": ("_flash_attention_forward", "_flash_attention_backward"),
    "efficient": ("_efficient_attention_forward", "_efficient_attention_backward"),
    "cudnn": ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"),
}


def attention_operators(which: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """PyTorch's operators (forward, backward) of an attention: "flash cpu", "flash cuda", "efficient" or "cudnn"."""
    forward, backward = (_symbol(torch.ops.aten, f"{name}.default", f"{which} attention") for name in _ATTENTION[which])
    return forward, backward


def has_cpu_gemm(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of ``dtype`` (bf16 or fp16) natively, by instructions that PyTorch uses."""
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(_symbol(torch.ops, f"mkldnn.{names[dtype]}", "matrix products in half precision")())


def flex_lse_request() -> Any:
    """The value of ``return_aux`` with which ``flex_attention`` also returns the log-sum-exp."""
    return _imported("torch.nn.attention.flex_attention", "AuxRequest", "kernel='flex'")(lse=True)


_ALL_REDUCE = _imported("torch.distributed._functional_collectives", "all_reduce", "the sum of the loss over ranks")


def functional_all_reduce(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The sum of ``x`` over the ranks of ``group``, differentiable: the gradient is summed over the ranks too."""
    total: Tensor = _ALL_REDUCE(x, "sum", group)
    return total


def flattened(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """A DeviceMesh of one dim, called ``name``, over all ranks of ``mesh``. Every rank must call it: it makes a group."""
    return _symbol(mesh, "_flatten", "the rank sets of a mesh")(name)  # type: ignore[no-any-return]


def number_of_groups() -> int:
    """What the name of a group of some ranks ends with: how many groups this rank asked for, before 2.14 how many it is in."""
    world = _symbol(torch.distributed.distributed_c10d, "_world", "process groups of some ranks")
    return int(world.group_count if VERSION >= (2, 14) else len(world.pg_names))


version_counter: Callable[[Tensor], int] = attrgetter("_version")
"""How many in-place operations have changed a tensor's memory, as PyTorch counts them: equal counts mean equal content."""
base_of_view: Callable[[Tensor], Tensor | None] = attrgetter("_base")
"""The tensor of which a tensor is a view; None if it is not a view."""
register_fake_backend = partial(_imported, "torch.testing._internal.distributed.fake_pg", "FakeStore", "longspan rehearse")
"""Registers PyTorch's "fake" backend, of whose process groups one rank alone exists, when it is called."""
backward_id: Callable[[], int] = _symbol(torch._C, "_current_graph_task_id", "the average of gradients")
"""The number of the backward pass that is running in this thread; -1 if none is."""
ZERO = "zero=2 and zero=3"


def after_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` once, when the backward pass that is running in this thread has finished."""
    _symbol(torch.autograd.Variable, "_execution_engine.queue_callback", "the average of gradients")(callback)


def accumulates_gradient(parameter: Tensor) -> bool:
    """Whether the backward that is running adds to ``parameter.grad``.

    False if it was started by ``torch.autograd.grad``, which returns gradients instead.
    """
    will_execute = _symbol(torch._C, "_will_engine_execute_node", "the average of gradients")
    try:
        return bool(will_execute(get_gradient_edge(parameter).node))
    except RuntimeError:
        return False


def fsdp_backward_is_unfinished(model: Any) -> bool:
    """Whether FSDP2 began a backward of ``model`` whose final callback never ran, because the backward failed."""
    state = _symbol(model, "_get_fsdp_state", ZERO)()
    return _symbol(state, "_state_ctx.post_backward_final_callback_queued", ZERO) is True


def fsdp_fill_unused_gradients(model: Any) -> None:
    """Make FSDP2 use a gradient of zeros for a parameter that this rank did not use, where it would wait for ever."""
    fill = getattr(model, "set_reduce_scatter_unused_params", None)  # since PyTorch 2.13
    if fill is not None:
        fill(True)
        return
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            for group in _fsdp_groups(module):
                group.post_backward = partial(_fill_then_reduce, group, group.post_backward)


def _fill_then_reduce(group: Any, reduce: Callable[..., None], *unused: Any) -> None:
    """In place of FSDP2's ``reduce`` of a group of parameters: give unused parameters gradients of zeros, then call it."""
    if group.reduce_grads:
        for parameter in group.fsdp_params:
            whole = getattr(parameter, "_unsharded_param", None)
            if whole is None or not whole.requires_grad or whole.grad is not None:
                continue
            if parameter.unsharded_accumulated_grad is None:
                whole.grad = torch.zeros_like(whole)
    reduce(*unused)


def _fsdp_groups(module: Any) -> list[Any]:
    """The groups of parameters of one FSDPModule: before PyTorch 2.13 one, or none where it has no parameter of its own."""
    state = _symbol(module, "_get_fsdp_state", ZERO)()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    if hasattr(state, "_fsdp_param_group") and state._fsdp_param_group is None:
        return []
    return [_symbol(state, "_fsdp_param_group", ZERO)]


def fsdp_gathered_parameters(module: Any) -> list[tuple[str, Tensor]]:
    """(name, whole parameter) of each that ``module``, an FSDPModule, has ever gathered: FSDP2 keeps these objects."""
    found = [(each, getattr(each, "_unsharded_param", None)) for group in _fsdp_groups(module) for each in group.fsdp_params]
    return [(str(_symbol(each, "_param_fqn", ZERO)), whole) for each, whole in found if whole is not None]


def is_inside_ddp() -> bool:
    """Whether a DistributedDataParallel is computing its forward at this moment."""
    return _symbol(nn.parallel.DistributedDataParallel, "_get_active_ddp_module", "refusing it")() is not None


own_parameters: Callable[[nn.Module], Mapping[str, nn.Parameter | None]] = attrgetter("_parameters")
"""The parameters of a module itself, not of those inside it, by name; without a Python call, for a check at every forward."""
own_modules: Callable[[nn.Module], Mapping[str, nn.Module | None]] = attrgetter("_modules")
"""The modules directly inside a module, by name; without a Python call, for a check at every forward."""
MODULE_HOOKS = {
    "forward pre-hook": attrgetter("_forward_pre_hooks"), "forward hook": attrgetter("_forward_hooks"),
    "backward pre-hook": attrgetter("_backward_pre_hooks"), "backward hook": attrgetter("_backward_hooks"),
}  # fmt: skip
GRADIENT_HOOKS = attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")
"""Hooks of a module by kind, and the two kinds of a parameter's: each {number: hook}, numbered in the order of registration."""


def has_hooks_on_all_modules() -> bool:
    """Whether the program has registered a hook that every module calls (``register_module_forward_hook`` and its like)."""
    return bool(_symbol(nn.modules.module, "_has_any_global_hook", "calling hooks on a head")())


class ElasticLauncher(NamedTuple):
    """The classes and functions of PyTorch's elastic launcher that cli/launch.py uses, under PyTorch's own names."""

    ChildFailedError: Any
    DefaultLogsSpecs: Any
    LaunchConfig: Any
    SignalException: Any
    elastic_launch: Any


def elastic_launcher() -> ElasticLauncher:
    """PyTorch's elastic launcher, imported at this call, because the import takes a second."""
    elastic, purpose = "torch.distributed.elastic.multiprocessing", "launching ranks"
    return ElasticLauncher(
        ChildFailedError=_imported(f"{elastic}.errors", "ChildFailedError", purpose),
        DefaultLogsSpecs=_imported(f"{elastic}.api", "DefaultLogsSpecs", purpose),
        LaunchConfig=partial(_launch_config, _imported("torch.distributed.launcher.api", "LaunchConfig", purpose)),
        SignalException=_imported(f"{elastic}.api", "SignalException", purpose),
        elastic_launch=_imported("torch.distributed.launcher.api", "elastic_launch", purpose),
    )


def _launch_config(kind: Any, *, shutdown_timeout: int, **options: Any) -> Any:
    """A LaunchConfig of the class ``kind``; before PyTorch 2.13 without ``shutdown_timeout``, its agent waits 30 seconds."""
    known = "shutdown_timeout" in {field.name for field in fields(kind)}
    return kind(**options, **({"shutdown_timeout": shutdown_timeout} if known else {}))


def hash_store() -> Any:
    """A key-value store (torch.distributed.Store) within this process, for a process group of one rank."""
    return _symbol(torch.distributed, "HashStore", "a world of one rank")()


def tcp_store(host: str, port: int, *, seconds: float) -> Any:
    """A client of the TCPStore at ``host`` and ``port``, through which the ranks of a launcher share keys.

    Raises:
        RuntimeError: nothing answers within ``seconds``, because the host may have ended.
    """
    store = _symbol(torch.distributed, "TCPStore", "launching ranks")
    return store(host, port, is_master=False, timeout=timedelta(seconds=seconds))


def hosted_store(host: str, port: int) -> Any:
    """A TCPStore at ``host`` and ``port`` that this process runs until it ends; it waits for no other process."""
    return _symbol(torch.distributed, "TCPStore", "launching ranks")(host, port, is_master=True, wait_for_workers=False)


def meet_in_store(host: str, port: int, ranks: int, *, is_host: bool, seconds: float) -> Any:
    """The TCPStore at ``host`` and ``port``, returned once all ``ranks`` have connected.

    Args:
        host, port: where the store listens.
        ranks: how many processes connect.
        is_host: whether this process runs the store.
        seconds: how long to wait.

    Raises:
        RuntimeError: not all have connected within ``seconds``.
    """
    store = _symbol(torch.distributed, "TCPStore", "launching ranks")
    return store(host, port, ranks, is_host, timeout=timedelta(seconds=seconds))


def torchrun_store() -> tuple[Any, int, int]:
    """The store on which the ranks that torchrun started meet, from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    It waits for the store. Call it only if ``torch.distributed.is_torchelastic_launched()``.

    Returns:
        (the torch.distributed.Store, this rank's number, the number of ranks).
    """
    rendezvous = _symbol(torch.distributed.distributed_c10d, "rendezvous", "joining torchrun's ranks")
    store, rank, ranks = next(rendezvous("env://"))
    return store, rank, ranks


def set_group_timeout(group: torch.distributed.ProcessGroup, timeout: timedelta) -> None:
    """Make collectives of ``group``, on gloo and NCCL, fail after ``timeout``."""
    new: Any = getattr(torch.distributed, "set_timeout", None)
    if new is not None:
        new(timeout, group)
    else:
        _symbol(torch.distributed.distributed_c10d, "_set_pg_timeout", "ParallelMesh(timeout=)")(timeout, group)


def event_tree(profiler: Any) -> Sequence[Any]:
    """The nested events, with their allocations, that the profiler ``torch.profiler.profile().profiler`` recorded."""
    events: Sequence[Any] = _symbol(profiler, "kineto_results.experimental_event_tree", "the memory report")()
    return events


def run_pipeline(
    schedule: Any,
    stages: list[Any],
    args: list[tuple[Any, ...]],
    kwargs: list[dict[str, Any]],
    losses: list[Tensor],
    trains: bool,
) -> None:
    """Run a pipeline schedule of PyTorch over micro-batches that are split already.

    Args:
        schedule: the schedule; it computes losses, by its ``loss_fn``, only if ``trains``.
        stages: its stages on this rank.
        args, kwargs: for each micro-batch, the positional arguments of the first stage and the keywords of every stage.
        losses: gets the losses of the micro-batches, on the last stage alone.
        trains: whether the schedule runs backwards.
    """
    step = _symbol(schedule, "_step_microbatches", "pipeline > 1")
    for stage in stages:
        stage.has_backward = trains
        stage.clear_runtime_states()
    targets = [torch.zeros(()) for _ in args]
    step(args, kwargs, targets, losses if trains else None)
    if not trains:
        losses += [loss for stage in stages if stage.is_last for loss in stage.output_chunks]


def vote_for_all_stages(stage: Any) -> None:
    """Let a pipeline stage take its own vote for that of all stages, where PyTorch (2.13) asks whether shapes are known."""
    if hasattr(stage, "_warmup_backward_result"):
        stage._warmup_backward_result = lambda received_result=None: torch.ones(1, dtype=torch.int32, device=stage.device)

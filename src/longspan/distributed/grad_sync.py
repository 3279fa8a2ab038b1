"""Gradient averaging over the ranks in every backward (zero=0), of modules outside the model, and sums over copies.

    hooks of each parameter     .grad of earlier micro-batches aside, gradient of THIS backward into its bucket, .grad back
    a full bucket               all-reduce in fp32, while the backward goes on                              (grad_buckets.py)
    the end of the backward     mean over ranks --> .grad +=

Every rank computes the same global loss, so the gradient of a parameter is the mean of the ranks' gradients. A tied weight is
one parameter, .grad of earlier micro-batches is never reduced again, and a parameter that one rank does not use counts as zero
there without blocking the others. Independent of what the model computes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle

from longspan import _compat
from longspan.distributed.consensus import first_difference, gather_or_raise, largest_integers
from longspan.distributed.deferred_hooks import DeferredHooks
from longspan.distributed.grad_buckets import Buckets, MeanInBuckets, Reductions, reduction_dtype
from longspan.distributed.grad_norm import local_part
from longspan.distributed.groups import new_group, new_group_of, set_timeout
from longspan.distributed.mesh import ParallelMesh, refuse_no_mesh
from longspan.errors import ModelError


class MeanGradients:
    """Hooks on a model that make ``backward()`` add the mean of the ranks' gradients to ``.grad``; ``parallelize`` uses it at
    zero=0.

    If every rank's loss is the global loss, ``.grad`` is the gradient of one device over the global batch. The mean is formed
    in fp32 (fp64 for fp64 parameters). A parameter that no rank used keeps its ``.grad``; ranks that did not use it count as
    zero. Every rank of the mesh must call ``backward`` equally often. Hooks of the user on a parameter's gradient
    (``register_hook``, ``register_post_accumulate_grad_hook``) are called with the mean.

    Args:
        model: the module whose parameters get hooks; those that require a gradient now.
        mesh: the mean is over ``mesh.fsdp_group``.

    Attributes:
        handles: of the hooks.

    Raises:
        ModelError: later, in a forward or backward: for ``torch.autograd.grad`` of a parameter, for ``create_graph=True``, and
            for a parameter that was unfrozen or replaced since.
    """

    def __init__(self, model: nn.Module, mesh: ParallelMesh) -> None:
        self._model = model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._known = frozenset(map(id, self._parameters))
        self._running: WeakValueDictionary[int, MeanInBuckets] = WeakValueDictionary()
        self._delayed: MeanInBuckets | None = None
        self._backward_in_delayed = -1
        self._control, self._averages = mesh.loss_control_group, mesh.fsdp_group.size() > 1
        self._earlier: dict[int, Tensor | None] = {}
        self._buckets = Buckets.of(self._parameters)
        self._reductions = gradient_reductions(mesh)
        self.handles: list[RemovableHandle] = [model.register_forward_pre_hook(self.refuse_what_changed)]
        tensor = mesh.coordinate.tensor > 1
        self._deferred = DeferredHooks(model, self.handles, cut=tensor) if self._averages or tensor else None
        for index, parameter in enumerate(self._parameters):
            if self._deferred is not None:
                self.handles.append(parameter.register_hook(partial(self._find_hooks, parameter)))
            if self._averages:  # on one rank the gradient is the mean already
                self.handles.append(parameter.register_hook(partial(self._set_earlier_aside, index)))
                self.handles.append(parameter.register_post_accumulate_grad_hook(partial(self._take, index)))

    def remove(self) -> None:
        """Remove the hooks from the model: ``backward`` then adds this rank's own gradient to ``.grad``."""
        for handle in self.handles:
            handle.remove()
        if self._deferred is not None:
            self._deferred.restore()

    def _set_earlier_aside(self, index: int, grad: Tensor | None) -> Tensor | None:
        """Hook on the gradient of parameter ``index``, before autograd adds it to ``.grad``: keep the ``.grad`` of earlier
        backwards, and remove it from the parameter, so that autograd moves ``grad`` there without a copy.

        Returns:
            None, which leaves ``grad`` as it is; of a weight of tensor parallelism, the gradient in the weight's placement.
        """
        self._join_backward(index)
        if grad is None:
            return None
        parameter = self._parameters[index]
        self._earlier[index], parameter.grad = parameter.grad, None
        if isinstance(grad, DTensor) and isinstance(parameter, DTensor):  # a weight of tensor parallelism
            return grad.redistribute(placements=parameter.placements)
        return None

    @record_function("longspan::mean_gradients")
    def _take(self, index: int, parameter: Tensor) -> None:
        """Hook after autograd has set ``.grad`` of parameter ``index``: copy the gradient of this backward into its bucket, and
        restore the ``.grad`` of earlier ones."""
        if index not in self._earlier:  # the gradient was undefined, and nothing has been accumulated
            return
        mean, grad = self._join_backward(index), parameter.grad
        parameter.grad = self._earlier.pop(index)
        assert grad is not None
        mean.add(index, local_part(grad))
        if mean is not self._delayed:
            mean.reduce_full_buckets()

    def _join_backward(self, index: int) -> MeanInBuckets:
        """The mean that the backward that is running adds to.

        At the first gradient of a backward its kind is checked, the mean is made, and a callback is registered that finishes it
        at the end. Only that callback holds a strong reference, so a backward that fails leaves no gradients for the next one.

        Args:
            index: the parameter whose gradient was just computed, for the check that it can be averaged.

        Raises:
            ModelError: what this backward computes cannot be averaged, or the model was changed.
        """
        backward = _compat.backward_id()
        if self._delayed is not None:
            if backward != self._backward_in_delayed:
                self._refuse_what_cannot_be_averaged(index)
                self._backward_in_delayed = backward
            return self._delayed
        mean = self._running.get(backward)
        if mean is None:
            self._refuse_what_cannot_be_averaged(index)
            mean = self._running[backward] = MeanInBuckets(self._buckets, self._reductions)
            self._reductions.let_start_early(mean)
            _compat.after_backward(partial(self._finish, mean))
        return mean

    def _refuse_what_cannot_be_averaged(self, index: int) -> None:
        """Raise ModelError in a backward that does not accumulate into ``.grad`` (autograd.grad) or that builds a graph of
        itself.

        Args:
            index: a parameter whose gradient this backward has just computed.
        """
        if torch.is_grad_enabled() or not _compat.accumulates_gradient(self._parameters[index]):
            raise ModelError(
                "torch.autograd.grad and create_graph=True would give this rank's part of a parameter's gradient; "
                "call loss.backward() and read .grad, which is the mean over the ranks"
            )
        self.refuse_what_changed()

    def refuse_what_changed(self, module: nn.Module | None = None, *_: object) -> None:
        """Raise ModelError if a parameter of the model requires a gradient but was unfrozen or replaced after hooks were set.

        It is also a forward pre-hook: if all parameters with hooks were frozen or replaced, no hook would run in the backward.
        Of a part of the model (``module``) that is called by itself, only its own parameters count.
        """
        for parameter in (module or self._model).parameters():
            if parameter.requires_grad and id(parameter) not in self._known:
                name = next(name for name, each in self._model.named_parameters() if each is parameter)
                raise ModelError(
                    f"parameter {name!r} was unfrozen or replaced after parallelize: its gradient would differ between ranks; "
                    f"call unparallelize(model), then parallelize it again"
                )
        if not torch.compiler.is_compiling():  # it would break the graph; the backward looks, and refuses
            self._find_hooks()

    def _find_hooks(self, running: nn.Parameter | None = None, *_: object) -> None:
        """Let hooks of the user that were registered since the last look get the mean; also a hook on the gradient of
        ``running``.

        Raises:
            ModelError: a hook that cannot get it, or one that was registered between the backwards of ``once``.
        """
        if self._deferred is not None and self._deferred.find(running) and self._delayed is not None:
            raise ModelError(
                "a hook on a gradient was registered inside forward_backward, which would call it once with the sum of several "
                "micro-batches; register it before forward_backward"
            )

    @contextmanager
    def once(self) -> Iterator[None]:
        """Context manager: the gradients of all backwards inside are summed on this rank, and averaged over the ranks once, on
        exit.

        So several micro-batches cost one all-reduce; each backward averages by itself where any rank has hooks of the user on
        gradients. If the block raises, nothing is added to ``.grad``. Every rank must enter it.
        """
        if not self._averages or self._hooks_on_any_rank():
            yield
            return
        self._delayed, self._backward_in_delayed = MeanInBuckets(self._buckets, self._reductions), -1
        try:
            yield
            delayed = self._delayed
        finally:
            self._delayed = None
        self._finish(delayed)

    def _hooks_on_any_rank(self) -> bool:
        """Whether any rank has hooks of the user on gradients: all ranks must average equally often. One control all-reduce."""
        mine = self._deferred is not None and self._deferred.exist()
        return bool(largest_integers([int(mine)], self._control, "Every rank must call forward_backward equally often.")[0])

    @torch.no_grad()
    @record_function("longspan::mean_gradients")
    def _finish(self, mean: MeanInBuckets) -> None:
        """Wait until the gradients in ``mean`` are averaged over the ranks, and add each to its parameter's ``.grad``, which
        has none of them yet.

        Called at the end of each backward or, where several are summed first, at the end of the context ``once``.
        """
        for index, gradient in mean.finished():
            parameter = self._parameters[index]
            _add(parameter, gradient if self._deferred is None else self._deferred.of_gradient(parameter, gradient))
            if self._deferred is not None:
                self._deferred.after_accumulation(parameter)


def gradient_reductions(mesh: ParallelMesh) -> Reductions:
    """The all-reduces over ``mesh.fsdp_group`` in a process group that reduces nothing but gradients; one for each mesh.

    Gradients are reduced while the backward runs other collectives, and ranks may come to the two in different orders, which
    one group would confuse. Every rank of the mesh must call it at once.
    """
    if mesh.own_reductions is None:
        if mesh.fsdp_group.size() == 1:  # nothing to reduce
            group = mesh.fsdp_group
        elif mesh.fsdp_group.size() == mesh.world_group.size():  # a DeviceMesh would take the group of all ranks, as others do
            group = new_group(backend="")
        else:
            group = new_group_of(mesh.fsdp_mesh.mesh.tolist(), mesh.world_group, backend="")
        set_timeout([group], mesh.timeout)
        mesh.own_reductions = Reductions(group, mesh.loss_control_group)
    return mesh.own_reductions


@torch.no_grad()
def sum_over(parameter: Tensor, group: dist.ProcessGroup | None) -> None:
    """Replace ``parameter.grad`` in place by its sum over the ranks of ``group``, formed in fp32 (fp64 for fp64).

    Args:
        parameter: has a gradient on every rank, whose dtype stays. Of a sharded gradient (DTensor) the local shards are summed.
        group: the ranks that hold a copy, each of which must call this; None: all ranks.
    """
    assert parameter.grad is not None
    mine = local_part(parameter.grad)
    total = mine.to(reduction_dtype(mine.dtype), copy=True)
    dist.all_reduce(total, group=group)
    mine.copy_(total)


@torch.no_grad()
def average_gradients(module: nn.Module, mesh: ParallelMesh) -> None:
    """Average the gradients of a module outside the parallel model over the ranks: a value head, a projector, a vision tower.

    Call it on every rank once after each backward, or once after the last of several micro-batches, and before clipping:

        loss = cross_entropy(head(hidden), part["shift_labels"], mesh=mesh, num_labels=part["longspan"].num_labels)
        loss.backward()
        average_gradients(head, mesh)

    With the same global loss on every rank (``cross_entropy(..., mesh=mesh)``, or ``all_reduce_sum`` of your own sums over
    ``mesh.loss_group``), ``.grad`` is then the gradient of one device over the global batch. The mean is formed in fp32 (fp64
    for fp64 parameters) and written to ``.grad``. Where some ranks have no gradient for a parameter they count as zero; where
    no rank has one, ``.grad`` stays None.

    Args:
        module: equal parameters on every rank, outside of what ``parallelize``, DDP or FSDP was given. (A second mean over
            gradients that are means already changes nothing.)
        mesh: the mean is over ``mesh.loss_group``: also over the tensor ranks, which hold other tokens and the same module.

    Raises:
        LayoutError: ``mesh`` is no ParallelMesh.
        ModelError: on every rank alike, for sharded parameters, or where names, shapes or dtypes differ between ranks.
    """
    refuse_no_mesh(mesh)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    difference = first_difference(gather_or_raise(lambda: _whole_parameters(trained), mesh.world_group))
    if difference is not None:
        name, first, rank, other = difference
        raise ModelError(
            f"average_gradients was given different modules: parameter {name} is {first} on rank 0 and {other} on rank {rank}; "
            f"pass the same module with the same trained parameters on every rank"
        )
    parameters = list(trained.values())
    mean = MeanInBuckets(Buckets.of(parameters), Reductions(mesh.loss_group, mesh.loss_control_group))
    for index, parameter in enumerate(parameters):
        if parameter.grad is not None:
            mean.add(index, parameter.grad)
    for index, gradient in mean.finished():
        parameters[index].grad = gradient.to(parameters[index].dtype)


def _whole_parameters(trained: dict[str, nn.Parameter]) -> dict[str, str]:
    """{name: its shape and dtype as text} of the parameters, for the comparison between ranks.

    Raises:
        ModelError: a parameter is sharded, so FSDP2 averages its gradient.
    """
    for name, parameter in trained.items():
        if isinstance(parameter, DTensor):
            raise ModelError(
                f"average_gradients was given {name!r}, a sharded parameter, whose gradient FSDP2 averages in the "
                f"backward; pass only modules with whole parameters, outside of the parallel model"
            )
    return {name: f"{list(parameter.shape)} {parameter.dtype}" for name, parameter in trained.items()}


def _add(parameter: nn.Parameter, mean: Tensor) -> None:
    """Add ``mean`` to ``parameter.grad`` in place; where it is None, set it, in the parameter's dtype."""
    if parameter.grad is None:
        parameter.grad = _placed_as(parameter, mean.to(parameter.dtype))
    else:
        local_part(parameter.grad).add_(mean)


def _placed_as(like: Tensor, local: Tensor) -> Tensor:
    """``local``, this rank's shard, as a DTensor with the mesh, placements and shape of ``like``; ``local`` if that is no
    DTensor."""
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())

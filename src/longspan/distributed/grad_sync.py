"""Gradient averaging over the ranks after every backward (zero=0), of modules outside the model, and sums over copies.

    backward on each rank     hook of each parameter: store the gradient of THIS backward, leave .grad unchanged
    end of the backward       [ p0 | p1 | p2 ... | has a gradient? ] --all-reduce in fp32--> mean over ranks --> .grad +=

Every rank computes the same global loss, so the gradient of a parameter is the mean of the ranks' gradients. The reduction runs
once per backward, in the order of the parameters and not in the order in which a rank finishes them. So a tied weight is one
parameter, .grad of earlier micro-batches is never reduced again, and a parameter that one rank does not use counts as zero
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
from longspan.distributed.consensus import first_difference, gather_or_raise
from longspan.distributed.grad_norm import local_part
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError

BUCKET_BYTES = 25 * 2**20
"""Bytes of gradients in one all-reduce: large enough that its latency is negligible, small compared with the model."""


class MeanGradients:
    """Hooks on a model that make ``backward()`` add the mean of the ranks' gradients to ``.grad``; ``parallelize`` uses it at
    zero=0.

    If every rank's loss is the global loss, ``.grad`` is the gradient of one device over the global batch. The mean is formed
    in fp32 (fp64 for fp64 parameters). A parameter that no rank used keeps its ``.grad``; ranks that did not use it count as
    zero. Every rank of the mesh must call ``backward`` equally often.

    Args:
        model: the module whose parameters get hooks; those that require a gradient now.
        mesh: the mean is over ``mesh.fsdp_group``.

    Raises:
        ModelError: later, in a forward or backward: for ``torch.autograd.grad`` of a parameter, for ``create_graph=True``, and
            for a parameter that was unfrozen or replaced since.
    """

    def __init__(self, model: nn.Module, mesh: ParallelMesh) -> None:
        self._model, self._mesh = model, mesh
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._buckets = _buckets(self._parameters)
        self._arrived: WeakValueDictionary[int, _Arrived] = WeakValueDictionary()
        self._delayed: _Arrived | None = None
        # on one rank the gradient is the mean already
        hooked = self._parameters if mesh.fsdp_group.size() > 1 else []
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._refuse_what_changed),
            *(parameter.register_hook(partial(self._keep, index)) for index, parameter in enumerate(hooked)),
        ]

    def __deepcopy__(self, memo: dict[int, object]) -> "MeanGradients":
        raise ModelError(
            "a parallel model cannot be copied: the gradients of the copy would not be averaged; copy it before parallelize, "
            "or copy its state_dict into a model that was built again"
        )

    def remove(self) -> None:
        """Remove the hooks from the model: ``backward`` then adds this rank's own gradient to ``.grad``."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, index: int, grad: Tensor | None) -> Tensor | None:
        """Hook on the gradient of parameter ``index``: store ``grad``, and return zeros, so that this backward leaves ``.grad``
        as it is.

        ``_reduce`` adds the mean to ``.grad`` at the end of the backward. Without a gradient (None) it returns None.
        """
        arrived = self._arrived_in_this_backward(index)
        if grad is None:
            return None
        parameter = self._parameters[index]
        if isinstance(grad, DTensor) and isinstance(parameter, DTensor):  # a weight of tensor parallelism
            arrived[index] = local_part(grad.redistribute(placements=parameter.placements))
            return _placed_as(parameter, torch.zeros_like(arrived[index]))
        arrived[index] = grad
        return grad.new_zeros(()).expand_as(grad)

    def _arrived_in_this_backward(self, index: int) -> "_Arrived":
        """The gradients that have been computed so far in the backward that is running, by index of the parameter.

        At the first gradient of a backward the dict is made, and a callback is registered that averages its gradients over
        ranks at the end. Only that callback holds a strong reference, so a backward that fails leaves no gradients for the next
        one.

        Args:
            index: the parameter whose gradient was just computed, for the check that it can be averaged.
        """
        task = _compat.backward_id()
        arrived = self._arrived.get(task)
        if arrived is None:
            self._refuse_what_cannot_be_averaged(index)
            arrived = self._arrived[task] = _Arrived()
            _compat.after_backward(partial(self._reduce, arrived))
        return arrived

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
        self._refuse_what_changed()

    def _refuse_what_changed(self, *_: object) -> None:
        """Raise ModelError if a parameter of the model requires a gradient but was unfrozen or replaced after hooks were set.

        It is also a forward pre-hook: if all parameters with hooks were frozen or replaced, no hook would run in the backward.
        """
        known = set(map(id, self._parameters))
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                raise ModelError(
                    f"parameter {name!r} was unfrozen or replaced after parallelize: its gradient would differ between ranks; "
                    f"call unparallelize(model), then parallelize it again"
                )

    @contextmanager
    def once(self) -> Iterator[None]:
        """Context manager: the gradients of all backwards inside are summed on this rank, and averaged over the ranks once, on
        exit.

        So several micro-batches cost one all-reduce. If the block raises, nothing is added to ``.grad``.
        """
        self._delayed = _Arrived()
        try:
            yield
            delayed = self._delayed
        finally:
            self._delayed = None
        self._reduce(delayed)

    @torch.no_grad()
    @record_function("longspan::mean_gradients")
    def _reduce(self, arrived: "_Arrived") -> None:
        """Add the mean over ranks of the gradients ``arrived`` to ``.grad``; inside ``once`` only add them to those of the
        block."""
        if self._delayed is not None:
            for index, grad in arrived.items():
                wide = grad.to(_reduction_dtype(grad.dtype))
                self._delayed[index] = self._delayed[index] + wide if index in self._delayed else wide
            return
        for bucket in self._buckets:
            for index, mean in _mean_of_bucket(self._parameters, bucket, arrived, self._mesh.fsdp_group).items():
                _add(self._parameters[index], mean)


@torch.no_grad()
def sum_over(parameter: Tensor, group: dist.ProcessGroup | None) -> None:
    """Replace ``parameter.grad`` in place by its sum over the ranks of ``group``, formed in fp32 (fp64 for fp64).

    Args:
        parameter: has a gradient on every rank, whose dtype stays. Of a sharded gradient (DTensor) the local shards are summed.
        group: the ranks that hold a copy, each of which must call this; None: all ranks.
    """
    assert parameter.grad is not None
    mine = local_part(parameter.grad)
    total = mine.to(_reduction_dtype(mine.dtype), copy=True)
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
        ModelError: on every rank alike, for sharded parameters, or where names, shapes or dtypes differ between ranks.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    difference = first_difference(gather_or_raise(lambda: _whole_parameters(trained), mesh.world_group))
    if difference is not None:
        name, first, rank, other = difference
        raise ModelError(
            f"average_gradients was given different modules: parameter {name} is {first} on rank 0 and {other} on rank {rank}; "
            f"pass the same module with the same trained parameters on every rank"
        )
    parameters = list(trained.values())
    for bucket in _buckets(parameters):
        found = {index: grad for index in bucket if (grad := parameters[index].grad) is not None}
        for index, mean in _mean_of_bucket(parameters, bucket, found, mesh.loss_group).items():
            parameters[index].grad = mean.to(parameters[index].dtype, copy=True)


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


def _mean_of_bucket(
    parameters: list[nn.Parameter], bucket: list[int], found: dict[int, Tensor], group: dist.ProcessGroup
) -> dict[int, Tensor]:
    """The mean over the ranks of ``group`` of the gradients of one bucket, by one all-reduce.

    Args:
        parameters, bucket: all parameters, and the indices of those of this bucket.
        found: this rank's gradients by index; the entries of the bucket are removed.
        group: the ranks that hold the parameters.

    Returns:
        The mean by index, in fp32 or fp64. A rank without a gradient counts as zero; a parameter for which no rank has one is
        left out.
    """
    sizes = [local_part(parameters[index]).numel() for index in bucket]
    first = parameters[bucket[0]]
    flat = torch.zeros(sum(sizes) + len(bucket), dtype=_reduction_dtype(first.dtype), device=first.device)
    *pieces, present = torch.split(flat, [*sizes, len(bucket)])
    ones = torch.tensor([float(index in found) for index in bucket], dtype=flat.dtype, device="cpu")
    # one copy for the bucket: an element written on a GPU would be a wait for each parameter
    present.copy_(ones.pin_memory() if flat.device.type != "cpu" else ones, non_blocking=True)
    for piece, index in zip(pieces, bucket):
        if index in found:
            piece.copy_(found.pop(index).flatten())
    if group.size() > 1:
        dist.all_reduce(flat, group=group)
    return {
        index: piece.div_(group.size()).view(local_part(parameters[index]).shape)
        for index, piece, ranks in zip(bucket, pieces, present.tolist())
        if ranks
    }


class _Arrived(dict[int, Tensor]):
    """{index of a parameter: this rank's gradient of it} of one backward.

    It is a class because a plain dict cannot be referenced weakly.
    """


def _reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients of parameters of ``dtype`` are averaged: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _buckets(parameters: list[nn.Parameter]) -> list[list[int]]:
    """The indices of ``parameters``, in order, cut into buckets of one dtype and device and of about ``BUCKET_BYTES`` bytes
    each.

    A bucket is reduced by one all-reduce.
    """
    buckets: list[list[int]] = []
    kind, free = None, 0
    for index, parameter in enumerate(parameters):
        dtype = _reduction_dtype(parameter.dtype)
        size = local_part(parameter).numel() * dtype.itemsize
        if (dtype, parameter.device) != kind or size > free:
            buckets.append([])
            kind, free = (dtype, parameter.device), BUCKET_BYTES
        buckets[-1].append(index)
        free -= size
    return buckets


def _add(parameter: nn.Parameter, mean: Tensor) -> None:
    """Add ``mean`` to ``parameter.grad`` in place; where it is None, set it, in the parameter's dtype."""
    if parameter.grad is None:
        parameter.grad = _placed_as(parameter, mean.to(parameter.dtype, copy=True))
    else:
        local_part(parameter.grad).add_(mean)


def _placed_as(like: Tensor, local: Tensor) -> Tensor:
    """``local``, this rank's shard, as a DTensor with the mesh, placements and shape of ``like``; ``local`` if that is no
    DTensor."""
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())

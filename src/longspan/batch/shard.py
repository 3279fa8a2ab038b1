"""Every rank's part of a batch, and whole rows again. Knows nothing of attention or models.

    shard_batch = sync_batches(shard_local(...))

    whole batch  --shard_local-->  my tokens + BatchInfo  --sync_batches-->  the same, with num_labels of all ranks
       [B, N]       (no ranks)        [B, n]               (one all-reduce)

Everything that changes from step to step is in the one frozen ``BatchInfo``, which reaches attention and the loss as the
keyword ``longspan`` of the model's call (context.py). cut.py cuts, labels.py shifts, agreement.py compares.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, overload

import torch
from jaxtyping import Num
from torch import Tensor

from longspan.batch.agreement import sync_batches
from longspan.batch.context import Part
from longspan.batch.cut import cut_row
from longspan.batch.encoder_decoder import cut_pair, has_two_rows
from longspan.distributed.collectives import all_gather
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.mesh import ParallelMesh, refuse_no_mesh
from longspan.errors import BatchError, LongspanError
from longspan.masks.constructors import Mask


@overload
def shard_batch(
    batch: Mapping[str, Any],
    mesh: ParallelMesh,
    *,
    shift: bool = True,
    mask: Mask | Sequence[Mask] | None = None,
    dims: Mapping[str, int] | None = None,
) -> Part: ...


@overload
def shard_batch(
    batch: Sequence[Mapping[str, Any]],
    mesh: ParallelMesh,
    *,
    shift: bool = True,
    mask: Mask | Sequence[Mask] | None = None,
    dims: Mapping[str, int] | None = None,
) -> list[Part]: ...


def shard_batch(
    batch: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    mesh: ParallelMesh,
    *,
    shift: bool = True,
    mask: Mask | Sequence[Mask] | None = None,
    dims: Mapping[str, int] | None = None,
) -> Part | list[Part]:
    """A rank's part of a batch, or its parts of the micro-batches of one accumulated step; every rank calls it once a step.

    The ranks of a sequence pass the same whole batch, each data replica its own rows; a replica without a row passes
    ``input_ids`` and ``labels`` of shape [0, N] (and ``decoder_input_ids`` [0, M], where the others do) and still joins. Over a
    list the labels are counted once for all, so the sum of the losses is the loss of one device. ``shift=False`` is for models
    that predict a token in its own place: masked LMs, and encoder-decoders, whose batch has ``decoder_input_ids``
    (``shift_right`` makes them of the labels).

    Args:
        batch: tensors [batch, tokens, ...] by name, or a list of such micro-batches.
        mesh: the ranks.
        shift: whether each token predicts the next one, so that ``labels`` are shifted on the whole row.
        mask: who sees whom, for all rows or one for each row; None: each layer's own mask.
        dims: {name of a tensor: its dim of tokens}, for tensors that are not known by name; None: there are none.

    Returns:
        ``Part`` for a mapping, a list of them for a list: this rank's tensors on ``mesh.device``, and under ``longspan`` the
        BatchInfo. Pass batches in host memory, as a DataLoader gives them: their content is read to be compared.

    Raises:
        LayoutError: ``mesh`` is no ParallelMesh.
        BatchError: for a batch that cannot be cut or that differs between the ranks of a sequence, on every rank alike.
        MaskError: for a mask of another length, on every rank alike.
    """
    refuse_no_mesh(mesh)
    micro_batches: Any = [batch] if isinstance(batch, Mapping) else batch
    parts: list[Part] = []
    problem: LongspanError | None = None
    try:
        _refuse_no_batch(micro_batches)
        whole = [_on_host(one) for one in micro_batches]
        parts = [shard_local(one, mesh.coordinate, shift=shift, mask=mask, dims=dims) for one in whole]
    except LongspanError as error:
        problem = error
    except Exception as error:
        problem = BatchError(f"{type(error).__name__}: {error}")
        problem.__cause__ = error
    agreed = [on_device(part, mesh.device) for part in sync_batches(parts, mesh, error=problem)]
    return agreed[0] if isinstance(batch, Mapping) else agreed


def on_device(part: Part, device: torch.device) -> Part:
    """A copy of ``part`` with its tensors on ``device``; a tensor that is there already is the same object.

    Tensors of host memory are pinned and copied without waiting for the device.
    """
    return {name: _moved(value, device) if isinstance(value, Tensor) else value for name, value in part.items()}


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """One tensor on ``device``; host memory without a gradient is pinned first, so that the copy does not block."""
    if device.type == "cpu" or tensor.device == device:
        return tensor.to(device)
    return (tensor.pin_memory() if tensor.device.type == "cpu" and not tensor.requires_grad else tensor).to(
        device, non_blocking=True
    )


def _on_host(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A copy of ``batch`` with its integer and boolean tensors in host memory, where they are hashed and counted."""
    return {
        name: value.cpu() if isinstance(value, Tensor) and not value.is_floating_point() else value
        for name, value in batch.items()
    }


def _refuse_no_batch(micro_batches: Any) -> None:
    """Raise BatchError if ``micro_batches`` is neither a mapping of tensors by name nor a list of such mappings."""
    whole = (
        [micro_batches] if isinstance(micro_batches, Tensor | str) or not isinstance(micro_batches, Sequence) else micro_batches
    )
    for given in whole:
        if not isinstance(given, Mapping):
            shape = f" of shape {list(given.shape)}" if isinstance(given, Tensor) else ""
            raise BatchError(
                f"shard_batch was given a {type(given).__name__}{shape} as a batch; pass tensors by name, like "
                f'{{"input_ids": ids, "labels": ids}}, or a list of such micro-batches'
            )
    if not whole:
        raise BatchError("shard_batch was given no micro-batch; pass at least one, without rows one of shape [0, tokens]")


def shard_local(
    batch: Mapping[str, Any],
    coordinate: MeshCoordinate,
    *,
    shift: bool = True,
    mask: Mask | Sequence[Mask] | None = None,
    dims: Mapping[str, int] | None = None,
) -> Part:
    """The tensors of ``batch`` [batch, tokens, ...] cut to the tokens of the rank at ``coordinate``, without other ranks.

    A worker of a DataLoader may call it, because it needs no communication. Before training, ``sync_batches`` completes the
    BatchInfo, whose ``num_labels`` counts this batch alone until then.

    Args:
        batch: tensors of whole rows by name.
        coordinate: the place of a rank in the mesh (``mesh.coordinate``).
        shift: whether each token predicts the next one, so that ``labels`` are shifted on the whole row.
        mask: who sees whom, for all rows or one for each row; None: each layer's own mask.
        dims: {name of a tensor: its dim of tokens}, for tensors that are not known by name; None: there are none.

    Returns:
        The cut tensors and, under ``longspan``, the BatchInfo. ``position_ids`` in the whole row are added where there are
        none, and with ``shift`` the ``shift_labels``: labels shifted on the whole row, then cut.

    Raises:
        BatchError: the batch cannot be cut.
        MaskError: a mask has another length.
    """
    cut = cut_pair if has_two_rows(batch) else cut_row
    return cut(batch, coordinate, shift=shift, mask=mask, dims=dims or {})


def unshard(tensor: Num[Tensor, "*part"], mesh: ParallelMesh, dim: int = 1, tokens: int | None = None) -> Num[Tensor, "*whole"]:
    """The whole row, put together on every rank from the tokens that each rank of the sequence holds along ``dim``.

    It is the inverse of the cut by ``shard_batch``, and differentiable: the gradient of a rank's part is the sum, over all
    ranks of the sequence, of the gradients of the tokens that are in it.

    Args:
        tensor: this rank's tokens, as part of a model's output: [batch, my tokens, ...] for ``dim=1``.
        mesh: the ranks; all ranks of a sequence call it.
        dim: the dim of tokens.
        tokens: tokens of the whole row (``BatchInfo.tokens``). None: every rank has equally many.

    Returns:
        A tensor with the whole row along ``dim``, in the row's order.

    Raises:
        LayoutError: ``mesh`` is no ParallelMesh.
        BatchError: ``dim`` has not as many tokens as this rank holds of a row of ``tokens``.
    """
    refuse_no_mesh(mesh)
    coordinate = mesh.coordinate
    sequence = coordinate.sequence_ranks
    whole = tokens if tokens is not None else tensor.shape[dim] * sequence
    layout = coordinate.layout(max(whole, sequence))  # shard_batch has lengthened a row shorter than its ranks
    ranks = product(*map(range, (coordinate.ring, coordinate.ulysses, coordinate.tensor)))
    owned = [layout.mine(*rank) for rank in ranks]
    sizes = [sum(map(len, runs)) for runs in owned]
    mine = sizes[coordinate.sequence_rank]
    if tensor.shape[dim] != mine:
        raise BatchError(
            f"unshard was given {tensor.shape[dim]} tokens in dim {dim}, but this rank holds {mine} of tokens={layout.tokens}; "
            f"pass tokens= the length of the whole row (BatchInfo.tokens)"
        )
    gathered = all_gather(tensor, mesh.sequence_group, mesh.transport, dim, sizes)
    if not coordinate.zigzag:
        return gathered.narrow(dim, 0, whole)
    order = torch.cat([torch.arange(run.start, run.stop, device="cpu") for runs in owned for run in runs])
    return gathered.index_select(dim, order.argsort()[:whole].to(gathered.device))

"""Predictions of an evaluation, gathered from all ranks: every row of all data replicas and every token of a row.

token-wise function     my logits --function--> [rows, my tokens, ...] --gather--> [all rows, all tokens, ...]
any other function      my logits --gather--> [all rows, all tokens, V] --function-->  its result           V: vocabulary
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longspan.batch.context import BatchInfo
from longspan.batch.labels import IGNORE
from longspan.batch.shard import unshard
from longspan.distributed.collectives import all_gather
from longspan.distributed.consensus import gather
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError

PROBE_ROWS, PROBE_TOKENS = 2, 7
"""The size of the random logits on which ``is_token_wise`` tests a function."""


def single(values: tuple[Any, ...] | None) -> Any:
    """Undo Trainer's tuple around one output or label: ``values[0]`` of a tuple of one element, else ``values`` unchanged,
    also None."""
    return values[0] if values is not None and len(values) == 1 else values


def gather_output(name: str, mine: Any, info: BatchInfo, mesh: ParallelMesh) -> Any:
    """Gather one output of the model from all ranks: a collective.

    Args:
        name: the name of the output; the encoder's outputs of an encoder-decoder begin with ``encoder_``.
        mine: this rank's output [rows, my tokens, ...], or a tuple or list of such tensors.
        info: the BatchInfo of the call.
        mesh: the mesh of the model.

    Returns:
        On every rank the output [rows of all data replicas, tokens, ...], detached, in the dtype and structure of ``mine``.
        Rows and tokens are in the order of the batch; rows shorter than another replica's are padded with -100.

    Raises:
        BatchError: for an output whose dim 1 is not this rank's tokens.
    """
    if isinstance(mine, tuple | list):
        return type(mine)(gather_output(name, each, info, mesh) for each in mine)
    if info.target is not None and not name.startswith("encoder_"):
        info = info.target
    if not isinstance(mine, Tensor) or mine.ndim < 2 or mine.shape[1] != sum(map(len, info.positions)):
        raise BatchError(
            f"the model's output {name!r} has no dim of tokens that could be gathered; leave it out with ignore_keys, or "
            f"evaluate with prediction_loss_only=True"
        )
    mine = mine.detach()
    carried = mine.to(torch.uint8) if mine.dtype == torch.bool else mine  # gloo has no collective of booleans
    return gather_replicas(unshard(carried, mesh, tokens=info.given_tokens), mesh).to(mine.dtype)


def gather_replicas(rows: Tensor, mesh: ParallelMesh) -> Tensor:
    """Gather ``rows`` [rows, tokens, ...] of every data replica along dim 0, in the order of the replicas: a collective.

    Every rank gets the result. Replicas may differ in rows and tokens; shorter rows are padded at their end with -100.
    """
    replicas = gather(tuple(rows.shape), mesh.world_group)[:: mesh.coordinate.sequence_ranks]
    longest = max(shape[1] for shape in replicas)
    padding = [0, 0] * (rows.ndim - 2) + [0, longest - rows.shape[1]]
    padded = F.pad(rows.to(mesh.device), padding, value=IGNORE).contiguous()
    return all_gather(padded, mesh.data_group, mesh.transport, 0, [shape[0] for shape in replicas])


def sum_over_replicas(count: int | float, mesh: ParallelMesh) -> float:
    """The sum over data replicas of ``count``, which must be equal on all ranks of a replica. Every rank must call it."""
    total = torch.tensor(count, dtype=torch.float64, device="cpu")
    dist.all_reduce(total, group=mesh.world_group)
    return total.item() / mesh.coordinate.sequence_ranks


def is_token_wise(function: Callable[[Any, Any], Any], logits: Any, labels: Any) -> bool:
    """Whether ``function(logits, labels)`` computes each token's result from that token's logits and label only.

    Tested on random logits and labels [2, 7, ...] with the trailing dims of the given ones: the result must be [2, 7, ...],
    and the function of a block of rows and tokens must equal that block of the whole result. A function that raises,
    returns anything but tensors, or gives another result for equal arguments is not token-wise.

    Args:
        function: ``preprocess_logits_for_metrics`` of a Trainer.
        logits: this rank's outputs [rows, my tokens, ...], a tensor or a tuple as Trainer passes them.
        labels: this rank's labels [rows, my tokens], a tensor, a tuple or None.

    Returns:
        False also for a function that depends on other tokens only for other values than the random ones.
    """
    try:
        generator = torch.Generator(device="cpu").manual_seed(0)
        fake_logits = _map(logits, lambda x: _random_like(x, generator))
        vocab = min(leaf.shape[-1] for leaf in _leaves(fake_logits))
        fake_labels = _map(labels, lambda x: _random_labels(x, vocab, generator))
        whole = function(_map(fake_logits, Tensor.clone), _map(fake_labels, Tensor.clone))
        if any(leaf.shape[:2] != (PROBE_ROWS, PROBE_TOKENS) for leaf in _leaves(whole)):
            return False
        for rows in (slice(0, 1), slice(1, 2), slice(0, 2)):
            for tokens in (slice(0, 1), slice(1, 4), slice(4, 7)):
                part = function(*(_map(x, lambda leaf: leaf[rows, tokens].clone()) for x in (fake_logits, fake_labels)))  # noqa: B023
                for one, other in zip(_leaves(part), _leaves(_map(whole, lambda leaf: leaf[rows, tokens])), strict=True):  # noqa: B023
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
    except Exception:  # whatever a function of the user raises on other shapes than it expects
        return False
    return True


def apply_token_wise(function: Callable[[Any, Any], Any], logits: Any, labels: Any) -> Any:
    """``function(logits, labels)`` of this rank's tokens, for a token-wise function. A replica without rows gets no rows.

    Args:
        function: ``preprocess_logits_for_metrics`` of a Trainer, for which ``is_token_wise`` is True.
        logits, labels: of this rank's tokens, [rows, my tokens, ...]. Without rows, the function is called with one row of
            zeros, and that row of the result is removed.

    Returns:
        The function's result, [rows, my tokens, ...].
    """
    if all(leaf.shape[0] for leaf in _leaves(logits)):
        return function(logits, labels)
    dummy = (_map(x, lambda leaf: leaf.new_zeros(1, *leaf.shape[1:])) for x in (logits, labels))
    return _map(function(*dummy), lambda leaf: leaf[:0])


def my_labels(part: Mapping[str, Any], names: list[str], tokens: int) -> Any:
    """The labels in this rank's part of a batch, as Trainer passes labels: one tensor, or a tuple of several.

    Args:
        part: this rank's part.
        names: the names of its entries that are labels.
        tokens: the number of this rank's tokens.

    Returns:
        None if an entry is missing or is not [rows, ``tokens``, ...].
    """
    labels = tuple(part.get(name) for name in names)
    cut = all(isinstance(label, Tensor) and label.ndim > 1 and label.shape[1] == tokens for label in labels)
    return single(labels) if cut else None


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``function`` applied to each tensor of it: one tensor, or a nested tuple or list of them."""
    if isinstance(value, tuple | list):
        return type(value)(_map(each, function) for each in value)
    return None if value is None else function(value)


def _leaves(value: Any) -> list[Tensor]:
    """All tensors of ``value``, which is one tensor, a nested tuple or list of them, or something else."""
    if isinstance(value, tuple | list):
        return [leaf for each in value for leaf in _leaves(each)]
    if not isinstance(value, Tensor):
        raise TypeError(f"{type(value).__name__} is no tensor")
    return [value]


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A random tensor [2, 7, ...], drawn by ``generator``, with the dtype and the trailing dims of ``tensor``, to test a
    function."""
    shape = (PROBE_ROWS, PROBE_TOKENS, *tensor.shape[2:])
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(tensor.device, tensor.dtype)


def _random_labels(tensor: Tensor, vocab: int, generator: torch.Generator) -> Tensor:
    """Random labels [2, 7, ...] below ``vocab`` with the dtype and the trailing dims of ``tensor``."""
    shape = (PROBE_ROWS, PROBE_TOKENS, *tensor.shape[2:])
    labels = torch.randint(0, vocab, shape, generator=generator, device="cpu")
    labels[:, ::3] = IGNORE
    return labels.to(tensor.device, tensor.dtype)

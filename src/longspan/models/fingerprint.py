"""Facts about a model by which ranks are compared: a hash of every parameter and buffer, and whatever else is given as text.

    rank 0   {"norm.weight": "[64] torch.float32 trained=True 81fc...", "kernel": "auto", ...}
    rank 1   {...}                                                                                -->  all equal, or one error
    rank 2   {...}

One small exchange before the first data collective. Independent of the kind of model.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longspan.distributed.consensus import first_difference, gather_or_raise
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError


def agree(mesh: ParallelMesh, look: Callable[[], dict[str, str]]) -> None:
    """Call ``look`` on every rank and compare the results, {name: text}; return if all are equal.

    Raises:
        ModelError: on every rank alike, if a value differs between ranks; the message names it.
        LongspanError: on every rank alike, if ``look`` raised one on some rank.
    """
    difference = first_difference(gather_or_raise(look, mesh.world_group))
    if difference is not None:
        name, first, rank, other = difference
        raise ModelError(
            f"the model differs between ranks: {name} is {first} on rank 0 and {other} on rank {rank}; "
            f"build it with the same config and seed, or load the same checkpoint, on every rank"
        )


def fingerprints(model: nn.Module) -> dict[str, str]:
    """For every parameter and buffer, by name, a text of its shape, dtype, whether it is trained, and a hash of its content.

    Raises:
        ModelError: a parameter is sharded already, or on the meta device.
    """
    held = [*model.named_parameters(), *model.named_buffers()]
    return {name: f"{list(t.shape)} {t.dtype} trained={t.requires_grad} {_hash(t)}" for name, t in held}


def _hash(tensor: Tensor) -> str:
    """A hash of the tensor's content. Raises ModelError for a sharded tensor, or one on the meta device."""
    if isinstance(tensor, DTensor):
        raise ModelError("the model is sharded already; give it to parallelize whole, which shards it with zero=3")
    if tensor.is_meta:
        raise ModelError("the model is on the meta device; give it weights first: model.to_empty(device=...), then initialize")
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return hashlib.blake2b(content, digest_size=8).hexdigest()

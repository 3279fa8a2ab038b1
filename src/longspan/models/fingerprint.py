"""Facts about a model by which ranks are compared: a hash of every parameter and buffer; and the arguments of ``parallelize``.

    rank 0   {"norm.weight": "[64] torch.float32 trained=True 81fc...", ...}
    rank 1   {...}                                                                                -->  all equal, or one error
    rank 2   {...}

One small exchange of each before the first data collective. The hash of a tensor is formed where it is:

    its bits as integers          x0  x1  x2  ...
    weights, odd and mixed        w0  w1  w2  ...      hash = x0 w0 + x1 w1 + ...   modulo 2^64, piece by piece

A sum of integers modulo 2^64 does not depend on its order, so every device gives the same hash. The host reads all hashes of a
device at once. They are against accidents, not against attacks. Independent of the kind of model.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longspan.distributed.consensus import first_difference, gather, gather_or_raise
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import ModelError

PIECE = 2**20
"""Elements that are hashed at a time; they take 8 bytes each meanwhile."""
MIX, STEP = -0x61C8864680B583EB, -0x40A7B892E31B1A47
"""Odd integers of 64 bits without a pattern: the constants of splitmix64 (Steele, Lea and Flood, 2014)."""
INTEGERS = {1: torch.uint8, 2: torch.int16}
"""For the size of an element in bytes, the dtype that its bits are read as; int32 for all larger ones.

Not int64: its highest bits would meet the lowest of the weights alone, so that two changed signs could cancel.
"""


def agree(mesh: ParallelMesh, look: Callable[[], dict[str, str]]) -> None:
    """Call ``look`` on every rank and compare the results, {name: text}; return if all are equal.

    Raises:
        ModelError: on every rank alike, if a value differs between ranks; the message names it.
        LongspanError: on every rank alike, if ``look`` raised one on some rank.
    """
    remedy = "build it with the same config and seed, or load the same checkpoint, on every rank"
    _refuse_difference("the model differs", gather_or_raise(look, mesh.world_group), remedy)


def refuse_other_arguments(mesh: ParallelMesh, mine: Mapping[str, str]) -> None:
    """Raise ModelError on every rank alike if an argument of ``parallelize`` is not the same on all; otherwise return.

    Args:
        mesh: the ranks, each of which must call this.
        mine: this rank's arguments, {name: text}.
    """
    _refuse_difference("the arguments of parallelize differ", gather(mine, mesh.world_group), "pass the same on every rank")


def _refuse_difference(what: str, facts: Sequence[Mapping[str, str]], remedy: str) -> None:
    """Raise ModelError if the ``facts`` of the ranks, {name: text} each, are not all equal; it begins with ``what`` and ends
    with ``remedy``."""
    difference = first_difference(facts)
    if difference is not None:
        name, first, rank, other = difference
        raise ModelError(f"{what} between ranks: {name} is {first} on rank 0 and {other} on rank {rank}; {remedy}")


def fingerprints(model: nn.Module) -> dict[str, str]:
    """For every parameter and buffer, by name, a text of its shape, dtype, whether it is trained, and a hash of its content.

    Raises:
        ModelError: a parameter is sharded already, or on the meta device.
    """
    held = {name: tensor for named in (model.named_parameters(), model.named_buffers()) for name, tensor in named}
    for tensor in held.values():
        _refuse_without_content(tensor)
    hashes: dict[str, int] = {}
    for device in {tensor.device for tensor in held.values()}:
        here = {name: tensor for name, tensor in held.items() if tensor.device == device}
        bits = [_bits(tensor) for tensor in here.values()]
        weights_P = _weights(min(PIECE, max(map(len, bits))), device)
        hashes |= zip(here, torch.stack([_hash(each, weights_P) for each in bits]).tolist())
    return {
        name: f"{list(tensor.shape)} {tensor.dtype} trained={tensor.requires_grad} {hashes[name] % 2**64:016x}"
        for name, tensor in held.items()
    }


def _refuse_without_content(tensor: Tensor) -> None:
    if isinstance(tensor, DTensor):
        raise ModelError("the model is sharded already; give it to parallelize whole, which shards it with zero=3")
    if tensor.is_meta:
        raise ModelError("the model is on the meta device; give it weights first: model.to_empty(device=...), then initialize")


def _weights(count: int, device: torch.device) -> Tensor:
    """``count`` odd integers, int64, that depend on their index alone."""
    mixed = torch.arange(1, count + 1, device=device).mul_(MIX)
    mixed ^= mixed >> 31
    return mixed.mul_(STEP).bitwise_or_(1)


def _bits(tensor: Tensor) -> Tensor:
    """The bits of ``tensor`` as integers, flat; a view where it is contiguous."""
    return tensor.detach().contiguous().flatten().view(INTEGERS.get(tensor.element_size(), torch.int32))


def _hash(bits: Tensor, weights_P: Tensor) -> Tensor:
    """The hash of the integers ``bits``, an int64 scalar on their device."""
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece in bits.split(PIECE) if len(bits) else ():
        total = total * STEP + (piece * weights_P[: len(piece)]).sum()
    return total

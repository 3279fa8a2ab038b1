"""Whole tensors for sharded parameters: what one device saved is loaded by ``load_state_dict`` as it is.

    every rank reads [a b]   --load_state_dict-->   rank 0 [a ]   rank 1 [ b]

Without it PyTorch's ``load_state_dict`` ends half-way, because a DTensor cannot be copied from a plain tensor. Independent of
files and of training; without a collective.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def shard_like(value: Any, like: Any) -> Any:
    """Shard a whole tensor, which every rank holds, as the DTensor ``like`` is sharded. No collective.

    Returns:
        A DTensor on the mesh and with the placements of ``like``, if ``like`` is a DTensor and ``value`` a plain tensor of its
        shape; else ``value`` unchanged.
    """
    if not isinstance(like, DTensor) or type(value) is not Tensor or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_whole_tensors(model: nn.Module) -> None:
    """Register a hook on ``model`` with which ``load_state_dict`` accepts whole tensors for its sharded parameters.

    Each tensor, which every rank holds, is sharded as the parameter is.
    """
    model.register_load_state_dict_pre_hook(_shard_weights)


def _shard_weights(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Pre-hook of a module's ``load_state_dict``: shard its whole tensors in ``state``, in place, as its parameters are."""
    for name, own in module.state_dict().items():
        if prefix + name in state:
            state[prefix + name] = shard_like(state[prefix + name], own)

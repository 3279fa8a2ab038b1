"""State dicts of sharded models and optimizers, gathered for the checkpoint files of one device, and sharded again.

    zero=3   rank 0 [a ]  rank 1 [ b]   --gather_state-->   rank 0 [a b] on the CPU, the others None    -->  optimizer.pt
             rank 0 [a ]  rank 1 [ b]   <--shard_like----   every rank reads [a b] and keeps its shard  <--  optimizer.pt

The files are those that one device writes: one device continues from what four ranks wrote, and four ranks from what one
device wrote. Independent of files and of training.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def gather_state(state: Any, keep: bool) -> Any:
    """Gather every sharded tensor (DTensor) of a nested ``state``, one after the other. Every rank of the mesh must call it.

    Args:
        state: mappings, lists and tuples of tensors and other values.
        keep: whether this rank needs the result.

    Returns:
        The same structure. In place of a DTensor: the whole tensor on the CPU if ``keep``, else None. Any other value is
        unchanged.
    """
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(state, Mapping):
        return {name: gather_state(value, keep) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gather_state(value, keep) for value in state)
    return state


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


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A pre-hook of ``optimizer.load_state_dict``, for a state of whole tensors.

    Args:
        optimizer: holds parameters that may be sharded.
        state: the state dict of an optimizer over the whole parameters, matched to them by their order.

    Returns:
        A copy of ``state`` whose moments are sharded as their parameters are. A moment of another shape than its parameter
        (such as ``step``) is unchanged.
    """
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_number = dict(zip(numbers, parameters))
    moments = {
        number: {name: shard_like(value, by_number[number]) for name, value in held.items()}
        for number, held in state["state"].items()
    }
    return state | {"state": moments}

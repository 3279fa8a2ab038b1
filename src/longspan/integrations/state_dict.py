"""Sharded state in the files of one device, and back.

    zero=3   rank 0 [a ]  rank 1 [ b]   --whole-->   rank 0 [a b] on the CPU, the others nothing   -->  optimizer.pt
             rank 0 [a ]  rank 1 [ b]   <--spread--  every rank reads [a b] and keeps its part     <--  optimizer.pt

The files are those that one device writes: one device goes on with what four wrote, and four with what one wrote. Knows
state dicts; nothing of files or of training.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def whole(state: Any, keep: bool) -> Any:
    """``state`` with every sharded tensor gathered, one by one; on the CPU where ``keep``, else None. Every rank calls it."""
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(state, Mapping):
        return {name: whole(value, keep) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole(value, keep) for value in state)
    return state


def spread(value: Any, like: Any) -> Any:
    """This rank's part of a whole tensor, as ``like`` is sharded; anything else as it is. No collective."""
    if not isinstance(like, DTensor) or type(value) is not Tensor or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def read_whole_weights(model: nn.Module) -> None:
    """From now on ``model.load_state_dict`` takes whole tensors for sharded parameters."""
    model.register_load_state_dict_pre_hook(_spread_weights)


def _spread_weights(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, own in module.state_dict().items():
        if prefix + name in state:
            state[prefix + name] = spread(state[prefix + name], own)


def spread_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A hook of ``optimizer.load_state_dict``: the moments of each parameter as it is sharded."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of = dict(zip(numbers, parameters))
    moments = {
        number: {name: spread(value, of[number]) for name, value in held.items()} for number, held in state["state"].items()
    }
    return state | {"state": moments}

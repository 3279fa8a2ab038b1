"""State dicts of sharded models and optimizers, gathered for the checkpoint files of one device, and sharded again.

    zero=3   rank 0 [a ]  rank 1 [ b]   --gather_state-->   rank 0 [a b] on the CPU, the others None    -->  optimizer.pt
             rank 0 [a ]  rank 1 [ b]   <--shard_optimizer_state--  every rank reads [a b], keeps its shard <--  optimizer.pt

The files are those that one device writes: one device continues from what four ranks wrote, and four ranks from what one
device wrote. ``sharded_state`` and ``load_sharded_state`` leave tensors sharded, for PyTorch's distributed checkpoint.

Random generators: the CPU's draws what all ranks must draw alike, so there is one state for all. A device's draws a rank's own
dropout, so there is one for each rank, and a rank that the checkpoint does not know keeps the one that it has.
Independent of files and of training.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from longspan.distributed.whole_tensors import shard_like
from longspan.models.adapter import parallel_state

BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
"""Optimizer states and options by the names of parameters: a pipeline stage has other groups than the whole model."""

DEVICE_RANDOM = "device_random"
"""The entry of a checkpoint with the states of the devices' random generators: {"cuda.3": that of rank 3}."""


def sharded_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a distributed checkpoint holds of a run. Every rank must call it.

    Returns:
        {"model": weights, "optimizer": states by the names that parameters have in the whole model, "random": torch's CPU
        random state, and on a GPU "device_random": {name of this rank: its device's}}. Tensors are sharded as they are in
        ``model``; ``read_sharded_state`` writes into them.
    """
    states = _renamed(get_optimizer_state_dict(model, optimizer, options=BY_NAME), _copies(model))
    random = {"random": torch.get_rng_state(), **_device_random(_device(model))}
    return {"model": get_model_state_dict(model), "optimizer": states, **random}


def read_sharded_state(state: dict[str, Any], folder: Any) -> None:
    """Read a distributed checkpoint into ``state``, a ``sharded_state``, in place. Every rank must call it.

    Args:
        state: what is asked for; what the checkpoint holds beside it is not read.
        folder: the checkpoint. Where it holds no random state of this rank's device, that of ``state`` stays.

    Raises:
        CheckpointException: it is damaged, or lacks anything else.
    """
    load(state, checkpoint_id=folder, planner=_Planner())


def load_sharded_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put what was read into a ``sharded_state`` of the same model and optimizer into them. Every rank must call it."""
    set_model_state_dict(model, state["model"])
    states = _renamed(state["optimizer"], {first: second for second, first in _copies(model).items()})
    set_optimizer_state_dict(model, optimizer, states, options=BY_NAME)
    torch.set_rng_state(state["random"])
    device = _device(model)
    for random in state.get(DEVICE_RANDOM, {}).values():
        torch.get_device_module(device).set_rng_state(random, device)


class _Planner(DefaultLoadPlanner):
    """PyTorch's plan for reading a checkpoint, without the random states of devices that the checkpoint does not hold."""

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        held = {} if metadata is None else metadata.state_dict_metadata
        self.state_dict = {
            name: value for name, value in self.state_dict.items() if name in held or not name.startswith(f"{DEVICE_RANDOM}.")
        }


def _device(model: nn.Module) -> torch.device:
    """The device on which this rank computes: that of the mesh of a parallel model, else that of the first parameter."""
    state = parallel_state(model)
    return next(model.parameters()).device if state is None else state.mesh.device


def _device_random(device: torch.device) -> dict[str, dict[str, Tensor]]:
    """The entry of a checkpoint with the random state of this rank's ``device``; none for the CPU, whose state all share."""
    if device.type == "cpu":
        return {}
    rank = dist.get_rank() if dist.is_initialized() else 0
    return {DEVICE_RANDOM: {f"{device.type}.{rank}": torch.get_device_module(device).get_rng_state(device)}}


def _copies(model: nn.Module) -> dict[str, str]:
    """The names of the weights on this pipeline stage that are copies of a tied weight of the first stage: {name here: name
    there}.

    The name on the first stage is that in the whole model. Empty without a pipeline, and on stages without a copy.
    """
    state = parallel_state(model)
    return {} if state is None or state.pipeline is None else state.pipeline.copy_names


def _renamed(states: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """``states`` with other names of parameters in its keys "state.NAME.FIELD" and "param_groups.NAME.FIELD".

    ``names``: {name: other name}; names that are not in it stay.
    """
    renamed = {}
    for key, value in states.items():
        kind, _, rest = key.partition(".")
        name, _, field = rest.rpartition(".")
        renamed[f"{kind}.{names.get(name, name)}.{field}"] = value
    return renamed


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

"""The device that tests follow: LONGSPAN_TEST_DEVICE, "cpu" where it is not set. Imports torch alone."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map_only

DEVICE = torch.device(os.environ.get("LONGSPAN_TEST_DEVICE", "cpu"))


def launches(profile: torch.profiler.profile) -> int:
    """How many kernels a profile saw start on the GPU."""
    return sum(event.count for event in profile.key_averages() if event.key.startswith("cudaLaunchKernel"))


def occupy() -> None:
    """Keep the GPU's current stream busy for some milliseconds, so that what does not wait for it comes too early."""
    if DEVICE.type == "cuda":
        torch.cuda._sleep(20_000_000)


class MadeOn(TorchFunctionMode):
    """A mode in which tensors that are made without a device are made on this one, by tests that do not know of it.

    Random numbers are drawn on the CPU, so that they are the same on every device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.factories = device, _device_constructors()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.factories or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        if func.__name__.startswith(("rand", "normal")):
            return moved(func(*args, **kwargs | {"device": torch.device("cpu")}), self.device)
        return func(*args, **kwargs | {"device": self.device})


def moved(tree: Any, device: torch.device) -> Any:
    """The tensors in lists, tuples and dicts on ``device``, as leaves; all else, and tensors that are there, unchanged."""

    def move(x: Tensor) -> Tensor:
        return x if x.device == device else x.detach().to(device).requires_grad_(x.requires_grad)

    return tree_map_only(Tensor, move, tree)


def call_on_device(body: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """``body(*args)`` of a rank on ``DEVICE``; what it returns is on the CPU, because it goes to another process."""
    if DEVICE.type == "cpu":
        return body(*args)
    with MadeOn(DEVICE):
        return moved(body(*moved(args, DEVICE)), torch.device("cpu"))

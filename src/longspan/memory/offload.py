"""Activation offload: what a block saves for its backward is kept in host memory until that backward begins.

    forward    block 0 --saves--> host   block 1 --saves--> host   ...   last block keeps its own
    backward                                    host --> block 1                host --> block 0

On CUDA the copies run on a stream of their own, from and to pinned memory, beside the kernels. On a CPU the host is the same
memory: nothing is gained there, and the same code runs. (The CUDA side has never run on a GPU.)
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

OFFLOAD_BYTES = 2**20
"""Smaller tensors stay on the device: a copy would cost more than it frees."""


def offload_activations(block: nn.Module) -> None:
    """Change ``block`` in place so that the tensors it saves for its backward are kept in host memory.

    Parameters stay where they are. ``vars(block).pop("forward")`` undoes it.

    Args:
        block: a module whose backward runs some time after its forward; the last block of a model gains nothing.
    """
    vars(block)["forward"] = partial(_forward_offloaded, block, block.forward)


def _forward_offloaded(block: nn.Module, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    copies: dict[object, tuple[Tensor, _HostCopy]] = {}  # the tensor itself is held, so that its address means no other

    def pack(x: Tensor) -> Tensor | _HostCopy:
        size = min(x.numel() * x.element_size(), x.untyped_storage().nbytes())  # an expanded tensor has less than it shows
        if size < OFFLOAD_BYTES or x.untyped_storage().data_ptr() in parameters:
            return x
        same = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)  # saved by q, k and v alike, it is copied once
        if same not in copies:
            copies[same] = (x.detach(), _HostCopy(x))
        return copies[same][1]

    with saved_tensors_hooks(pack, lambda kept: kept.restore() if isinstance(kept, _HostCopy) else kept):
        output = forward(*args, **named)
    copies.clear()
    return output


class _HostCopy:
    """A tensor copied to host memory, and the way back to its device."""

    def __init__(self, x: Tensor) -> None:
        self.device = x.device
        self.host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
        if not x.is_cuda:
            self.host.copy_(x)
            return
        copying = _copy_stream(x.device)
        copying.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(copying):
            self.host.copy_(x, non_blocking=True)
        x.record_stream(copying)  # its memory is free for others only when the copy has read it

    def restore(self) -> Tensor:
        if self.device.type != "cuda":
            return self.host.to(self.device)
        now, copying = torch.cuda.current_stream(self.device), _copy_stream(self.device)
        with torch.cuda.stream(copying):
            x = self.host.to(self.device, non_blocking=True)
        now.wait_stream(copying)
        x.record_stream(now)
        return x


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for copies, so that kernels need not wait for them."""
    return torch.cuda.Stream(device)

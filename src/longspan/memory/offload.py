"""Activation offload: the tensors that a block saves for its backward are kept in host memory until then.

    forward    block 0 --saves--> host   block 1 --saves--> host   ...   last block saves on the device
    backward                                    host --> block 1                host --> block 0

On CUDA the copies use pinned memory and a stream of their own, and overlap with the kernels; this has never run on a GPU. On a
CPU the same code runs without any gain, because the host is the same memory.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from longspan import _compat

OFFLOAD_BYTES = 2**20
"""The smallest tensor (bytes) that is offloaded; copying smaller ones costs more than it frees."""


def offload_activations(block: nn.Module) -> None:
    """Change ``block`` in place so that the tensors that its forward saves for the backward are kept in host memory.

    Parameters stay on the device. It replaces ``block.forward`` on the instance, so ``vars(block).pop("forward")`` undoes it.

    Args:
        block: a module whose backward does not directly follow its forward; the last block of a model gains nothing.
    """
    vars(block)["forward"] = partial(_forward_offloaded, block, block.forward)


def _forward_offloaded(block: nn.Module, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Call ``forward`` with hooks that move the tensors it saves for the backward to host memory; return its result.

    Parameters of ``block``, and tensors below ``OFFLOAD_BYTES``, stay on the device.
    """
    parameters = {_storage(parameter) for parameter in block.parameters()}
    copies: dict[object, tuple[Tensor, _HostCopy]] = {}  # holding the tensor keeps its address from being reused

    def pack(x: Tensor) -> Tensor | _HostCopy:
        size = min(x.numel() * x.element_size(), x.untyped_storage().nbytes())  # an expanded tensor has a smaller storage
        if size < OFFLOAD_BYTES or x.untyped_storage().data_ptr() in parameters:
            return x
        same = (
            x.data_ptr(),
            x.shape,
            x.stride(),
            x.dtype,
            _compat.changes_in_place(x),
        )  # several operators save it; it is copied once
        if same not in copies:
            copies[same] = (x.detach(), _HostCopy(x))
        return copies[same][1]

    with saved_tensors_hooks(pack, lambda kept: kept.restore() if isinstance(kept, _HostCopy) else kept):
        output = forward(*args, **named)
    copies.clear()
    return output


class _HostCopy:
    """A copy of the tensor ``x`` in host memory, which is begun when it is made; ``restore`` copies it back for the
    backward."""

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
        x.record_stream(copying)  # its memory may be reused only after the copy has read it

    def restore(self) -> Tensor:
        """A new copy of the tensor on the device of the original. On CUDA it may still be arriving; operators called later
        wait for it."""
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
    """The CUDA stream for copies between ``device`` and host memory, which run beside the kernels; the same one at every
    call."""
    return torch.cuda.Stream(device)


@torch.no_grad()
def _storage(parameter: Tensor) -> int:
    """The address of a parameter's memory, to recognise it; of a weight that is cut over tensor ranks, of this rank's part."""
    held: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return held.untyped_storage().data_ptr()

"""Activation offload: the tensors that a block saves for its backward are kept in host memory until then.

    forward    block 0 --saves--> host   block 1 --saves--> host   ...   last block saves on the device
    backward                                    host --> block 1 | host --> block 0     fetched while block 1 computes

On CUDA the copies use pinned memory and a stream of their own, and overlap with the kernels. The forward waits until at most
``IN_FLIGHT`` blocks are on their way to the host, because a host that runs ahead would leave them all on the device. This has
never run on a GPU. On a CPU the same code runs without any gain, because the host is the same memory.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from longspan import _compat

OFFLOAD_BYTES = 2**20
"""The smallest tensor (bytes) that is offloaded; copying smaller ones costs more than it frees."""
IN_FLIGHT = 2
"""How many blocks' copies to the host may be unfinished."""


def offload_activations(blocks: Sequence[nn.Module]) -> None:
    """Change ``blocks`` in place so that the tensors that their forwards save for the backward are kept in host memory.

    Parameters stay on the device, and so do tensors computed from one parameter alone, such as its cast under autocast. It
    replaces ``block.forward`` on the instances, so ``vars(block).pop("forward")`` undoes it.

    Args:
        blocks: modules in the order of the forward, whose backwards do not directly follow their forwards; the last block of a
            model gains nothing.
    """
    chain = _Chain()
    for index, block in enumerate(blocks):
        vars(block)["forward"] = partial(_forward_offloaded, chain, index, block, block.forward)


def _forward_offloaded(
    chain: "_Chain", index: int, block: nn.Module, forward: Callable[..., Any], *args: Any, **named: Any
) -> Any:
    """Call ``forward`` with hooks that move the tensors it saves for the backward to host memory; return its result.

    Parameters of ``block``, what is computed from one of them alone, and tensors below ``OFFLOAD_BYTES`` stay on the device.
    ``index`` is the place of ``block`` in ``chain``.
    """
    parameters = list(block.parameters())
    storages, known = {_storage(parameter) for parameter in parameters}, set(map(id, parameters))
    offloaded = chain.follow(index)
    # several operators save a tensor; it is copied once, and holding it keeps its address from being reused
    copies: dict[object, tuple[Tensor, _HostCopy]] = {}

    def pack(x: Tensor) -> "Tensor | _Saved":
        size = min(x.numel() * x.element_size(), x.untyped_storage().nbytes())  # an expanded tensor has a smaller storage
        if size < OFFLOAD_BYTES or x.untyped_storage().data_ptr() in storages or _is_of_one_parameter(x, known):
            return x
        same = (x.data_ptr(), x.shape, x.stride(), x.dtype, _compat.version_counter(x))
        if same not in copies:
            copies[same] = (x.detach(), offloaded.add(x))
        return _Saved(offloaded, copies[same][1])

    with saved_tensors_hooks(pack, lambda kept: kept.restore() if isinstance(kept, _Saved) else kept):
        output = forward(*args, **named)
    copies.clear()
    chain.wait_for_earlier(offloaded)
    return output


class _Chain:
    """The blocks of one model: which block's tensors are fetched next in a backward, and which are on their way to the host."""

    def __init__(self) -> None:
        self._last: Callable[[], _OffloadedBlock | None] = lambda: None
        self._unfinished: deque[torch.cuda.Event] = deque()

    def follow(self, index: int) -> "_OffloadedBlock":
        """A record of the tensors of block ``index`` in this forward, after that of the block before it."""
        last = self._last()
        offloaded = _OffloadedBlock(index, last if last is not None and last.index == index - 1 else None)
        self._last = ref(offloaded)  # the graph holds it
        return offloaded

    def wait_for_earlier(self, offloaded: "_OffloadedBlock") -> None:
        """Wait on the host until no more than ``IN_FLIGHT`` blocks are on their way to the host, ``offloaded`` among them."""
        if (copied := offloaded.copied()) is not None:
            self._unfinished.append(copied)
        while len(self._unfinished) > IN_FLIGHT:
            self._unfinished.popleft().synchronize()


class _OffloadedBlock:
    """The host copies of what one forward of one block saved; as its backward begins, those of the block before are fetched."""

    def __init__(self, index: int, before: "_OffloadedBlock | None") -> None:
        self.index, self._before = index, before
        self._copies: list[_HostCopy] = []
        self._fetched = False

    def add(self, x: Tensor) -> "_HostCopy":
        """Start to copy ``x`` to the host."""
        self._copies.append(_HostCopy(x))
        return self._copies[-1]

    def copied(self) -> torch.cuda.Event | None:
        """An event after all copies to the host; None where there is nothing to wait for."""
        devices = {copy.device for copy in self._copies if copy.device.type == "cuda"}
        return _copy_stream(devices.pop()).record_event() if devices else None

    def begin_backward(self) -> None:
        """Start the copies back to the device, of this block and of the one before; only at the first call."""
        before, self._before = self._before, None
        self._fetch()
        if before is not None:
            before._fetch()

    def _fetch(self) -> None:
        if not self._fetched:
            self._fetched = True
            for copy in reversed(self._copies):  # the backward needs first what was saved last
                copy.fetch()


class _Saved:
    """What the graph holds in place of a tensor: the host copy, and the block it is of."""

    def __init__(self, block: _OffloadedBlock, copy: "_HostCopy") -> None:
        self._block, self._copy = block, copy
        copy.uses += 1

    def restore(self) -> Tensor:
        """The tensor on its device."""
        self._block.begin_backward()
        return self._copy.restore()


class _HostCopy:
    """A copy of a tensor in host memory, made at once, and the way back to the device of the original.

    Attributes:
        device: of the original.
        uses: how often a backward asks for the tensor; its copy on the device is freed after the last time.
    """

    def __init__(self, x: Tensor) -> None:
        self.device, self.uses = x.device, 0
        self._asked = 0
        self._back: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self.host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
        if not x.is_cuda:
            self.host.copy_(x)
            return
        copying = _copy_stream(x.device)
        copying.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(copying):
            self.host.copy_(x, non_blocking=True)
        x.record_stream(copying)  # its memory may be reused only after the copy has read it

    def fetch(self) -> None:
        """Start the copy back to the device, unless it is there."""
        if self._back is not None:
            return
        if self.device.type != "cuda":
            self._back = self.host.to(self.device, copy=True)
            return
        copying = _copy_stream(self.device)
        self._back = torch.empty_like(self.host, device=self.device)  # of the computing stream, which frees it
        copying.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(copying):
            self._back.copy_(self.host, non_blocking=True)
        self._arrived = copying.record_event()

    def restore(self) -> Tensor:
        """The tensor on the device of the original. On CUDA, operators called after it wait for its content."""
        self.fetch()
        x, self._asked = self._back, self._asked + 1
        assert x is not None
        if self._arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived)
        if self._asked >= self.uses:
            self._back, self._arrived, self._asked = None, None, 0
        return x


@torch.no_grad()
def _is_of_one_parameter(x: Tensor, parameters: set[int]) -> bool:
    """Whether ``x`` was computed from one of the parameters (by id) and nothing else, as a cast under autocast is."""
    node = x.grad_fn
    while node is not None and (leaf := getattr(node, "variable", None)) is None:
        inputs = [before for before, _ in node.next_functions if before is not None]
        node = inputs[0] if len(inputs) == 1 else None
    return node is not None and id(leaf) in parameters


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

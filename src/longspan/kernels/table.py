"""Local attention over bands, forward and backward: one kernel a file, all with the interface of ``protocol.py``.

reference  dense fp64, the oracle           sdpa  PyTorch's fused flash operators
online     blocked softmax: softcap, bias, unequal dims, any dtype           flex  compiled block masks, CUDA only
"""

import torch

from longspan.errors import KernelError
from longspan.kernels.flex import Flex
from longspan.kernels.online import Online
from longspan.kernels.protocol import BoundBias, Kernel, Need, accumulation_dtype
from longspan.kernels.reference import Reference
from longspan.kernels.sdpa import SDPA

__all__ = ["KERNELS", "BoundBias", "Kernel", "Need", "accumulation_dtype", "choose", "refuse_unknown"]

# "auto" takes the first that can: order is preference
KERNELS = {kernel.name: kernel for kernel in (SDPA(), Online(), Flex(), Reference())}


def choose(
    kernel: str | Kernel,
    *,
    device_type: str,
    dtype: torch.dtype,
    qk_dim: int,
    v_dim: int,
    softcap: float | None = None,
    bias: object | None = None,
) -> Kernel:
    """The kernel of this name, or the fastest that can do it for "auto"; a kernel object is returned as it is.

    Raises KernelError for an unknown name, and for a kernel that lacks what is asked.
    """
    if not isinstance(kernel, str):
        return kernel
    refuse_unknown(kernel)
    need = Need(device_type, dtype, qk_dim, v_dim, softcap=softcap is not None, bias=bias is not None)
    reasons = {name: each.lacks(need) for name, each in KERNELS.items()}
    able = [name for name, reason in reasons.items() if reason is None]
    if kernel == "auto":
        return KERNELS[able[0]]
    if reasons[kernel] is not None:
        raise KernelError(f"kernel={kernel!r} cannot do this: {reasons[kernel]}; use {' or '.join(map(repr, able))}")
    return KERNELS[kernel]


def refuse_unknown(kernel: str) -> None:
    """Raise KernelError for a name that is none of a kernel, nor "auto"."""
    known = ["auto", *KERNELS]
    if kernel not in known:
        raise KernelError(f"kernel={kernel!r} is unknown; use {', '.join(map(repr, known))}, or a function of your own")

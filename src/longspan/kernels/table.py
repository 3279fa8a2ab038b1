"""The table of kernels by name, and the choice of one for an attention. One kernel a file, with the interface of protocol.py.

sdpa        PyTorch's fused flash attention operators, on CPU and CUDA
online      blocked online softmax in plain PyTorch: softcap, bias, unequal head dims, every dtype
flex        compiled FlexAttention, CUDA only
reference   dense attention in fp64
"""

from typing import NamedTuple

import torch

from longspan.errors import KernelError
from longspan.kernels.flex import Flex
from longspan.kernels.online import Online
from longspan.kernels.protocol import BoundBias, Kernel, Need, accumulation_dtype
from longspan.kernels.reference import Reference
from longspan.kernels.sdpa import SDPA

__all__ = ["KERNELS", "BoundBias", "Kernel", "Need", "accumulation_dtype", "choose", "refuse_unknown"]

KERNELS = {kernel.name: kernel for kernel in (SDPA(), Online(), Flex(), Reference())}
"""Every kernel by its name."""


class Preference(NamedTuple):
    """A row of ``PREFERENCES``, the order in which ``kernel="auto"`` tries the kernels on a type of device.

    Attributes:
        device_type: "cpu", "cuda".
        kernels: names of kernels, the fastest first.
        basis: what the order rests on: a measurement, or an assumption.
    """

    device_type: str
    kernels: tuple[str, ...]
    basis: str


PREFERENCES = (
    Preference("cuda", ("sdpa", "flex", "online", "reference"), "assumed: no kernel has run on a GPU"),
    Preference("cpu", ("sdpa", "online", "reference"), "measured on two CPU cores, docs/numbers.md"),
)
"""``kernel="auto"`` takes the first kernel of the device's row that supports the attention; other devices have the CPU's."""


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
    """The kernel to use for an attention.

    Args:
        kernel: the name of a kernel, "auto" for the first of ``PREFERENCES`` that supports the attention, or a ``Kernel``
            object, which is returned unchanged.
        device_type: "cpu" or "cuda".
        dtype: the dtype of q, k and v.
        qk_dim: the head dim of queries and keys.
        v_dim: the head dim of values.
        softcap: c if a score s is replaced by c·tanh(s/c); None without a softcap.
        bias: the bias of the scores, None without one.

    Returns:
        The kernel.

    Raises:
        KernelError: the name is unknown, or the named kernel does not support the attention; the message names those that do.
    """
    if not isinstance(kernel, str):
        return kernel
    refuse_unknown(kernel)
    need = Need(device_type, dtype, qk_dim, v_dim, softcap=softcap is not None, bias=bias is not None)
    reasons = {name: each.lacks(need) for name, each in KERNELS.items()}
    able = [name for name, reason in reasons.items() if reason is None]
    if kernel == "auto":
        row = next((row for row in PREFERENCES if row.device_type == device_type), PREFERENCES[-1])
        return KERNELS[next(name for name in row.kernels if name in able)]
    if reasons[kernel] is not None:
        raise KernelError(f"kernel={kernel!r} cannot do this: {reasons[kernel]}; use {' or '.join(map(repr, able))}")
    return KERNELS[kernel]


def refuse_unknown(kernel: str) -> None:
    """Raise KernelError if ``kernel`` is neither "auto" nor a key of ``KERNELS``; otherwise return None."""
    known = ["auto", *KERNELS]
    if kernel not in known:
        raise KernelError(f"kernel={kernel!r} is unknown; use {', '.join(map(repr, known))}, or a function of your own")

"""The table of kernels by name, and the choice of one for an attention. One kernel a file, with the interface of protocol.py.

sdpa        PyTorch's fused flash attention operators, on CPU and CUDA
cudnn       cuDNN's attention, CUDA only
efficient   PyTorch's memory-efficient attention, CUDA only: fp32, bias
online      blocked online softmax in plain PyTorch: softcap, bias, unequal head dims, every dtype
flex        compiled FlexAttention, CUDA only
reference   dense attention in fp64
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from longspan.errors import KernelError
from longspan.kernels.capability import AMPERE, HOPPER, capability
from longspan.kernels.cudnn import Cudnn, agrees_with_flash_attention
from longspan.kernels.efficient import Efficient
from longspan.kernels.flex import Flex
from longspan.kernels.online import Online
from longspan.kernels.protocol import BoundBias, BuiltInKernel, Kernel, Need, accumulation_dtype
from longspan.kernels.reference import Reference
from longspan.kernels.sdpa import SDPA
from longspan.masks.constructors import Causal, Full, Mask

__all__ = ["KERNELS", "BoundBias", "Kernel", "Need", "accumulation_dtype", "choose", "refuse_unknown"]

_ALL: tuple[BuiltInKernel, ...] = (SDPA(), Online(), Flex(), Cudnn(), Efficient(), Reference())
KERNELS = {kernel.name: kernel for kernel in _ALL}
"""Every kernel by its name."""


HALF = (torch.float16, torch.bfloat16)
ANY_DTYPE = (*HALF, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A row of ``PREFERENCES``: the order in which ``kernel="auto"`` tries the kernels for some attentions.

    Attributes:
        device_type: "cpu", "cuda".
        kernels: names of kernels, the fastest first.
        basis: what the order rests on: "measured on CARD, date" or "assumed: why".
        capability: the least compute capability of the GPU; a GPU that is not seen is taken for an Ampere.
        dtypes: the dtypes.
        most_dim: the largest head dim.
        masks: the kinds of mask, of ``kind_of``.
        least_tokens: the least number of tokens of the whole sequence.
    """

    device_type: str
    kernels: tuple[str, ...]
    basis: str
    capability: tuple[int, int] = (0, 0)
    dtypes: tuple[torch.dtype, ...] = ANY_DTYPE
    most_dim: int = 2**31
    masks: tuple[str, ...] = ("causal", "full", "other")
    least_tokens: int = 0

    def fits(self, need: Need, kind: str, tokens: int) -> bool:
        """Whether the row is for the attention ``need`` under a mask of this kind over so many tokens."""
        return (
            need.device_type == self.device_type
            and (need.capability or AMPERE) >= self.capability
            and need.dtype in self.dtypes
            and max(need.qk_dim, need.v_dim) <= self.most_dim
            and kind in self.masks
            and tokens >= self.least_tokens
        )


PREFERENCES = (
    Preference(
        device_type="cuda", capability=HOPPER, dtypes=HALF, most_dim=128, masks=("causal", "full"), least_tokens=4096,
        kernels=("cudnn", "sdpa", "flex", "efficient", "online"),
        basis="assumed: published figures have cuDNN at about twice FlashAttention 2 on Hopper; no kernel has run on a GPU",
    ),
    Preference(
        device_type="cuda", capability=AMPERE, dtypes=HALF, kernels=("sdpa", "flex", "efficient", "online"),
        basis="assumed: FlashAttention 2 is one call for each of these masks; no kernel has run on a GPU",
    ),
    Preference(
        device_type="cuda", dtypes=HALF, kernels=("efficient", "flex", "online"),
        basis="assumed: older than FlashAttention 2 takes; no kernel has run on a GPU",
    ),
    Preference(
        device_type="cuda", dtypes=(torch.float32,), masks=("causal", "full"), kernels=("efficient", "flex", "online"),
        basis="assumed: compiled ahead, and one call for each of these masks; no kernel has run on a GPU",
    ),
    Preference(
        device_type="cuda", kernels=("flex", "efficient", "online"),
        basis="assumed: one call for any mask; no kernel has run on a GPU",
    ),
    Preference(
        device_type="cpu", kernels=("sdpa", "online"), basis="measured on two CPU cores, docs/numbers.md"
    ),
)  # fmt: skip
"""``kernel="auto"`` takes the first row that is for the attention, and of its kernels the first that supports it.

Devices without a row have the CPU's, the last. "online" supports every attention."""


TRIALS: dict[str, Callable[[], bool]] = {"cudnn": agrees_with_flash_attention}
"""Kernels that "auto" takes only where a trial on this machine succeeds, because they have never run on a GPU."""


def kind_of(mask: Mask | Sequence[Mask]) -> str:
    """The kind of a mask, or of the masks of several rows, by which ``PREFERENCES`` are chosen: "causal", "full" or "other"."""
    masks = [mask] if isinstance(mask, Mask) else mask
    kinds = {next((kind for kind, one in KINDS.items() if isinstance(each, one)), "other") for each in masks}
    return kinds.pop() if len(kinds) == 1 else "other"


KINDS = {"causal": Causal, "full": Full}
"""Kinds of mask that are one call of operators without windows, on every rank of a ring too."""


def choose(
    kernel: str | Kernel | None,
    *,
    device_type: str,
    dtype: torch.dtype,
    qk_dim: int,
    v_dim: int,
    softcap: float | None = None,
    bias: object | None = None,
    mask: Mask | Sequence[Mask] = (),
    tokens: int = 0,
) -> Kernel:
    """The kernel to use for an attention.

    Args:
        kernel: the name of a kernel, "auto" for the first of ``PREFERENCES`` that supports the attention, or a ``Kernel``
            object, which is returned unchanged. None is refused.
        device_type: "cpu" or "cuda".
        dtype: the dtype of q, k and v.
        qk_dim: the head dim of queries and keys.
        v_dim: the head dim of values.
        softcap: c if a score s is replaced by c·tanh(s/c); None without a softcap.
        bias: the bias of the scores, None without one.
        mask: the mask, or one for each row of the batch; () for one that is not known.
        tokens: the number of tokens of the whole sequence; 0 if it is not known.

    Returns:
        The kernel.

    Raises:
        KernelError: the name is unknown, or the named kernel does not support the attention; the message names those that do.
            "auto" always finds one, because "online" supports every attention.
    """
    if isinstance(kernel, Kernel):
        return kernel
    refuse_unknown(kernel)
    assert isinstance(kernel, str)
    seen = capability() if device_type == "cuda" else None
    need = Need(device_type, dtype, qk_dim, v_dim, softcap=softcap is not None, bias=bias is not None, capability=seen)
    reasons = {name: each.lacks(need) for name, each in KERNELS.items()}
    able = [name for name, reason in reasons.items() if reason is None]
    if kernel == "auto":
        kind = kind_of(mask)
        row = next((row for row in PREFERENCES if row.fits(need, kind, tokens)), PREFERENCES[-1])
        return KERNELS[next(name for name in row.kernels if name in able and (name not in TRIALS or TRIALS[name]()))]
    if reasons[kernel] is not None:
        raise KernelError(f"kernel={kernel!r} cannot do this: {reasons[kernel]}; use {' or '.join(map(repr, able))}")
    return KERNELS[kernel]


def refuse_unknown(kernel: object) -> None:
    """Raise KernelError if ``kernel`` is neither "auto" nor a key of ``KERNELS`` nor a ``Kernel``; otherwise return None."""
    known = ["auto", *KERNELS]
    if not isinstance(kernel, Kernel) and not (isinstance(kernel, str) and kernel in known):
        raise KernelError(f"kernel={kernel!r} is unknown; use {', '.join(map(repr, known))}, or a function of your own")

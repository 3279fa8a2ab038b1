"""The compute capability of this process's GPU, by which kernels say what they lack and ``kernel="auto"`` chooses."""

from functools import lru_cache

import torch

AMPERE = (8, 0)
"""The oldest compute capability that FlashAttention 2 and cuDNN's attention have kernels for."""
HOPPER = (9, 0)
"""The compute capability of H100 and H200."""


@lru_cache(maxsize=1)
def capability() -> tuple[int, int] | None:
    """The compute capability of this process's GPU; None where it sees none, or a GPU of another maker than NVIDIA."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() and torch.version.hip is None else None


def lacks_ampere(what: str, found: tuple[int, int] | None) -> str | None:
    """The reason, as a sentence, why ``what`` cannot run on a GPU of compute capability ``found``; None if it can, or if
    ``found`` is None, where no GPU is seen."""
    if found is None or found >= AMPERE:
        return None
    return f"{what} needs compute capability 8.0 (Ampere), and this GPU has {found[0]}.{found[1]}"

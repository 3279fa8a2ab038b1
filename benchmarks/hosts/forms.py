"""Closed forms of what one layer sends over the link of a host, in bytes. Integers only: no torch.

A rank holds n = N/P tokens of h elements. To each rank that is not itself it sends, in one pass of a layer,

    Ulysses        4 n h/P     q, k, v and the output, for its heads                     8 a step, 12 with attention kept
    Megatron-SP    4 n h       two all-gathers and two reduce-scatters                   8 a step, 11 with recomputation
    ring           2 n h       keys and values                                           6 a step: again, and gradients

so a rank sends 4Nh/P (P-1)/P, 4Nh (P-1)/P and 2Nh (P-1)/P. On hosts of R ranks the R ranks of a host send to P - R others.
Sources: arXiv:2309.14509 (Ulysses, section 3.2), arXiv:2205.05198 (Megatron-SP), arXiv:2105.13120 (ring self-attention).
"""

from dataclasses import dataclass

UNITS = {
    ("ulysses", "none"): (4, 8),
    ("ulysses", "selective"): (4, 12),
    ("tensor", "none"): (4, 8),
    ("tensor", "full"): (4, 11),
    ("ring", "none"): (2, 6),
}
"""Units of one layer, forward and in a step (forward and backward), by (axis, recompute)."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes that the closed forms take.

    Attributes:
        tokens: tokens of the row, on all ranks together.
        hidden: elements of a hidden state; heads x head dim is as much.
        hosts, ranks_per_host: the ranks.
        itemsize: bytes of an element.
    """

    tokens: int
    hidden: int
    hosts: int
    ranks_per_host: int = 1
    itemsize: int = 4

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.hosts * self.ranks_per_host


def layer_bytes(axis: str, recompute: str, size: Size) -> tuple[int, int]:
    """(forward, step): the bytes that the ranks of one host send to other hosts for one layer.

    Args:
        axis: the axis of the mesh that has all ranks: "ulysses", "tensor" or "ring".
        recompute: what a layer computes again in its backward, as in ``MemoryOptions``.
        size: the sizes; ``tokens`` and ``hidden`` are multiples of the ranks.
    """
    assert size.tokens % size.ranks == size.hidden % size.ranks == 0
    width = size.hidden // size.ranks if axis == "ulysses" else size.hidden
    pairs = size.ranks_per_host * (size.ranks - size.ranks_per_host)
    unit = size.tokens // size.ranks * width * size.itemsize * pairs
    forward, step = UNITS[axis, recompute]
    return forward * unit, step * unit

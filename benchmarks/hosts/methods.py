"""The methods that are compared, as degrees of one ParallelMesh: Ulysses, Megatron-SP, ring, a hybrid, data parallel. No torch.

ulysses        4 Nh/P units of activations a layer and pass: q, k, v and the output, each once
megatron-sp    tensor parallel with ulysses = ring = 1: an all-gather and a reduce-scatter around attention and feed-forward
ring           ring attention on contiguous tokens, every key to every rank: ColossalAI's ring self-attention
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method on ``P`` ranks.

    Attributes:
        name: as the tables print it.
        axis: the axis of the mesh that has the ranks.
        recompute: what a layer computes again in its backward, as in ``MemoryOptions``.
        ring: the ring degree beside the axis, whose degree is P / ring.
        zigzag: whether a ring's tokens are balanced for a causal mask.
        mask: "causal", or "full" where every rank needs every key.
    """

    name: str
    axis: str
    recompute: str = "none"
    ring: int = 1
    zigzag: bool = False
    mask: str = "causal"

    def degrees(self, ranks: int) -> dict[str, int]:
        """The arguments of ``ParallelMesh`` on so many ranks; data takes what is left."""
        if self.axis == "data":
            return {}
        return {"ring": self.ring} | {self.axis: ranks // self.ring}

    @property
    def layout(self) -> str | None:
        """The argument ``layout`` of ``ParallelMesh``."""
        return None if self.axis != "ring" and self.ring == 1 else "zigzag" if self.zigzag else "contiguous"


ULYSSES = Method(name="Ulysses", axis="ulysses")
ULYSSES_KEPT = Method(name="Ulysses, attention kept", axis="ulysses", recompute="selective")
MEGATRON = Method(name="Megatron-SP", axis="tensor")
MEGATRON_RECOMPUTED = Method(name="Megatron-SP, layers recomputed", axis="tensor", recompute="full")
RING = Method(name="ring, contiguous", axis="ring", mask="full")
HYBRID = Method(name="Ulysses x ring 2", axis="ulysses", ring=2, zigzag=True)
DATA = Method(name="data parallel", axis="data")

COUNTED = (ULYSSES, ULYSSES_KEPT, MEGATRON, MEGATRON_RECOMPUTED, RING)
"""Those whose bytes are counted beside their closed forms."""
TIMED = (ULYSSES, MEGATRON, RING, HYBRID, DATA)
"""Those whose step is timed."""
BY_NAME = {method.name: method for method in (*COUNTED, HYBRID, DATA)}
FEWER, MORE = 1, 3
"""The numbers of layers of two decoders whose counts or times are subtracted, so that layers alone are left."""

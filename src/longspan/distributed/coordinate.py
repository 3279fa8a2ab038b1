"""The coordinate of a rank on the device mesh: the degrees of all axes and its index on each, as integers.

    pipeline x data x ring x ulysses x tensor       degrees
        0        1      0       1        0          of a rank with data_rank=1 and ulysses_rank=1

The positions of a row that the rank holds follow from it. It imports no torch, as the planner does not either.
"""

from dataclasses import dataclass

from longspan.distributed.layout import Layout, Runs


@dataclass(frozen=True, kw_only=True)
class MeshCoordinate:
    """The degrees of a mesh and the position of one rank on it, as plain integers, so that a DataLoader worker can be given it.

    Attributes:
        pipeline, data, ring, ulysses, tensor: the degree of each axis.
        pipeline_rank, data_rank, ring_rank, ulysses_rank, tensor_rank: this rank's index on each axis, from 0.
        zigzag: whether ring ranks hold an early and a late piece of a row each.
    """

    pipeline: int = 1
    data: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1
    pipeline_rank: int = 0
    data_rank: int = 0
    ring_rank: int = 0
    ulysses_rank: int = 0
    tensor_rank: int = 0
    zigzag: bool = False

    @property
    def sequence_ranks(self) -> int:
        """The number of ranks that hold the tokens of one sequence together."""
        return self.ring * self.ulysses * self.tensor

    @property
    def sequence_rank(self) -> int:
        """The index of this rank among the ``sequence_ranks`` ranks of one sequence, in the order ring, ulysses, tensor."""
        return (self.ring_rank * self.ulysses + self.ulysses_rank) * self.tensor + self.tensor_rank

    @property
    def attention_ranks(self) -> int:
        """The number of ranks over which one head's attention may be spread: ring x ulysses. Tensor ranks have other heads."""
        return self.ring * self.ulysses

    def layout(self, tokens: int) -> Layout:
        """The partition of a row of ``tokens`` tokens over the ranks of a sequence."""
        return Layout(tokens, self.ring, self.ulysses, self.zigzag, self.tensor)

    def my_positions(self, tokens: int) -> Runs:
        """The positions (token indices) that this rank holds of a row of ``tokens`` tokens, as ranges in its order."""
        return self.layout(tokens).mine(self.ring_rank, self.ulysses_rank, self.tensor_rank)

    def tensor_sizes(self, tokens: int) -> tuple[int, ...]:
        """For each tensor rank with this rank's ring and ulysses rank, its number of tokens of a row of ``tokens``."""
        return self.layout(tokens).shares(self.ring_rank, self.ulysses_rank)

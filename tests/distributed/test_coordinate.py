"""The coordinate of a rank: its fields are those of the axes, and the coordinates of a sequence hold each token once."""

from itertools import product

import pytest

from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.mesh import AXES


def test_every_axis_has_its_two_fields_in_the_coordinate() -> None:
    fields = {name for axis in AXES for name in (axis.name, f"{axis.name}_rank")}
    assert fields | {"zigzag"} == set(MeshCoordinate.__dataclass_fields__)


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize(("ring", "ulysses", "tensor"), [(1, 1, 1), (2, 3, 1), (3, 1, 2), (2, 2, 2)])
@pytest.mark.parametrize("tokens", [24, 29])
def test_the_ranks_of_a_sequence_are_numbered_in_turn_and_hold_each_token_once(
    ring: int, ulysses: int, tensor: int, zigzag: bool, tokens: int
) -> None:
    degrees = {"ring": ring, "ulysses": ulysses, "tensor": tensor, "zigzag": zigzag}
    ranks = [
        MeshCoordinate(**degrees, ring_rank=r, ulysses_rank=u, tensor_rank=t)
        for r, u, t in product(range(ring), range(ulysses), range(tensor))
    ]
    assert [rank.sequence_rank for rank in ranks] == list(range(ring * ulysses * tensor))
    assert {(rank.sequence_ranks, rank.attention_ranks) for rank in ranks} == {(len(ranks), ring * ulysses)}
    held = [[position for run in rank.my_positions(tokens) for position in run] for rank in ranks]
    assert sorted(position for positions in held for position in positions) == list(range(tokens))
    assert [rank.tensor_sizes(tokens)[rank.tensor_rank] for rank in ranks] == list(map(len, held))

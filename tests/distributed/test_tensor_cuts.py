"""How parameters are cut over the tensor ranks: integers."""

import pytest

from longspan.distributed.tensor_cuts import Cut


def test_pieces_of_whole_and_of_packed_weights() -> None:
    assert Cut(dim=0, units=4).pieces(32, 2, 1) == (range(16, 32),)
    assert Cut(dim=0, units=6, packed=2).pieces(12, 3, 1) == (range(2, 4), range(8, 10))


def test_neighbouring_ranks_share_a_unit_where_there_are_fewer_units_than_ranks() -> None:
    cut = Cut(dim=0, units=2, replicable=True)
    assert [cut.pieces(8, 4, rank) for rank in range(4)] == [(range(4),), (range(4),), (range(4, 8),), (range(4, 8),)]


def test_rows_of_a_vocabulary_may_be_uneven() -> None:
    cut = Cut(dim=0, units=7, uneven=True)
    assert [cut.pieces(7, 3, rank) for rank in range(3)] == [(range(3),), (range(3, 5),), (range(5, 7),)]
    assert not cut.is_even(3)
    assert Cut(dim=0, units=6, uneven=True).is_even(3)


@pytest.mark.parametrize(
    ("cut", "legal"),
    [
        (Cut(dim=0, units=4), {1, 2, 4}), (Cut(dim=0, units=2, replicable=True), {1, 2, 4, 6, 8}),
        (Cut(dim=0, units=5, uneven=True), {1, 2, 3, 4, 5}),
    ],
)  # fmt: skip
def test_the_degrees_that_a_cut_allows(cut: Cut, legal: set[int]) -> None:
    assert {ranks for ranks in range(1, 9) if cut.divides(ranks)} == legal

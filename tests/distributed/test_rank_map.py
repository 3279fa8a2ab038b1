"""The map of ranks to hosts and axes, and when an all-to-all across hosts is worth a sentence."""

import pytest

from longspan.distributed.rank_map import MOST_LINES, crossing, rank_map

AXES = ("pipeline", "data", "ring", "ulysses", "tensor")


def degrees(**given: int) -> dict[str, int]:
    return {axis: given.get(axis, 1) for axis in AXES}


def test_every_host_has_its_ranks_and_their_places() -> None:
    assert rank_map(["a"] * 4 + ["node-b"] * 4, degrees(data=2, ring=2, ulysses=2)).splitlines() == [
        "host a       ranks 0-3  data 0, ring 0-1, ulysses 0-1",
        "host node-b  ranks 4-7  data 1, ring 0-1, ulysses 0-1",
    ]
    assert rank_map(["a", "a", "a", "b"], degrees(pipeline=2, tensor=2)).splitlines() == [
        "host a  ranks 0-2  pipeline 0-1, tensor 0-1",
        "host b  rank 3  pipeline 1, tensor 1",
    ]
    assert rank_map(["a"], degrees()) == "host a  rank 0"


def test_places_that_are_no_neighbours_are_listed() -> None:
    assert rank_map(["a", "b", "b", "a"], degrees(ulysses=4)).splitlines()[2] == "host a  rank 3  ulysses 3"
    assert rank_map(["a", "b", "b", "b", "b", "a"], degrees(data=2, ulysses=3)).splitlines()[1] == (
        "host b  ranks 1-4  data 0-1, ulysses 0-2"
    )
    assert rank_map(["a", "a", "b", "b"], degrees(data=2, ring=2)).splitlines()[1] == "host b  ranks 2-3  data 1, ring 0-1"
    assert rank_map(["a", "b", "b", "a", "a", "a"], degrees(data=2, ulysses=3)).splitlines()[1] == (
        "host b  ranks 1-2  data 0, ulysses 1-2"
    )
    assert rank_map(["a", "a", "b", "b", "a", "a"], degrees(data=2, ulysses=3)).splitlines()[1] == (
        "host b  ranks 2-3  data 0-1, ulysses 0,2"
    )


def test_many_hosts_are_shortened() -> None:
    lines = rank_map([str(host) for host in range(MOST_LINES + 3)], degrees(data=MOST_LINES + 3)).splitlines()
    assert (len(lines), lines[-1]) == (MOST_LINES + 1, "and 3 more")


@pytest.mark.parametrize(
    ("per_host", "given", "advice"),
    [
        (4, {"ulysses": 8}, "ulysses=4 and ring=2"),
        (4, {"ulysses": 4, "ring": 2}, None),
        (4, {"ulysses": 4, "data": 2}, None),
        (2, {"ulysses": 4, "ring": 2}, "ulysses=2 and ring=4"),
        (1, {"ulysses": 8}, None),  # every exchange crosses
        (4, {"ulysses": 4, "tensor": 2}, "ulysses=2 and ring=2"),
        (4, {"ulysses": 2, "tensor": 2, "pipeline": 2}, None),
        (3, {"ulysses": 6}, "ulysses=3 and ring=2"),
    ],
)
def test_an_all_to_all_across_hosts_is_advised_against_where_a_ring_would_keep_it_inside(
    per_host: int, given: dict[str, int], advice: str | None
) -> None:
    on = degrees(**given)
    ranks = on["pipeline"] * on["data"] * on["ring"] * on["ulysses"] * on["tensor"]
    advised = crossing([f"host{rank // per_host}" for rank in range(ranks)], on)
    assert (advised is None) == (advice is None)
    assert advice is None or (advised is not None and f"with {advice} they would stay inside a host" in advised)

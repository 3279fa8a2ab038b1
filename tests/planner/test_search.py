"""What a plan may choose and what it prefers: legal layouts, ties, memory with its error, the longest sequence."""

from dataclasses import replace

import numpy as np
import pytest

from longspan import plan
from longspan.errors import LayoutError
from longspan.planner.explain import lost
from longspan.planner.hardware import cluster
from longspan.planner.model import PRESETS
from longspan.planner.search import TIE, Columns, _best, degree_rows, longest, option_rows, search
from longspan.planner.setting import Setting
from longspan.planner.strategy import Recipe, Strategy, Workload, check
from longspan.planner.uncertainty import memory_bound, memory_error

LLAMA = PRESETS["llama-8b"]


def _setting(tokens: int = 131_072, gpus: int = 8) -> Setting:
    return Setting(LLAMA, cluster("h100", gpus), Recipe(), Workload(tokens=tokens))


def test_tiles_beside_tensor_ranks_are_refused_as_parallelize_does() -> None:
    with pytest.raises(LayoutError, match=r"tile_tokens=4096 does not work with tensor=2.*use tensor=1"):
        check(LLAMA, Workload(tokens=8192), Strategy(tensor=2, tile_tokens=4096))
    with pytest.raises(LayoutError, match="tile_tokens=4096 does not work with tensor=2"):
        search(_setting(), {"tensor": 2, "tile_tokens": 4096})
    assert search(_setting(), {"tensor": 2}).legal == search(_setting(), {"tensor": 2, "tile_tokens": 0}).legal
    found = plan(LLAMA, tokens=1_000_000, fixed={"tensor": 4})
    assert found.best.strategy.tile_tokens == 0


def test_every_layout_that_is_counted_as_legal_is_legal() -> None:
    x = _setting(gpus=4)
    columns, legal = Columns(degree_rows(x, {}), option_rows({})), 0
    for index in range(columns.count):
        try:
            check(x.shape, x.workload, columns.strategy(index), 4)
            legal += 1
        except LayoutError:
            pass
    assert search(x).legal == legal


def _line(seconds: float, needs: float, error: float, *degrees: int) -> list[float]:
    return [0, seconds, needs, 0, needs * (1 + error), *degrees, 3]


@pytest.mark.parametrize(
    ("second", "wins"),
    [(_line(1.009, 5, 0.05, 1, 1, 1, 8, 1), True), (_line(1.02, 5, 0.05, 1, 1, 1, 8, 1), False),
     (_line(1.009, 9.5, 0.05, 1, 1, 2, 4, 1), False), (_line(1.009, 9.5, 0.05, 1, 1, 1, 1, 1), True),
     (_line(1.009, 9, 0.6, 1, 1, 2, 4, 1), False)],
)  # fmt: skip
def test_of_equal_times_less_memory_wins_beyond_its_error_and_then_fewer_axes(second: list[float], wins: bool) -> None:
    """Less memory; slower than a tie; less by no more than the error; fewer axes; less, and might be more."""
    first = _line(1, 10, 0.05, 1, 1, 1, 8, 1)
    chosen = _best(np.array([first, second]))
    assert chosen is not None
    assert list(chosen) == (second if wins else first)


def test_the_default_plan_leaves_memory_free() -> None:
    found = plan("llama-8b", gpus=8, tokens=131_072)
    assert found.best.strategy == Strategy(ulysses=8, zero=3, tile_tokens=4096)


def test_a_tie_is_explained_by_what_decided_it() -> None:
    x, best = _setting(), Strategy(ulysses=8, zero=3, tile_tokens=4096)
    sentence = lost(x, best, replace(best, zero=2))
    assert "which is a tie (within 1%): the best needs less memory, 53.2 GiB instead of 77.6 GiB" in sentence
    assert "the best has fewer axes" in lost(x, best, Strategy(ulysses=4, ring=2, zero=3, tile_tokens=4096))
    assert "most of the difference is" in lost(x, best, Strategy(ulysses=8, zero=3, recompute="full"))
    for fixed in ({}, {"ulysses": 8}, {"ring": 8}, {"tensor": 2}):
        found = plan("llama-8b", gpus=8, tokens=131_072, fixed=fixed)
        assert found.runner_up is not None
        is_tie = found.runner_up.seconds <= (1 + TIE) * found.best.seconds
        assert ("which is a tie" in found.lost) is is_tie


@pytest.mark.parametrize("tokens", [8192, 131_072, 600_000])
def test_memory_and_the_error_of_its_prediction_fit(tokens: int) -> None:
    for gpus in (1, 2, 8):
        try:
            found = plan("llama-8b", gpus=gpus, tokens=tokens)
        except LayoutError:
            continue
        for choice in (found.best, found.runner_up):
            if choice is not None:
                assert choice.bytes * (1 + choice.memory_error) <= found.cluster.accelerator.memory
    with pytest.raises(LayoutError, match=r"\+-5%, of 79.3 on a GPU"):
        plan("llama-8b", gpus=8, tokens=131_072, fixed={"zero": 2, "ulysses": 8, "recompute": "none", "head_chunks": 1})


def test_the_bound_of_memory_is_the_same_for_one_strategy_and_for_many() -> None:
    columns = Columns(degree_rows(_setting(), {}), option_rows({}))
    bounds = np.asarray(memory_bound(columns))
    for index in range(0, columns.count, 7):
        strategy = columns.strategy(index)
        assert bounds[index] == float(memory_bound(strategy)) == 1 + memory_error(strategy)[0]


def test_the_longest_sequence_is_all_positions_and_no_less_than_what_is_planned() -> None:
    shape = replace(LLAMA, positions=131_072)
    assert plan(shape, gpus=8, tokens=4096).longest == 131_072
    assert longest(_setting(1_234_567)) >= 1_234_567
    fits, above = (found := longest(_setting())), found + found // 1000 + 1
    assert search(_setting(fits)).best is not None
    assert search(_setting(above)).best is None
    while above - fits > 1:  # the last length that fits, to the token
        middle = (fits + above) // 2
        fits, above = (fits, middle) if search(_setting(middle)).best is None else (middle, above)
    assert longest(_setting(fits)) == fits > found


@pytest.mark.parametrize(
    ("gpus", "fixed", "reason"),
    [(12, {"ulysses": 5}, "ulysses=5 does not divide 12 GPUs; use 1, 2, 3, 4, 6 or 12"),
     (8, {"ulysses": 8, "ring": 8}, "ring=8 x ulysses=8 are 64 ranks, which do not divide 8 GPUs; use degrees whose product is "
                                    "1, 2, 4 or 8, or 64 GPUs")],
)  # fmt: skip
def test_degrees_that_do_not_divide_the_gpus_are_named(gpus: int, fixed: dict[str, int | str], reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        plan("llama-8b", gpus=gpus, tokens=8192, fixed=fixed)


def test_an_option_without_which_it_fits_is_named() -> None:
    with pytest.raises(LayoutError, match=r"or leave out zero=0: then up to [0-9,]+ do"):
        plan("llama-8b", gpus=1, tokens=1_000_000, fixed={"zero": 0})
    with pytest.raises(LayoutError, match=r"tokens fit$"):
        plan("llama-8b", gpus=1, tokens=1_000_000, fixed={"zero": 3})

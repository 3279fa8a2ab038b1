"""Tiles of a mask, in integers: the stacks of plain masks, each pair once, little waste, linear time."""

import sys

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

from longspan.kernels.reference import visible
from longspan.kernels.tiles import Shape, Stack, plan
from longspan.masks.bands import Band, area
from longspan.masks.constructors import Causal, Chunked, Documents, Full, Mask, Window
from tests.helpers import processes
from tests.helpers.examples import examples
from tests.helpers.kernel_cases import COLUMN, CORNERS, CPU, Inputs, attentions, bands_of, draw_inputs

# beartype looks at a random item of each list that it checks
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


def test_plain_masks_are_one_call() -> None:
    assert plan(Causal().bands(100, 100)) == (Stack(Shape.LOWER, 0, 0, 100, 100),)
    assert plan(Full().bands(100, 70)) == (Stack(Shape.RECTANGLE, 0, 0, 100, 70),)
    assert plan(Window(None, None).bands(9, 9)) == (Stack(Shape.RECTANGLE, 0, 0, 9, 9),)
    assert plan(Window(0, None).bands(9, 9)) == (Stack(Shape.UPPER, 0, 0, 9, 9),)


def test_equal_documents_are_one_stack() -> None:
    assert plan((Chunked(10) & Causal()).bands(1000, 1000)) == (Stack(Shape.LOWER, 0, 0, 10, 10, 100, 10, 10),)
    assert plan((Documents((50, 50, 30)) & Causal()).bands(130, 130)) == (
        Stack(Shape.LOWER, 0, 0, 50, 50, 2, 50, 50),
        Stack(Shape.LOWER, 100, 100, 30, 30),
    )


def test_a_window_is_walked() -> None:
    assert plan(Window(255).bands(1000, 1000)) == (
        Stack(Shape.LOWER, 0, 0, 256, 256),
        Stack(Shape.BAND, 256, 1, 128, 383, 5, 128, 128),
        Stack(Shape.BAND, 896, 641, 104, 359),
    )
    assert plan(Window(2047).bands(8192, 8192)) == (
        Stack(Shape.LOWER, 0, 0, 2048, 2048),
        Stack(Shape.UPPER, 2048, 1, 2047, 2047, 3, 2048, 2048),
        Stack(Shape.LOWER, 2048, 2048, 2048, 2048, 3, 2048, 2048, fresh=False),
    )


def pairs(stacks: tuple[Stack, ...], queries: int, keys: int) -> Tensor:
    """How often each pair is computed."""
    count = torch.zeros(queries, keys, dtype=torch.int64)
    for stack in stacks:
        for tile in stack.chunks(1):
            q, k = torch.arange(tile.rows)[:, None], torch.arange(tile.keys)
            band = Band(0, tile.rows, 0, tile.keys, 0, tile.keys - tile.rows)
            seen = {
                Shape.RECTANGLE: torch.ones(tile.rows, tile.keys, dtype=torch.bool),
                Shape.LOWER: k <= q,
                Shape.UPPER: k >= q,
                Shape.BAND: visible([band], tile.rows, tile.keys, CPU),
            }[tile.shape]
            count[tile.q_start : tile.q_stop, tile.k_start : tile.k_start + tile.keys] += seen
    return count


@examples(few=25, many=500)
@given(attention=attentions())
@example(attention=(CORNERS, draw_inputs(150, 150)))
@example(attention=(COLUMN, draw_inputs(150, 150)))
def test_tiles_cover_each_pair_once(attention: tuple[Mask, Inputs]) -> None:
    mask, x = attention
    bands, stacks = bands_of(mask, x), plan(bands_of(mask, x))
    shape = x.q.shape[0], x.k.shape[0]
    assert torch.equal(pairs(stacks, *shape), visible(bands, *shape, CPU).long())
    touched: set[int] = set()
    for stack in stacks:
        rows = {row for tile in stack.chunks(1) for row in range(tile.q_start, tile.q_stop)}
        assert len(rows) == stack.count * stack.rows, "tiles of a stack share no query: results are written in place"
        assert not (stack.fresh and rows & touched)
        touched |= rows


@pytest.mark.parametrize(("left", "waste"), [(255, 1.5), (511, 1.25), (1023, 1.15), (4095, 1.01)])
def test_tiles_compute_little_that_nobody_sees(left: int, waste: float) -> None:
    """A million tokens: a few stacks, and an area near that of the band."""
    bands = Window(left).bands(2**20, 2**20)
    stacks = plan(bands)
    computed = {Shape.LOWER: 0.5, Shape.UPPER: 0.5, Shape.RECTANGLE: 1.0, Shape.BAND: 1.0}
    assert len(stacks) <= 7
    assert sum(computed[s.shape] * s.count * s.rows * s.keys for s in stacks) <= waste * area(bands)


def test_ten_times_the_documents_take_ten_times_as_long() -> None:
    """In a process of its own: the checks of shapes and types that the other tests run under would be timed too."""
    code = (
        "import time\n"
        "from longspan.kernels.tiles import plan\n"
        "from longspan.masks.constructors import Causal, Documents\n"
        "def seconds_of(documents):\n"
        "    lengths = [1 + i * 7919 % 97 for i in range(documents)]\n"
        "    bands = (Documents(lengths) & Causal()).bands(sum(lengths), sum(lengths))\n"
        "    start = time.process_time()\n"
        "    stacks = plan(bands)\n"
        "    seconds = time.process_time() - start\n"
        "    assert sum(s.count for s in stacks) == documents\n"
        "    return seconds\n"
        "print(seconds_of(40_000) / sum(seconds_of(4_000) for _ in range(10)))\n"
    )
    ratio = float(processes.output([sys.executable, "-c", code]))
    assert ratio < 3  # 1.3 where nothing else runs; what goes over all documents for each of them takes 10

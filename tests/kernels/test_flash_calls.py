"""Calls with windows and lengths, in integers: each pair once by the operator's own rule, few calls, linear time."""

import sys

import pytest
import torch
from hypothesis import example, given

from longspan.kernels import flash_calls
from longspan.kernels.flash_calls import Call, head_groups, plan
from longspan.kernels.reference import visible
from longspan.masks.bands import Band
from longspan.masks.constructors import Causal, Chunked, Documents, Full, Mask, SinkTokens, Window
from tests.helpers import processes
from tests.helpers.examples import examples
from tests.helpers.flash_operator import shown
from tests.helpers.kernel_cases import COLUMN, CORNERS, CPU, Inputs, attentions, bands_of, draw_inputs

# beartype looks at a random item of each list that it checks
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


def pairs(call: Call, queries: int, keys: int) -> torch.Tensor:
    """How often the operator shows each (query, key) pair in a call."""
    seen = torch.zeros(queries, keys, dtype=torch.int64)
    q, k = call.q_start, call.k_start
    most = max(keys for _, keys in call.lengths)
    for rows, columns in call.lengths:
        causal = call.left.limit is None and call.right.limit == 0
        bands = shown(rows, columns, most, causal, call.left.limit, call.right.limit)
        seen[q : q + rows, k : k + columns] += visible(bands, rows, columns, CPU)
        q, k = q + rows, k + columns
    return seen


@examples(few=60, many=1000)
@given(attention=attentions())
@example(attention=(CORNERS, draw_inputs(150, 150)))
@example(attention=(COLUMN, draw_inputs(150, 150)))
@example(attention=(Window(3, None), draw_inputs(300, 7)))  # more queries than the operator's windows reach
@example(attention=(Documents((1, 90, 2), (1, 3, 80)) & Window(2, 40), draw_inputs(93, 84)))
def test_each_pair_is_shown_once(attention: tuple[Mask, Inputs]) -> None:
    mask, x = attention
    bands = bands_of(mask, x)
    queries, keys = x.q.shape[0], x.k.shape[0]
    planned = plan(bands)
    seen = sum((pairs(call, queries, keys) for call in planned.calls), torch.zeros(queries, keys, dtype=torch.int64))
    assert torch.equal(seen, visible(bands, queries, keys, CPU).long())
    reached: set[int] = set()
    columns: list[int] = []
    for call in planned.calls:
        rows = set(range(call.q_start, call.q_start + call.rows))
        assert call.fresh == (not rows & reached) or not call.fresh  # a call may be merged though it need not be
        assert not (call.fresh and rows & reached)
        reached |= rows
        columns += range(call.k_start, call.k_start + call.keys)
    assert planned.disjoint_queries == all(call.fresh for call in planned.calls)
    assert planned.disjoint_keys == (len(columns) == len(set(columns)))


DOCUMENTS = [1000 + 6 * i for i in range(100)]


@pytest.mark.parametrize(
    ("mask", "tokens", "calls", "documents"),
    [
        (Causal(), 131_072, 1, 1),
        (Full(), 131_072, 1, 1),
        (Window(255), 131_072, 1, 1),
        (Window(4095, 17), 131_072, 1, 1),
        (Documents(DOCUMENTS) & Causal(), sum(DOCUMENTS), 1, 100),
        (Documents(DOCUMENTS), sum(DOCUMENTS), 1, 100),
        (Documents([1024] * 128) & Causal(), 131_072, 1, 128),
        (Documents([*DOCUMENTS, 1, 2, 3]) & Window(1023), sum(DOCUMENTS) + 6, 1, 103),
        (Chunked(8192) & Causal(), 131_072, 1, 16),
        (Causal() & (Window(4095) | SinkTokens(4)), 131_072, 3, 3),
        (Documents([1] * 70_000), 70_000, 2, 70_000),  # more than one call takes
    ],
    ids=lambda x: repr(x)[:30],
)
def test_common_masks_are_one_call(mask: Mask, tokens: int, calls: int, documents: int) -> None:
    found = plan(mask.bands(tokens, tokens)).calls
    assert len(found) == calls
    assert sum(len(call.lengths) for call in found) == documents
    assert max(len(call.lengths) for call in found) <= flash_calls.MOST_DOCUMENTS


def test_a_causal_mask_and_a_window_in_the_operator_s_words() -> None:
    (causal,) = plan(Causal().bands(9, 9)).calls
    assert (causal.lengths, causal.left.limit, causal.right.limit) == (((9, 9),), None, 0)
    (window,) = plan(Window(3, 1).bands(9, 9)).calls
    assert (window.left.limit, window.right.limit) == (3, 1)
    (later,) = plan((Band(4, 9, 0, 9, -8, 0),)).calls  # five later queries of a causal mask: aligned at the bottom right
    assert (later.q_start, later.lengths, later.left.limit, later.right.limit) == (4, ((5, 9),), None, 0)


def test_a_plan_is_made_once() -> None:
    bands = Window(7).bands(50, 50)
    assert plan(bands) is plan(tuple(bands))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "keys", "dim", "most"),
    [(32, 8, 100, 100, 8, 2**31), (32, 8, 100, 100, 8, 10_000), (4, 1, 1000, 10, 8, 20_000), (6, 2, 10, 1000, 8, 9_000)],
)
def test_a_call_has_fewer_elements_than_32_bits_index(
    heads: int, kv_heads: int, rows: int, keys: int, dim: int, most: int
) -> None:
    groups, group = head_groups(heads, kv_heads, rows, keys, dim, most), heads // kv_heads
    assert [i for q, _ in groups for i in range(q.start, q.stop)] == list(range(heads))
    for q, kv in groups:
        assert rows * (q.stop - q.start) * dim < most
        assert keys * (kv.stop - kv.start) * dim < most
        read = [head // group for head in range(q.start, q.stop)]
        assert sorted(set(read)) == list(range(kv.start, kv.stop))
        assert (q.stop - q.start) % (kv.stop - kv.start) == 0
    assert len(head_groups(heads, kv_heads, rows, keys, dim, 2**31)) == 1


def test_ten_times_the_documents_take_ten_times_as_long() -> None:
    """In a process of its own: the checks of shapes and types that the other tests run under would be timed too."""
    code = (
        "import time\n"
        "from longspan.kernels.flash_calls import plan\n"
        "from longspan.masks.constructors import Causal, Documents\n"
        "def seconds_of(documents):\n"
        "    lengths = [1 + i * 7919 % 97 for i in range(documents)]\n"
        "    bands = (Documents(lengths) & Causal()).bands(sum(lengths), sum(lengths))\n"
        "    start = time.process_time()\n"
        "    calls = plan(bands).calls\n"
        "    seconds = time.process_time() - start\n"
        "    assert sum(len(call.lengths) for call in calls) == documents\n"
        "    plan.cache_clear()\n"
        "    return seconds\n"
        "print(seconds_of(40_000) / sum(seconds_of(4_000) for _ in range(10)))\n"
    )
    ratio = float(processes.output([sys.executable, "-c", code]))
    assert ratio < 3  # what goes over all documents for each of them takes 10

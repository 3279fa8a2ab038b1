"""Masks against their definitions, pair by pair: a set of (query, key) is the oracle of every band and every cut."""

import pickle
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longspan.errors import MaskError
from longspan.masks.bands import Band, area, blind_rows, rectangle
from longspan.masks.constructors import (
    Bands,
    BlockSparse,
    Causal,
    Chunked,
    Documents,
    Full,
    Mask,
    PrefixLM,
    SinkTokens,
    Span,
    Window,
    batch_bands,
)
from tests.helpers import processes
from tests.helpers.mask_cases import asked, dense, pairs, some_mask

# beartype, which checks signatures in the tests, picks the item that it checks by the random module
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


@settings(max_examples=500, deadline=None)
@given(asked())
@example((Documents((3, 0, 4), (0, 2, 5)), 7, 7))
@example((PrefixLM(4), 3, 5))
@example((PrefixLM(5), 7, 3))
@example((Documents(()), 0, 0))
def test_the_bands_of_a_mask_are_its_definition(case: tuple[Mask, int, int]) -> None:
    mask, tokens, key_tokens = case
    bands = mask.bands(tokens, key_tokens)
    assert pairs(bands) == dense(mask, tokens, key_tokens)
    assert area(bands) == len(dense(mask, tokens, key_tokens))


def test_the_simple_masks_are_one_band() -> None:
    assert Causal().bands(5, 5) == (Band(0, 5, 0, 5, -4, 0),)
    assert Full().bands(2, 3) == (Band(0, 2, 0, 3, -1, 2),)
    assert Window(2).bands(9, 9) == (Band(0, 9, 0, 9, -2, 0),)
    assert Window(None, 0).bands(7, 7) == Causal().bands(7, 7)
    assert Window(None, None).bands(7, 4) == Full().bands(7, 4)
    assert (Documents((3, 5)) & Causal()).bands(8, 8) == (Band(0, 3, 0, 3, -2, 0), Band(3, 8, 3, 8, -4, 0))
    assert len((Causal() & (Window(255) | SinkTokens(4))).bands(32768, 32768)) == 2
    assert len((Full() | Documents((4, 4))).bands(8, 8)) == 1


def test_blocks_are_joined() -> None:
    assert BlockSparse(2, [[True, True], [True, True]]).bands(4, 4) == Full().bands(4, 4)
    assert BlockSparse(1, [[k <= q for k in range(6)] for q in range(6)]).bands(6, 6) == Causal().bands(6, 6)
    columns, lines = [[True, False, True]] * 4, [[True] * 4, [False] * 4, [True] * 4]
    assert BlockSparse(2, columns).bands(8, 6) == (rectangle(0, 8, 0, 2), rectangle(0, 8, 4, 6))
    assert BlockSparse(2, lines).bands(6, 8) == (rectangle(0, 2, 0, 8), rectangle(4, 6, 0, 8))


def test_masks_are_values() -> None:
    mask = Documents([3, 5]) & (Window(4) | SinkTokens(1)) & BlockSparse(4, [[True, False], [True, True]])
    assert mask == Documents((3, 5)) & (Window(4) | SinkTokens(1)) & BlockSparse(4, ((True, False), (True, True)))
    assert hash(mask) == hash(pickle.loads(pickle.dumps(mask)))
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert SinkTokens(3) != PrefixLM(3)
    layout = "((True, False), (True, True))"
    assert repr(mask) == f"Documents((3, 5)) & (Window(left=4, right=0) | SinkTokens(n=1)) & BlockSparse(4, {layout})"
    assert eval(repr(mask)) == mask
    assert repr(Documents((1,) * 9)) == "Documents((1, 1, 1, 1, 1, 1, ...))"


# ---- rows of a batch


@st.composite
def batches(draw: st.DrawFn) -> tuple[tuple[Mask, ...], int, int]:
    tokens, key_tokens = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return tuple(draw(st.lists(some_mask(tokens, key_tokens), max_size=4))), tokens, key_tokens


@settings(max_examples=100, deadline=None)
@given(batches())
def test_rows_are_the_masks_along_the_diagonal(case: tuple[tuple[Mask, ...], int, int]) -> None:
    each, tokens, key_tokens = case
    expected = {
        (row * tokens + q, row * key_tokens + k) for row, mask in enumerate(each) for q, k in dense(mask, tokens, key_tokens)
    }
    assert pairs(batch_bands(each, len(each), tokens, key_tokens)) == expected


def test_one_mask_holds_for_every_row() -> None:
    assert batch_bands(Causal(), 3, 5, 7) == batch_bands([Causal()] * 3, 3, 5, 7)
    assert batch_bands(Causal(), 0, 5, 5) == ()
    padded = batch_bands((Span(0, 3) & Causal(), Span(1, 4) & Causal()), 2, 4, 4)
    assert blind_rows(padded, 8) == (range(3, 5),)


# ---- refusals


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Window(-1), r"^Window\(left=-1, right=0\): left is -1, but it counts tokens; it must be 0 or more or None"),
        (lambda: Window(None, -2), r"right is -2, but it counts tokens; it must be 0 or more or None for no limit$"),
        (lambda: Documents((3, -1, 4)), r"^Documents\(\(3, -1, 4\)\): the smallest of lengths is -1, .* must be 0 or more$"),
        (lambda: Documents((3,), (-1,)), r"the smallest of key_lengths is -1"),
        (lambda: Documents((3, 4), (7,)), r"2 documents of queries and 1 of keys cannot be paired; pass as many key_lengths"),
        (lambda: PrefixLM(-1), r"^PrefixLM\(n=-1\): n is -1, but it counts tokens; it must be 0 or more$"),
        (lambda: Chunked(0), r"^Chunked\(n=0\): n is 0, but it counts tokens; it must be 1 or more$"),
        (lambda: SinkTokens(-4), r"^SinkTokens\(n=-4\): n is -4"),
        (lambda: Span(-1, 4), r"start is -1"),
        (lambda: Span(5, 4), r"stop is 4, but it counts tokens; it must be 5 or more$"),
        (lambda: Window(1.5), r"^Window\(left=1.5, right=0\): left is 1.5, a float; it counts tokens, so pass an int or None"),
        (lambda: Chunked(torch.tensor(3)), r"n is 3, a Tensor; it counts tokens, so pass an int$"),
        (lambda: Documents((4.0, 4.0)), r"^the lengths \[4.0, 4.0\] of documents count tokens; pass a sequence of ints$"),
        (lambda: Documents((4,), (4.5,)), r"^the lengths \[4.5\] of documents count tokens"),
        (lambda: BlockSparse(0, [[True]]), r"block is 0, but it counts tokens; it must be 1 or more$"),
        (lambda: Bands([Band(0, 4, 0, 4, -3, 0), Band(2, 6, 0, 3, -9, 9)]), r"overlap, in Band\(q_start=2, q_stop=4, .*pass"),
        (lambda: Bands([Band(0, 4, 0, 4, -3, 0)] * 2), r"overlap"),
        (lambda: Bands([Band(-1, 4, 0, 4, -3, 0)]), r"is -1, but it counts tokens"),
        (lambda: BlockSparse(4, [[True], [True, False]]), r"its rows have \[1, 2\] flags; each needs one flag per block"),
    ],
)
def test_nonsense_is_refused_at_birth(build: object, text: str) -> None:
    with pytest.raises(MaskError, match=text):
        build()


@pytest.mark.parametrize(
    ("mask", "tokens", "key_tokens", "text"),
    [
        (Documents((3, 4)), 8, 8, r"holds 7 queries and 7 keys, but is asked for 8 and 8; pass lengths that sum to 8"),
        (Documents((3, 4)), 7, 9, r"holds 7 queries and 7 keys, but is asked for 7 and 9; .* key_lengths where keys differ$"),
        (Documents((3, 4), (4, 4)), 7, 7, r"holds 7 queries and 8 keys, but is asked for 7 and 7"),
        (Span(2, 9), 8, 10, r"^Span\(start=2, stop=9\) goes beyond 8 queries or 10 keys; stop may be at"),
        (Span(2, 9), 10, 8, r"stop may be at most 8$"),
        (Bands([Band(0, 4, 0, 4, -3, 0)]), 3, 4, r"goes beyond 3 queries or 4 keys; shorten it"),
        (BlockSparse(4, [[True]]), 5, 4, r"is a layout of 1 x 1 blocks, but 5 queries and 4 keys are 2 x 1 blocks of 4; pass"),
        (BlockSparse(4, [[True]]), 4, 5, r"5 keys are 1 x 2 blocks of 4"),
        (Causal() & (SinkTokens(1) | Documents((3, 4))), 8, 8, r"^Documents\(\(3, 4\)\) holds 7 queries"),
    ],
)
def test_another_length_is_refused(mask: Mask, tokens: int, key_tokens: int, text: str) -> None:
    with pytest.raises(MaskError, match=text):
        mask.bands(tokens, key_tokens)


def test_lengths_of_an_array_are_compared_by_value() -> None:
    assert Documents(torch.tensor([3, 4])) == Documents((3, 4))
    assert len({Documents(torch.tensor([3, 4]).numpy()), Documents((3, 4))}) == 1


def test_a_row_without_a_mask_is_refused() -> None:
    text = r"^2 masks for a batch of 3 rows: pass one mask for all, or 3, one per row$"
    with pytest.raises(MaskError, match=text):
        batch_bands((Causal(), Full()), 3, 8, 8)


# ---- time


def test_a_hundred_thousand_documents_take_half_a_second() -> None:
    """In a process of its own: the checks of shapes and types that the other tests run under would be timed too."""
    code = (
        "import time; from longspan.masks.constructors import Causal, Documents\n"
        "def once(seed):\n"
        "    mask = Documents([1 + (seed + i) * 7 % 30 for i in range(100_000)]) & Causal()\n"
        "    tokens, start = sum(mask.left.lengths), time.process_time()\n"
        "    assert len(mask.bands(tokens, tokens)) == 100_000\n"
        "    return time.process_time() - start\n"
        "print(min(once(seed) for seed in range(5)))\n"
    )
    seconds = float(processes.output([sys.executable, "-c", code]))
    assert seconds < 1.0  # 0.4 where nothing else runs; other work on the same cores may double it

"""Transformers' mask functions as masks of longspan."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from longspan.hf.mask_functions import MaskFunction, as_mask
from longspan.masks.constructors import Causal, Chunked, Full, Mask, Window

CPU = torch.device("cpu")


def test_chunked_masks_are_read() -> None:
    cpu = torch.device("cpu")
    assert as_mask(chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long)), cpu) == Chunked(8) & Causal()
    assert as_mask(and_masks(causal_mask_function, lambda b, h, q, k: k % 3 == 0), cpu) is None


@pytest.mark.parametrize(
    ("function", "mask"),
    [
        (causal_mask_function, Causal()),
        (bidirectional_mask_function, Full()),
        (sliding_window_causal_mask_function(5), Window(4)),
        (sliding_window_bidirectional_mask_function(5), Window(5, 5)),
    ],
)
def test_each_kind_of_mask_function_is_recognised(function: Callable[..., Tensor], mask: Mask) -> None:
    assert as_mask(function, CPU, 1000) == mask


def test_it_is_evaluated_only_when_asked_and_then_once() -> None:
    calls = []

    def causal(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        calls.append(k.numel())
        return k <= q

    given = MaskFunction(causal, CPU, padding=torch.tensor([[1, 1, 0]]))
    assert not calls
    assert given.sees(3, 3)
    assert not given.sees(3, 4)
    assert given.mask == Causal()
    asked = len(calls)
    assert given.mask == Causal()
    assert len(calls) == asked
    assert given.hides_padding
    assert not MaskFunction(causal, CPU, padding=torch.ones(1, 3)).hides_padding
    assert not MaskFunction(causal, CPU).hides_padding

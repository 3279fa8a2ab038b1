"""Transformers' mask functions as masks of longspan."""

import torch
from transformers.masking_utils import and_masks, causal_mask_function, chunked_causal_mask_function

from longspan.hf.mask_functions import as_mask
from longspan.masks.constructors import Causal, Chunked


def test_chunked_masks_are_read() -> None:
    cpu = torch.device("cpu")
    assert as_mask(chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long)), cpu) == Chunked(8) & Causal()
    assert as_mask(and_masks(causal_mask_function, lambda b, h, q, k: k % 3 == 0), cpu) is None

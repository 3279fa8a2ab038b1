"""Measure the memory that attention holds, as the resident memory of separate processes (test_checkpointing.py).

All figures are in hidden states: one is [4096 tokens, 16 heads, 32] in fp32.

Freed tensors go back to the system at once (MALLOC_MMAP_THRESHOLD_), and the peak is reset before each measurement.
"""

import gc
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan import Causal, ParallelMesh, attend
from longspan.memory.checkpointing import selective_context
from longspan.models.block import Attention, Block
from longspan.models.decoder_config import DecoderConfig
from tests.helpers.ranks import on_ranks

TOKENS, HEADS, DIM = 4096, 16, 32
CONFIG = DecoderConfig(vocab=8, layers=1, hidden=HEADS * DIM, heads=HEADS, kv_heads=HEADS, head_dim=DIM, ffn=DIM)
UNIT = 4 * TOKENS * HEADS * DIM  # bytes of one hidden state in fp32


def resident(name: str = "VmRSS") -> float:
    """A line of /proc/self/status in hidden states: resident memory now (VmRSS), or its peak since the last reset (VmHWM)."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1]) / UNIT


def peak_of(work: Callable[[], object]) -> float:
    """The peak of resident memory during ``work()`` minus that before it, in hidden states."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")
    result = work()
    after = resident("VmHWM") - before
    del result
    return after


def kept_by(attention: Callable[..., Tensor], context: dict[str, Any]) -> float:
    """Hidden states that a block under activation checkpointing holds between forward and backward, beside input and output.

    ``context``: keywords of ``checkpoint``.
    """
    torch.manual_seed(0)
    block, x = Block(CONFIG), torch.randn(1, TOKENS, CONFIG.hidden, requires_grad=True)
    before = resident()
    out = checkpoint(block, x, attention, use_reentrant=False, **context)
    kept = resident() - before - 1
    (out * x.detach()).sum().backward()
    return kept


def exchanged(head_chunks: int) -> float:
    """Peak memory of ``attend`` over the 2 ranks of this process group, forward and backward, on this rank.

    In hidden states of this rank's tokens, without the inputs, the output and their gradients.
    """
    mesh = ParallelMesh(ulysses=2)
    q, k, v, dout = (torch.randn(1, TOKENS // 2, HEADS, DIM) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    few = [torch.randn(1, 2, HEADS, DIM, requires_grad=True) for _ in range(3)]  # what the first call loads is not counted
    attend(*few, mask=Causal(), mesh=mesh, head_chunks=head_chunks, recomputable=True).sum().backward()

    def work() -> object:
        out = attend(q, k, v, mask=Causal(), mesh=mesh, head_chunks=head_chunks, recomputable=True)
        return out, torch.autograd.grad(out, leaves, dout)

    return (peak_of(work) - 4 / 2) * 2  # in hidden states of my tokens


def attention_of_a_block(head_chunks: int, attention: Callable[..., Tensor]) -> float:
    """Peak memory of a block's attention with its projections on one rank, forward and backward, in hidden states.

    Not counted are the input, the output, their gradients, and the gradients of the projections.
    """
    torch.manual_seed(0)
    attended, x = Attention(CONFIG, head_chunks), torch.randn(1, TOKENS, CONFIG.hidden, requires_grad=True)
    dout = torch.randn(1, TOKENS, CONFIG.hidden)

    def work() -> object:
        out: Tensor = attended(x, attention)
        out.backward(dout)
        return out

    weights = sum(parameter.numel() * 4 for parameter in attended.parameters()) / UNIT
    return peak_of(work) - 2 - weights


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    tmp_path = Path(sys.argv[1])
    plain = partial(attend, mask=Causal())
    recomputable = partial(plain, recomputable=True)
    kept_by(recomputable, {"context_fn": selective_context})  # first calls load code and grow the heap, which is not measured
    attention_of_a_block(8, plain)
    attention_of_a_block(8, recomputable)
    print("kept", 0, kept_by(recomputable, {"context_fn": selective_context}), kept_by(plain, {}))
    for chunks in (1, 8):
        print("block", chunks, attention_of_a_block(chunks, plain), attention_of_a_block(chunks, recomputable))
    for chunks in (1, 8):
        print("exchanged", chunks, *on_ranks(2, exchanged, chunks, tmp_path=tmp_path))

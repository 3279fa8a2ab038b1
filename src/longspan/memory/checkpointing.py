"""Activation checkpointing of a block: full recomputation, or selective, which keeps attention's output.

    block(x)        none    everything that its backward needs is kept
                    full    x is kept, everything else is computed again in the backward

    checkpoint(block, x, use_reentrant=False, context_fn=selective_context)          a block of attend(recomputable=True)

                      norm, q, k, v      attention                    out, feed-forward
      forward         compute, free      exchange, attend, exchange   compute, free
                                         keep out (my tokens) and log-sum-exp (my heads)
      recompute       compute            nothing: out is kept         compute
      backward        through            receive q, k, v, out, dout,  through
                                         return dq, dk, dv

    all-to-alls a layer a step            forward   recompute   backward
      attend, computed again                 2          2           2
      attend(recomputable=True), saved       2          0           2

Attention is most of the work of a long sequence, and its output is small: one hidden state a token. So it is computed once.
Source: the log-sum-exp as what a backward needs, FlashAttention, arXiv:2205.14135. Knows nothing of models.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import longspan.attention.custom_ops  # noqa: F401 - registers the operator that a selective checkpoint saves
from longspan.memory.options import Recompute


def selective_context() -> tuple[Any, Any]:
    """The ``context_fn`` of a ``torch.utils.checkpoint.checkpoint`` that computes everything again but
    ``attend(recomputable=True)``.

    The gradients are those without a checkpoint. Plain ``attend`` is computed again, its exchanges too.
    """
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts([torch.ops.longspan.attention_recomputable.default])
    return contexts


def checkpoint_block(block: nn.Module, recompute: Recompute) -> None:
    """Change ``block`` in place so that it saves its inputs alone and computes again what its backward needs.

    ``vars(block).pop("forward")`` undoes it.

    Args:
        block: a module that is called with tensors, and gives the same result when it is computed again.
        recompute: "none" changes nothing; "full" computes everything again; "selective" everything but
            ``attend(recomputable=True)``.
    """
    if recompute == "none":
        return
    context: dict[str, Any] = {"context_fn": selective_context} if recompute == "selective" else {}
    vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False, **context)

"""Activation checkpointing of a block: full recomputation, or selective, which saves the output of attention.

    recompute =     none        the forward saves everything that the backward needs
                    full        the forward saves the block's input; the backward computes the block again
                    selective   as full, but attention's output is saved too and attention is not computed again

    checkpoint(block, x, use_reentrant=False, context_fn=selective_context)          a block of attend(recomputable=True)

                      norm, q, k, v      attention                    out, feed-forward
      forward         compute, free      exchange, attend, exchange   compute, free
                                         save out (my tokens) and log-sum-exp (my heads)
      recompute       compute            nothing: out is saved        compute
      backward        autograd           exchange q, k, v, out, dout  autograd
                                         exchange dq, dk, dv

    all-to-alls a layer and step          forward   recompute   backward
      attend, computed again                 2          2           2
      attend(recomputable=True), saved       2          0           2

On long sequences attention is most of the work, and its output is small: one hidden state per token.
Source: saving only the log-sum-exp for the backward, FlashAttention, arXiv:2205.14135. Independent of models.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import longspan.attention.custom_ops  # noqa: F401 - registers the operator that a selective checkpoint saves
from longspan.memory.options import Recompute


def selective_context() -> tuple[Any, Any]:
    """The ``context_fn`` of ``torch.utils.checkpoint.checkpoint`` with which attention is saved and all else recomputed.

    Saved are the results of ``attend(recomputable=True)``. Everything else in the checkpoint is computed again in the backward,
    also a plain ``attend`` with its all-to-alls. Gradients are the same as without a checkpoint.

    Returns:
        The two contexts of ``create_selective_checkpoint_contexts``: for the forward and for the recomputation.
    """
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts([torch.ops.longspan.attention_recomputable.default])
    return contexts


def checkpoint_block(block: nn.Module, recompute: Recompute) -> None:
    """Change ``block`` in place so that its forward saves only its inputs and its backward computes it again.

    It replaces ``block.forward`` on the instance, so ``vars(block).pop("forward")`` undoes it.

    Args:
        block: a module whose result is the same when it is computed again.
        recompute: "none" changes nothing; "full" computes everything again; "selective" computes everything again except
            ``attend(recomputable=True)``.
    """
    if recompute == "none":
        return
    context: dict[str, Any] = {"context_fn": selective_context} if recompute == "selective" else {}
    vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False, **context)

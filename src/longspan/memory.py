"""Compute again what is cheap, keep what is dear: recomputation around attention. Knows nothing of models.

    checkpoint(block, x, use_reentrant=False, context_fn=keep_attention)          a block that calls attend_once

                      norm, q, k, v      attention                    out, feed-forward
      forward         compute, drop      exchange, attend, exchange   compute, drop
                                         keep out (my tokens) and log-sum-exp (my heads)
      recompute       compute            nothing: out is there        compute
      backward        through            bring q, k, v, out, dout,    through
                                         take dq, dk, dv home

    all-to-alls a layer a step            forward   recompute   backward
      attend, recomputed                     2          2           2
      attend_once, attention kept            2          0           2

Attention is most of the work of a long sequence and its output a small part of the memory, one token's hidden state: so it is
computed once. Source: the log-sum-exp as what a backward needs, FlashAttention, arXiv:2205.14135.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from longspan.attention import Bias, prepare
from longspan.kernels import Kernel
from longspan.kernels.function import KernelFunction
from longspan.masks import Causal, Mask
from longspan.mesh import ParallelMesh
from longspan.operators import kept_attention


def attend_once(
    q: Float[Tensor, "batch my_tokens heads qk_dim"],
    k: Float[Tensor, "batch my_keys kv_heads _"],
    v: Float[Tensor, "batch my_values value_heads v_dim"],
    *,
    mask: Mask | Sequence[Mask] = Causal(),  # noqa: B008 - masks are frozen
    mesh: ParallelMesh | None = None,
    tokens: int | None = None,
    key_tokens: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " sink_heads"] | None = None,
    bias: Bias | None = None,
    kernel: str | Kernel | KernelFunction = "auto",
    head_chunks: int = 1,
) -> Float[Tensor, "batch my_tokens heads v_dim"]:
    """``attend`` as one operator, exchanges included, which holds nothing but q, k, v, its output and log-sum-exp of my tokens.

    Equals ``attend`` of the same arguments, gradients included, and sends twice as much in the backward pass: q, k and v, which
    are not kept on the heads' side, and the output come with the gradient. Give it to a model as its attention,
    ``Decoder(config, attention=attend_once)``, and checkpoint with ``keep_attention``.
    """
    q, k, v, parameters, plan = prepare(
        q, k, v, mask, mesh, tokens, key_tokens, scale, softcap, sinks, bias, kernel, head_chunks
    )
    out: Tensor = kept_attention(q, k, v, sinks, parameters, plan.chunks)[0]
    return out


def keep_attention() -> tuple[Any, Any]:
    """The ``context_fn`` of a ``torch.utils.checkpoint.checkpoint`` that computes all again but ``attend_once``.

    The gradients are those without a checkpoint. Plain ``attend`` is computed again, its exchanges too.
    """
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts([torch.ops.longspan.kept_attention.default])
    return contexts

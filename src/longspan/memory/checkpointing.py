"""Compute again what is cheap, keep what is dear, put away what is not needed yet. Knows nothing of models or ranks.

    block(x)        none    everything that its backward needs is kept
                    full    x is kept, all else computed again in the backward

    checkpoint(block, x, use_reentrant=False, context_fn=selective_context)          a block of attend(recomputable=True)

                      norm, q, k, v      attention                    out, feed-forward
      forward         compute, drop      exchange, attend, exchange   compute, drop
                                         keep out (my tokens) and log-sum-exp (my heads)
      recompute       compute            nothing: out is there        compute
      backward        through            bring q, k, v, out, dout,    through
                                         take dq, dk, dv home

    all-to-alls a layer a step            forward   recompute   backward
      attend, computed again                 2          2           2
      attend(recomputable=True), saved       2          0           2

Attention is most of the work of a long sequence and its output a small part of the memory, one token's hidden state: so it is
computed once. Source: the log-sum-exp as what a backward needs, FlashAttention, arXiv:2205.14135.

    put_away        what a block keeps goes to the host while later blocks run, and comes back when its backward begins
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import longspan.attention.custom_ops  # noqa: F401 - registers the operator that a selective checkpoint saves
from longspan.errors import ModelError

Recompute = Literal["none", "full", "selective"]
"""What a block computes again in its backward: nothing, everything, or everything but attention and its exchanges."""
AWAY_BYTES = 2**20
"""What is smaller stays: a copy would cost more than it frees."""


@dataclass(frozen=True)
class Tools:
    """What a model is given so that it needs less memory. None changes a number; ``parallelize`` says what each does."""

    recompute: Recompute = "none"
    tile_tokens: int | None = None
    head_chunks: int = 1
    put_away: bool = False
    return_logits: bool = True


def selective_context() -> tuple[Any, Any]:
    """The ``context_fn`` of a ``torch.utils.checkpoint.checkpoint`` that computes all again but ``attend(recomputable=True)``.

    The gradients are those without a checkpoint. Plain ``attend`` is computed again, its exchanges too.
    """
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts([torch.ops.longspan.attention_recomputable.default])
    return contexts


def recompute(block: nn.Module, what: Recompute) -> None:
    """Let ``block`` keep its inputs alone and compute again what its backward needs; ``vars(block).pop("forward")`` undoes it.

    ``"selective"`` computes ``attend(recomputable=True)`` once, and plain ``attend`` again.

    Raises ModelError for an unknown word.
    """
    refuse_unknown(what)
    if what == "none":
        return
    context: dict[str, Any] = {"context_fn": selective_context} if what == "selective" else {}
    vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False, **context)


def refuse_unknown(what: str) -> None:
    """Raise ModelError for a word that ``recompute`` does not know."""
    if what not in get_args(Recompute):
        raise ModelError(f"recompute={what!r} is unknown; legal are {', '.join(map(repr, get_args(Recompute)))}")


def put_away(block: nn.Module) -> None:
    """Let ``block`` move what it keeps for its backward to the host, on CUDA by a stream of its own from pinned memory.

    Parameters stay where they are. ``vars(block).pop("forward")`` undoes it. On a CPU the host is the same memory: nothing is
    gained there, and the same code runs. (The CUDA side has never run on a GPU.)
    """
    vars(block)["forward"] = partial(_forward_put_away, block, block.forward)


def _forward_put_away(block: nn.Module, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    stay = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    gone: dict[object, tuple[Tensor, _Away]] = {}  # with the tensor itself, whose address then means no other

    def pack(x: Tensor) -> Tensor | _Away:
        size = min(x.numel() * x.element_size(), x.untyped_storage().nbytes())  # an expanded tensor has less than it shows
        if size < AWAY_BYTES or x.untyped_storage().data_ptr() in stay:
            return x
        same = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)  # saved for q, k and v, it is copied once
        if same not in gone:
            gone[same] = (x.detach(), _Away(x))
        return gone[same][1]

    with saved_tensors_hooks(pack, lambda kept: kept.back() if isinstance(kept, _Away) else kept):
        output = forward(*args, **named)
    gone.clear()
    return output


class _Away:
    """A tensor on the host, and the way back to where it was."""

    def __init__(self, x: Tensor) -> None:
        self.device = x.device
        self.host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
        if not x.is_cuda:
            self.host.copy_(x)
            return
        beside = _stream_beside(x.device)
        beside.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(beside):
            self.host.copy_(x, non_blocking=True)
        x.record_stream(beside)  # its memory is free for others only when the copy has read it

    def back(self) -> Tensor:
        if self.device.type != "cuda":
            return self.host.to(self.device)
        now, beside = torch.cuda.current_stream(self.device), _stream_beside(self.device)
        with torch.cuda.stream(beside):
            x = self.host.to(self.device, non_blocking=True)
        now.wait_stream(beside)
        x.record_stream(now)
        return x


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """For copies, so that kernels need not wait for them."""
    return torch.cuda.Stream(device)

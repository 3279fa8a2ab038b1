"""The two operators of attention, each one node for autograd, torch.compile and selective checkpointing.

    attention         rows of my heads --> rows of my heads           between two exchanges that are operators of their own

    kept_attention    my tokens, every head --> my tokens, every head       a chunk of the heads at a time:

        forward     q, k, v     --exchange-->  kernels  --exchange-->  out          kept: q, k, v, out (my tokens) and the
        backward    q, k, v,                                                        log-sum-exp (my heads), nothing else
                    out, dout   --exchange-->  kernels  --exchange-->  dq, dk, dv

        chunk 0     bring | attend         | home
        chunk 1             bring          | attend         | home         while the kernels work on one chunk, the next
        chunk 2                              bring          | attend ...   one is on its way

The first keeps what it was brought and sends less; the second keeps no copy on the heads' side, so that a checkpoint which
saves its two results repeats neither attention nor exchange. Knows rows and heads; nothing of masks, meshes or models.

B batch  S my tokens  R rows: batch * every token   H every head  K every key/value head  G my heads   D head size
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._library.opaque_object import MemberType, register_opaque_type
from torch._opaque_base import OpaqueBase
from torch.profiler import record_function

from longspan.attention import ring
from longspan.attention.ring import Ring
from longspan.attention.ulysses import Trade, new_home, start_heads_for_tokens, start_tokens_for_heads
from longspan.kernels.head_groups import Local


class Core(OpaqueBase):
    """What attention needs beside its tensors: the kernel as it is bound here, and the hops of the ring."""

    def __init__(self, local: Local, ring: Ring) -> None:
        self.local, self.ring = local, ring

    def __deepcopy__(self, memo: dict[int, Any]) -> "Core":
        return self  # torch.compile copies its graphs; what names process groups is the same in all of them


@dataclass(frozen=True)
class Part:
    """The attention of some of my heads: its exchanges (None on one ulysses rank), and what happens between them."""

    heads: range
    kv_heads: range
    core: Core
    there: Trade | None  # q, k, v
    back: Trade | None  # the output
    again: Trade | None  # q, the output, its gradient, k, v: what a backward needs that finds nothing there


class Chunks(OpaqueBase):
    """The parts of one attention, in their order; ``replicated`` says whether key/value heads come home more than once."""

    def __init__(self, parts: tuple[Part, ...], replicated: bool, tokens: int) -> None:
        self.parts, self.replicated, self.tokens = parts, replicated, tokens
        self.heads = sum(len(part.heads) for part in parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Chunks":
        return self


Send = Callable[[], Callable[[], None]]
"""Starts to take the results of a part home, and returns how to end it."""

register_opaque_type(Core, typ="reference")
register_opaque_type(Chunks, typ="reference", members=dict.fromkeys(("heads", "tokens"), MemberType.USE_REAL))


@torch.library.custom_op("longspan::attention", mutates_args=())
def attention(
    q_RGD: Tensor, k_RGD: Tensor, v_RGD: Tensor, sinks: Tensor | None, parameters: Sequence[Tensor], core: Core
) -> tuple[Tensor, Tensor]:
    """(out [rows, my heads, v_dim] of q's dtype, lse [my heads, rows]) of my heads, sinks included."""
    out_RGD, lse = _forward(q_RGD, k_RGD, v_RGD, sinks, parameters, core)
    return out_RGD.contiguous(), lse.contiguous()  # as the fake promises inductor; flash lays lse the other way round


@torch.library.custom_op("longspan::attention_backward", mutates_args=())
def attention_backward(
    dout_RGD: Tensor, q_RGD: Tensor, k_RGD: Tensor, v_RGD: Tensor, out_RGD: Tensor, lse: Tensor,
    sinks: Tensor | None, parameters: Sequence[Tensor], core: Core,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, of the sinks if there are any, and of the bias' parameters."""
    grads = _backward(dout_RGD, q_RGD, k_RGD, v_RGD, out_RGD, lse, sinks, parameters, core)
    return _as_inputs(grads, [q_RGD, k_RGD, v_RGD], sinks, parameters)


@torch.library.custom_op("longspan::kept_attention", mutates_args=())
def kept_attention(
    q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, sinks: Tensor | None, parameters: Sequence[Tensor], chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """(out [batch, my tokens, every head, v_dim], lse [my heads, rows]), exchanges, rings and sinks included."""
    out_BSHD = q_BSHD.new_empty(*q_BSHD.shape[:3], v_BSKD.shape[3])
    lses: list[Tensor] = []

    def bring(part: Part) -> Callable[[], list[Tensor]]:
        return _bring([q_BSHD], [k_BSKD, v_BSKD], part, part.there)

    def attend(part: Part, rows: list[Tensor]) -> Send:
        out_RGD, lse = _forward(rows[0], rows[1], rows[2], _of(sinks, part), parameters, part.core)
        lses.append(lse)
        return partial(_send_home, [out_RGD], [(out_BSHD, part.heads, False)], part.back)

    _in_turn(chunks.parts, bring, attend)
    return out_BSHD, torch.cat(lses)


@torch.library.custom_op("longspan::kept_attention_backward", mutates_args=())
def kept_attention_backward(
    dout_BSHD: Tensor, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, out_BSHD: Tensor, lse: Tensor,
    sinks: Tensor | None, parameters: Sequence[Tensor], chunks: Chunks,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, of the sinks if there are any, and of the bias' parameters."""
    dq = new_home(q_BSHD.shape, False, q_BSHD)
    dk, dv = (new_home(x.shape, chunks.replicated, x) for x in (k_BSKD, v_BSKD))
    dsinks = None if sinks is None else lse.new_zeros(sinks.shape)
    dparameters = [lse.new_zeros(parameter.shape) for parameter in parameters]
    lses = iter(lse.split([len(part.heads) for part in chunks.parts]))

    def bring(part: Part) -> Callable[[], list[Tensor]]:
        return _bring([q_BSHD, out_BSHD, dout_BSHD], [k_BSKD, v_BSKD], part, part.again)

    def attend(part: Part, rows: list[Tensor]) -> Send:
        *grads, dsinks_G, shares = _backward_of_rows(rows, next(lses), _of(sinks, part), parameters, part.core)
        if dsinks is not None and dsinks_G is not None:
            dsinks[part.heads.start : part.heads.stop] = dsinks_G
        for total, share in zip(dparameters, shares):
            total += share
        keys = (part.kv_heads, chunks.replicated)
        return partial(_send_home, grads, [(dq, part.heads, False), (dk, *keys), (dv, *keys)], part.there)

    _in_turn(chunks.parts, bring, attend)
    return _as_inputs((dq, dk, dv, dsinks, dparameters), [q_BSHD, k_BSKD, v_BSKD], sinks, parameters)


def _in_turn(
    parts: Sequence[Part],
    bring: Callable[[Part], Callable[[], list[Tensor]]],
    attend: Callable[[Part, list[Tensor]], Send],
) -> None:
    """Bring each part its rows, attend, and take the results home, with exchanges under way while kernels work.

    While one part is at work the next arrives and the one before goes home; whatever has had its turn is let go at once.
    """
    arriving: Callable[[], list[Tensor]] | None = bring(parts[0])
    leaving: Callable[[], None] = _nothing
    for part, following in zip(parts, [*parts[1:], None]):
        assert arriving is not None
        rows = arriving()
        arriving = None if following is None else bring(following)
        send = attend(part, rows)
        rows.clear()
        leaving()
        leaving = send()
        del send
    leaving()


def _nothing() -> None:
    pass


def _bring(queries: Sequence[Tensor], keys: Sequence[Tensor], part: Part, trade: Trade | None) -> Callable[[], list[Tensor]]:
    """Start to bring the heads of a part: call the result for their rows [rows, my heads, dim]."""
    if trade is not None:
        arriving = start_tokens_for_heads([*queries, *keys], trade)
        return lambda: columns(arriving(), trade)
    rows = [x[:, :, part.heads.start : part.heads.stop].flatten(0, 1) for x in queries]
    rows += [x[:, :, part.kv_heads.start : part.kv_heads.stop].flatten(0, 1) for x in keys]
    return lambda: rows


def _send_home(xs_RGD: list[Tensor], homes: Sequence[tuple[Tensor, range, bool]], trade: Trade | None) -> Callable[[], None]:
    """Start to take rows home to (tensor of every head, which of them, whether they are summed): call the result to end it.

    They travel in the dtype of the first home, and ``xs_RGD`` is left empty.
    """
    if trade is not None:
        dtype = homes[0][0].dtype
        rows = [_side_by_side([xs_RGD.pop(0).flatten(1) for _ in crowd.dims], dtype) for crowd in trade.crowds]
        return start_heads_for_tokens(rows, trade, [home for home, _, _ in homes])
    for x_RGD, (home, heads, summed) in zip(xs_RGD, homes):
        place_BSGD = home[:, :, heads.start : heads.stop]
        x_BSGD = x_RGD.reshape(place_BSGD.shape)
        place_BSGD.copy_(place_BSGD + x_BSGD if summed else x_BSGD)
    xs_RGD.clear()
    return _nothing


def columns(rows_RW: Sequence[Tensor], trade: Trade) -> list[Tensor]:
    """The rows of each crowd as its tensors [rows, my heads, dim], which are views."""
    xs_RW = chain.from_iterable(x.split(widths, 1) for x, widths in zip(rows_RW, trade.columns))
    return [x.unflatten(1, (-1, dim)) for x, dim in zip(xs_RW, trade.dims)]


def _side_by_side(xs_RW: list[Tensor], dtype: torch.dtype) -> Tensor:
    if len(xs_RW) == 1:
        return xs_RW[0].to(dtype)
    with record_function("longspan::exchange"):
        side_by_side = xs_RW[0].new_empty(len(xs_RW[0]), sum(x.shape[1] for x in xs_RW), dtype=dtype)
        return torch.cat(xs_RW, 1, out=side_by_side)


def _of(sinks: Tensor | None, part: Part) -> Tensor | None:
    return None if sinks is None else sinks[part.heads.start : part.heads.stop]


def _forward(
    q_RGD: Tensor, k_RGD: Tensor, v_RGD: Tensor, sinks: Tensor | None, parameters: Sequence[Tensor], core: Core
) -> tuple[Tensor, Tensor]:
    with _exactly(q_RGD):
        out, lse = ring.forward(q_RGD, k_RGD, v_RGD, core.local, core.ring, tuple(parameters))
    if sinks is not None:
        lse_of_keys, lse = lse, torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(1))
        out = out * (lse_of_keys - lse).exp().T.unsqueeze(2)
    return out.to(q_RGD.dtype), lse


def _exactly(like: Tensor) -> torch.autocast:
    """Autocast has had its say on q, k and v: what a kernel forms in fp32 must not become half again."""
    return torch.autocast(like.device.type, enabled=False)


def _backward_of_rows(
    rows: Sequence[Tensor], lse: Tensor, sinks: Tensor | None, parameters: Sequence[Tensor], core: Core
) -> "Gradients":
    """``_backward`` of what ``Part.again`` brings, which none but the caller then still holds."""
    q_RGD, out_RGD, dout_RGD, k_RGD, v_RGD = rows
    return _backward(dout_RGD, q_RGD, k_RGD, v_RGD, out_RGD, lse, sinks, parameters, core)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, list[Tensor]]
"""Of q, k, v, the sinks and the bias' parameters, in the kernels' precision."""


def _backward(
    dout_RGD: Tensor, q_RGD: Tensor, k_RGD: Tensor, v_RGD: Tensor, out_RGD: Tensor, lse: Tensor,
    sinks: Tensor | None, parameters: Sequence[Tensor], core: Core,
) -> Gradients:  # fmt: skip
    leaves = tuple(parameter.detach().requires_grad_() for parameter in parameters)
    with _exactly(q_RGD):
        dq, dk, dv, dparameters = ring.backward(dout_RGD, q_RGD, k_RGD, v_RGD, out_RGD, lse, core.local, core.ring, leaves)
    if sinks is None:
        return dq, dk, dv, None, dparameters
    flow = (dout_RGD.to(lse.dtype) * out_RGD).sum(-1).T
    return dq, dk, dv, -((sinks.to(lse.dtype).unsqueeze(1) - lse).exp() * flow).sum(1), dparameters


def _as_inputs(grads: Gradients, qkv: Sequence[Tensor], sinks: Tensor | None, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients that there are, each in the dtype of its input, and lying as the fakes promise."""
    dq, dk, dv, dsinks, dparameters = grads
    present = [dq, dk, dv, *([] if dsinks is None else [dsinks]), *dparameters]
    return [grad.to(x.dtype).contiguous() for grad, x in zip(present, _inputs(qkv, sinks, parameters))]


def _inputs(qkv: Sequence[Tensor], sinks: Tensor | None, parameters: Sequence[Tensor]) -> list[Tensor]:
    return [*qkv, *([] if sinks is None else [sinks]), *parameters]


@attention.register_fake
def _(
    q_RGD: Tensor, k_RGD: Tensor, v_RGD: Tensor, sinks: Tensor | None, parameters: Sequence[Tensor], core: Core
) -> tuple[Tensor, Tensor]:
    rows, heads, _ = q_RGD.shape
    return q_RGD.new_empty(rows, heads, v_RGD.shape[2]), _fake_lse(q_RGD, heads, rows)


@kept_attention.register_fake
def _(
    q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, sinks: Tensor | None, parameters: Sequence[Tensor], chunks: Chunks
) -> tuple[Tensor, Tensor]:
    out_BSHD = q_BSHD.new_empty(*q_BSHD.shape[:3], v_BSKD.shape[3])
    return out_BSHD, _fake_lse(q_BSHD, chunks.heads, q_BSHD.shape[0] * chunks.tokens)


def _fake_lse(like: Tensor, heads: int, rows: int) -> Tensor:
    return like.new_empty(heads, rows, dtype=torch.promote_types(like.dtype, torch.float32))


def _fake_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    sinks: Tensor | None, parameters: Sequence[Tensor], plan: Core | Chunks,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(x.shape) for x in _inputs([q, k, v], sinks, parameters)]


attention_backward.register_fake(_fake_gradients)
kept_attention_backward.register_fake(_fake_gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, parameters, ctx.plan = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, *parameters)


def _back_through(backward: Callable[..., list[Tensor]], ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, sinks, *parameters = ctx.saved_tensors  # read once: a checkpoint gives them out once
    dq, dk, dv, *rest = backward(dout, q, k, v, out, lse, sinks, parameters, ctx.plan)
    dsinks = None if sinks is None else rest.pop(0)
    return dq, dk, dv, dsinks, rest, None


attention.register_autograd(partial(_back_through, attention_backward), setup_context=_save)
kept_attention.register_autograd(partial(_back_through, kept_attention_backward), setup_context=_save)

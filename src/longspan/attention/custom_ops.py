"""The two operators of attention, each one node for autograd, torch.compile and selective checkpointing.

    attention               rows of my heads --> rows of my heads       between two all-to-alls that are separate operators

    attention_recomputable  my tokens, every head --> my tokens, every head       includes the all-to-alls, in head chunks:

        forward     q, k, v     --exchange-->  kernels  --exchange-->  out          saved: q, k, v, out (my tokens) and the
        backward    q, k, v,                                                        log-sum-exp (my heads), nothing else
                    out, dout   --exchange-->  kernels  --exchange-->  dq, dk, dv

        chunk 0     fetch | attend         | return
        chunk 1             fetch          | attend         | return       while the kernel computes one chunk, the next
        chunk 2                              fetch          | attend ...   one is exchanged

The first saves its exchanged inputs and sends less. The second saves no exchanged copies; a checkpoint that saves its two
results repeats neither attention nor all-to-alls. Independent of masks and models.

The suffix of a tensor's name gives its dims: B batch, S my tokens, R rows (batch * every token), H every head,
K every key/value head, G my heads, D head size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from longspan.attention import ring
from longspan.attention.plan import AttentionPlan, ExchangePlan, HeadChunk
from longspan.attention.ulysses import new_output, start_exchange_to_heads, start_exchange_to_tokens
from longspan.kernels.protocol import accumulation_dtype, contiguous_last_dim

Return = Callable[[], Callable[[], None]]
"""A function that starts the all-to-all of a chunk's results back to the ranks that hold the tokens.

It returns another function, which waits for the end of that all-to-all and writes the results.
"""
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, list[Tensor]]
"""(dq, dk, dv, gradient of the sink logits or None without them, list of the gradients of the bias parameters), all in fp32 or
fp64."""


@torch.library.custom_op("longspan::attention", mutates_args=())
def attention(
    q_RGD: Tensor, k_RGD: Tensor, v_RGD: Tensor, sinks: Tensor | None, parameters: Sequence[Tensor], plan: AttentionPlan
) -> tuple[Tensor, Tensor]:
    """Attention over rows that were exchanged already: all tokens of this ring rank, for the heads of this ulysses rank.

    It contains the ring hops and the sink logits, and no all-to-all. A row is one token of one sequence of the batch.

    Args:
        q_RGD, k_RGD, v_RGD: [rows, my heads, dim].
        sinks: the sink logits of my heads, or None.
        parameters: the parameters of the bias, empty without one.
        plan: the decisions that need no tensor values: kernel, mask bands, ring hops.

    Returns:
        (out [rows, my heads, v_dim] in the dtype of q, log-sum-exp of the scores [my heads, rows] in fp32 or fp64).
    """
    out_RGD, lse = _forward([q_RGD, k_RGD, v_RGD], sinks, parameters, plan, plan.chunks[0])
    return out_RGD.contiguous(), lse.contiguous()  # the strides of the fake below; flash gives lse other ones


@torch.library.custom_op("longspan::attention_backward", mutates_args=())
def attention_backward(
    dout_RGD: Tensor, q_RGD: Tensor, k_RGD: Tensor, v_RGD: Tensor, out_RGD: Tensor, lse: Tensor,
    sinks: Tensor | None, parameters: Sequence[Tensor], plan: AttentionPlan,
) -> list[Tensor]:  # fmt: skip
    """The backward of ``attention``: gradients for this rank's heads over all exchanged rows, without an all-to-all.

    Args:
        dout_RGD: the gradient of ``out_RGD``.
        q_RGD, k_RGD, v_RGD, sinks, parameters, plan: the arguments of ``attention``.
        out_RGD, lse: the results of ``attention``.

    Returns:
        A list in the order: gradients of q, k and v [rows, my heads, dim], of the sink logits [my heads] (no entry without
        them), of each bias parameter; each in the dtype of its input.
    """
    rows = [q_RGD, out_RGD, dout_RGD, k_RGD, v_RGD]
    grads = _backward(rows, lse, sinks, parameters, plan, plan.chunks[0])
    return _as_inputs(grads, [q_RGD, k_RGD, v_RGD], sinks, parameters)


@torch.library.custom_op("longspan::attention_recomputable", mutates_args=())
def attention_recomputable(
    q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, sinks: Tensor | None, parameters: Sequence[Tensor], plan: AttentionPlan
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's tokens for every head, including its all-to-alls, ring hops and sink logits.

    The heads are exchanged and computed one head chunk after another.

    Args:
        q_BSHD, k_BSKD, v_BSKD: [batch, my tokens, every head, dim].
        sinks: the sink logits of every head, or None.
        parameters: the parameters of the bias, empty without one.
        plan: the decisions that need no tensor values: kernel, mask bands, ring hops, all-to-alls.

    Returns:
        (out [batch, my tokens, every head, v_dim] in the dtype of q, log-sum-exp of the scores [my heads, rows]); a row is one
        token, of any rank, of one sequence of the batch.
    """
    out_BSHD = q_BSHD.new_empty(*q_BSHD.shape[:3], v_BSKD.shape[3])
    lses: list[Tensor] = []

    def fetch(chunk: HeadChunk) -> Callable[[], list[Tensor]]:
        return _fetch([q_BSHD], [k_BSKD, v_BSKD], chunk, chunk.qkv)

    def attend(chunk: HeadChunk, rows: list[Tensor]) -> Return:
        out_RGD, lse = _forward(rows, _of(sinks, chunk), parameters, plan, chunk)
        lses.append(lse)
        return partial(_return, [out_RGD], [(out_BSHD, chunk.heads, False)], chunk.out)

    _pipeline(plan.chunks, fetch, attend)
    return out_BSHD, torch.cat(lses)


@torch.library.custom_op("longspan::attention_recomputable_backward", mutates_args=())
def attention_recomputable_backward(
    dout_BSHD: Tensor, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, out_BSHD: Tensor, lse: Tensor,
    sinks: Tensor | None, parameters: Sequence[Tensor], plan: AttentionPlan,
) -> list[Tensor]:  # fmt: skip
    """The backward of ``attention_recomputable``, including its all-to-alls: gradients for this rank's tokens and every head.

    q, k, v, out and dout are exchanged again.

    Args:
        dout_BSHD: the gradient of ``out_BSHD``.
        q_BSHD, k_BSKD, v_BSKD, sinks, parameters, plan: the arguments of ``attention_recomputable``.
        out_BSHD, lse: the results of ``attention_recomputable``.

    Returns:
        A list in the order: gradients of q, k and v [batch, my tokens, every head, dim], of the sink logits [every head] (no
        entry without them; 0 for heads of other ranks), of each bias parameter (this rank's part of the sum); each in the dtype
        of its input.
    """
    dq = new_output(q_BSHD.shape, False, q_BSHD)
    dk, dv = (new_output(x.shape, plan.replicated, x) for x in (k_BSKD, v_BSKD))
    dsinks = None if sinks is None else lse.new_zeros(sinks.shape)
    dparameters = [lse.new_zeros(parameter.shape) for parameter in parameters]
    lses = iter(lse.split([len(chunk.heads) for chunk in plan.chunks]))

    def fetch(chunk: HeadChunk) -> Callable[[], list[Tensor]]:
        return _fetch([q_BSHD, out_BSHD, dout_BSHD], [k_BSKD, v_BSKD], chunk, chunk.backward)

    def attend(chunk: HeadChunk, rows: list[Tensor]) -> Return:
        *grads, dsinks_G, parts = _backward(rows, next(lses), _of(sinks, chunk), parameters, plan, chunk)
        if dsinks is not None and dsinks_G is not None:
            dsinks[chunk.heads.start : chunk.heads.stop] = dsinks_G
        for total, part in zip(dparameters, parts):
            total += part
        keys = (chunk.kv_heads, plan.replicated)
        return partial(_return, grads, [(dq, chunk.heads, False), (dk, *keys), (dv, *keys)], chunk.qkv)

    _pipeline(plan.chunks, fetch, attend)
    return _as_inputs((dq, dk, dv, dsinks, dparameters), [q_BSHD, k_BSKD, v_BSKD], sinks, parameters)


def _pipeline(
    chunks: Sequence[HeadChunk],
    fetch: Callable[[HeadChunk], Callable[[], list[Tensor]]],
    attend: Callable[[HeadChunk, list[Tensor]], Return],
) -> None:
    """For each head chunk in turn: fetch its rows, attend, return the results; communication overlaps with the kernel.

    The kernel on one chunk runs while the next chunk is fetched and the one before is returned. Buffers are freed at their last
    use.

    Args:
        chunks: at least one.
        fetch: called with a chunk, starts the exchange of its rows; the function that it returns waits and gives them.
        attend: called with a chunk and its rows, computes it; the function that it returns starts the return of the results.
    """
    arriving: Callable[[], list[Tensor]] | None = fetch(chunks[0])
    leaving: Callable[[], None] = _nothing
    for chunk, following in zip(chunks, [*chunks[1:], None]):
        assert arriving is not None
        rows = arriving()
        arriving = None if following is None else fetch(following)
        start_return = attend(chunk, rows)
        rows.clear()
        leaving()
        leaving = start_return()
        del start_return
    leaving()


def _nothing() -> None:
    pass


def _fetch(
    queries: Sequence[Tensor], keys: Sequence[Tensor], chunk: HeadChunk, exchange: ExchangePlan | None
) -> Callable[[], list[Tensor]]:
    """Start the all-to-all from tokens to heads for one chunk of the heads.

    Args:
        queries, keys: tensors with all query heads, and with all key/value heads, [batch, my tokens, heads, dim].
        chunk: the heads.
        exchange: the all-to-all; None on one ulysses rank, where the heads are sliced and nothing is sent.

    Returns:
        A function that waits and returns the tensors of ``queries``, then of ``keys``, as [rows, my heads, dim].
    """
    if exchange is not None:
        arriving = start_exchange_to_heads([*queries, *keys], exchange)
        return lambda: columns(arriving(), exchange)
    rows = [x[:, :, chunk.heads.start : chunk.heads.stop].flatten(0, 1) for x in queries]
    rows += [x[:, :, chunk.kv_heads.start : chunk.kv_heads.stop].flatten(0, 1) for x in keys]
    return lambda: rows


def _return(
    xs_RGD: list[Tensor], outputs: Sequence[tuple[Tensor, range, bool]], exchange: ExchangePlan | None
) -> Callable[[], None]:
    """Start the all-to-all from heads to tokens for one chunk; the returned function waits for it and writes into ``outputs``.

    Args:
        xs_RGD: tensors [rows, my heads, dim]; sent in the dtype of the first output, and removed from the list.
        outputs: for each of them (tensor of all heads, the heads to write, whether to add instead of write).
        exchange: the all-to-all to heads whose adjoint this is; None on one ulysses rank, where nothing is sent.
    """
    if exchange is not None:
        dtype = outputs[0][0].dtype
        rows = [_side_by_side([xs_RGD.pop(0).flatten(1) for _ in group.dims], dtype) for group in exchange.groups]
        return start_exchange_to_tokens(rows, exchange, [output for output, _, _ in outputs])
    for x_RGD, (output, heads, summed) in zip(xs_RGD, outputs):
        target_BSGD = output[:, :, heads.start : heads.stop]
        x_BSGD = x_RGD.reshape(target_BSGD.shape)
        target_BSGD.copy_(target_BSGD + x_BSGD if summed else x_BSGD)
    xs_RGD.clear()
    return _nothing


def columns(rows_RW: Sequence[Tensor], exchange: ExchangePlan) -> list[Tensor]:
    """The received tensors of an all-to-all, each [rows, my heads, dim], as views of the rows in which they lie side by side.

    Args:
        rows_RW: for each group of tensors that were sent together, [rows, sum of my heads x dim over the group's tensors].
        exchange: the all-to-all.
    """
    xs_RW = chain.from_iterable(x.split(widths, 1) for x, widths in zip(rows_RW, exchange.my_widths))
    return [x.unflatten(1, (-1, dim)) for x, dim in zip(xs_RW, exchange.dims)]


def _side_by_side(xs_RW: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The tensors ``xs_RW`` [rows, width] concatenated along the width, in ``dtype``; a single one is only cast."""
    if len(xs_RW) == 1:
        return xs_RW[0].to(dtype)
    with record_function("longspan::exchange"):
        side_by_side = xs_RW[0].new_empty(len(xs_RW[0]), sum(x.shape[1] for x in xs_RW), dtype=dtype)
        return torch.cat(xs_RW, 1, out=side_by_side)


def _of(sinks: Tensor | None, chunk: HeadChunk) -> Tensor | None:
    """Those of ``sinks`` [my heads] that belong to the heads of ``chunk``; None without sink logits."""
    return None if sinks is None else sinks[chunk.heads.start : chunk.heads.stop]


def _forward(
    rows: Sequence[Tensor], sinks: Tensor | None, parameters: Sequence[Tensor], plan: AttentionPlan, chunk: HeadChunk
) -> tuple[Tensor, Tensor]:
    """Attention of one head chunk with its ring hops and sink logits.

    Args:
        rows: q, k and v as [rows, heads, dim], for the heads of the chunk that this rank has.
        sinks: the sink logits of the chunk's heads, or None.
        parameters: the parameters of the bias, empty without one.
        plan: the layout, mask and kernel of the attention.
        chunk: the heads that are attended together, one of ``plan``'s.

    Returns:
        (out [rows, heads, v_dim] in the dtype of q, log-sum-exp [heads, rows] with the sink logits, in fp32 or fp64).
    """
    q_RGD, k_RGD, v_RGD = map(contiguous_last_dim, rows)  # what a Kernel may expect
    with _without_autocast(q_RGD):
        out, lse = ring.forward(q_RGD, k_RGD, v_RGD, plan=plan, chunk=chunk, parameters=tuple(parameters))
    if sinks is not None:
        lse_of_keys, lse = lse, torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(1))
        out = out * (lse_of_keys - lse).exp().T.unsqueeze(2)
    return out.to(q_RGD.dtype), lse


def _without_autocast(like: Tensor) -> torch.autocast:
    """Context manager that disables autocast on the device of ``like``.

    q, k and v are cast already, and what a kernel computes in fp32 must not be cast to bf16.
    """
    return torch.autocast(like.device.type, enabled=False)


def _backward(
    rows: Sequence[Tensor], lse: Tensor, sinks: Tensor | None, parameters: Sequence[Tensor],
    plan: AttentionPlan, chunk: HeadChunk,
) -> Gradients:  # fmt: skip
    """The gradients of one head chunk, in fp32 or fp64.

    Args:
        rows: q, out, dout, k and v [rows, heads, dim], for the heads of the chunk that this rank has, in this order (that
            of ``HeadChunk.backward``).
        lse: log-sum-exp of the forward, [my heads, rows].
        sinks: the sink logits of the chunk's heads, or None.
        parameters: the parameters of the bias, empty without one.
        plan: the layout, mask and kernel of the attention.
        chunk: the heads that are attended together, one of ``plan``'s.

    Returns:
        (dq, dk, dv, gradient of the sink logits or None, list of the gradients of the bias parameters).
    """
    q_RGD, out_RGD, dout_RGD, k_RGD, v_RGD = map(contiguous_last_dim, rows)
    leaves = tuple(parameter.detach().requires_grad_() for parameter in parameters)
    with _without_autocast(q_RGD):
        dq, dk, dv, dparameters = ring.backward(
            dout_RGD, q_RGD, k_RGD, v_RGD, out_RGD, lse, plan=plan, chunk=chunk, parameters=leaves
        )
    if sinks is None:
        return dq, dk, dv, None, dparameters
    flow = (dout_RGD.to(lse.dtype) * out_RGD).sum(-1).T
    return dq, dk, dv, -((sinks.to(lse.dtype).unsqueeze(1) - lse).exp() * flow).sum(1), dparameters


def _as_inputs(grads: Gradients, qkv: Sequence[Tensor], sinks: Tensor | None, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients as the attention operators return them: a list without None, contiguous, each in the dtype of its input.

    Args:
        grads: those of q, k, v, the sink logits (or None) and the bias parameters.
        qkv, sinks, parameters: the inputs.
    """
    dq, dk, dv, dsinks, dparameters = grads
    present = [dq, dk, dv, *([] if dsinks is None else [dsinks]), *dparameters]
    return [grad.to(x.dtype).contiguous() for grad, x in zip(present, _inputs(qkv, sinks, parameters))]


def _inputs(qkv: Sequence[Tensor], sinks: Tensor | None, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The inputs that have a gradient, in the order of the gradients; without ``sinks`` where they are None."""
    return [*qkv, *([] if sinks is None else [sinks]), *parameters]


@attention.register_fake
def _(
    q_RGD: Tensor, k_RGD: Tensor, v_RGD: Tensor, sinks: Tensor | None, parameters: Sequence[Tensor], plan: AttentionPlan
) -> tuple[Tensor, Tensor]:
    rows, heads, _ = q_RGD.shape
    return q_RGD.new_empty(rows, heads, v_RGD.shape[2]), _fake_lse(q_RGD, heads, rows)


@attention_recomputable.register_fake
def _(
    q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, sinks: Tensor | None, parameters: Sequence[Tensor], plan: AttentionPlan
) -> tuple[Tensor, Tensor]:
    out_BSHD = q_BSHD.new_empty(*q_BSHD.shape[:3], v_BSKD.shape[3])
    return out_BSHD, _fake_lse(q_BSHD, plan.heads, plan.rows)


def _fake_lse(like: Tensor, heads: int, rows: int) -> Tensor:
    """An uninitialised log-sum-exp [heads, rows] in the accumulation dtype of ``like``, for tracing without data."""
    return like.new_empty(heads, rows, dtype=accumulation_dtype(like.dtype))


def _fake_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    sinks: Tensor | None, parameters: Sequence[Tensor], plan: AttentionPlan,
) -> list[Tensor]:  # fmt: skip
    """The uninitialised gradients of both backward operators, for tracing without data; the arguments are theirs."""
    return [x.new_empty(x.shape) for x in _inputs([q, k, v], sinks, parameters)]


attention_backward.register_fake(_fake_gradients)
attention_recomputable_backward.register_fake(_fake_gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save in the forward what the backward of an attention operator needs: its inputs, its results and the plan."""
    q, k, v, sinks, parameters, ctx.plan = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, *parameters)


def _backward_of(operator: Callable[..., list[Tensor]], ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
    """The backward of an attention operator, for autograd: calls its backward ``operator`` with ``dout`` and what ``_save``
    saved."""
    q, k, v, out, lse, sinks, *parameters = ctx.saved_tensors  # read once: a checkpoint gives them out once
    dq, dk, dv, *rest = operator(dout, q, k, v, out, lse, sinks, parameters, ctx.plan)
    dsinks = None if sinks is None else rest.pop(0)
    return dq, dk, dv, dsinks, rest, None


attention.register_autograd(partial(_backward_of, attention_backward), setup_context=_save)
attention_recomputable.register_autograd(partial(_backward_of, attention_recomputable_backward), setup_context=_save)

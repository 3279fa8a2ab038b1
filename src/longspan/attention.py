"""Attention over a sequence that no rank holds whole: exchange, kernel, exchange. Knows nothing of models.

    q, k, v  [batch, my tokens, every head, dim]
        |   one exchange            tokens -> heads
        v
    rows     [batch * every token, my heads, dim]
        |   the operator            kernel over the bands of the mask (and, over a ring, over every piece of keys)
        v
    rows     [batch * every token, my heads, dim] and log-sum-exp
        |   one exchange            heads -> tokens
        v
    out      [batch, my tokens, every head, dim]

Everything that is decided on integers is decided once, in a ``Plan``, before a tensor moves. The operator in the middle is
one node for autograd, torch.compile and selective checkpointing, whatever happens inside it.

R rows: batch * every token   H every head   G my heads   D head size
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBase

from longspan import kernels, masks, ring
from longspan.errors import KernelError, LayoutError
from longspan.exchange import Trade, plan_trade, trade_heads_for_tokens, trade_tokens_for_heads
from longspan.kernels import Kernel
from longspan.kernels.function import FunctionKernel, KernelFunction
from longspan.kernels.local import Local
from longspan.layout import Heads, Runs
from longspan.masks import Causal, Mask
from longspan.mesh import ParallelMesh, Place
from longspan.ring import Hop, Ring


@runtime_checkable
class Bias(Protocol):
    """What is added to the scores, asked tile by tile: ALiBi, T5's table. Differentiable in its ``parameters``.

    Called with the query heads of one kernel, the positions of the tile's queries and keys, and the parameters to use.
    """

    parameters: tuple[Tensor, ...]

    def __call__(
        self, heads: range, q_positions: Tensor, k_positions: Tensor, parameters: tuple[Tensor, ...]
    ) -> Float[Tensor, "some_heads queries keys"]: ...


class Core(OpaqueBase):
    """What the operator needs beside its tensors: the kernel as it is bound here, and the hops of the ring."""

    def __init__(self, local: Local, ring: Ring) -> None:
        self.local, self.ring = local, ring

    def __deepcopy__(self, memo: dict[int, Any]) -> "Core":
        return self  # torch.compile copies its graphs; what names process groups is the same in all of them


register_opaque_type(Core, typ="reference")


@dataclass(frozen=True)
class Plan:
    """One attention of one rank, decided on integers: how q, k, v come to their heads, what happens there, and the way back."""

    there: Trade | None
    core: Core
    back: Trade | None
    heads: range


def attend(
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
    sinks: Float[Tensor, " heads"] | None = None,
    bias: Bias | None = None,
    kernel: str | Kernel | KernelFunction = "auto",
    head_chunks: int = 1,
) -> Float[Tensor, "batch my_tokens heads v_dim"]:
    """This rank's tokens of the attention that one device would compute over the whole sequence.

    Equals ``F.scaled_dot_product_attention`` on the whole q, k, v with the mask, cut to this rank's tokens; so do the
    gradients of q, k and v. The gradient of ``sinks`` and of a bias' parameters is this rank's share of the sum.

    ``tokens`` (and ``key_tokens``) is the whole length; without it every rank holds equally many. A sequence of masks has
    one per row of the batch. ``mesh=None`` is one device. ``scale`` defaults to 1/sqrt(qk_dim); ``softcap`` c turns a score
    s into c·tanh(s/c); ``sinks`` are logits that take part in each head's softmax and have no value.

    Raises, before anything is sent: LayoutError (heads or tokens that do not fit the mesh), MaskError (a mask of another
    length), KernelError (mixed dtypes or devices, an unknown kernel, or one that lacks what is asked).
    Source: DeepSpeed-Ulysses, arXiv:2309.14509.
    """
    q, k, v = _as_autocast_wants(q, k, v)
    _refuse_what_does_not_fit(q, k, v, sinks, head_chunks)
    plan = _plan(
        q.shape, k.shape, v.shape, q.dtype, q.device.type, mask if isinstance(mask, Mask) else tuple(mask),
        mesh, tokens, key_tokens, scale, softcap, sinks is not None, bias, kernel,
    )  # fmt: skip
    q_RGD, k_RGD, v_RGD = _to_rows(q, k, v, plan.there)
    my_sinks = None if sinks is None else sinks[plan.heads.start : plan.heads.stop]
    parameters = [] if bias is None else list(bias.parameters)
    out_RGD, _ = attention(q_RGD, k_RGD, v_RGD, my_sinks, parameters, plan.core)
    return _to_tokens(out_RGD, plan.back, q.shape[0])


@torch.library.custom_op("longspan::attention", mutates_args=())
def attention(
    q_RGD: Tensor, k_RGD: Tensor, v_RGD: Tensor, sinks: Tensor | None, parameters: Sequence[Tensor], core: Core
) -> tuple[Tensor, Tensor]:
    """(out [rows, my heads, v_dim] of q's dtype, lse [my heads, rows]) of my heads, sinks included."""
    out, lse = ring.forward(q_RGD, k_RGD, v_RGD, core.local, core.ring, tuple(parameters))
    if sinks is not None:
        lse_of_keys, lse = lse, torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(1))
        out = out * (lse_of_keys - lse).exp().T.unsqueeze(2)
    return out.to(q_RGD.dtype), lse


@torch.library.custom_op("longspan::attention_backward", mutates_args=())
def attention_backward(
    dout_RGD: Tensor, q_RGD: Tensor, k_RGD: Tensor, v_RGD: Tensor, out_RGD: Tensor, lse: Tensor,
    sinks: Tensor | None, parameters: Sequence[Tensor], core: Core,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, of the sinks if there are any, and of the bias' parameters."""
    leaves = tuple(parameter.detach().requires_grad_() for parameter in parameters)
    dq, dk, dv, dparameters = ring.backward(
        dout_RGD, q_RGD, k_RGD, v_RGD, out_RGD, lse, core.local, core.ring, leaves
    )
    grads = [dq.to(q_RGD.dtype), dk.to(q_RGD.dtype), dv.to(q_RGD.dtype)]
    if sinks is not None:
        flow = (dout_RGD.to(lse.dtype) * out_RGD).sum(-1).T
        grads.append(-((sinks.to(lse.dtype).unsqueeze(1) - lse).exp() * flow).sum(1).to(sinks.dtype))
    return grads + [grad.to(parameter.dtype) for grad, parameter in zip(dparameters, parameters)]


@attention.register_fake
def _(
    q_RGD: Tensor, k_RGD: Tensor, v_RGD: Tensor, sinks: Tensor | None, parameters: Sequence[Tensor], core: Core
) -> tuple[Tensor, Tensor]:
    rows, heads, _ = q_RGD.shape
    lse = q_RGD.new_empty(heads, rows, dtype=torch.promote_types(q_RGD.dtype, torch.float32))
    return q_RGD.new_empty(rows, heads, v_RGD.shape[2]), lse


@attention_backward.register_fake
def _(
    dout_RGD: Tensor, q_RGD: Tensor, k_RGD: Tensor, v_RGD: Tensor, out_RGD: Tensor, lse: Tensor,
    sinks: Tensor | None, parameters: Sequence[Tensor], core: Core,
) -> list[Tensor]:  # fmt: skip
    inputs = [q_RGD, k_RGD, v_RGD, *([] if sinks is None else [sinks]), *parameters]
    return [x.new_empty(x.shape) for x in inputs]


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_RGD, k_RGD, v_RGD, sinks, parameters, ctx.core = inputs
    ctx.save_for_backward(q_RGD, k_RGD, v_RGD, *output, sinks, *parameters)


def _back_through_attention(ctx: Any, dout_RGD: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, sinks = ctx.saved_tensors[:6]
    parameters = list(ctx.saved_tensors[6:])
    dq, dk, dv, *rest = attention_backward(dout_RGD, *tensors, sinks, parameters, ctx.core)
    dsinks = None if sinks is None else rest.pop(0)
    return dq, dk, dv, dsinks, rest, None


attention.register_autograd(_back_through_attention, setup_context=_save_attention)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _plan(
    q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size, dtype: torch.dtype, device_type: str,
    mask: Mask | tuple[Mask, ...], mesh: ParallelMesh | None, tokens: int | None, key_tokens: int | None,
    scale: float | None, softcap: float | None, has_sinks: bool, bias: Bias | None,
    kernel: str | Kernel | KernelFunction,
) -> Plan:  # fmt: skip
    place = mesh.place if mesh is not None else Place()
    ranks = place.ring * place.ulysses
    tokens = q_shape[1] * ranks if tokens is None else tokens
    if key_tokens is None:
        key_tokens = tokens if k_shape[1] == q_shape[1] else k_shape[1] * ranks
    heads = Heads(q_shape[2], k_shape[2], place.ulysses)
    mine = heads.query_of(place.ulysses_rank)
    hops = _plan_hops(mask, q_shape[0], tokens, key_tokens, place)
    scale = 1 / math.sqrt(q_shape[3]) if scale is None else scale
    if callable(kernel):
        _refuse_beside_a_function(kernel, place, {"softcap": softcap, "sinks": has_sinks or None, "bias": bias})
        chosen: Kernel = FunctionKernel(kernel)
    else:
        chosen = kernels.choose(
            kernel, device_type=device_type, dtype=dtype, qk_dim=q_shape[3], v_dim=v_shape[3], softcap=softcap, bias=bias
        )
    my_queries = _held(place, q_shape[0], tokens, place.ring_rank)
    bind = None if bias is None else partial(_TileBias, bias, mine, tokens, key_tokens, my_queries)
    local = Local(chosen, heads.groups(place.ulysses_rank), scale, softcap, bind)
    if mesh is None:
        return Plan(None, Core(local, Ring(hops)), None, mine)
    out_shape = torch.Size((*q_shape[:3], v_shape[3]))
    return Plan(
        plan_trade([q_shape, k_shape, v_shape], mesh, tokens, key_tokens),
        Core(local, Ring(hops, mesh.ring_group, mesh.transport)),
        plan_trade([out_shape], mesh, tokens),
        mine,
    )


@lru_cache(maxsize=256)
def _plan_hops(mask: Mask | tuple[Mask, ...], rows: int, tokens: int, key_tokens: int, place: Place) -> tuple[Hop, ...]:
    bands = masks.rows(mask, rows, tokens, key_tokens)
    queries = [_held(place, rows, tokens, rank) for rank in range(place.ring)]
    keys = [_held(place, rows, key_tokens, rank) for rank in range(place.ring)]
    return ring.plan_hops(bands, queries, keys, place.ring_rank)


def _held(place: Place, rows: int, tokens: int, ring_rank: int) -> Runs:
    """What a ring rank holds of the batch laid out as one row of rows * tokens."""
    runs = place.layout(tokens).runs(ring_rank)
    return tuple(range(run.start + row * tokens, run.stop + row * tokens) for row in range(rows) for run in runs)


class _TileBias:
    """A bias for some heads and some rows of keys: asked with places among my rows, it answers for positions."""

    def __init__(
        self, bias: Bias, my_heads: range, tokens: int, key_tokens: int, query_rows: Runs,
        heads: slice, key_rows: Runs, parameters: tuple[Tensor, ...],
    ) -> None:  # fmt: skip
        self.bias, self.heads, self.parameters = bias, my_heads[heads], parameters
        self.q_positions = _positions(query_rows, tokens)
        self.k_positions = _positions(key_rows, key_tokens)

    def __call__(self, q_index: Tensor, k_index: Tensor) -> Tensor:
        q_positions, k_positions = self.q_positions.to(q_index.device), self.k_positions.to(k_index.device)
        return self.bias(self.heads, q_positions[q_index], k_positions[k_index], self.parameters)


def _positions(rows: Runs, tokens: int) -> Tensor:
    return torch.cat([torch.arange(run.start, run.stop) for run in rows] or [torch.arange(0)]) % tokens


def _as_autocast_wants(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast q, k and v get its dtype, as scaled_dot_product_attention does; fp64 stays."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _refuse_what_does_not_fit(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, head_chunks: int) -> None:
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        kinds = ", ".join(f"{name} is {x.dtype} on {x.device}" for name, x in {"q": q, "k": k, "v": v}.items())
        raise KernelError(f"{kinds}: kernels need one dtype and one device; cast them, or use autocast")
    if q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise LayoutError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit; they are [batch, tokens, heads, dim]: "
            f"q and k share batch and dim, k and v share batch, tokens and heads"
        )
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise LayoutError(f"sinks of shape {list(sinks.shape)} do not fit {q.shape[2]} query heads; pass one logit a head")
    if head_chunks != 1:
        raise KernelError(f"head_chunks={head_chunks} is not supported yet; use head_chunks=1")


def _refuse_beside_a_function(function: KernelFunction, place: Place, extras: dict[str, Any]) -> None:
    name = FunctionKernel(function).name
    asked = [extra for extra, value in extras.items() if value is not None] + ["ring"] * (place.ring > 1)
    if asked:
        raise KernelError(
            f"kernel {name!r} returns only its output, which cannot carry {' and '.join(asked)}; pass a Kernel "
            f"(forward with its log-sum-exp, and backward), or one of longspan's own: kernel='auto'"
        )


def _to_rows(q: Tensor, k: Tensor, v: Tensor, there: Trade | None) -> tuple[Tensor, Tensor, Tensor]:
    """My heads of every token, the rows of the batch behind one another: [batch * tokens, my heads, dim]."""
    if there is None:
        return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    rows = trade_tokens_for_heads([q, k, v], there)
    columns = chain.from_iterable(x.split(widths, 1) for x, widths in zip(rows, there.columns))
    q_RGD, k_RGD, v_RGD = (x.unflatten(1, (-1, whole.shape[3])) for x, whole in zip(columns, (q, k, v)))
    return q_RGD, k_RGD, v_RGD


def _to_tokens(out_RGD: Tensor, back: Trade | None, batch: int) -> Tensor:
    if back is None:
        return out_RGD.unflatten(0, (batch, -1))
    (out_BSHD,) = trade_heads_for_tokens([out_RGD.flatten(1)], back, batch)
    return out_BSHD

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
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from longspan.attention import ring
from longspan.attention.custom_ops import Chunks, Core, Part, attention, columns, kept_attention
from longspan.attention.ring import Hop, Ring
from longspan.attention.ulysses import Trade, plan_trades, trade_heads_for_tokens, trade_tokens_for_heads
from longspan.distributed.layout import Heads, Runs
from longspan.distributed.mesh import MeshCoordinate, ParallelMesh
from longspan.errors import KernelError, LayoutError
from longspan.kernels import table as kernels
from longspan.kernels.head_groups import Local
from longspan.kernels.protocol import Kernel
from longspan.kernels.user_function import FunctionKernel, KernelFunction
from longspan.masks import constructors as masks
from longspan.masks.constructors import Causal, Mask


@runtime_checkable
class Bias(Protocol):
    """What is added to the scores, asked tile by tile: ALiBi, T5's table. Differentiable in its ``parameters``.

    Called with the query heads of one kernel, the positions of the tile's queries and keys, and the parameters to use.
    """

    parameters: tuple[Tensor, ...]

    def __call__(
        self, heads: range, q_positions: Tensor, k_positions: Tensor, parameters: tuple[Tensor, ...]
    ) -> Float[Tensor, "some_heads queries keys"]: ...


@dataclass(frozen=True)
class Plan:
    """One attention of one rank, decided on integers: how q, k, v come to their heads, what happens there, and the way back.

    ``part`` is the first chunk of the heads, which is all of them where ``head_chunks`` is 1; ``chunks`` are all of them.
    """

    part: Part
    chunks: Chunks


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
    sink_logits: Float[Tensor, " sink_heads"] | None = None,
    bias: Bias | None = None,
    kernel: str | Kernel | KernelFunction = "auto",
    head_chunks: int = 1,
) -> Float[Tensor, "batch my_tokens heads v_dim"]:
    """This rank's tokens of the attention that one device would compute over the whole sequence.

    Equals ``F.scaled_dot_product_attention`` on the whole q, k, v with the mask, cut to this rank's tokens; so do the
    gradients of q, k and v. The gradient of ``sink_logits`` and of a bias' parameters is this rank's share of the sum.

    ``tokens`` is the whole length; without it every rank must hold equally many. ``key_tokens`` is that of k and v where it
    is another one: with ``tokens`` it is needed. A sequence of masks has one per row of the batch. ``mesh=None`` is one
    device. ``scale`` defaults to 1/sqrt(qk_dim); ``softcap`` c turns a score s into c·tanh(s/c); ``sink_logits`` take
    part in each head's softmax and have no value.
    ``head_chunks`` c exchanges and attends a c-th of each rank's heads at a time, the next on its way meanwhile, and exchanges
    again in the backward pass: 2 c collectives each way, and the copies on the heads' side are those of two parts of c.

    Raises, before anything is sent: LayoutError (heads or tokens that do not fit the mesh), MaskError (a mask of another
    length), KernelError (mixed dtypes or devices, an unknown kernel, or one that lacks what is asked).
    Source: DeepSpeed-Ulysses, arXiv:2309.14509.
    """
    q, k, v, parameters, plan = prepare(
        q, k, v, mask, mesh, tokens, key_tokens, scale, softcap, sink_logits, bias, kernel, head_chunks
    )
    if head_chunks > 1:
        kept: Tensor = kept_attention(q, k, v, sink_logits, parameters, plan.chunks)[0]
        return kept
    q_RGD, k_RGD, v_RGD = _to_rows(q, k, v, plan.part.there)
    my_sinks = None if sink_logits is None else sink_logits[plan.part.heads.start : plan.part.heads.stop]
    out_RGD, _ = attention(q_RGD, k_RGD, v_RGD, my_sinks, parameters, plan.part.core)
    return _to_tokens(out_RGD, plan.part.back, q.shape[:2])


def prepare(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Sequence[Mask], mesh: ParallelMesh | None, tokens: int | None,
    key_tokens: int | None, scale: float | None, softcap: float | None, sink_logits: Tensor | None, bias: Bias | None,
    kernel: str | Kernel | KernelFunction, head_chunks: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Plan]:  # fmt: skip
    """(q, k, v as autocast wants them, the bias' parameters, the plan): everything that is refused is refused here."""
    q, k, v = _as_autocast_wants(q, k, v)
    _refuse_what_does_not_fit(q, k, v, sink_logits)
    plan = _plan(
        q.shape, k.shape, v.shape, q.dtype, q.device.type, mask if isinstance(mask, Mask) else tuple(mask),
        mesh, tokens, key_tokens, scale, softcap, sink_logits is not None, bias, kernel, head_chunks,
    )  # fmt: skip
    return q, k, v, [] if bias is None else list(bias.parameters), plan


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _plan(
    q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size, dtype: torch.dtype, device_type: str,
    mask: Mask | tuple[Mask, ...], mesh: ParallelMesh | None, tokens: int | None, key_tokens: int | None,
    scale: float | None, softcap: float | None, has_sinks: bool, bias: Bias | None,
    kernel: str | Kernel | KernelFunction, head_chunks: int,
) -> Plan:  # fmt: skip
    coordinate = mesh.coordinate if mesh is not None else MeshCoordinate()
    ranks = coordinate.sequence_ranks
    equal_pieces = tokens is None
    tokens = q_shape[1] * ranks if tokens is None else tokens
    if key_tokens is None:  # decided by what was said, which is the same on every rank, not by this rank's share
        key_tokens = k_shape[1] * ranks if equal_pieces else tokens
    heads = Heads(q_shape[2], k_shape[2], coordinate.ulysses, head_chunks)
    hops = _plan_hops(mask, q_shape[0], tokens, key_tokens, coordinate)
    held = Ring(hops) if mesh is None else Ring(hops, mesh.ring_group, mesh.transport)
    scale = 1 / math.sqrt(q_shape[3]) if scale is None else scale
    if callable(kernel):
        _refuse_beside_a_function(kernel, coordinate, {"softcap": softcap, "sink_logits": has_sinks or None, "bias": bias})
        chosen: Kernel = FunctionKernel(kernel)
    else:
        chosen = kernels.choose(
            kernel, device_type=device_type, dtype=dtype, qk_dim=q_shape[3], v_dim=v_shape[3], softcap=softcap, bias=bias
        )
    my_queries = coordinate.layout(tokens).batch_runs(coordinate.ring_rank, q_shape[0])

    def core_of(chunk: int) -> Core:
        mine = heads.query_of(coordinate.ulysses_rank, chunk)
        bind = None if bias is None else partial(_TileBias, bias, mine, tokens, key_tokens, my_queries)
        return Core(Local(chosen, heads.groups(coordinate.ulysses_rank, chunk), scale, softcap, bind), held)

    nowhere: tuple[Trade | None, ...] = (None,) * head_chunks
    there, back, again = nowhere, nowhere, nowhere
    if mesh is not None:
        out_shape = torch.Size((*q_shape[:3], v_shape[3]))
        there = plan_trades([q_shape], [k_shape, v_shape], heads, mesh, tokens, key_tokens)
        back = plan_trades([out_shape], [], heads, mesh, tokens)
        again = plan_trades([q_shape, out_shape, out_shape], [k_shape, v_shape], heads, mesh, tokens, key_tokens)
    parts = tuple(
        Part(
            heads.query_of(coordinate.ulysses_rank, j),
            heads.kv_of(coordinate.ulysses_rank, j),
            core_of(j),
            there[j],
            back[j],
            again[j],
        )
        for j in range(head_chunks)
    )
    ring_tokens = sum(map(len, coordinate.layout(tokens).runs(coordinate.ring_rank)))
    return Plan(parts[0], Chunks(parts, heads.replicated, ring_tokens))


@lru_cache(maxsize=256)
def _plan_hops(
    mask: Mask | tuple[Mask, ...], rows: int, tokens: int, key_tokens: int, coordinate: MeshCoordinate
) -> tuple[Hop, ...]:
    bands = masks.rows(mask, rows, tokens, key_tokens)
    queries, keys = (
        [coordinate.layout(length).batch_runs(rank, rows) for rank in range(coordinate.ring)] for length in (tokens, key_tokens)
    )
    return ring.plan_hops(bands, queries, keys, coordinate.ring_rank)


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


def _refuse_what_does_not_fit(q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None) -> None:
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        kinds = ", ".join(f"{name} is {x.dtype} on {x.device}" for name, x in {"q": q, "k": k, "v": v}.items())
        raise KernelError(f"{kinds}: kernels need one dtype and one device; cast them, or use autocast")
    if q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise LayoutError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit; they are [batch, tokens, heads, dim]: "
            f"q and k share batch and dim, k and v share batch, tokens and heads"
        )
    if sink_logits is not None and sink_logits.shape != q.shape[2:3]:
        raise LayoutError(
            f"sink_logits of shape {list(sink_logits.shape)} do not fit {q.shape[2]} query heads; pass one logit a head"
        )


def refuse_kernel(kernel: str | Kernel | KernelFunction, coordinate: MeshCoordinate) -> None:
    """Raise KernelError for what no attention at this place can have as its kernel: an unknown name, a function on a ring."""
    if callable(kernel):
        _refuse_beside_a_function(kernel, coordinate, {})
    elif isinstance(kernel, str):
        kernels.refuse_unknown(kernel)


def _refuse_beside_a_function(function: KernelFunction, coordinate: MeshCoordinate, extras: dict[str, Any]) -> None:
    name = FunctionKernel(function).name
    asked = [extra for extra, value in extras.items() if value is not None] + ["ring"] * (coordinate.ring > 1)
    if asked:
        raise KernelError(
            f"kernel {name!r} returns only its output, which cannot carry {' and '.join(asked)}; pass a Kernel "
            f"(forward with its log-sum-exp, and backward), or one of longspan's own: kernel='auto'"
        )


def _to_rows(q: Tensor, k: Tensor, v: Tensor, there: Trade | None) -> tuple[Tensor, Tensor, Tensor]:
    """My heads of every token, the rows of the batch behind one another: [batch * tokens, my heads, dim]."""
    if there is None:
        return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    q_RGD, k_RGD, v_RGD = columns(trade_tokens_for_heads([q, k, v], there), there)
    return q_RGD, k_RGD, v_RGD


def _to_tokens(out_RGD: Tensor, back: Trade | None, batch_and_tokens: torch.Size) -> Tensor:
    if back is None:
        return torch.unflatten(out_RGD, 0, batch_and_tokens)
    out_BSHD: Tensor = trade_heads_for_tokens([out_RGD.flatten(1)], back, batch_and_tokens[0])[0]
    return out_BSHD

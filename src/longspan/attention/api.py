"""``attend``: scaled dot-product attention over a sequence that is split over ranks (Ulysses and ring). Independent of models.

    q, k, v  [batch, my tokens, every head, dim]
        |   one all-to-all          tokens -> heads                                                    ulysses.py
        v
    rows     [batch * every token, my heads, dim]
        |   one operator            the kernel over the mask's bands, and over every piece of a ring   custom_ops.py, ring.py
        v
    rows     [batch * every token, my heads, dim] and log-sum-exp
        |   one all-to-all          heads -> tokens
        v
    out      [batch, my tokens, every head, dim]

``attend`` records its arguments as an ``AttentionSpec``; ``plan_attention`` turns a spec into an
``AttentionPlan``, once per spec. The operator is one node for autograd, torch.compile and selective checkpointing.

The suffix of a tensor's name gives its dims: R rows (batch * every token), H every head, G my heads, D head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from longspan import _compat
from longspan.attention import ring
from longspan.attention.custom_ops import attention, attention_recomputable, columns
from longspan.attention.plan import AttentionPlan, Bias, ExchangePlan, HeadChunk, Hop
from longspan.attention.plan_cache import Constant, cached
from longspan.attention.refusals import (
    refuse_bias,
    refuse_factors,
    refuse_integers,
    refuse_lengths,
    refuse_tensors,
    refuse_what_is_no_tensor,
)
from longspan.attention.ulysses import exchange_to_heads, exchange_to_tokens, plan_exchanges
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.layout import Heads
from longspan.distributed.mesh import ParallelMesh, refuse_no_mesh
from longspan.errors import KernelError
from longspan.kernels import table as kernels
from longspan.kernels.protocol import Kernel
from longspan.kernels.user_function import FunctionKernel, KernelFunction
from longspan.masks import constructors as masks
from longspan.masks.constructors import Mask
from longspan.masks.refusals import refuse_no_mask

__all__ = ["AttentionSpec", "Bias", "attend", "plan_attention", "refuse_kernel"]


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The description of one attention call on one rank, without tensor values: local shapes, mask, mesh and options.

    ``attend`` makes it, and ``plan_attention`` turns it into a plan; kernels are chosen by it. Hashable: two calls with equal
    specs use the same plan.

    Attributes:
        q_shape, k_shape, v_shape: this rank's shapes, [batch, my tokens, heads, dim].
        dtype: of q, k and v.
        device_type: "cpu", "cuda".
        tokens: tokens of a whole row of q; None: every rank holds as many as this one.
        key_tokens: tokens of a whole row of k and v; None: as many as of q, or, without ``tokens``, computed from k's shape.
        has_sink_logits: whether the call has sink logits.
        mask, mesh, scale, softcap, bias, kernel, head_chunks: the arguments of ``attend``. ``kernel`` None: bound later.
    """

    q_shape: torch.Size
    k_shape: torch.Size
    v_shape: torch.Size
    dtype: torch.dtype
    device_type: str
    mask: Mask | tuple[Mask, ...]
    mesh: ParallelMesh | None = None
    tokens: int | None = None
    key_tokens: int | None = None
    scale: float | None = None
    softcap: float | None = None
    has_sink_logits: bool = False
    bias: Bias | None = None
    kernel: str | Kernel | KernelFunction | None = "auto"
    head_chunks: int = 1

    @property
    def coordinate(self) -> MeshCoordinate:
        """The mesh's degrees and this rank's position on it; those of a mesh of one rank if there is no mesh."""
        return MeshCoordinate() if self.mesh is None else self.mesh.coordinate

    @property
    def whole_tokens(self) -> int:
        """The number of queries of a whole row, over all ranks that hold it."""
        return self.q_shape[1] * self.coordinate.attention_ranks if self.tokens is None else self.tokens

    @property
    def whole_key_tokens(self) -> int:
        """The number of keys of a whole row, over all ranks that hold it.

        It is ``key_tokens``, or if that is None ``tokens``, or if both are None computed from k's shape.
        """
        if self.key_tokens is not None:
            return self.key_tokens
        return self.k_shape[1] * self.coordinate.attention_ranks if self.tokens is None else self.tokens


def attend(
    q: Float[Tensor, "batch my_tokens heads qk_dim"],
    k: Float[Tensor, "batch my_keys kv_heads _"],
    v: Float[Tensor, "batch my_values value_heads v_dim"],
    *,
    mask: Mask | Sequence[Mask],
    mesh: ParallelMesh | None = None,
    tokens: int | None = None,
    key_tokens: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, " sink_heads"] | None = None,
    bias: Bias | None = None,
    kernel: str | Kernel | KernelFunction = "auto",
    head_chunks: int = 1,
    recomputable: bool = False,
) -> Float[Tensor, "batch my_tokens heads v_dim"]:
    """Scaled dot-product attention of this rank's tokens over the whole sequence.

    Equals ``F.scaled_dot_product_attention`` on the whole q, k, v with the mask, cut to this rank's tokens; so do the gradients
    of q, k and v. The gradients of ``sink_logits`` and of a bias' parameters are this rank's part of the sum.

    Args:
        q: Queries of this rank's tokens, [batch, my tokens, heads, qk_dim].
        k: Keys of this rank's tokens, [batch, my tokens, kv_heads, qk_dim]; ``heads`` is a multiple of ``kv_heads``.
        v: Values of this rank's tokens, [batch, my tokens, kv_heads, v_dim].
        mask: Which keys each query sees, for all rows of the batch; or one mask per row.
        mesh: The mesh whose ulysses and ring axes hold the sequence. None is one device.
        tokens: The length of a whole row. None: every rank holds equally many tokens.
        key_tokens: The length of a whole row of k and v where it is not that of q; then needed wherever ``tokens`` is.
        scale: Factor of the scores (None: 1/sqrt(qk_dim)).
        softcap: c turns a score s into c·tanh(s/c). None: no softcap.
        sink_logits: One logit per query head, [heads], that takes part in the head's softmax and has no value. None: none.
        bias: A ``Bias``: a term added to the scores, computed tile by tile (ALiBi, T5). None: none.
        kernel: The name of a kernel, "auto" for the fastest that can do it, a ``Kernel``, or a function ``(q, k, v, *, bands,
            scale) -> out``.
        head_chunks: The number of parts of each rank's heads that are exchanged and computed one after another, while the next
            part is sent; the exchanged copies of two parts exist at a time. Implies ``recomputable``.
        recomputable: Make attention with its exchanges one operator that saves only q, k, v, its output and the log-sum-exp. A
            selective checkpoint (``selective_context``) can then save its result and repeat neither attention nor exchange. The
            backward pass sends twice as much, because it exchanges q, k, v and the output again.

    Returns:
        [batch, my tokens, heads, v_dim] in the dtype of q (under autocast: of autocast).

    Raises:
        LayoutError: Heads or tokens do not fit the mesh, the shapes do not fit one another, or ``mesh`` is no ParallelMesh.
        MaskError: The mask is none, is of another length, or there is not one mask per row.
        KernelError: q, k or v that is no dense tensor, mixed dtypes or devices, a dtype that is none of ``DTYPES``, an unknown
            kernel, or one that lacks an option used here; a scale or softcap that is no number above 0 and finite; a bias that
            is no ``Bias``.
        All are raised before anything is sent.

    Source: DeepSpeed-Ulysses, arXiv:2309.14509; ring: arXiv:2310.01889; sink logits: arXiv:2309.17453.
    """
    refuse_what_is_no_tensor(q=q, k=k, v=v)
    if sink_logits is not None:
        refuse_what_is_no_tensor(sink_logits=sink_logits)
    q, k, v = _as_autocast(q, k, v)
    refuse_tensors(q, k, v, sink_logits)
    constant: Constant[AttentionPlan] = _plan(
        q_shape=q.shape, k_shape=k.shape, v_shape=v.shape, dtype=q.dtype, device_type=q.device.type,
        mask=tuple(mask) if isinstance(mask, Sequence) else mask, mesh=mesh, tokens=tokens, key_tokens=key_tokens,
        scale=scale, softcap=softcap, has_sink_logits=sink_logits is not None, bias=bias, kernel=kernel,
        head_chunks=head_chunks,
    )  # fmt: skip
    plan, parameters = constant.plan, [] if bias is None else list(bias.parameters)
    if recomputable or head_chunks > 1:
        out: Tensor = attention_recomputable(q, k, v, sink_logits, parameters, plan)[0]
        return out
    chunk: HeadChunk = plan.chunks[0]
    q_RGD, k_RGD, v_RGD = _to_rows(q, k, v, chunk.qkv)
    my_sinks = None if sink_logits is None else sink_logits[chunk.heads.start : chunk.heads.stop]
    out_RGD, _ = attention(q_RGD, k_RGD, v_RGD, my_sinks, parameters, plan)
    return _to_tokens(out_RGD, chunk.out, q.shape[:2])


@_compat.constant_when_compiled
def _plan(**fields: Any) -> Constant[AttentionPlan]:
    """The plan of the attention whose AttentionSpec has ``fields``, in the wrapper ``Constant``; for torch.compile it is a
    constant.

    The spec is made in here because a dataclass made inside a compiled graph is not a constant.
    """
    return Constant(plan_attention(AttentionSpec(**fields)))


def plan_attention(spec: AttentionSpec) -> AttentionPlan:
    """Plan an attention from its spec: the split of heads, the all-to-alls, the ring hops and the kernel.

    Args:
        spec: the attention. If a plan for an equal spec is cached on its mesh, that plan is returned. A kernel object, a
            function or a bias is not cached: it is bound to a copy of the cached plan.

    Returns:
        The plan, an opaque argument of the attention operators.

    Raises:
        LayoutError: heads or tokens do not fit the mesh.
        MaskError: the mask is none, is of another length, or there is not one mask per row.
        KernelError: the kernel is unknown, or lacks an option that the spec has; an option that no kernel can compute with.
    """
    if spec.mesh is not None:
        refuse_no_mesh(spec.mesh)
    refuse_no_mask(spec.mask if isinstance(spec.mask, tuple) else (spec.mask,))
    refuse_integers(tokens=spec.whole_tokens, key_tokens=spec.whole_key_tokens, head_chunks=spec.head_chunks)
    refuse_factors(scale=spec.scale, softcap=spec.softcap)
    refuse_bias(spec.bias)
    if spec.mesh is None:
        refuse_lengths(spec.q_shape[1], spec.k_shape[1], spec.whole_tokens, spec.whole_key_tokens)
    if spec.bias is None and isinstance(spec.kernel, str):
        return cached(spec.mesh, spec, lambda: _make_plan(spec, _choose_kernel(spec)))
    kernel = _choose_kernel(spec)
    unbound = replace(spec, kernel=None, bias=None)
    return cached(spec.mesh, unbound, lambda: _make_plan(unbound, None)).bind(kernel, spec.bias)


def _choose_kernel(spec: AttentionSpec) -> Kernel:
    """The kernel that the spec asks for: the user's own, the one of that name, or with "auto" the fastest that can do it.

    Raises:
        KernelError: the name is unknown, or the kernel cannot do what the spec asks.
    """
    if callable(spec.kernel):
        extras = {"softcap": spec.softcap, "sink_logits": spec.has_sink_logits or None, "bias": spec.bias}
        _refuse_beside_a_function(spec.kernel, spec.coordinate, extras)
        return FunctionKernel(spec.kernel)
    return kernels.choose(
        spec.kernel, device_type=spec.device_type, dtype=spec.dtype, qk_dim=spec.q_shape[3], v_dim=spec.v_shape[3],
        softcap=spec.softcap, bias=spec.bias, mask=spec.mask, tokens=spec.whole_tokens,
    )  # fmt: skip


def _make_plan(spec: AttentionSpec, kernel: Kernel | None) -> AttentionPlan:
    """The plan of ``spec``, without a look into the cache. ``kernel`` None makes a plan to which a kernel is bound later."""
    coordinate, mesh, tokens, key_tokens = spec.coordinate, spec.mesh, spec.whole_tokens, spec.whole_key_tokens
    heads = Heads(spec.q_shape[2], spec.k_shape[2], coordinate.ulysses, spec.head_chunks)
    chunks = _plan_chunks(spec, heads)  # first, because it refuses tokens that are not this rank's
    return AttentionPlan(
        kernel=kernel,
        scale=1 / math.sqrt(spec.q_shape[3]) if spec.scale is None else spec.scale,
        softcap=spec.softcap,
        hops=_plan_hops(spec),
        chunks=chunks,
        replicated=heads.replicated,
        ring_group=None if mesh is None else mesh.ring_group,
        transport=None if mesh is None else mesh.transport,
        tokens=tokens,
        key_tokens=key_tokens,
        query_runs=coordinate.layout(tokens).batch_runs(coordinate.ring_rank, spec.q_shape[0]),
    )


def _plan_hops(spec: AttentionSpec) -> tuple[Hop, ...]:
    """The steps of the ring for this rank in the attention ``spec``, over all rows of the batch laid one after another."""
    coordinate, batch, tokens, key_tokens = spec.coordinate, spec.q_shape[0], spec.whole_tokens, spec.whole_key_tokens
    bands = masks.batch_bands(spec.mask, batch, tokens, key_tokens)
    query_runs, key_runs = (
        [coordinate.layout(length).batch_runs(rank, batch) for rank in range(coordinate.ring)]
        for length in (tokens, key_tokens)
    )
    return ring.plan_hops(bands, query_runs, key_runs, coordinate.ring_rank)


def _plan_chunks(spec: AttentionSpec, heads: Heads) -> tuple[HeadChunk, ...]:
    """This rank's part of ``heads`` in head chunks, each with the all-to-alls of its tensors (None on one ulysses rank).

    ``spec`` gives the shapes of the tensors and the mesh.
    """
    rank, tokens, key_tokens = spec.coordinate.ulysses_rank, spec.whole_tokens, spec.whole_key_tokens
    q, k, v, out = spec.q_shape, spec.k_shape, spec.v_shape, torch.Size((*spec.q_shape[:3], spec.v_shape[3]))

    def exchanges(queries: Sequence[torch.Size], keys: Sequence[torch.Size]) -> tuple[ExchangePlan | None, ...]:
        if spec.mesh is None:
            return (None,) * spec.head_chunks
        return plan_exchanges(queries, keys, heads, spec.mesh, tokens=tokens, key_tokens=key_tokens)

    planned = zip(exchanges([q], [k, v]), exchanges([out], []), exchanges([q, out, out], [k, v]))
    return tuple(
        HeadChunk(
            heads=heads.query_of(rank, chunk), kv_heads=heads.kv_of(rank, chunk), groups=heads.groups(rank, chunk),
            qkv=qkv, out=out_plan, backward=backward,
        )
        for chunk, (qkv, out_plan, backward) in enumerate(planned)
    )  # fmt: skip


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors cast to the autocast dtype if autocast is enabled on the device of the first, else unchanged.

    An fp64 tensor is never cast, and neither is one that is not of floating point, which is refused then.
    """
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def refuse_kernel(kernel: str | Kernel | KernelFunction, coordinate: MeshCoordinate) -> None:
    """Raise KernelError for a kernel that no attention on this mesh can use; otherwise return. ``parallelize`` calls it.

    Args:
        kernel: a name, which must be known; a ``Kernel``; or a function, which returns no log-sum-exp and so cannot be used
            with ring > 1.
        coordinate: the degrees of the mesh.
    """
    if callable(kernel):
        _refuse_beside_a_function(kernel, coordinate, {})
    else:
        kernels.refuse_unknown(kernel)


def _refuse_beside_a_function(function: KernelFunction, coordinate: MeshCoordinate, extras: dict[str, Any]) -> None:
    """Raise KernelError if a kernel function, which returns no log-sum-exp, is asked for together with what needs one.

    Args:
        function: the user's function.
        coordinate: the degrees of the mesh; a ring needs the log-sum-exp.
        extras: {option of ``attend``: its value}; one that is not None needs more than a function's arguments.
    """
    name = FunctionKernel(function).name
    asked = [extra for extra, value in extras.items() if value is not None] + ["ring"] * (coordinate.ring > 1)
    if asked:
        raise KernelError(
            f"kernel {name!r} returns only its output, which cannot carry {' and '.join(asked)}; pass a Kernel "
            f"(forward with its log-sum-exp, and backward), or one of longspan's own: kernel='auto'"
        )


def _to_rows(q: Tensor, k: Tensor, v: Tensor, exchange: ExchangePlan | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [batch, my tokens, heads, dim] exchanged from tokens to heads, in one all-to-all.

    Returns:
        q, k, v as [batch * every token, my heads, dim], one row of the batch after another. ``exchange`` None (one ulysses
        rank) only reshapes.
    """
    if exchange is None:
        return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    q_RGD, k_RGD, v_RGD = columns(exchange_to_heads([q, k, v], exchange), exchange)
    return q_RGD, k_RGD, v_RGD


def _to_tokens(out_RGD: Tensor, exchange: ExchangePlan | None, batch_and_tokens: torch.Size) -> Tensor:
    """Exchange the output of attention from heads to tokens.

    Args:
        out_RGD: [batch * every token, my heads, dim].
        exchange: the all-to-all; None (one ulysses rank) only reshapes.
        batch_and_tokens: (batch, my tokens).

    Returns:
        [batch, my tokens, every head, dim].
    """
    if exchange is None:
        return torch.unflatten(out_RGD, 0, batch_and_tokens)
    out_BSHD: Tensor = exchange_to_tokens([out_RGD.flatten(1)], exchange, batch_and_tokens[0])[0]
    return out_BSHD

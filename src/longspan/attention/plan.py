"""The plan of one attention of one rank: everything that is decided on integers before a tensor moves.

    AttentionPlan       kernel, scale, bias, the hops of the ring, and the chunks of this rank's heads
      Hop               one piece of keys and values that arrives over the ring                           ring.py
      HeadChunk         some of this rank's heads, and the exchanges that bring and return their tensors
        ExchangePlan    one all-to-all                                                                    ulysses.py

A plan depends on shapes, mask and mesh, never on the values of a tensor, so it is made once per shape and kept (plan_cache.py).
The kernel and the bias of a user are objects that may hold a model: they are bound to a copy of the plan at each call, and are
never kept.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from longspan._compat import OpaqueBase, register_opaque
from longspan.attention.ulysses import ExchangePlan
from longspan.distributed.collectives import Transport
from longspan.distributed.layout import Runs
from longspan.kernels.head_groups import GroupedKernel, Groups
from longspan.kernels.protocol import BoundBias, Kernel
from longspan.masks.bands import Band


@runtime_checkable
class Bias(Protocol):
    """A term added to the attention scores, computed tile by tile (ALiBi, T5); differentiable in its ``parameters``.

    ``bias(heads, q_positions, k_positions, parameters)`` returns the term for a run of query heads, the positions of a tile's
    queries and keys, and the parameters to use in place of ``bias.parameters``: copies, when their gradients are computed.
    """

    parameters: tuple[Tensor, ...]

    def __call__(
        self, heads: range, q_positions: Tensor, k_positions: Tensor, parameters: tuple[Tensor, ...]
    ) -> Float[Tensor, "some_heads queries keys"]: ...


@dataclass(frozen=True)
class Hop:
    """One piece of keys and values: from the ring rank ``offset`` before this one, while this rank's go to that behind it."""

    offset: int
    bands: tuple[Band, ...]  # between this rank's rows of queries and the rows of keys that arrive
    arriving: Runs  # the rows of keys that arrive, as positions in the whole row
    leaving: Runs  # the rows of this rank's keys that leave, as positions among its own


@dataclass(frozen=True, kw_only=True)
class HeadChunk:
    """Some of this rank's heads and their exchanges, which are None on one ulysses rank."""

    heads: range
    kv_heads: range
    groups: Groups
    qkv: ExchangePlan | None
    out: ExchangePlan | None
    backward: ExchangePlan | None  # q, out, dout, k, v: what the backward of the recomputable operator fetches


class AttentionPlan(OpaqueBase):
    """One attention of one rank. An opaque argument of the operators in custom_ops.py."""

    def __init__(
        self, *, kernel: Kernel | None, scale: float, softcap: float | None, chunks: tuple[HeadChunk, ...], replicated: bool,
        hops: tuple[Hop, ...], ring_group: dist.ProcessGroup | None, transport: Transport | None,
        tokens: int, key_tokens: int, query_runs: Runs,
    ) -> None:  # fmt: skip
        self.kernel, self.scale, self.softcap = kernel, scale, softcap
        self.chunks, self.replicated = chunks, replicated  # replicated: some key/value head is in several ranks or chunks
        self.hops, self.ring_group, self.transport = hops, ring_group, transport
        self.tokens, self.key_tokens, self.query_runs = tokens, key_tokens, query_runs
        self.heads = sum(len(chunk.heads) for chunk in chunks)
        self.rows = sum(map(len, query_runs))
        self.bias: Bias | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionPlan":
        return self  # torch.compile copies its graphs; what names process groups is the same in all of them

    def bind(self, kernel: Kernel, bias: Bias | None) -> "AttentionPlan":
        """The same plan with this kernel and bias."""
        bound = copy(self)
        bound.kernel, bound.bias = kernel, bias
        return bound

    def kernel_of(self, chunk: HeadChunk) -> GroupedKernel:
        """The kernel for the heads of one chunk."""
        assert self.kernel is not None, "a plan is bound before it runs"
        return GroupedKernel(self.kernel, chunk.groups, self.scale, self.softcap)

    def bias_of(self, chunk: HeadChunk, key_runs: Runs, parameters: tuple[Tensor, ...]) -> Callable[[slice], BoundBias] | None:
        """The bias of some heads of a chunk at these rows of keys, with these parameters; None without a bias."""
        if self.bias is None:
            return None
        q_positions, k_positions = _positions(self.query_runs, self.tokens), _positions(key_runs, self.key_tokens)
        return partial(TileBias, self.bias, chunk.heads, q_positions, k_positions, parameters)


register_opaque(AttentionPlan, members=("chunks", "heads", "rows"))


class TileBias:
    """A bias for some heads at the rows of one hop: translates indices among those rows to positions in the sequence."""

    def __init__(
        self, bias: Bias, chunk_heads: range, q_positions: Tensor, k_positions: Tensor, parameters: tuple[Tensor, ...],
        heads: slice,
    ) -> None:  # fmt: skip
        self.bias, self.heads, self.parameters = bias, chunk_heads[heads], parameters
        self.q_positions, self.k_positions = q_positions, k_positions

    def __call__(self, q_index: Tensor, k_index: Tensor) -> Tensor:
        q_positions, k_positions = self.q_positions.to(q_index.device), self.k_positions.to(k_index.device)
        return self.bias(self.heads, q_positions[q_index], k_positions[k_index], self.parameters)


def _positions(runs: Runs, tokens: int) -> Tensor:
    return torch.cat([torch.arange(run.start, run.stop) for run in runs] or [torch.arange(0)]) % tokens

"""AttentionPlan: the decisions for one attention on one rank that need no tensor values.

    AttentionPlan       kernel, scale, bias, the hops of the ring, and the chunks of this rank's heads
      Hop               one piece of keys and values that is received over the ring                       ring.py
      HeadChunk         some of this rank's heads, and the all-to-alls of their tensors
        ExchangePlan    one all-to-all of several TensorGroups                                            ulysses.py

A plan depends on shapes, mask and mesh only, so it is made once per shape and cached (plan_cache.py). A user's kernel or bias
is an object that may hold a model: it is bound to a copy of the plan at each call and not cached.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from longspan._compat import OpaqueBase, register_opaque
from longspan.distributed.collectives import Transport
from longspan.distributed.layout import Runs
from longspan.distributed.scratch import Scratch
from longspan.kernels.head_groups import GroupedKernel, Groups
from longspan.kernels.protocol import BoundBias, Kernel
from longspan.masks.bands import Band


@runtime_checkable
class Bias(Protocol):
    """A term added to the attention scores, computed tile by tile (ALiBi, T5); pass one as ``attend(bias=)``.

    It is called as ``bias(heads, q_positions, k_positions, parameters)`` for one tile: a range of query heads, and the
    positions in the row of its queries and keys, and returns the term [heads, queries, keys]. It is differentiable in its
    ``parameters``: use the argument in place of ``bias.parameters``, because it is a copy when gradients are computed.
    """

    parameters: tuple[Tensor, ...]

    def __call__(
        self, heads: range, q_positions: Tensor, k_positions: Tensor, parameters: tuple[Tensor, ...]
    ) -> Float[Tensor, "some_heads queries keys"]: ...


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Tensors with the same partition of tokens over the ranks (q, or q, k and v), sent side by side in one all-to-all.

    Attributes:
        sizes: for each rank, the number of tokens of a row that it holds.
        heads: ``heads[tensor][rank]``: the range of heads that the rank computes.
        dims: the head dim of each tensor.
        counts: the number of all heads of each tensor.
        summed: for each tensor, whether a head's result comes from several ranks or exchanges and must be summed.
    """

    sizes: tuple[int, ...]
    heads: tuple[tuple[range, ...], ...]
    dims: tuple[int, ...]
    counts: tuple[int, ...]
    summed: tuple[bool, ...]

    def widths(self, rank: int) -> tuple[int, ...]:
        """For each tensor, the elements per token that are sent to ``rank``: the heads that it computes x head dim."""
        return tuple(len(heads[rank]) * dim for heads, dim in zip(self.heads, self.dims))


@dataclass(frozen=True, kw_only=True)
class OwnPart:
    """The part of an exchange of one row that a rank keeps, which need not go through the collective.

    Attributes:
        mine: its place among the rows of every token, flat.
        others: the place of what the other ranks send, in one piece before or behind it.
        ranks, other_ranks: this rank, and the others.
        sent, received: elements for and from each rank, tokens to heads, 0 for this rank.
    """

    mine: slice
    others: slice
    ranks: range
    other_ranks: range
    sent: list[int]
    received: list[int]


class ExchangePlan(OpaqueBase):
    """One all-to-all between tokens and heads: its tensors, process group, transport and memory.

    It is an opaque argument of the operators ``exchange_to_heads`` and ``exchange_to_tokens``.

    Args:
        groups: the tensors, in groups of one partition of tokens.
        process_group: the ulysses ranks.
        transport: the all-to-all.
        scratch: where send buffers and received tensors come from.
    """

    def __init__(
        self, groups: Sequence[TensorGroup], process_group: dist.ProcessGroup, transport: Transport, scratch: Scratch
    ) -> None:
        self.groups, self.process_group, self.transport, self.scratch = tuple(groups), process_group, transport, scratch
        self.rank, self.ranks = process_group.rank(), range(process_group.size())
        self.widths = tuple(tuple(group.widths(p) for p in self.ranks) for group in self.groups)  # [group][rank][tensor]
        self.my_widths = tuple(widths[self.rank] for widths in self.widths)
        self.dims = tuple(dim for group in self.groups for dim in group.dims)
        # elements of one row of the batch, by rank and group: what tokens_to_heads sends, and what it receives
        self.sends = [[group.sizes[self.rank] * sum(widths[p]) for group, widths in self._both()] for p in self.ranks]
        self.receives = [[group.sizes[p] * sum(widths[self.rank]) for group, widths in self._both()] for p in self.ranks]
        self._sent, self._received = [sum(parts) for parts in self.sends], [sum(parts) for parts in self.receives]
        self.own = self._own_part()

    def _own_part(self) -> "OwnPart | None":
        """The slices of the flat receive buffer with what this rank sends to itself and with what the others send it.

        None where the others' is not one slice: on every rank but the first and the last, and where several groups of tensors
        (such as q, and k with v) are sent one after the other.
        """
        if len(self.groups) > 1 or 0 < self.rank < self.ranks[-1]:
            return None
        before, own = sum(self._received[: self.rank]), self._received[self.rank]
        others = slice(own, None) if self.rank == 0 else slice(0, before)
        sent, received = list(self._sent), list(self._received)
        sent[self.rank] = received[self.rank] = 0
        return OwnPart(
            mine=slice(before, before + own),
            others=others,
            ranks=range(self.rank, self.rank + 1),
            other_ranks=self.ranks[1:] if self.rank == 0 else self.ranks[:-1],
            sent=sent,
            received=received,
        )

    def _both(self) -> list[tuple[TensorGroup, tuple[tuple[int, ...], ...]]]:
        """For each group of tensors (the group, for each rank the elements of one token that each tensor sends to it)."""
        return list(zip(self.groups, self.widths))

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExchangePlan":
        return self  # torch.compile copies its graphs; process groups cannot be copied

    def sent(self, batch: int) -> list[int]:
        """For each rank, the elements sent to it from tokens to heads for ``batch`` rows: this rank's tokens in that rank's
        heads."""
        return [batch * elements for elements in self._sent]

    def received(self, batch: int) -> list[int]:
        """For each rank, the elements received from it from tokens to heads for ``batch`` rows: that rank's tokens in my
        heads."""
        return [batch * elements for elements in self._received]


register_opaque(ExchangePlan, members=("groups", "rank", "my_widths", "dims"))


@dataclass(frozen=True)
class Hop:
    """One step of the ring: receive keys and values from one ring rank, send some of this rank's own to another.

    Attributes:
        offset: they come from the ring rank ``offset`` before this one, and go to the one ``offset`` after it; 0: own keys.
        bands: the mask between this rank's queries and the received keys, as indices of both.
        arriving: the positions in the whole row of the keys that are received.
        leaving: the keys that are sent, as indices among this rank's own.
    """

    offset: int
    bands: tuple[Band, ...]  # between this rank's rows of queries and the received rows of keys
    arriving: Runs  # the rows of keys that are received, as positions in the whole row
    leaving: Runs  # the rows of this rank's keys that are sent, as indices into its own rows


@dataclass(frozen=True, kw_only=True)
class HeadChunk:
    """Some of this rank's heads, which are exchanged and computed together, and the all-to-alls of their tensors.

    Attributes:
        heads, kv_heads: the query heads, and the key/value heads that they read.
        groups: slices of both in which each key/value head is read by equally many query heads, as kernels require.
        qkv, out, backward: the all-to-all of q, k, v, that of the output, and that of the recomputable operator's backward (q,
            out, dout, k, v); None on one ulysses rank.
    """

    heads: range
    kv_heads: range
    groups: Groups
    qkv: ExchangePlan | None
    out: ExchangePlan | None
    backward: ExchangePlan | None  # q, out, dout, k, v: what the backward of the recomputable operator fetches


class AttentionPlan(OpaqueBase):
    """All decisions for one attention on one rank that need no tensor values; ``plan_attention`` makes it.

    It is an opaque argument of the operators in custom_ops.py, so torch.compile does not look inside.

    Args:
        kernel: the kernel; None: ``bind`` sets it.
        scale, softcap: factor of the scores; c of c·tanh(s/c), or None.
        chunks: this rank's heads, in the parts in which they are exchanged.
        replicated: whether some key/value head is in several ranks or chunks, so that its gradients are summed.
        hops: the steps of the ring.
        ring_group, transport: the ring ranks, and how they exchange; None without a mesh.
        tokens, key_tokens: tokens of a whole row of queries, and of keys.
        query_runs: the positions of this rank's queries, over all rows of the batch.
    """

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
        return self  # torch.compile copies its graphs; process groups cannot be copied

    def bind(self, kernel: Kernel, bias: Bias | None) -> "AttentionPlan":
        """A copy of the plan with this kernel and bias (None: no bias); the plan itself is not changed."""
        bound = copy(self)
        bound.kernel, bound.bias = kernel, bias
        return bound

    def kernel_of(self, chunk: HeadChunk) -> GroupedKernel:
        """The plan's kernel with its scale and softcap, as an object that calls it for one group of the chunk's heads after
        another: in each group every key/value head is read by equally many query heads, as kernels require."""
        assert self.kernel is not None, "a plan is bound before it runs"
        return GroupedKernel(self.kernel, chunk.groups, self.scale, self.softcap)

    def bias_of(
        self, chunk: HeadChunk, key_runs: Runs, parameters: tuple[Tensor, ...], device: torch.device
    ) -> Callable[[slice], BoundBias] | None:
        """The bias of a chunk in one ring hop: a function from a slice of the chunk's heads to a ``BoundBias``.

        Args:
            chunk: the head chunk.
            key_runs: the positions of the keys of the hop.
            parameters: the tensors to use as the parameters of the bias.
            device: of the queries, on which the positions are formed, so that no tile waits for a copy from the host.

        Returns:
            The function; None if the attention has no bias.
        """
        if self.bias is None:
            return None
        q_positions, k_positions = (
            _positions(runs, tokens, device) for runs, tokens in ((self.query_runs, self.tokens), (key_runs, self.key_tokens))
        )
        return partial(TileBias, self.bias, chunk.heads, q_positions, k_positions, parameters)


register_opaque(AttentionPlan, members=("chunks", "heads", "rows"))


class TileBias:
    """A ``BoundBias``: the user's ``Bias`` for some heads in one ring hop, as a kernel calls it.

    Calling it with the indices of a tile's local queries and keys gives the term [heads, queries, keys] for their positions.

    Args:
        bias: the user's bias.
        chunk_heads, heads: the heads of the chunk, and the slice of them.
        q_positions, k_positions: the position in its row of each local query and key.
        parameters: the tensors to use as the parameters of the bias.
    """

    def __init__(
        self, bias: Bias, chunk_heads: range, q_positions: Tensor, k_positions: Tensor, parameters: tuple[Tensor, ...],
        heads: slice,
    ) -> None:  # fmt: skip
        self.bias, self.heads, self.parameters = bias, chunk_heads[heads], parameters
        self.q_positions, self.k_positions = q_positions, k_positions

    def __call__(self, q_index: Tensor, k_index: Tensor) -> Tensor:
        return self.bias(self.heads, self.q_positions[q_index], self.k_positions[k_index], self.parameters)


def _positions(runs: Runs, tokens: int, device: torch.device) -> Tensor:
    """The position in its own row of each token in ``runs``, as a tensor on ``device``.

    ``runs`` are ranges over the rows of a batch laid one after another, each of ``tokens`` tokens.
    """
    parts = [torch.arange(run.start, run.stop, device=device) for run in runs]
    return torch.cat(parts or [torch.arange(0, device=device)]) % tokens

"""Ring attention (context parallel): attend to the keys of one ring rank after another, and merge results by log-sum-exp.

    ring=4, rank 1      hop 0      hop 1        hop 2        hop 3
      keys of rank        1          0            3            2          while the kernel computes one piece,
      out, lse          merge <-   merge <-     merge <-     merge        the next one is received

A piece is sent directly by its owner, and holds only the keys that some query of the receiver sees: under a window or with
documents most hops send nothing, and a causal zigzag sends about half of the rows. In the backward pass the pieces are sent
again; each is computed with the log-sum-exp and the output over *all* keys, and the gradients of keys and values are sent back
to their owner in fp32.

One rank is a ring of one hop. Independent of the all-to-all of heads and of models.
Source: Ring Attention, arXiv:2310.01889; zigzag: Striped Attention, arXiv:2311.09431, and its successors.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from longspan.attention.plan import AttentionPlan, HeadChunk, Hop
from longspan.distributed.collectives import Arrival
from longspan.distributed.layout import Runs, consecutive, select
from longspan.kernels.protocol import Gradients, Partial, accumulation_dtype, merge_weights
from longspan.masks.bands import Band, localize


def plan_hops(bands: tuple[Band, ...], query_runs: Sequence[Runs], key_runs: Sequence[Runs], rank: int) -> tuple[Hop, ...]:
    """The steps of ring attention for one rank: in each, it receives keys and values from one rank and sends its own to
    another.

    The first step has offset 0: the rank's own keys. A step in which no rank needs a key is left out on every rank alike, so
    all ranks have the same number of steps.

    Args:
        bands: the mask of the whole row, in its positions.
        query_runs: for each ring rank, the positions of the queries that it holds.
        key_runs: for each ring rank, the positions of the keys that it holds.
        rank: this ring rank.
    """
    ranks = range(len(query_runs))
    every_key = (range(max((run.stop for runs in key_runs for run in runs), default=0)),)
    sees = [localize(bands, runs, every_key) for runs in query_runs]  # first to the few bands of each rank's queries
    places = [(range(_rows(runs)),) for runs in query_runs]
    hops = [Hop(0, localize(sees[rank], places[rank], key_runs[rank]), key_runs[rank], ())]
    for offset in ranks[1:]:
        receivers = [(source + offset) % len(ranks) for source in ranks]
        needed = [_visible(localize(sees[to], places[to], key_runs[source])) for source, to in zip(ranks, receivers)]
        if any(needed):
            source = (rank - offset) % len(ranks)
            arriving = tuple(chain.from_iterable(select(key_runs[source], run) for run in needed[source]))
            hops.append(Hop(offset, localize(sees[rank], places[rank], arriving), arriving, needed[rank]))
    return tuple(hops)


def _visible(bands: tuple[Band, ...]) -> Runs:
    """The keys that at least one query of these bands sees, as sorted disjoint ranges."""
    runs: list[range] = []
    for start, stop in sorted((band.k_start, band.k_stop) for band in bands):
        if runs and start <= runs[-1].stop:
            runs[-1] = range(runs[-1].start, max(stop, runs[-1].stop))
        else:
            runs.append(range(start, stop))
    return tuple(runs)


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, plan: AttentionPlan, chunk: HeadChunk, parameters: tuple[Tensor, ...]
) -> Partial:
    """Attention of this rank's rows over the keys of all ring ranks, for one head chunk.

    Args:
        q, k, v: this rank's rows [rows, my heads, dim].
        plan: the attention; its hops say which keys are received from whom.
        chunk: the heads.
        parameters: the parameters of the bias.

    Returns:
        out [queries, heads, v_dim] and the log-sum-exp [heads, queries].
    """
    result: Partial | None = None
    kernel = plan.kernel_of(chunk)
    for hop, k_piece, v_piece in _pieces(k, v, plan):
        if result is not None and not hop.bands:
            continue  # this hop serves other ranks
        bias = plan.bias_of(chunk, hop.arriving, parameters, q.device)
        part = kernel.forward(q, k_piece, v_piece, bands=hop.bands, bias=bias)
        result = part if result is None else _merge(*result, *part)
    assert result is not None
    return result


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *, plan: AttentionPlan, chunk: HeadChunk, parameters: tuple[Tensor, ...],
) -> Gradients:  # fmt: skip
    """The gradients of ``forward`` for one head chunk, summed over the hops in fp32 (fp64 for fp64).

    Keys and values are received again; their gradients are sent to the ranks that hold them.

    Args:
        dout: the gradient of ``out``, [queries, heads, v_dim].
        q, k, v: this rank's rows [rows, my heads, dim].
        out, lse: the results of ``forward``, over all keys.
        plan, chunk, parameters: the attention, the heads, and the parameters of the bias.

    Returns:
        (dq, dk, dv of this rank's rows, list of the gradients of the bias parameters).
    """
    kernel = plan.kernel_of(chunk)
    total: Gradients | None = None
    returning: tuple[Hop, Arrival] | None = None  # one at a time: each holds a piece in fp32
    for hop, k_piece, v_piece in _pieces(k, v, plan):
        bias = plan.bias_of(chunk, hop.arriving, parameters, q.device)
        if total is None:
            total = kernel.backward(dout, q, k_piece, v_piece, out, lse, bands=hop.bands, bias=bias)
            if len(plan.hops) > 1:  # what follows is added to it
                dq, dk, dv = (x.to(accumulation_dtype(x.dtype)) for x in total[:3])
                total = dq, dk, dv, total[3]
            continue
        dk, dv = k_piece.to(total[1].dtype), v_piece.to(total[2].dtype)  # no rows, where this hop serves other ranks
        if hop.bands:
            dq, dk, dv, dparameters = kernel.backward(dout, q, k_piece, v_piece, out, lse, bands=hop.bands, bias=bias)
            for sum_, part in zip([total[0], *total[3]], [dq, *dparameters]):
                sum_.add_(part)
        _add_returned(returning, total[1], total[2])
        returning = (hop, _return(dk, dv, hop, plan))
    assert total is not None
    _add_returned(returning, total[1], total[2])
    return total


def _pieces(k: Tensor, v: Tensor, plan: AttentionPlan) -> Iterator[tuple[Hop, Tensor, Tensor]]:
    """Yield (hop, keys, values) of every hop of ``plan`` in turn; the next piece is exchanged while the caller computes with
    this one.

    ``k`` and ``v`` are this rank's own, which are the first hop's.
    """
    exchange: Arrival | None = None
    for hop, following in zip(plan.hops, [*plan.hops[1:], None]):
        arrived = exchange.wait() if exchange is not None else None
        exchange = _send(k, v, following, plan) if following is not None else None
        yield (hop, k, v) if arrived is None else (hop, *_as_pair(arrived, k, v))


def _send(k: Tensor, v: Tensor, hop: Hop, plan: AttentionPlan) -> Arrival:
    """Start to send those of this rank's keys and values that the receiver of ``hop`` needs.

    The returned handle gives the keys and values that this rank receives, flat.
    """
    columns = (k.flatten(1), v.flatten(1))
    send = k.new_empty(_rows(hop.leaving), columns[0].shape[1] + columns[1].shape[1])
    for place, run in zip(consecutive([len(run) for run in hop.leaving]), hop.leaving):
        torch.cat([x[run.start : run.stop] for x in columns], 1, out=send[place.start : place.stop])
    return _rotate(send, hop.offset, _rows(hop.arriving), plan)


def _return(dk: Tensor, dv: Tensor, hop: Hop, plan: AttentionPlan) -> Arrival:
    """Start to send ``dk`` and ``dv``, the gradients of the keys of ``hop``, back to their owner.

    The returned handle gives the gradients of this rank's own keys that another rank has computed, flat.
    """
    return _rotate(torch.cat([dk.flatten(1), dv.flatten(1)], 1), -hop.offset, _rows(hop.leaving), plan)


def _rotate(rows: Tensor, offset: int, expected_rows: int, plan: AttentionPlan) -> Arrival:
    """Start to send ``rows`` to the ring rank ``offset`` after this one and to receive from the one ``offset`` before it.

    Returns:
        A handle whose ``wait`` gives the received elements, flat: ``expected_rows`` rows as wide as ``rows``.
    """
    assert plan.ring_group is not None
    assert plan.transport is not None
    ranks, rank = plan.ring_group.size(), plan.ring_group.rank()
    send, recv = [0] * ranks, [0] * ranks
    send[(rank + offset) % ranks] = rows.numel()
    recv[(rank - offset) % ranks] = expected_rows * rows.shape[1]
    return plan.transport.all_to_all(rows.flatten(), send, recv, plan.ring_group)


def _add_returned(returning: tuple[Hop, Arrival] | None, dk: Tensor, dv: Tensor) -> None:
    """Wait for the gradients that ``returning`` brings, and add them in place to this rank's ``dk`` and ``dv``; None:
    nothing."""
    if returning is None:
        return
    hop, arrival = returning
    dk_part, dv_part = _as_pair(arrival.wait(), dk, dv)
    for place, run in zip(consecutive([len(run) for run in hop.leaving]), hop.leaving):
        dk[run.start : run.stop] += dk_part[place.start : place.stop]
        dv[run.start : run.stop] += dv_part[place.start : place.stop]


def _as_pair(flat: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A received flat buffer of rows [key | value] as two views, [rows, heads, dim] with the heads and dims of ``k`` and
    ``v``."""
    widths = [x.shape[1] * x.shape[2] for x in (k, v)]
    k_columns, v_columns = flat.view(-1, sum(widths)).split(widths, 1)
    return k_columns.unflatten(1, k.shape[1:]), v_columns.unflatten(1, v.shape[1:])


def _rows(runs: Runs) -> int:
    """The number of positions in ``runs``."""
    return sum(map(len, runs))


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Partial:
    """The result over all keys from two partial results of the same queries over different keys, as new tensors.

    Args:
        out_a, out_b: [queries, heads, v_dim].
        lse_a, lse_b: their log-sum-exp, [heads, queries].

    Returns:
        (out, log-sum-exp). A query that sees no key in either has out 0 and log-sum-exp -inf.
    """
    lse, weight_a, weight_b = merge_weights(lse_a, lse_b)
    return out_a * weight_a.T.unsqueeze(2) + out_b * weight_b.T.unsqueeze(2), lse

"""Bring every piece of keys and values to my queries, one piece at a time, and merge what each gives by log-sum-exp.

    ring=4, rank 1      hop 0      hop 1        hop 2        hop 3
      keys of rank        1          0            3            2          while the kernel works on one piece,
      out, lse          merge <-   merge <-     merge <-     merge        the next one is on its way

A piece comes straight from its owner, so a rank asks only for the rows of keys that its mask lets it see: under a window or
documents most hops vanish, and under a causal zigzag half the rows do. In the backward pass the pieces come again, each
with the log-sum-exp and the output of the *whole* row of keys, and the gradients of keys and values go home in fp32.

One rank is a ring of one hop. Knows bands and rows; nothing of heads being traded or of models.
Source: Ring Attention, arXiv:2310.01889; zigzag: Striped Attention, arXiv:2311.09431, and its successors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.distributed.collectives import Arrival, Transport
from longspan.distributed.layout import Runs, consecutive, select
from longspan.kernels.head_groups import Local
from longspan.masks.bands import Band, localize


@dataclass(frozen=True)
class Hop:
    """One piece of keys: from the rank ``offset`` before me, while mine go to the rank ``offset`` behind me."""

    offset: int
    bands: tuple[Band, ...]  # between my rows of queries and the rows of keys that arrive
    arriving: Runs  # the rows of keys that arrive, as places in the whole row
    leaving: Runs  # the rows of my keys that leave, as places among mine


@dataclass(frozen=True)
class Ring:
    """The hops of one rank, and what carries them (None: a ring of one)."""

    hops: tuple[Hop, ...]
    group: dist.ProcessGroup | None = None
    transport: Transport | None = None


def plan_hops(bands: tuple[Band, ...], query_rows: Sequence[Runs], key_rows: Sequence[Runs], rank: int) -> tuple[Hop, ...]:
    """The hops of ``rank``, from who holds which rows of queries and keys. Every rank leaves out the same hops.

    ``bands`` are those of the whole row; ``query_rows[r]`` and ``key_rows[r]`` are what ring rank r holds of it.
    """
    ranks = range(len(query_rows))
    every_key = (range(max((run.stop for runs in key_rows for run in runs), default=0)),)
    sees = [localize(bands, runs, every_key) for runs in query_rows]  # first to the few bands of each rank's queries
    places = [(range(_rows(runs)),) for runs in query_rows]
    hops = [Hop(0, localize(sees[rank], places[rank], key_rows[rank]), key_rows[rank], ())]
    for offset in ranks[1:]:
        asking = [(source + offset) % len(ranks) for source in ranks]
        needed = [_seen(localize(sees[asks], places[asks], key_rows[source])) for source, asks in zip(ranks, asking)]
        if any(needed):
            source = (rank - offset) % len(ranks)
            arriving = tuple(chain.from_iterable(select(key_rows[source], run) for run in needed[source]))
            hops.append(Hop(offset, localize(sees[rank], places[rank], arriving), arriving, needed[rank]))
    return tuple(hops)


def _seen(bands: tuple[Band, ...]) -> Runs:
    """The rows of keys that some query of these bands sees, as few runs as possible."""
    runs: list[range] = []
    for start, stop in sorted((band.k_start, band.k_stop) for band in bands):
        if runs and start <= runs[-1].stop:
            runs[-1] = range(runs[-1].start, max(stop, runs[-1].stop))
        else:
            runs.append(range(start, stop))
    return tuple(runs)


def forward(q: Tensor, k: Tensor, v: Tensor, local: Local, ring: Ring, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """(out [queries, heads, v_dim], lse [heads, queries]) over every piece of keys; one piece is given as it is."""
    result: tuple[Tensor, Tensor] | None = None
    for hop, k_piece, v_piece in _pieces(k, v, ring):
        if result is not None and not hop.bands:
            continue  # this hop serves other ranks
        part = local.forward(q, k_piece, v_piece, hop.bands, hop.arriving, parameters)
        result = part if result is None else _merge(*result, *part)
    assert result is not None
    return result


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    local: Local, ring: Ring, parameters: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """(dq, dk, dv, gradients of the bias' parameters), summed over the pieces in fp32 (fp64 for fp64)."""
    total: tuple[Tensor, Tensor, Tensor, list[Tensor]] | None = None
    going_home: tuple[Hop, Arrival] | None = None  # one at a time: each holds a piece in fp32
    for hop, k_piece, v_piece in _pieces(k, v, ring):
        if total is None:
            total = local.backward(dout, q, k_piece, v_piece, out, lse, hop.bands, hop.arriving, parameters)
            continue
        dk, dv = k_piece.to(total[1].dtype), v_piece.to(total[2].dtype)  # no rows, where this hop serves other ranks
        if hop.bands:
            dq, dk, dv, dparameters = local.backward(dout, q, k_piece, v_piece, out, lse, hop.bands, hop.arriving, parameters)
            for sum_, part in zip([total[0], *total[3]], [dq, *dparameters]):
                sum_.add_(part)
        _add_returned(going_home, total[1], total[2])
        going_home = (hop, _send_home(dk, dv, hop, ring))
    assert total is not None
    _add_returned(going_home, total[1], total[2])
    return total


def _pieces(k: Tensor, v: Tensor, ring: Ring) -> Iterator[tuple[Hop, Tensor, Tensor]]:
    """(hop, keys, values) one after another; the next piece travels while the caller works on this one."""
    on_its_way: Arrival | None = None
    for hop, following in zip(ring.hops, [*ring.hops[1:], None]):
        arrived = on_its_way.wait() if on_its_way is not None else None
        on_its_way = _send_round(k, v, following, ring) if following is not None else None
        yield (hop, k, v) if arrived is None else (hop, *_as_pair(arrived, k, v))


def _send_round(k: Tensor, v: Tensor, hop: Hop, ring: Ring) -> Arrival:
    columns = (k.flatten(1), v.flatten(1))
    send = k.new_empty(_rows(hop.leaving), columns[0].shape[1] + columns[1].shape[1])
    for place, run in zip(consecutive([len(run) for run in hop.leaving]), hop.leaving):
        torch.cat([x[run.start : run.stop] for x in columns], 1, out=send[place.start : place.stop])
    return _travel(send, hop.offset, _rows(hop.arriving), ring)


def _send_home(dk: Tensor, dv: Tensor, hop: Hop, ring: Ring) -> Arrival:
    return _travel(torch.cat([dk.flatten(1), dv.flatten(1)], 1), -hop.offset, _rows(hop.leaving), ring)


def _travel(rows: Tensor, offset: int, expected_rows: int, ring: Ring) -> Arrival:
    """Send rows to the rank ``offset`` behind me while as many as expected come from the rank ``offset`` before me."""
    assert ring.group is not None
    assert ring.transport is not None
    ranks, rank = ring.group.size(), ring.group.rank()
    send, recv = [0] * ranks, [0] * ranks
    send[(rank + offset) % ranks] = rows.numel()
    recv[(rank - offset) % ranks] = expected_rows * rows.shape[1]
    return ring.transport.all_to_all(rows.flatten(), send, recv, ring.group)


def _add_returned(going_home: tuple[Hop, Arrival] | None, dk: Tensor, dv: Tensor) -> None:
    if going_home is None:
        return
    hop, arrival = going_home
    dk_part, dv_part = _as_pair(arrival.wait(), dk, dv)
    for place, run in zip(consecutive([len(run) for run in hop.leaving]), hop.leaving):
        dk[run.start : run.stop] += dk_part[place.start : place.stop]
        dv[run.start : run.stop] += dv_part[place.start : place.stop]


def _as_pair(flat: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of [keys | values] as views of the shapes of k and v, whatever their number."""
    widths = [x.shape[1] * x.shape[2] for x in (k, v)]
    k_columns, v_columns = flat.view(-1, sum(widths)).split(widths, 1)
    return k_columns.unflatten(1, k.shape[1:]), v_columns.unflatten(1, v.shape[1:])


def _rows(runs: Runs) -> int:
    return sum(map(len, runs))


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results of the same queries as one, in fp32 at least; a query that neither reaches stays at 0 and -inf."""
    lse = torch.logaddexp(lse_a, lse_b)
    reached = lse.masked_fill(lse == -torch.inf, 0.0)
    share_a, share_b = ((part - reached).exp().T.unsqueeze(2) for part in (lse_a, lse_b))
    return out_a * share_a + out_b * share_b, lse

"""The closed forms of a decoder's traffic in one step, by axis of the mesh: what ``longspan check`` compares counts with.

    ulysses    a layer's all-to-alls of attention        }  times the layers, and again where a layer is recomputed
    ring       a layer's exchanges of keys and values    }
    tensor     two regions a layer, and once a forward the position ids

Everything is derived from integers: the degrees, the rows and tokens, the model's shape, the memory options. The sums are those
of distributed/traffic.py; every layer is causal and of one shape.
"""

from longspan.attention.ring import plan_hops
from longspan.cli.config import Check
from longspan.distributed.layout import Heads, split
from longspan.distributed.mesh import MeshCoordinate
from longspan.distributed.traffic import (
    Traffic,
    attention_traffic,
    recomputable_attention_traffic,
    ring_traffic,
    tensor_region_traffic,
)
from longspan.masks import constructors as masks
from longspan.masks.constructors import Causal
from longspan.models.decoder_config import DecoderConfig

Passes = tuple[Traffic, Traffic]
"""(traffic of the forward, traffic of the backward)."""
POSITION_BYTES = 8


def by_axis(config: Check, shape: DecoderConfig, at: MeshCoordinate, itemsize: int) -> dict[str, Passes]:
    """What this rank sends in one forward and backward of the whole decoder, by axis; axes of degree 1 are left out.

    Args:
        config: the rows, tokens and memory options.
        shape: the decoder, of all ranks together.
        at: the degrees and this rank's position.
        itemsize: bytes of an element of the compute dtype. Parameters, and hidden states between regions, have at least 4.

    Returns:
        {axis: (traffic of the forward, traffic of the backward)}.
    """
    passes = _attention(config, shape.of_tensor_rank(at.tensor), at, itemsize) | {
        "tensor": _tensor(config, shape, at, itemsize)
    }
    return {axis: both for axis, both in passes.items() if getattr(at, axis) > 1}


def _attention(config: Check, shape: DecoderConfig, at: MeshCoordinate, itemsize: int) -> dict[str, Passes]:
    """{axis: (forward, backward)} that attention sends in all layers on the axes ulysses and ring.

    Args:
        config: the rows, tokens and memory options.
        shape: the decoder with the heads of one tensor rank.
        at: the degrees and this rank's position.
        itemsize: bytes of an element of q, k and v.
    """
    layout, dim = at.layout(config.tokens), shape.head_dim
    sizes, rows = layout.sizes(at.ring_rank), _rows(config, at)
    chunked = Heads(shape.heads, shape.kv_heads, config.head_chunks)
    exchange = recomputable_attention_traffic if _is_recomputable(config) else attention_traffic
    held = [layout.batch_runs(rank, rows) for rank in range(at.ring)]
    hops = plan_hops(masks.rows(Causal(), rows, config.tokens, config.tokens), held, held, at.ring_rank)[1:]
    leaving, arriving = ([sum(map(len, getattr(hop, keys))) for hop in hops] for keys in ("leaving", "arriving"))
    ulysses, ring = [], []
    for chunk in range(config.head_chunks):
        heads = Heads(len(chunked.query_of(chunk)), len(chunked.kv_of(chunk)), at.ulysses)
        ulysses.append(exchange(heads, sizes, sizes, at.ulysses_rank, rows=rows, qk_dim=dim, v_dim=dim, itemsize=itemsize))
        width = 2 * dim * len(heads.kv_of(at.ulysses_rank))
        ring.append(ring_traffic(leaving, arriving, width, itemsize=itemsize, grad_itemsize=max(itemsize, 4)))
    found = {}
    for axis, chunks in (("ulysses", ulysses), ("ring", ring)):
        forward, backward = (_times(shape.layers, _sum([chunk[way] for chunk in chunks])) for way in (0, 1))
        found[axis] = (forward, forward + backward if config.recompute == "full" else backward)
    return found


def _tensor(config: Check, shape: DecoderConfig, at: MeshCoordinate, itemsize: int) -> Passes:
    """(forward, backward) that all layers send on the tensor axis: two regions a layer, and the gather of the position ids.

    A recomputed layer stops before its last reduce-scatter.

    Args:
        config, shape, at: the options, the decoder of all ranks together, and this rank's position.
        itemsize: bytes of an element of the compute dtype.
    """
    rows, shares, hidden = _rows(config, at), at.tensor_sizes(config.tokens), max(itemsize, 4)
    sums = {"attention": hidden if config.head_chunks > 1 else itemsize, "feed-forward": itemsize}  # chunks are summed up

    def region(which: str) -> Passes:
        at_rank = (shares, at.tensor_rank)
        return tensor_region_traffic(*at_rank, rows=rows, hidden=shape.hidden, itemsize=hidden, sum_itemsize=sums[which])

    one = [_times(shape.layers, region("attention")[way] + region("feed-forward")[way]) for way in (0, 1)]
    positions = Traffic(1, rows * shares[at.tensor_rank] * (len(shares) - 1) * POSITION_BYTES)
    forward, backward = one[0] + positions, one[1]
    if config.recompute != "none":
        last = shape.layers * rows * (sum(shares) - shares[at.tensor_rank]) * shape.hidden * sums["feed-forward"]
        backward = backward + Traffic(one[0].collectives - shape.layers, one[0].bytes - last)
    return forward, backward


def _rows(config: Check, at: MeshCoordinate) -> int:
    """The rows of this rank's data replica."""
    return split(config.rows, at.data)[at.data_rank]


def _is_recomputable(config: Check) -> bool:
    """Whether attention runs as ``attend(recomputable=True)`` with these options."""
    return config.recompute == "selective" or config.head_chunks > 1


def _times(count: int, each: Traffic) -> Traffic:
    """``count`` times the traffic of one."""
    return Traffic(count * each.collectives, count * each.bytes)


def _sum(each: list[Traffic]) -> Traffic:
    """The sum of several traffics."""
    return sum(each, Traffic())

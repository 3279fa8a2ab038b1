"""The closed forms of a decoder's traffic in one step, by axis of the mesh: what ``longspan check`` compares counts with.

    ulysses    a layer's all-to-alls of attention        }  times the layers of this rank's stages, and again where a layer is
    ring       a layer's exchanges of keys and values    }  recomputed
    tensor     two regions a layer, once a forward of a stage the position ids, and on the stages that have them the embedding
               and the loss
    pipeline   hidden states to the next stage, and their gradients back

All for each micro-batch. Everything is derived from integers: the degrees, the rows and tokens, the model's shape, the memory
options. The sums are those of distributed/traffic.py; every layer is causal and of one shape.
"""

from dataclasses import replace

from longspan.attention.ring import plan_hops
from longspan.cli.config import Check
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.layout import Heads, consecutive, split
from longspan.distributed.traffic import (
    ID_BYTES,
    Traffic,
    attention_traffic,
    embedding_traffic,
    pipeline_traffic,
    recomputable_attention_traffic,
    ring_traffic,
    tensor_region_traffic,
    vocabulary_loss_traffic,
)
from longspan.masks import constructors as masks
from longspan.masks.constructors import Causal
from longspan.models.decoder_config import DecoderConfig

Passes = tuple[Traffic, Traffic]
"""(traffic of the forward, traffic of the backward)."""


def by_axis(config: Check, shape: DecoderConfig, at: MeshCoordinate, itemsize: int, layers: int) -> dict[str, Passes]:
    """What this rank sends in one step of the decoder, by axis; axes of degree 1 are left out.

    Args:
        config: the rows, tokens, micro-batches, schedule and memory options.
        shape: the decoder, of all ranks together.
        at: the degrees and this rank's position.
        itemsize: bytes of an element of the compute dtype. Parameters, and hidden states between regions, have at least 4.
        layers: the layers of this rank's pipeline stages; without a pipeline all.
    """
    held, found = replace(shape, layers=layers), dict[str, list[Passes]]()
    fewest = 1 if at.pipeline > 1 else 0  # the stages fill a micro-batch without rows with one that nobody learns from
    parts = consecutive(split(config.rows, config.micro_batches))
    micro_batches = [max(fewest, split(len(rows), at.data)[at.data_rank]) for rows in parts]
    for rows in micro_batches:
        passes = _attention(config, held.of_tensor_rank(at.tensor), at, rows, itemsize) | {
            "tensor": _tensor(config, held, at, rows, itemsize)
        }
        for axis, both in passes.items():
            found.setdefault(axis, []).append(both)
    elements = micro_batches[0] * sum(map(len, at.my_positions(config.tokens))) * shape.hidden
    sizes = {"micro_batches": config.micro_batches, "elements": elements, "itemsize": max(itemsize, 4)}
    found["pipeline"] = [pipeline_traffic(at.pipeline, at.pipeline_rank, config.stages_per_rank, **sizes)]
    return {
        axis: (_sum([forward for forward, _ in each]), _sum([backward for _, backward in each]))
        for axis, each in found.items()
        if getattr(at, axis) > 1
    }


def _attention(config: Check, shape: DecoderConfig, at: MeshCoordinate, rows: int, itemsize: int) -> dict[str, Passes]:
    """{axis: (forward, backward)} that attention sends in all layers on the axes ulysses and ring.

    Args:
        config: the rows, tokens and memory options.
        shape: the decoder with the heads of one tensor rank.
        at: the degrees and this rank's position.
        itemsize: bytes of an element of q, k and v.
    """
    layout, dim = at.layout(config.tokens), shape.head_dim
    sizes = layout.sizes(at.ring_rank)
    chunked = Heads(shape.heads, shape.kv_heads, config.head_chunks)
    exchange = recomputable_attention_traffic if _is_recomputable(config) else attention_traffic
    held = [layout.batch_runs(rank, rows) for rank in range(at.ring)]
    hops = plan_hops(masks.batch_bands(Causal(), rows, config.tokens, config.tokens), held, held, at.ring_rank)[1:]
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


def _tensor(config: Check, shape: DecoderConfig, at: MeshCoordinate, rows: int, itemsize: int) -> Passes:
    """Two regions a layer, once a stage the gather of the position ids, and the embedding and the loss on their stages.

    A recomputed layer stops before its last reduce-scatter.
    """
    shares, hidden = at.tensor_sizes(config.tokens), max(itemsize, 4)
    sums = {"attention": hidden if config.head_chunks > 1 else itemsize, "feed-forward": itemsize}  # chunks are summed up

    def region(which: str) -> Passes:
        at_rank = (shares, at.tensor_rank)
        return tensor_region_traffic(*at_rank, rows=rows, hidden=shape.hidden, itemsize=hidden, sum_itemsize=sums[which])

    one = [_times(shape.layers, region("attention")[way] + region("feed-forward")[way]) for way in (0, 1)]
    one_stage = Traffic(1, rows * shares[at.tensor_rank] * (len(shares) - 1) * ID_BYTES)
    positions = _times(config.stages_per_rank, one_stage)
    forward, backward = one[0] + positions, one[1]
    ends = {"rows": rows, "hidden": shape.hidden, "itemsize": hidden}
    for stage, traffic in ((0, embedding_traffic), (at.pipeline - 1, vocabulary_loss_traffic)):
        if at.pipeline_rank == stage:
            more = traffic(shares, at.tensor_rank, **ends)
            forward, backward = forward + more[0], backward + more[1]
    if config.recompute != "none":
        last = shape.layers * rows * (sum(shares) - shares[at.tensor_rank]) * shape.hidden * sums["feed-forward"]
        backward = backward + Traffic(one[0].collectives - shape.layers, one[0].bytes - last)
    return forward, backward


def _is_recomputable(config: Check) -> bool:
    """Whether attention runs as ``attend(recomputable=True)`` with these options."""
    return config.recompute == "selective" or config.head_chunks > 1


def _times(count: int, each: Traffic) -> Traffic:
    """``count`` times the traffic of one."""
    return Traffic(count * each.collectives, count * each.bytes)


def _sum(each: list[Traffic]) -> Traffic:
    """The sum of several traffics."""
    return sum(each, Traffic())

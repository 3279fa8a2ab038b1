"""The closed form of planner/memory.py for longspan's decoder in any layout of a plan: pipeline, data, ring, ulysses, tensor.

    strategy, step   ->   layers of the fullest stage x micro-batches in flight, parameters of a rank, tokens of a micro-batch
                     ->   footprint   ->   bytes of the tensors at the peak, which a rehearsal measures

It covers one device's tensors; what a process holds beside them is ``Constants.reserve``. rank_memory.py is coarser, covers any
model, and prices every layout of a search.
"""

from dataclasses import replace

from longspan.planner.memory import Footprint, Sizes, footprint
from longspan.planner.model import ModelShape
from longspan.planner.strategy import Strategy, Workload, micro_batches


def decoder_footprint(shape: ModelShape, s: Strategy, work: Workload, dtype: str) -> Footprint:
    """The memory of the fullest rank of our decoder.

    Args:
        shape: a dense decoder with a gated feed-forward and equal layers.
        s: the layout and options; parameters that are offloaded are counted as if they were not.
        work: the step.
        dtype: "fp32" or "bf16". bf16 is autocast over fp32 weights at zero=0, else FSDP2's compute dtype.

    Returns:
        The Footprint, in bytes.
    """
    layers = -(-shape.layers // s.pipeline)
    flight = min(s.pipeline, micro_batches(work, s))
    table = 0 if shape.vocab % s.tensor else shape.vocab * shape.hidden * (s.tensor - 1) // s.tensor  # rows of other ranks
    ends = (shape.embedding_parameters - table, shape.head_parameters - (0 if shape.tied else table))
    outside = max(ends) if s.pipeline > 1 else sum(ends)
    (kind,) = shape.kinds
    sizes = Sizes(
        vocab=shape.vocab,
        layers=layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.qk_dim,
        ffn=kind.ffn,
    )
    return footprint(
        replace(sizes, layers=layers * flight),
        parameters=shape.layer_parameters * layers // shape.layers // s.tensor + outside,
        tokens=work.tokens * s.micro_batch,
        ranks=s.ring * s.ulysses,
        ulysses=s.ulysses,
        zero=s.zero,
        fsdp_ranks=s.data * s.ring * s.ulysses if s.zero else None,
        recompute=s.recompute,
        tile_tokens=s.tile_tokens or None,
        head_chunks=s.head_chunks,
        itemsize=2 if dtype == "bf16" else 4,
        tensor=s.tensor,
        autocast=dtype == "bf16" and s.zero == 0,
        norm_itemsize=4,
    )

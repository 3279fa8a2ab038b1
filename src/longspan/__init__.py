"""longspan: train a transformer on sequences that one device cannot hold, and get the numbers of one device.

    mesh  = ParallelMesh(ulysses=2)                  under torchrun, or longspan's own launcher
    model = parallelize(model, mesh)                 attention, loss and gradients over the mesh, in place
    part  = shard({"input_ids": ids, "labels": ids}, mesh)
    loss  = model(**part).loss; loss.backward()      the loss, and every gradient, of one device
"""

from longspan.attention import attend
from longspan.batch import Step, agree, cut, shard, unshard
from longspan.errors import (
    BatchError,
    DataError,
    KernelError,
    LayoutError,
    LongspanError,
    MaskError,
    ModelError,
    RunError,
)
from longspan.exchange import heads_to_tokens, tokens_to_heads
from longspan.loss import cross_entropy
from longspan.masks import BlockSparse, Causal, Chunked, Documents, Full, Mask, Only, PrefixLM, Sinks, Window
from longspan.mesh import ParallelMesh
from longspan.sharding import parallelize, unparallelize

__version__ = "0.1.0"

__all__ = [
    "BatchError",
    "BlockSparse",
    "Causal",
    "Chunked",
    "DataError",
    "Documents",
    "Full",
    "KernelError",
    "LayoutError",
    "LongspanError",
    "Mask",
    "MaskError",
    "ModelError",
    "Only",
    "ParallelMesh",
    "PrefixLM",
    "RunError",
    "Sinks",
    "Step",
    "Window",
    "agree",
    "attend",
    "cross_entropy",
    "cut",
    "heads_to_tokens",
    "parallelize",
    "shard",
    "tokens_to_heads",
    "unparallelize",
    "unshard",
]

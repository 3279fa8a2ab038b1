"""longspan: train a transformer on sequences that one device cannot hold, and get the numbers of one device.

    mesh  = ParallelMesh(ulysses=2)                  under torchrun, or longspan's own launcher
    model = parallelize(model, mesh)                 attention, loss and gradients over the mesh, in place
    part  = shard({"input_ids": ids, "labels": ids}, mesh)
    loss  = model(**part).loss; loss.backward()      the loss, and every gradient, of one device

Names are imported when they are asked for: ``longspan --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspan.attention import attend
    from longspan.bands import Band
    from longspan.batch import agree, cut, shard, shift_right, unshard
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
    from longspan.loss import cross_entropy, linear_cross_entropy
    from longspan.masks import Bands, BlockSparse, Causal, Chunked, Documents, Full, Mask, Only, PrefixLM, Sinks, Window
    from longspan.mesh import ParallelMesh
    from longspan.sharding import parallelize, unparallelize
    from longspan.step import Step
    from longspan.tiling import tiled

__version__ = "0.1.0"

_HOMES = {
    "attention": ("attend",),
    "bands": ("Band",),
    "batch": ("agree", "cut", "shard", "shift_right", "unshard"),
    "errors": ("BatchError", "DataError", "KernelError", "LayoutError", "LongspanError", "MaskError", "ModelError", "RunError"),
    "exchange": ("heads_to_tokens", "tokens_to_heads"),
    "loss": ("cross_entropy", "linear_cross_entropy"),
    "masks": (
        "Bands", "BlockSparse", "Causal", "Chunked", "Documents", "Full", "Mask", "Only", "PrefixLM", "Sinks", "Window",
    ),
    "mesh": ("ParallelMesh",),
    "sharding": ("parallelize", "unparallelize"),
    "step": ("Step",),
    "tiling": ("tiled",),
}

__all__ = [
    "Band",
    "Bands",
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
    "linear_cross_entropy",
    "parallelize",
    "shard",
    "shift_right",
    "tiled",
    "tokens_to_heads",
    "unparallelize",
    "unshard",
]


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'longspan' has no attribute {name!r}")
    return getattr(import_module(f"longspan.{home}"), name)

"""longspan: train a transformer on sequences that one device cannot hold, and get the numbers of one device.

    mesh  = ParallelMesh(ulysses=2)                  under torchrun, or longspan's own launcher
    model = parallelize(model, mesh)                 attention, loss and gradients over the mesh, in place
    part  = shard_batch({"input_ids": ids, "labels": ids}, mesh)
    loss  = model(**part).loss; loss.backward()      the loss, and every gradient, of one device

Public names are imported on first use, so that ``longspan --help`` does not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspan.attention.api import Bias as Bias
    from longspan.attention.api import attend as attend
    from longspan.attention.ulysses import heads_to_tokens as heads_to_tokens
    from longspan.attention.ulysses import tokens_to_heads as tokens_to_heads
    from longspan.batch.agreement import sync_batches as sync_batches
    from longspan.batch.context import BatchInfo as BatchInfo
    from longspan.batch.encoder_decoder import shift_right as shift_right
    from longspan.batch.shard import shard_batch as shard_batch
    from longspan.batch.shard import shard_local as shard_local
    from longspan.batch.shard import unshard as unshard
    from longspan.distributed.collectives import Transport as Transport
    from longspan.distributed.grad_norm import clip_grad_norm_ as clip_grad_norm_
    from longspan.distributed.grad_sync import average_gradients as average_gradients
    from longspan.distributed.mesh import ParallelMesh as ParallelMesh
    from longspan.distributed.pipeline_options import PipelineOptions as PipelineOptions
    from longspan.errors import BatchError as BatchError
    from longspan.errors import DataError as DataError
    from longspan.errors import KernelError as KernelError
    from longspan.errors import LayoutError as LayoutError
    from longspan.errors import LongspanError as LongspanError
    from longspan.errors import MaskError as MaskError
    from longspan.errors import ModelError as ModelError
    from longspan.errors import RunError as RunError
    from longspan.kernels.protocol import Kernel as Kernel
    from longspan.loss import cross_entropy as cross_entropy
    from longspan.loss import linear_cross_entropy as linear_cross_entropy
    from longspan.masks.constructors import BlockSparse as BlockSparse
    from longspan.masks.constructors import Causal as Causal
    from longspan.masks.constructors import Chunked as Chunked
    from longspan.masks.constructors import Documents as Documents
    from longspan.masks.constructors import Full as Full
    from longspan.masks.constructors import Mask as Mask
    from longspan.masks.constructors import PrefixLM as PrefixLM
    from longspan.masks.constructors import SinkTokens as SinkTokens
    from longspan.masks.constructors import Span as Span
    from longspan.masks.constructors import Window as Window
    from longspan.memory.options import AutoMemory as AutoMemory
    from longspan.memory.options import MemoryOptions as MemoryOptions
    from longspan.memory.tiling import tiled as tiled
    from longspan.models.adapter import parallel_state as parallel_state
    from longspan.parallelize import forward_backward as forward_backward
    from longspan.parallelize import parallelize as parallelize
    from longspan.parallelize import unparallelize as unparallelize
    from longspan.planner.plan import plan as plan

__version__ = "0.1.0"

_MODULE_OF = {
    name: module
    for module, names in {
        "attention.api": "Bias attend",
        "attention.ulysses": "heads_to_tokens tokens_to_heads",
        "batch.context": "BatchInfo",
        "batch.agreement": "sync_batches",
        "batch.encoder_decoder": "shift_right",
        "batch.shard": "shard_batch shard_local unshard",
        "distributed.collectives": "Transport",
        "distributed.grad_norm": "clip_grad_norm_",
        "distributed.grad_sync": "average_gradients",
        "distributed.mesh": "ParallelMesh",
        "distributed.pipeline_options": "PipelineOptions",
        "errors": "BatchError DataError KernelError LayoutError LongspanError MaskError ModelError RunError",
        "kernels.protocol": "Kernel",
        "loss": "cross_entropy linear_cross_entropy",
        "masks.constructors": "BlockSparse Causal Chunked Documents Full Mask PrefixLM SinkTokens Span Window",
        "memory.options": "AutoMemory MemoryOptions",
        "memory.tiling": "tiled",
        "models.adapter": "parallel_state",
        "parallelize": "forward_backward parallelize unparallelize",
        "planner.plan": "plan",
    }.items()
    for name in names.split()
}

__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """The public name ``name`` of the package, imported at its first use from the module that the table of names gives.

    Raises:
        AttributeError: it is no public name.
    """
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'longspan' has no attribute {name!r}")
    return getattr(import_module(f"longspan.{_MODULE_OF[name]}"), name)


class _Package(ModuleType):
    """The type of this package as a module, which keeps ``longspan.parallelize`` the function.

    Importing the submodule ``longspan.parallelize`` would otherwise bind the name to that module.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

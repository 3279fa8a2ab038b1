"""The adapter of a model that is given its attention and its loss as attributes, as the Decoder is.

    model.attention, model.cross_entropy      called by its forward; replaced by the same functions over the mesh
    model.blocks, model.config                its layers; its numbers of heads and key/value heads
    model.chunk_heads(n)                      only for ``head_chunks``

Any model with these attributes can be made parallel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from longspan.attention.api import attend, refuse_kernel
from longspan.batch.context import refuse_unknown_tokens
from longspan.distributed.layout import Heads
from longspan.distributed.mesh import ParallelMesh
from longspan.distributed.pipeline_parallel import PipelinePlan, Skipped
from longspan.distributed.tensor_cuts import Cut
from longspan.distributed.tensor_parallel import TensorPlan, refuse_plan
from longspan.distributed.vocab_parallel import vocabulary_cut
from longspan.errors import ModelError
from longspan.kernels.protocol import Kernel
from longspan.kernels.user_function import KernelFunction
from longspan.memory.options import MemoryOptions
from longspan.models.block import FeedForward, chunk_rows
from longspan.models.decoder import Decoder

NEEDED = ("attention", "cross_entropy", "blocks", "config")


class DecoderAdapter:
    """The ``ModelAdapter`` of a model with ``attention``, ``cross_entropy``, ``blocks`` and ``config`` as attributes.

    Args:
        model: the model, such as the Decoder.
        kernel: the attention kernel: a name, "auto", a ``Kernel`` or a function.
    """

    def __init__(self, model: Any, kernel: str | Kernel | KernelFunction) -> None:
        self.model, self.kernel = model, kernel
        self.guards: list[RemovableHandle] = []

    def computes_loss(self) -> bool:
        return True

    def blocks(self) -> Sequence[Any]:
        blocks: list[Any] = [block for block in self.model.blocks if not isinstance(block, Skipped)]
        return blocks

    def token_wise(self) -> Sequence[nn.Module]:
        return [module for module in self.model.modules() if type(module) in (FeedForward, nn.RMSNorm)]

    def tensor_plan(self) -> TensorPlan:
        if not isinstance(self.model, Decoder):
            raise ModelError(
                f"{type(self.model).__name__} does not say which of its weights tensor > 1 may cut; use tensor=1, the Decoder, "
                f"or a Hugging Face model"
            )
        config, names = self.model.config, [f"blocks.{layer}" for layer in range(self.model.config.layers)]
        query, kv = Cut(dim=0, units=config.heads), Cut(dim=0, units=config.kv_heads, replicable=True)
        layer = {
            "attention.query": query, "attention.key": kv, "attention.value": kv, "attention.out": replace(query, dim=1),
            "feed.gate": Cut(dim=0, units=config.ffn), "feed.up": Cut(dim=0, units=config.ffn),
            "feed.down": Cut(dim=1, units=config.ffn),
        }  # fmt: skip
        regions = tuple(f"{name}.{region}" for name in names for region in ("attention", "feed"))
        cuts = {f"{name}.{weight}.weight": cut for name in names for weight, cut in layer.items()}
        rows = vocabulary_cut(self.model.config.vocab)
        cuts |= {"embed.weight": rows, "head.weight": rows}
        return TensorPlan(regions=regions, exits=regions, cuts=cuts, embeddings=("embed",), heads=("head",))

    def pipeline_plan(self) -> PipelinePlan:
        if not isinstance(self.model, Decoder):
            raise ModelError(
                f"{type(self.model).__name__} does not say how its layers may be split into stages; use pipeline=1, the "
                f"Decoder, or a Hugging Face model"
            )
        return PipelinePlan(
            blocks=tuple(f"blocks.{layer}" for layer in range(self.model.config.layers)), first=("embed",),
            last=("norm",), heads=("head",),
            hidden=self.model.config.hidden, hidden_of=attrgetter("hidden"),
            tied=("embed.weight", "head.weight") if self.model.config.tied else None,
        )  # fmt: skip

    def prove(self, mesh: ParallelMesh, memory: MemoryOptions) -> None:
        """Raise the error of what makes this model impossible to run on ``mesh`` with ``memory``; otherwise return.

        Raises:
            ModelError: the model lacks one of the four attributes, or cannot compute its heads in ``memory.head_chunks``
                chunks.
            LayoutError: it has fewer heads than ulysses ranks, or sizes that the tensor ranks do not divide.
            KernelError: the kernel is unknown, or cannot be used with the mesh.
        """
        if missing := [name for name in NEEDED if not hasattr(self.model, name)]:
            raise ModelError(
                f"{type(self.model).__name__} offers no {', '.join(missing)}, so its attention cannot be made parallel; use "
                f"a Hugging Face model, the Decoder, or a model with attention, cross_entropy, blocks and config as attributes"
            )
        refuse_kernel(self.kernel, mesh.coordinate)
        config, coordinate = self.model.config, mesh.coordinate
        if coordinate.tensor > 1:
            refuse_plan(self.tensor_plan(), coordinate.tensor)
            config = config.of_tensor_rank(coordinate.tensor)
        Heads(config.heads, config.kv_heads, coordinate.ulysses)
        if memory.head_chunks != 1:
            self._refuse_chunks(memory.head_chunks, config, coordinate.ulysses)

    def _refuse_chunks(self, head_chunks: int, config: Any, ulysses: int) -> None:
        """Raise ModelError if the model cannot compute the heads of ``config`` on ``ulysses`` ranks in ``head_chunks``
        chunks."""
        if not hasattr(self.model, "chunk_heads"):
            raise ModelError(f"{type(self.model).__name__} has no chunk_heads(count); leave out head_chunks")
        chunk_rows(config, head_chunks)
        heads = config.heads
        if heads // head_chunks < ulysses:
            raise ModelError(
                f"head_chunks={head_chunks} leaves {heads // head_chunks} query heads to a chunk, and each of "
                f"ulysses={ulysses} ranks needs one; use head_chunks up to {heads // ulysses}"
            )

    def install(self, mesh: ParallelMesh, memory: MemoryOptions) -> None:
        """Replace the model's attention and loss by those over ``mesh``, and set the number of head chunks that ``memory`` has.

        From then on, a call of the model raises BatchError for a token beyond its vocabulary and, if a sequence lies on several
        ranks, ModelError for a batch that ``shard_batch`` did not cut.
        """
        self.attention, self.cross_entropy = self.model.attention, self.model.cross_entropy
        attention, tensor = self.attention, mesh.coordinate.tensor
        if attention is attend and (memory.recompute == "selective" or memory.head_chunks > 1):
            attention = partial(attend, recomputable=True)
        self.chunks = {block: block.attention.chunks for block in self.blocks()} if memory.head_chunks > 1 else {}
        if self.chunks:
            self.model.chunk_heads(memory.head_chunks, **({"tensor": tensor} if tensor > 1 else {}))
        chosen: dict[str, Any] = {} if self.kernel == "auto" else {"kernel": self.kernel}
        self.model.attention = partial(attention, mesh=mesh, **chosen)
        self.model.cross_entropy = partial(self.cross_entropy, mesh=mesh)
        self.guards = [self.model.register_forward_pre_hook(_refuse_unknown_tokens, with_kwargs=True)]
        if mesh.coordinate.sequence_ranks > 1:
            guard = self.model.register_forward_pre_hook(_refuse_whole_rows, prepend=True, with_kwargs=True)
            self.guards.append(guard)

    def refuse_call(self, keywords: Mapping[str, Any]) -> None:
        """Raise BatchError for a token or label of any rank that is beyond the model's vocabulary.

        ``keywords`` are those of the call; nothing is checked without its BatchInfo.
        """
        _refuse_unknown_tokens(self.model, (), dict(keywords))

    def undo(self) -> None:
        """Restore the model's attention, loss and head chunks as they were before ``install``, and remove its checks."""
        for guard in self.guards:
            guard.remove()
        self.model.attention, self.model.cross_entropy = self.attention, self.cross_entropy
        for block, chunks in self.chunks.items():
            block.attention.chunks = chunks


class SeededWeights:
    """The ``UnreadWeights`` of a Decoder on the meta device: its weights are drawn, by ``model.initialize(model.seed)``."""

    def facts(self, model: Any) -> dict[str, str]:
        """{"the seed": the model's seed as text}, which must be equal on all ranks for equal weights."""
        return {"the seed": str(model.seed)}

    def read_into(self, model: Any, device: torch.device) -> None:
        model.to_empty(device=device)
        model.initialize(model.seed)


def _refuse_whole_rows(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: raise ModelError for a batch that ``shard_batch`` did not cut, because ranks hold parts of a
    sequence."""
    if kwargs.get("longspan") is None:
        raise ModelError(
            "the batch was not cut by shard_batch, which gives each rank its tokens and their positions and counts the labels "
            "of all ranks; call model(**shard_batch(batch, mesh))"
        )


def _refuse_unknown_tokens(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: raise BatchError for a token or label of any rank that is beyond the model's vocabulary."""
    step = kwargs.get("longspan")
    if step is not None:
        refuse_unknown_tokens(step, getattr(model.config, "vocab", None), type(model).__name__)

"""Memory of the fullest rank by kind, on the device and on the host, for any strategy. Numbers, or numpy arrays of them.

    device  =  parameters + gradients + optimizer      what ZeRO shards, of the fullest pipeline stage
             + gathered                                two layers' parameters with ZeRO-3
             + saved                                   activations of all layers and micro-batches in flight
             + working                                 one layer's backward: recomputed activations and their gradients
             + logits                                  at the peak of the loss, on the last stage
             + reserve                                 context, buffers of collectives, fragmentation (a constant)

planner/memory.py is the closed form of longspan's own decoder, tensor by tensor; this file is coarser and covers every axis.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from longspan.distributed.pipeline_options import split_layers
from longspan.planner.closed_forms import Number, interleaved_factor
from longspan.planner.cost import saved_offload_bytes, stage_layers
from longspan.planner.setting import Setting, rank_tokens
from longspan.tuning import LOSS_TOKENS_ON_GPU, LOSS_WORDS_ON_GPU

LAYERS_GATHERED = 2
"""Layers whose parameters are whole at one time with ZeRO-3: the one that computes and the one that is prefetched."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the fullest rank at the peak of a step, by kind.

    Attributes:
        parameters, gradients, optimizer: what ZeRO shards.
        gathered: whole parameters of two layers, with ZeRO-3.
        saved: activations of all layers and micro-batches in flight.
        working, logits: one layer's backward, and the loss; they do not exist at one time.
        reserve: context, buffers of collectives, fragmentation.
        host: bytes in the host memory of one node, of all its ranks together.
    """

    parameters: Number
    gradients: Number
    optimizer: Number
    gathered: Number
    saved: Number
    working: Number
    logits: Number
    reserve: Number
    host: Number

    @property
    def total(self) -> Number:
        """Bytes on the device at the peak of the step: all kinds, but only the larger of ``working`` and ``logits``, without
        ``host``."""
        held = self.parameters + self.gradients + self.optimizer + self.gathered + self.saved + self.reserve
        return held + np.maximum(self.working, self.logits)

    @property
    def allocated(self) -> Number:
        """Bytes that the framework's allocator holds: the total without the reserve."""
        return self.total - self.reserve


def layer_widths(x: Setting, s: Any) -> tuple[Number, Number]:
    """Bytes of one token that a layer saves without recomputation with the strategy ``s``.

    Returns:
        (outside of tensor-parallel regions, inside them).
    """
    shape, size = x.shape, x.recipe.itemsize
    outside = (2 + shape.norms) * shape.hidden * size
    exchanged = (s.ulysses > 1) * shape.out_width  # attention's output for my tokens beside that for my heads
    inside = (shape.query_width + shape.kv_width + shape.out_width + exchanged) * size
    passes = (3 if x.recipe.compiled else 4) if shape.gated else 2
    inside = inside + (s.tile_tokens == 0) * passes * shape.ffn_width * size
    if x.recipe.attention == "unfused":  # softmax, dropout mask and dropped scores; masks of the two dropouts outside
        scores = 5 * shape.heads * x.workload.tokens
        inside = inside + scores * (1 - s.selective * (x.recipe.selective == "attention"))
        outside = outside + 2 * shape.hidden
    return outside, inside


def saved_bytes(x: Setting, s: Any) -> Number:
    """Bytes that one layer saves for its backward on one rank of the strategy ``s``, for one micro-batch."""
    shape, size, m, t = x.shape, x.recipe.itemsize, rank_tokens(x.workload, s), s.tensor
    outside, inside = layer_widths(x, s)
    none = m * (outside / (t if x.recipe.sharded_norms else 1) + inside / t)
    if x.recipe.saves_gathered and x.recipe.sharded_norms:
        none = none + m * 2 * shape.hidden * size * (t - 1) / t  # the normed inputs of attention and feed-forward
    block = m * (shape.hidden + shape.out_width) / t * size + m * shape.heads / t * 4
    halves = (shape.query_width + shape.kv_width + shape.hidden + shape.matrices * shape.ffn_width) / 2
    operators = m * (2 * shape.hidden + shape.out_width + halves) / t * size
    selective = {"block": block, "attention": none, "operators": operators}[x.recipe.selective]
    full = saved_offload_bytes(x, s) * (1 if x.recipe.sharded_norms else t)
    return s.full * full + s.selective * selective + (1 - s.full) * (1 - s.selective) * none


def forward_bytes(x: Setting, s: Any) -> Number:
    """Bytes of the temporary tensors of one layer's forward with the strategy ``s``: of attention or of the feed-forward, the
    larger.

    The gathered input of a tensor region and its partial output are among them.
    """
    shape, size, m, t = x.shape, x.recipe.itemsize, rank_tokens(x.workload, s), s.tensor
    rows = np.where(s.tile_tokens > 0, np.minimum(m, s.tile_tokens), m)
    feed = rows * shape.ffn_width * (shape.matrices + (s.tile_tokens > 0) * 4) * size / t
    exchanged = 1 + (s.ulysses > 1)
    attend = exchanged * m * (shape.query_width + shape.kv_width + shape.out_width) * size / t / s.head_chunks
    region = m * 2 * shape.hidden * size * (t - 1) / t
    return region + 2 * m * shape.hidden * size / t + np.maximum(feed, attend)


def working_bytes(x: Setting, s: Any) -> Number:
    """Bytes of the backward of one layer with the strategy ``s``: what it computes again, and gradients, which are as large as
    the forward's temporary tensors."""
    outside, inside = layer_widths(x, s)
    again = s.full + s.selective * (x.recipe.selective == "block")
    return again * rank_tokens(x.workload, s) * (outside + inside) / s.tensor + forward_bytes(x, s)


def cached_bytes(x: Setting, s: Any) -> Number:
    """Bytes that the allocator keeps beside the allocated ones at the peak of a step with the strategy ``s``: what a source
    that reports reserved memory counts besides.

    Blocks that a layer's forward has freed are smaller than the logits, so that the allocator asks for new ones. Where no
    logits are formed, or a layer's backward is the peak, the next tensors fit into the freed blocks.
    """
    memory = rank_memory(x, s)
    return (1 - s.chunked_loss) * (memory.logits > memory.working) * forward_bytes(x, s)


def logits_bytes(x: Setting, s: Any) -> Number:
    """Bytes of logits at the peak of the loss with the strategy ``s``: a block and the head's gradient if it is chunked, else
    all, and the head's gathered input."""
    shape, m, t = x.shape, rank_tokens(x.workload, s), s.tensor
    narrow = x.recipe.itemsize if x.recipe.itemsize < 4 else 0  # a copy of the fp32 logits, for the matrix products
    block = np.minimum(m, LOSS_TOKENS_ON_GPU) * np.minimum(shape.vocab / t, LOSS_WORDS_ON_GPU) * (4 + narrow)
    block = block + 4.0 * shape.hidden * shape.vocab / t
    gathered = x.recipe.sharded_norms * m * shape.hidden * x.recipe.itemsize * (t - 1) / t
    return np.where(s.chunked_loss, block, m * shape.vocab / t * x.recipe.logit_bytes + gathered)


@lru_cache(maxsize=1024)
def _ends(layers: int, pipeline: int, last_cost: float) -> tuple[int, int]:
    """The numbers of layers of the first and the last of ``pipeline`` stages, split as at run time; ``last_cost``: the head's
    parameters over those of a layer."""
    stages = split_layers([1.0] * layers, pipeline, last_cost=last_cost)
    return len(stages[0]), len(stages[-1])


def end_layers(x: Setting, s: Any) -> tuple[Number, Number]:
    """The numbers of layers of the first and of the last rank of the pipeline of the strategy ``s``."""
    shape, even = x.shape, stage_layers(x.shape, s)
    if not x.recipe.balanced_stages:
        return even, even
    head = shape.vocab * shape.hidden / (shape.layer_parameters / shape.layers)
    degrees = np.minimum(s.pipeline, shape.layers)
    table = np.ones((shape.layers + 1, 2))  # a row for each degree, filled where it occurs
    for pipeline in np.flatnonzero(np.bincount(np.ravel(degrees))).tolist():
        table[pipeline] = _ends(shape.layers, pipeline, head)
    early, late = table[degrees, 0], table[degrees, 1]
    return np.where(s.stages_per_rank > 1, even, early), np.where(s.stages_per_rank > 1, even, late)


def _end_stages(x: Setting, s: Any) -> tuple[tuple[Number, Number, Number], tuple[Number, Number, Number]]:
    """The first and the last stage, each as: parameters of a rank before ZeRO, layers, micro-batches whose activations it
    holds."""
    shape, (early, late) = x.shape, end_layers(x, s)
    one, piped = shape.layer_parameters / shape.layers, s.pipeline > 1
    tied = shape.tied * shape.vocab * shape.hidden  # the last stage has a copy of a tied head
    whole = shape.embedding_parameters + shape.head_parameters
    waiting = np.minimum(s.pipeline, x.workload.rows / (s.data * s.micro_batch))
    waiting = waiting * np.where(s.stages_per_rank > 1, interleaved_factor(s.pipeline, s.stages_per_rank), 1)
    first = (one * early + np.where(piped, shape.embedding_parameters, whole)) / s.tensor
    last = (one * late + np.where(piped, shape.head_parameters + tied, whole)) / s.tensor
    return (first, early, waiting), (last, late, 1.0)


def _both_stages(x: Setting, s: Any) -> tuple[RankMemory, RankMemory]:
    """The memory of a rank of the first and of the last stage; without a pipeline they are one stage."""
    of_first, of_last = _end_stages(x, s)
    saved, working, logits = saved_bytes(x, s), working_bytes(x, s), logits_bytes(x, s)
    last = _stage(x, s, of_last, (saved, working, logits))
    return _stage(x, s, of_first, (saved, working, np.where(s.pipeline > 1, 0.0, logits))), last


def rank_memory(x: Setting, s: Any) -> RankMemory:
    """The memory of the fullest rank of a strategy ``s``, whose fields are numbers or arrays of them.

    Of a pipeline it is a rank of the first stage, which holds the activations of p micro-batches, or of the last one, which
    holds those of one micro-batch and the logits.
    """
    first, last = _both_stages(x, s)
    is_first = first.total > last.total
    return RankMemory(
        **{name: np.where(is_first, getattr(first, name), getattr(last, name)) for name in RankMemory.__dataclass_fields__}
    )


def fullest_stage(x: Setting, s: Any) -> tuple[Number, Number, Number]:
    """The stage of ``rank_memory``: parameters of a rank before ZeRO, layers, and micro-batches whose activations it holds."""
    first, last = _both_stages(x, s)
    is_first = first.total > last.total
    of_first, of_last = _end_stages(x, s)
    parameters, layers, flight = (np.where(is_first, one, other) for one, other in zip(of_first, of_last))
    return parameters, layers, flight


def _stage(x: Setting, s: Any, stage: tuple[Number, Number, Number], layer: tuple[Number, Number, Number]) -> RankMemory:
    """The memory of a rank of one stage.

    Args:
        x, s: the setting and the strategy.
        stage: parameters of the rank before ZeRO, layers, micro-batches whose activations it holds.
        layer: ``saved_bytes``, ``working_bytes`` and ``logits_bytes``.
    """
    (held, layers, flight), (saved, working, logits) = stage, layer
    shape, recipe, shards = x.shape, x.recipe, s.data * s.ring * s.ulysses
    cut = [np.where(s.zero >= stage, shards, 1) for stage in (1, 2, 3)]
    parameters, gradients, optimizer = (
        held * size / cuts
        for size, cuts in zip((recipe.parameter_bytes, recipe.gradient_bytes, recipe.optimizer_bytes), reversed(cut))
    )
    gradients = gradients + (shards > 1) * held * recipe.bucket_bytes
    largest = (LAYERS_GATHERED * shape.layer_parameters / shape.layers + shape.vocab * shape.hidden) / s.tensor
    moved = s.offload_activations * layers * flight * saved_offload_bytes(x, s)
    local = np.minimum(s.ranks, x.cluster.gpus_per_node)
    host = moved + s.offload_optimizer * (optimizer + gradients) + s.offload_parameters * parameters
    return RankMemory(
        parameters=parameters * (1 - s.offload_parameters),
        gradients=gradients * (1 - s.offload_optimizer),
        optimizer=optimizer * (1 - s.offload_optimizer),
        gathered=(s.zero == 3) * np.minimum(largest, held) * recipe.gathered_bytes,
        saved=layers * flight * saved - moved,
        working=working,
        logits=logits,
        reserve=x.constants.reserve,
        host=host * local,
    )

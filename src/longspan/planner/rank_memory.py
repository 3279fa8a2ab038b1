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
from typing import Any

import numpy as np

from longspan.planner.closed_forms import Number, interleaved_factor
from longspan.planner.cost import Setting, rank_tokens, saved_offload_bytes, stage_layers, stage_parameters
from longspan.tuning import HEAD_TILE_BYTES

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


def working_bytes(x: Setting, s: Any) -> Number:
    """Bytes of the backward of one layer with the strategy ``s``: what it computes again, and gradients.

    The gradients are those of attention or of the feed-forward, the larger.
    """
    shape, size, m, t = x.shape, x.recipe.itemsize, rank_tokens(x.workload, s), s.tensor
    outside, inside = layer_widths(x, s)
    again = (s.full + s.selective * (x.recipe.selective == "block")) * m * (outside + inside) / t
    again = again + m * 2 * shape.hidden * size * (t - 1) / t  # the gathered input of a region, and its gradient
    rows = np.where(s.tile_tokens > 0, np.minimum(m, s.tile_tokens), m)
    feed = rows * shape.ffn_width * (shape.matrices + (s.tile_tokens > 0) * 4) * size / t
    exchanged = 1 + (s.ulysses > 1)
    attend = exchanged * m * (shape.query_width + shape.kv_width + shape.out_width) * size / t / s.head_chunks
    return again + 2 * m * shape.hidden * size / t + np.maximum(feed, attend)


def logits_bytes(x: Setting, s: Any) -> Number:
    """Bytes of logits at the peak of the loss with the strategy ``s``: a tile and the head's gradient if it is chunked, else
    all."""
    shape, m, t = x.shape, rank_tokens(x.workload, s), s.tensor
    tile = 3 * HEAD_TILE_BYTES + 4.0 * shape.hidden * shape.vocab / t
    return np.where(s.chunked_loss, tile, m * shape.vocab / t * x.recipe.logit_bytes)


def rank_memory(x: Setting, s: Any) -> RankMemory:
    """The memory of the fullest rank of a strategy ``s``, whose fields are numbers or arrays of them."""
    shape, recipe = x.shape, x.recipe
    held, shards = stage_parameters(shape, s), s.data * s.ring * s.ulysses
    cut = [np.where(s.zero >= stage, shards, 1) for stage in (1, 2, 3)]
    parameters, gradients, optimizer = (
        held * size / cuts
        for size, cuts in zip((recipe.parameter_bytes, recipe.gradient_bytes, recipe.optimizer_bytes), reversed(cut))
    )
    one = shape.layer_parameters / shape.layers / s.tensor
    largest = LAYERS_GATHERED * one + shape.vocab * shape.hidden / s.tensor
    gathered = (s.zero == 3) * np.minimum(largest, held) * recipe.gathered_bytes
    flight = np.minimum(s.pipeline, x.workload.rows / (s.data * s.micro_batch))
    layers = stage_layers(shape, s)
    # the first stage holds the inputs of p micro-batches and no logits, the last one holds one micro-batch and the logits
    first = layers * saved_bytes(x, s) * flight * np.where(
        s.stages_per_rank > 1, interleaved_factor(s.pipeline, s.stages_per_rank), 1
    )  # fmt: skip
    last, logits = layers * saved_bytes(x, s), logits_bytes(x, s)
    working = working_bytes(x, s)
    moved = s.offload_activations * layers * saved_offload_bytes(x, s)
    is_first = (s.pipeline > 1) & (first + working > last + np.maximum(working, logits))
    saved = np.where(is_first, first - moved * flight, last - moved)
    local = np.minimum(s.ranks, x.cluster.gpus_per_node)
    host = moved * flight + s.offload_optimizer * (optimizer + gradients) + s.offload_parameters * parameters
    return RankMemory(
        parameters=parameters * (1 - s.offload_parameters),
        gradients=gradients * (1 - s.offload_optimizer),
        optimizer=optimizer * (1 - s.offload_optimizer),
        gathered=gathered,
        saved=saved,
        working=working,
        logits=np.where(is_first, 0.0, logits),
        reserve=x.constants.reserve,
        host=host * local,
    )

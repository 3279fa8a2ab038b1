"""Time of a training step on one rank, split into compute, exposed communication, recomputation, offload, bubble and update.

    step  =  (micro-batches + (p - 1) / stages a rank) x micro-batch of a stage        pipeline, with its bubble
          +  gradients and parameters over data x ring x ulysses, where nothing hides them
          +  update of the optimizer
    micro-batch of a stage  =  layers x (forward + recomputation + backward)  +  loss
    forward of a layer      =  the larger of device time (matrix products, attention, element-wise) and dispatch
                             + exposed collectives of tensor, ulysses, ring and ZeRO-3

Every function takes a strategy whose fields are numbers, or numpy arrays of all layouts of a search: there is one formula.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from longspan.planner.closed_forms import Number, all_to_all_sent
from longspan.planner.collectives import all_reduce_time, all_to_all_time, gather_time, send_time
from longspan.planner.model import ModelShape
from longspan.planner.setting import Setting, groups, rank_tokens

GEMM_TILE = 128
"""Rows and columns of a result that one multiprocessor computes at a time in a matrix product."""


def product_time(x: Setting, rows: Number, inner: Number, columns: Number) -> Number:
    """Seconds of a matrix product [rows, inner] x [inner, columns]: by its operations, or by the bytes of its operands."""
    device, size = x.cluster.accelerator, x.recipe.itemsize
    tiles = np.ceil(rows / GEMM_TILE) * np.ceil(columns / GEMM_TILE)
    waves = np.ceil(tiles / device.multiprocessors) * device.multiprocessors / tiles
    padded = np.where(tiles < 4 * device.multiprocessors, waves, 1.0)
    moved = (rows * inner + inner * columns + rows * columns) * size / device.bandwidth
    return np.maximum(2.0 * rows * inner * columns * padded / x.matmul_rate, moved)


def matmul_time(x: Setting, s: Any) -> tuple[Number, Number]:
    """Seconds of the matrix products of one layer's forward on one rank of the strategy ``s``.

    Returns:
        (attention's projections, the feed-forward).
    """
    shape, m, t = x.shape, rank_tokens(x.workload, s), s.tensor
    scale = shape.attention_weights / (shape.hidden * (shape.query_width + shape.kv_width + shape.out_width))
    copies = np.maximum(1, t / shape.kv_heads)  # key/value heads that several tensor ranks compute
    projected = product_time(x, m, shape.hidden, (shape.query_width + shape.kv_width * copies) / t)
    attention = (projected + product_time(x, m, shape.out_width / t, shape.hidden)) * scale
    wide = shape.ffn_width / t
    feed = product_time(x, m, shape.hidden, (shape.matrices - 1) * wide) + product_time(x, m, wide, shape.hidden)
    return attention, feed


def attention_time(x: Setting, s: Any) -> tuple[Number, Number]:
    """Seconds of attention of one layer on one rank of the strategy ``s``, from the area of the layers' masks.

    Returns:
        (forward, backward).
    """
    shape, tokens, device = x.shape, x.workload.tokens, x.cluster.accelerator
    heads = np.ceil(shape.heads / (s.ulysses * s.tensor))
    if x.recipe.attention == "unfused":
        scores = heads * s.micro_batch * tokens * tokens / s.ring
        products = 2 * (shape.qk_dim + shape.v_dim) * scores / x.matmul_rate
        moved = 12 * scores / device.bandwidth  # written once, read and written by softmax and dropout, read once
        return products + moved, 2 * (products + moved)
    pairs = shape.attention_pairs(tokens) / shape.layers
    flops = 2 * (shape.qk_dim + shape.v_dim) * heads * s.micro_batch * pairs / s.ring
    keys = pairs / tokens / s.ring
    reached = keys / (keys + x.constants.attention_keys)
    kernel = device.attention.get(x.recipe.attention, device.attention["flash"])
    slower = device.matmul["bf16"] / device.matmul["fp32"] if x.recipe.dtype == "fp32" else 1.0
    return flops * slower / (kernel.forward * reached), 2.5 * flops * slower / (kernel.backward * reached)


def elementwise_time(x: Setting, s: Any) -> Number:
    """Seconds of the element-wise operators of one layer's forward (norms, residuals, activations), by the bytes they move.

    ``s`` is the strategy: its fields are numbers, or arrays of them.
    """
    shape, size, t, device = x.shape, x.recipe.itemsize, s.tensor, x.cluster.accelerator
    m = rank_tokens(x.workload, s)
    outside = (2 * shape.norms + 6) * shape.hidden * size  # norms read and write once, two residuals three times
    outside = outside + (0 if x.recipe.compiled else 4 * shape.hidden * size)
    passes = (3 if x.recipe.compiled else 5) if shape.gated else 2
    inside = 2 * (shape.query_width + shape.kv_width) * size + passes * shape.ffn_width * size
    if x.recipe.dtype == "fp8":  # inputs are read once and written twice, in both layouts
        inside = inside + 4 * (2 * shape.hidden + shape.out_width + shape.ffn_width)
    return m * (outside / (t if x.recipe.sharded_norms else 1) + inside / t) / (device.elementwise or device.bandwidth)


def operators(x: Setting, s: Any) -> Number:
    """The number of operators that the host starts in one layer's forward with the strategy ``s``."""
    fixed = (14 if x.recipe.compiled else 30) + (8 if x.recipe.attention == "unfused" else 0)
    return fixed + 4 * (s.tensor > 1) + 4 * (s.ulysses > 1) + 6 * (s.ring - 1)


def loss_products(x: Setting, s: Any) -> Number:
    """The number of matrix products of the head in forward and backward, with the loss of the strategy ``s``."""
    return np.where(s.chunked_loss, x.recipe.chunked_products, 3)


def loss_time(x: Setting, s: Any) -> Number:
    """Seconds of head and loss of one micro-batch, forward and backward, on the stage of the strategy ``s`` that has them."""
    shape, m, t = x.shape, rank_tokens(x.workload, s), s.tensor
    logits = m * shape.vocab / t
    moved = 2 * x.recipe.logit_bytes * logits / x.cluster.accelerator.bandwidth
    return loss_products(x, s) * product_time(x, m, shape.hidden, shape.vocab / t) + moved


@dataclass(frozen=True)
class Layer:
    """Seconds of one layer on one rank and micro-batch, as ``layer_time`` returns them.

    Attributes:
        forward, backward: device time or dispatch, whichever is longer.
        recompute: what the backward computes again.
        matmul, attention, elementwise, dispatch: what forward and backward consist of.
        tensor, ulysses, ring, zero: exposed communication by axis, of forward, recomputation and backward together.
    """

    forward: Number
    backward: Number
    recompute: Number
    matmul: Number
    attention: Number
    elementwise: Number
    dispatch: Number
    tensor: Number
    ulysses: Number
    ring: Number
    zero: Number

    @property
    def communication(self) -> Number:
        """Seconds of exposed communication over all axes."""
        return self.tensor + self.ulysses + self.ring + self.zero


def layer_time(x: Setting, s: Any) -> Layer:
    """The time of one layer of a strategy ``s``, whose fields are numbers or arrays of them, averaged over the model's
    layers."""
    projections, feed = matmul_time(x, s)
    attend, attend_back = attention_time(x, s)
    element = elementwise_time(x, s)
    started = operators(x, s) * x.constants.dispatch
    forward = np.maximum(projections + feed + attend + element, started)
    backward = np.maximum(2 * (projections + feed + element) + attend_back, 2 * started)
    tiled = (s.tile_tokens > 0) * (1 - s.full) * (1 - s.selective) * feed
    repeated = {
        "block": projections + feed + element,
        "attention": attend if x.recipe.attention == "unfused" else 0.0 * attend,
        "operators": (projections + feed) / 2 + element,
    }[x.recipe.selective]
    recompute = s.full * forward + s.selective * repeated + tiled
    communicated = _layer_communication(x, s, attend, attend_back, forward, backward + recompute)
    return Layer(
        forward=forward,
        backward=backward,
        recompute=recompute,
        matmul=3 * (projections + feed),
        attention=attend + attend_back,
        elementwise=3 * element,
        dispatch=np.maximum(0.0, forward + backward - 3 * (projections + feed + element) - attend - attend_back),
        **communicated,
    )  # fmt: skip


def ulysses_bytes(x: Setting, s: Any) -> Number:
    """Bytes that one rank of the strategy ``s`` sends in the two all-to-alls of one layer's forward: q, k, v and the output."""
    shape, m, t = x.shape, rank_tokens(x.workload, s), s.tensor
    copies = np.maximum(1, s.ulysses * t / shape.kv_heads)  # a key/value head is sent to every rank that reads it
    width = (shape.query_width + shape.kv_width * copies + shape.out_width) / t
    return all_to_all_sent(m * width * x.recipe.itemsize, s.ulysses)


def ulysses_exposed(x: Setting, s: Any) -> Number:
    """Seconds of the two all-to-alls of one layer's forward with the strategy ``s``: nothing hides them."""
    whole = ulysses_bytes(x, s) * s.ulysses / np.maximum(1, s.ulysses - 1)
    return 2 * all_to_all_time(groups(x.cluster, s)["ulysses"], whole / 2)


def _layer_communication(
    x: Setting, s: Any, attend: Number, attend_back: Number, forward: Number, backward: Number
) -> dict[str, Number]:
    """Exposed seconds of one layer's collectives: {axis: seconds}, of forward, recomputation and backward together.

    Args:
        x, s: the setting and the strategy.
        attend, attend_back: seconds of attention, behind which ring hops are hidden.
        forward, backward: seconds of the layer, behind which ZeRO-3's gathers are hidden.
    """
    shape, size, axes = x.shape, x.recipe.itemsize, groups(x.cluster, s)
    m = rank_tokens(x.workload, s)
    again = s.full + (s.selective if x.recipe.selective == "block" else 0)
    # tensor: two gathers and two reduce-scatters in each of forward and backward
    tensor = (8 + 4 * again) * gather_time(axes["tensor"], m * shape.hidden * size)
    if x.recipe.overlapped_tensor:
        tensor = np.maximum(0.0, tensor - forward - backward) + 0.25 * tensor
    ulysses = (2 + again) * ulysses_exposed(x, s)  # selective recomputation sends the output and its inputs again
    # ring: keys and values travel while the previous ones are computed; gradients in fp32 come back in the backward
    hop = send_time(axes["ring"], m * shape.kv_width / s.tensor * size)
    back = send_time(axes["ring"], m * shape.kv_width / s.tensor * (size + 4))
    ring = (s.ring - 1) * ((1 + s.full) * np.maximum(0.0, hop - attend / s.ring) + np.maximum(0.0, back - attend_back / s.ring))
    # ZeRO-3: a layer is gathered in the forward and in the backward, and its gradient reduced, beside the layer before it
    weights = shape.layer_parameters / shape.layers / s.tensor
    gather = gather_time(axes["fsdp"], weights * x.recipe.gathered_bytes)
    gather = (
        gather + s.offload_parameters * weights * x.recipe.gathered_bytes / axes["fsdp"].ranks / x.cluster.to_host.bandwidth
    )
    reduce = gather_time(axes["fsdp"], weights * x.recipe.reduced_bytes)
    zero = (s.zero == 3) * (np.maximum(0.0, gather - forward) + np.maximum(0.0, gather + reduce - backward))
    return {"tensor": tensor, "ulysses": ulysses, "ring": ring, "zero": zero}


def vocabulary_exchange_time(x: Setting, s: Any) -> Number:
    """Seconds in which tensor ranks exchange the embeddings and last hidden states of one micro-batch, forward and backward.

    Embedding and head are cut by rows of the vocabulary (``traffic.embedding_traffic``, ``vocabulary_loss_traffic``): each
    gathers or scatters [tokens, hidden] once in either pass. In a pipeline a stage has one of the two at most. Ids, labels and
    the sums of the loss are left out.
    """
    states = rank_tokens(x.workload, s) * x.shape.hidden * x.recipe.itemsize
    return np.where(s.pipeline > 1, 2, 4) * gather_time(groups(x.cluster, s)["tensor"], states)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of a rank, by what they are spent on; ``total`` is their sum, ``why`` explains each.

    Attributes:
        matmul, attention, elementwise, dispatch, loss: forward and backward, without recomputation.
        recompute: what the backward computes again.
        tensor, ulysses, ring, zero: exposed communication of the layers by axis; tensor also of embedding and head.
        gradients: exposed reduction of gradients, and gathering of parameters after the update.
        pipeline, bubble: sends between stages, and idle time.
        offload: copies to and from host memory that nothing hides.
        optimizer: the update.
    """

    matmul: Number
    attention: Number
    elementwise: Number
    dispatch: Number
    loss: Number
    recompute: Number
    tensor: Number
    ulysses: Number
    ring: Number
    zero: Number
    gradients: Number
    pipeline: Number
    bubble: Number
    offload: Number
    optimizer: Number

    @property
    def total(self) -> Number:
        """Seconds of the step."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


def stage_layers(shape: ModelShape, s: Any) -> Number:
    """The number of layers of the stage with the most layers, when the pipeline of the strategy ``s`` splits ``shape``."""
    stages = s.pipeline * s.stages_per_rank
    return np.ceil(shape.layers / stages) * s.stages_per_rank


def step_time(x: Setting, s: Any) -> StepTime:
    """The time of one optimizer step of a strategy ``s``, whose fields are numbers or arrays of them."""
    layer, loss = layer_time(x, s), loss_time(x, s)
    count = x.workload.rows / (s.data * s.micro_batch)
    layers = stage_layers(x.shape, s)
    compute = layer.forward + layer.backward + layer.recompute
    stage = layers * (compute + layer.communication)
    vocabulary = vocabulary_exchange_time(x, s)
    mean = (x.shape.layers * (compute + layer.communication) + loss + np.minimum(s.pipeline, 2) * vocabulary) / s.pipeline
    axes = groups(x.cluster, s)
    m = rank_tokens(x.workload, s)
    hop = send_time(axes["pipeline"], m / s.tensor * x.shape.hidden * x.recipe.itemsize)
    pipeline = (s.pipeline > 1) * 2 * hop * (count * s.stages_per_rank + s.pipeline - 1)
    bubble = (s.pipeline - 1) / s.stages_per_rank * mean
    gradients, optimizer = _gradients(x, s, layers, layer), _update(x, s)
    kept = layers * saved_offload_bytes(x, s)
    offload = s.offload_activations * count * 2 * np.maximum(0.0, kept / x.cluster.to_host.bandwidth - stage / 3)
    return StepTime(
        matmul=count * layers * layer.matmul,
        attention=count * layers * layer.attention,
        elementwise=count * layers * layer.elementwise,
        dispatch=count * layers * layer.dispatch,
        loss=count * loss,
        recompute=count * layers * layer.recompute,
        tensor=count * (layers * layer.tensor + vocabulary),
        ulysses=count * layers * layer.ulysses,
        ring=count * layers * layer.ring,
        zero=count * layers * layer.zero,
        gradients=gradients,
        pipeline=pipeline,
        bubble=bubble,
        offload=offload,
        optimizer=optimizer,
    )


def saved_offload_bytes(x: Setting, s: Any) -> Number:
    """Bytes of a block's input on one rank of the strategy ``s``: what ``offload_activations`` moves for one layer."""
    return rank_tokens(x.workload, s) / s.tensor * x.shape.hidden * x.recipe.itemsize


def stage_parameters(shape: ModelShape, s: Any) -> Number:
    """Parameters of one rank of the strategy ``s`` before ZeRO: the fullest stage's layers, and the larger of embedding and
    head.

    Those of a rank are the tensor degree's part of them.
    """
    ends = np.where(
        s.pipeline > 1,
        max(shape.embedding_parameters, shape.head_parameters + shape.tied * shape.vocab * shape.hidden),
        shape.embedding_parameters + shape.head_parameters,
    )
    return (shape.layer_parameters / shape.layers * stage_layers(shape, s) + ends) / s.tensor


def _gradients(x: Setting, s: Any, layers: Number, layer: Layer) -> Number:
    """Exposed seconds of reducing gradients, and of gathering parameters after the update, with ZeRO stages 0 to 2.

    Args:
        x, s: the setting and the strategy.
        layers: layers of a stage.
        layer: the time of one, behind whose backward a part of the reduction is hidden.
    """
    group, held = groups(x.cluster, s)["fsdp"], stage_parameters(x.shape, s)
    reduced = held * x.recipe.reduced_bytes
    whole, part = all_reduce_time(group, reduced), gather_time(group, reduced)
    gather = gather_time(group, held * x.recipe.gathered_bytes)
    hidden = layers * (layer.backward + layer.recompute) * (s.pipeline == 1)  # the last micro-batch's backward
    before = layers * layer.forward * (s.pipeline == 1)
    sharded = np.maximum(0.0, part - hidden) + np.maximum(0.0, gather - before)
    return (group.ranks > 1) * np.where(s.zero == 0, np.maximum(0.0, whole - hidden), (s.zero < 3) * sharded)


def _update(x: Setting, s: Any) -> Number:
    """Seconds of the optimizer's update on one rank of the strategy ``s``.

    Every byte of its states is read and written once, on the device or, with an offloaded optimizer, on the host.
    """
    shards = np.where(s.zero > 0, s.data * s.ring * s.ulysses, 1)
    mine = stage_parameters(x.shape, s) / shards
    recipe = x.recipe
    moved = 2 * (recipe.parameter_bytes + recipe.optimizer_bytes) + recipe.gradient_bytes
    on_device = mine * moved / x.cluster.accelerator.bandwidth
    on_host = mine * np.minimum(s.ranks, x.cluster.gpus_per_node) * x.constants.host_update
    return np.where(s.offload_optimizer, on_host, on_device)

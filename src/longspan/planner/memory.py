"""Closed-form estimate of the peak memory of a training step of a decoder. Integers only, no torch; see docs/memory.md.

    peak  =  states            parameters and optimizer states: whole, or one shard
          +  saved             activations that the forward saves for the backward, for all layers
          +  the largest of    loss | feed-forward | attention | update         temporary memory of each phase, with the
                                                                                buffers that exchanges keep meanwhile

Sizes are in bytes of one rank that holds n tokens of a row; a width of w elements takes ``n * w * itemsize``. Every term is a
tensor in the code; nothing is fitted to measurements.
"""

from dataclasses import dataclass

from longspan.tuning import BUCKET_BYTES, HEAD_TILE_BYTES, LOSS_TOKENS, LOSS_WORDS, SCRATCH_BYTES, SMALLEST_KEPT_BYTES

WIDE = 4
"""Bytes of an fp32 element: gradients, optimizer states, partial results of kernels, logits."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder, from which ``footprint`` estimates memory.

    Attributes:
        vocab, layers, heads, kv_heads: numbers of vocabulary entries, layers, query heads and key/value heads.
        hidden, head_dim, ffn: widths in elements, of a hidden state, of a head and of the feed-forward.
    """

    vocab: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


@dataclass(frozen=True)
class Footprint:
    """The estimated memory of a training step on one rank, in bytes."""

    states: int
    """Parameters and optimizer states, allocated during the whole step."""
    saved: int
    """Activations saved for the backward, and gathered parameters."""
    phases: dict[str, int]
    """Temporary memory of the phases "loss", "feed-forward", "attention" and "update", idle buffers of exchanges included."""

    @property
    def peak(self) -> int:
        """The largest number of bytes that are allocated at one time in the step.

        It is ``states`` plus the larger of two: the optimizer's update, before which saved activations are freed, or ``saved``
        plus the largest of the other phases.
        """
        backward = max(size for name, size in self.phases.items() if name != "update")
        return self.states + max(self.phases["update"], self.saved + backward)


def footprint(
    sizes: Sizes,
    *,
    parameters: int,
    tokens: int,
    ranks: int = 1,
    ulysses: int | None = None,
    zero: int = 0,
    fsdp_ranks: int | None = None,
    recompute: str = "none",
    tile_tokens: int | None = None,
    head_chunks: int = 1,
    logits: str = "blocks",
    itemsize: int = 4,
    tensor: int = 1,
    autocast: bool = False,
    norm_itemsize: int | None = None,
) -> Footprint:
    """The estimated memory of a training step with AdamW on one row, on the rank with the most tokens.

    Computed from sizes alone, with a causal mask, heads that divide evenly over the ranks, and optimizer states that exist
    already. docs/memory.md compares it with measurements.

    Args:
        sizes: sizes of the decoder.
        parameters: number of parameters.
        tokens: tokens of the row.
        ranks: ulysses and ring ranks that hold the row.
        ulysses: those of them that exchange tokens for heads; None: all. A single one exchanges nothing.
        zero: the ZeRO stage.
        fsdp_ranks: ranks that shard the parameters with ``zero`` > 0; None: ``ranks``.
        recompute: activation checkpointing of every block: "none", "full" or "selective".
        tile_tokens: tokens that a feed-forward or a norm processes at a time; None: all.
        head_chunks: chunks of a rank's heads that are exchanged and computed one after another.
        logits: how the loss forms logits: "whole" (Transformers' own loss), "blocks" (the Decoder, and Transformers with
            ``chunked_loss`` and a linear head) or "tiles" (Transformers with ``chunked_loss`` and another head).
        itemsize: bytes of an element of the activations.
        tensor: tensor ranks that split the layers' matrices, and embedding and head by rows of the vocabulary where they divide
            it; ``parameters`` are those of one of them.
        autocast: whether the weights are fp32 and cast at each use (``torch.autocast``): the residual stream, the norms and a
            copy of the weights in the activations' dtype are then saved too.
        norm_itemsize: bytes of an element of the two tensors that a norm saves, its input and its normalized input, without
            autocast; None: ``itemsize``. PyTorch's norm on a CPU computes and saves them in fp32 (4 bytes).

    Returns:
        A ``Footprint``; its ``peak`` is the memory that the step needs.
    """
    n = -(-tokens // (ranks * tensor))
    hidden, query, key, ffn = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, sizes.ffn
    zero = 2 if zero == 1 else zero  # FSDP2 has no stage 1
    shards = fsdp_ranks or (ranks if zero else 1)
    tiled = tile_tokens is not None
    block_parameters = hidden * (2 * query + 2 * key + 3 * ffn + 2) // tensor
    exchanging_ranks = ranks if ulysses is None else ulysses
    exchanging = exchanging_ranks > 1
    rows = -(-sizes.vocab // tensor)  # of the vocabulary, with which a tensor rank computes
    outside = (sizes.vocab if sizes.vocab % tensor else rows) * hidden * WIDE

    # widths that a layer saves
    wide = 1 if autocast or norm_itemsize is None else norm_itemsize // itemsize  # autocast has a term of its own
    residual, norms, feed = 2 * hidden, (2 if tiled else 4 * wide) * hidden, 0 if tiled else 4 * ffn
    in_chunks = head_chunks > 1  # each is computed again by itself, from the norm's output; only its own output is saved
    on_heads, on_tokens = 2 * query + 2 * key, query * exchanging  # q, k, v, output for my heads; the output for my tokens
    attended = query if in_chunks else on_heads + on_tokens
    layer = residual + norms + feed + attended
    saved_per_layer = {"none": layer, "full": hidden + query * in_chunks, "selective": hidden + query}[recompute]
    angles = sizes.head_dim * n * WIDE
    lse = sizes.heads * n * WIDE * (recompute != "full" or in_chunks)
    after_layers = (hidden + (1 if tiled else 2 * wide) * hidden) * n * (WIDE if autocast else itemsize)
    saved = sizes.layers * (saved_per_layer * n * itemsize + lse) + angles
    saved += sizes.layers * (tensor - 1) * 2 * hidden * n * itemsize * (recompute == "none")  # gathered inputs of regions
    if autocast:
        in_fp32 = {"none": residual + norms, "full": hidden, "selective": hidden}[recompute] * sizes.layers
        saved += in_fp32 * n * (WIDE - itemsize) + parameters * itemsize

    # The backward begins with the activations of all layers and, with zero=0, a bucket of gradients. It ends with those of all
    # layers; with zero=0 the ones of this backward exist beside .grad
    bucket = min(parameters * WIDE, BUCKET_BYTES) * (zero == 0 and ranks * tensor > 1)
    finished = (sizes.layers - 1) * block_parameters * WIDE * (1 if zero else 2) // shards
    freed = (sizes.layers - 1) * (saved_per_layer * n * itemsize + lse)
    finished_beyond_freed = max(bucket, finished - freed)

    # widths of a layer that are recomputed while its backward runs
    for_attention = {"full": attended, "selective": query + 2 * key}.get(recompute, 0) * (not in_chunks)
    recomputed = (norms + hidden + feed + for_attention) * (recompute != "none")
    words = min(rows, LOSS_WORDS)
    narrow = itemsize if itemsize < WIDE else 0  # copies in the activations' dtype beside the fp32 ones
    block = min(n * tensor, LOSS_TOKENS) * (words * (WIDE + narrow) + hidden * (itemsize + 2 * WIDE)) + words * hidden * narrow
    logit_bytes = {"blocks": block, "whole": n * sizes.vocab * (itemsize + 2 * WIDE)}
    logit_bytes["tiles"] = min(n, HEAD_TILE_BYTES // (WIDE * sizes.vocab)) * sizes.vocab * (itemsize + 2 * WIDE)
    tile = min(n, tile_tokens) if tile_tokens is not None else 0
    weights = 3 * hidden * ffn * WIDE // tensor * (2 if tiled else 1)
    gathered = {2: parameters * itemsize, 3: (parameters - max(0, sizes.layers - 2) * block_parameters) * itemsize}.get(zero, 0)
    work = tile * (5 * ffn + 2 * hidden) if tiled else n * 2 * ffn
    feed_forward = ((recomputed + 2 * hidden) * n + work) * itemsize + weights
    attention = _attention(sizes, n, ranks if exchanging else 1, recompute, head_chunks, itemsize)
    if recompute == "none":
        of_feed_forward = (hidden + norms // 2 + feed) * n * itemsize  # saved, and freed before attention's backward
        attention = max(0, attention - of_feed_forward)
    my_key = exchanging_ranks * sizes.head_dim * -(-sizes.kv_heads // head_chunks // exchanging_ranks)
    hops = _ring(my_key * n, ranks // exchanging_ranks, itemsize)
    regions = (tensor > 1) * tensor * n * hidden * (WIDE + itemsize if autocast else itemsize)
    kept = kept_by_exchanges(sizes, n, exchanging_ranks, recompute, head_chunks, itemsize) + hops + regions
    # while its backward runs, a layer that was computed again has its tensors in those buffers, as without recomputation
    meanwhile = "none" if recompute == "full" else recompute
    beside_a_layer = kept_by_exchanges(sizes, n, exchanging_ranks, meanwhile, head_chunks, itemsize) + hops + regions
    hidden_states = hidden * n * itemsize * (1 if tensor == 1 else 1 + 2 * tensor)  # of all tensor ranks, and their gradients
    phases = {
        "loss": after_layers + hidden_states + outside + logit_bytes[logits] + kept,
        "feed-forward": feed_forward + outside + finished_beyond_freed + beside_a_layer,
        "attention": attention + outside + finished_beyond_freed + hops + regions,
        "update": parameters // shards * WIDE * 2 + kept,
    }
    states = 3 * parameters // shards * WIDE
    return Footprint(states, saved + gathered, phases)


def _attention(sizes: Sizes, n: int, ranks: int, recompute: str, chunks: int, itemsize: int) -> int:
    """Temporary bytes in the backward of one layer's attention.

    Args:
        sizes: sizes of the decoder.
        n: tokens of this rank.
        ranks: ulysses ranks; 1: there is no exchange, and so no copy.
        recompute: activation checkpointing: "none", "full" or "selective".
        chunks: chunks of the heads, of which one is computed at a time.
        itemsize: bytes of an element of the activations.
    """
    hidden, dim = sizes.hidden, sizes.head_dim
    query, key = sizes.heads * dim // chunks, sizes.kv_heads * dim // chunks  # widths for my tokens, all heads
    my_query, my_key = (ranks * dim * -(-heads // chunks // ranks) for heads in (sizes.heads, sizes.kv_heads))  # my heads
    gradients = (my_query + 2 * my_key) * WIDE
    if recompute != "selective" and chunks == 1:
        recomputed = 0 if recompute == "none" else 2 * hidden + (query + 2 * key) + query
        if ranks == 1:
            return n * (recomputed * itemsize + gradients)
        return n * ((recomputed + query) * itemsize + 2 * gradients)  # the kernel's results, and the sums they are added to
    recomputed = (2 + (chunks > 1)) * hidden + 2 * query + 2 * key
    returned = query * itemsize + 2 * key * (WIDE if my_key > key else itemsize)
    computed = recomputed * itemsize + returned + 2 * gradients  # the kernel's results, and the sums they are added to
    if ranks == 1:
        return n * computed
    copied = my_query * itemsize  # the output's gradient in the kernel's layout
    received = (3 * my_query + 2 * my_key) * itemsize
    sent = n * (received // ranks) * (ranks - 1)  # a rank sends itself nothing
    idle = n * (my_query + 2 * my_key) * itemsize * (2 * my_key < my_query)  # what the forward received: of another size
    return n * (computed + copied + received) + sum(size for size in (sent, idle) if size <= SCRATCH_BYTES)


def kept_by_exchanges(sizes: Sizes, n: int, ranks: int, recompute: str, chunks: int, itemsize: int) -> int:
    """Bytes of the buffers that Ulysses exchanges on a CPU keep from one attention to the next (distributed/scratch.py).

    What saved activations occupy in them is not counted: without recomputation received q, k, v and the output for my tokens.
    On other devices the received ones belong to PyTorch's allocator, which gives them to other tensors meanwhile.

    Args:
        sizes: sizes of the decoder.
        n: tokens of this rank.
        ranks: ulysses ranks; 1: there is no exchange.
        recompute: activation checkpointing: "none", "full" or "selective".
        chunks: chunks of the heads, of which one is exchanged at a time.
        itemsize: bytes of an element of the activations.
    """
    if ranks == 1:
        return 0
    query, key = sizes.heads * sizes.head_dim // chunks, sizes.kv_heads * sizes.head_dim // chunks
    if recompute != "selective" and chunks == 1:
        sent, received = query + 2 * key, [query + 2 * key, query] * (recompute == "full")
    else:
        my_query, my_key = (ranks * sizes.head_dim * -(-heads // chunks // ranks) for heads in (sizes.heads, sizes.kv_heads))
        sent = 3 * my_query + 2 * my_key
        received = [sent] + [my_query + 2 * my_key] * (2 * my_key < my_query)  # else they lie where the backward receives
    sizes_received = [size for size in (n * width * itemsize for width in received) if size >= SMALLEST_KEPT_BYTES]
    buffers = [n * (sent * (ranks - 1) // ranks) * itemsize, *sizes_received]
    return sum(size for size in buffers if size <= SCRATCH_BYTES)


def _ring(elements: int, ring: int, itemsize: int) -> int:
    """Bytes of keys and values that come from another ring rank, and of their fp32 gradients on the way back.

    With more than two ranks those of the next hop arrive meanwhile.

    Args:
        elements: of the keys of one rank and head chunk; the values have as many.
        ring: ring ranks.
        itemsize: bytes of an element of the activations.
    """
    return min(ring - 1, 2) * 2 * elements * (itemsize + WIDE)

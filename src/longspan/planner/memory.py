"""How much memory a training step of a decoder needs at its fullest, in closed form. Integers only, no torch; docs/memory.md.

    peak  =  states            parameters, optimizer states: whole, or a share
          +  kept              what the forward leaves for the backward, of every layer
          +  the largest of    loss | feed-forward | attention | update         what comes on top while each is at work

Sizes are in bytes of one rank that holds n of a row's tokens; a width w costs ``n * w * itemsize``. Every term is a tensor
that can be named, so the form is a reading of the code, not a fit.
"""

from dataclasses import dataclass

from longspan.tuning import HEAD_TILE_BYTES, LOSS_TOKENS, LOSS_WORDS, SCRATCH_BYTES

WIDE = 4
"""Bytes of what is summed: gradients, optimizer states, partial results of kernels, logits."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder: widths in elements, numbers of layers and heads."""

    vocab: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank: what is there all the time, what waits for the backward, what each phase adds."""

    states: int
    kept: int
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """The most that is there at once: what was kept is gone when the update begins."""
        backward = max(size for name, size in self.phases.items() if name != "update")
        return self.states + max(self.phases["update"], self.kept + backward)


def footprint(
    sizes: Sizes,
    *,
    parameters: int,
    tokens: int,
    ranks: int = 1,
    zero: int = 0,
    fsdp_ranks: int | None = None,
    recompute: str = "none",
    tile_tokens: int | None = None,
    head_chunks: int = 1,
    logits: str = "blocks",
    itemsize: int = 4,
) -> Footprint:
    """Peak memory of a training step with AdamW on one row of ``tokens`` over ``ranks`` ulysses ranks, in bytes of one rank.

    Where heads divide evenly, causal, from the second step on; how near it comes is in docs/memory.md.
    With ``zero`` each rank keeps one of ``fsdp_ranks`` shards (default: one a rank).
    ``logits`` are formed in "blocks" (the decoder), all at once ("whole", as Transformers' models do), or, with
    ``chunked_loss``, by such a model's own head in "tiles".
    """
    n = -(-tokens // ranks)
    hidden, query, key, ffn = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, sizes.ffn
    zero = 2 if zero == 1 else zero  # which are the same
    share = fsdp_ranks or (ranks if zero else 1)
    tiled = tile_tokens is not None
    block_parameters = (parameters - sizes.vocab * hidden) // sizes.layers if sizes.layers else 0
    outside = sizes.vocab * hidden * WIDE

    # What a layer keeps, by name
    residual, norms, feed = 2 * hidden, (2 if tiled else 4) * hidden, 0 if tiled else 4 * ffn
    exchanged, returned = (query + 2 * key) + query, query  # q, k, v and the output of my heads; the output of my tokens
    layer = residual + norms + feed + exchanged + returned
    kept_of_layer = {"none": layer, "full": hidden, "selective": hidden + query}[recompute]
    angles = sizes.head_dim * n * WIDE
    lse = sizes.heads * n * WIDE * (recompute != "full")
    kept = (sizes.layers * kept_of_layer + hidden + (1 if tiled else 2) * hidden) * n * itemsize + angles + sizes.layers * lse

    # The last layer of the backward finds the others' gradients where they kept activations; zero=0 holds these gradients twice
    finished = (sizes.layers - 1) * block_parameters * WIDE * (1 if zero else 2) // share
    freed = (sizes.layers - 1) * (kept_of_layer * n * itemsize + lse)
    at_the_end = max(0, finished - freed)

    # What is there again of a layer, while its backward runs
    again = norms + hidden + feed + {"none": 0, "full": exchanged + returned, "selective": query + 2 * key}[recompute]
    again *= recompute != "none"
    words = min(sizes.vocab, LOSS_WORDS)
    narrow = itemsize if itemsize < WIDE else 0  # the products, and the gradient's, beside those that are summed
    block = min(n, LOSS_TOKENS) * (words * (WIDE + narrow) + hidden * (itemsize + 2 * WIDE)) + words * hidden * narrow
    of_logits = {"blocks": block, "whole": n * sizes.vocab * (itemsize + 2 * WIDE)}
    of_logits["tiles"] = min(n, HEAD_TILE_BYTES // (WIDE * sizes.vocab)) * sizes.vocab * (itemsize + 2 * WIDE)
    tile = min(n, tile_tokens) if tile_tokens is not None else 0
    weights = 2 * 3 * hidden * ffn * WIDE if tiled else 3 * hidden * ffn * WIDE
    gathered = {2: parameters * itemsize, 3: (2 * block_parameters + 2 * sizes.vocab * hidden) * itemsize}.get(zero, 0)
    work = tile * (6 * ffn + 2 * hidden) if tiled else n * 2 * ffn
    feeding = ((again + 2 * hidden) * n + work) * itemsize + weights
    phases = {
        "loss": hidden * n * itemsize + outside + of_logits[logits],
        "feed-forward": feeding + outside + at_the_end,
        "attention": _attending(sizes, n, ranks, recompute, head_chunks, itemsize) + outside + at_the_end,
        "update": parameters // share * WIDE * 2,
    }
    states = 3 * parameters // share * WIDE
    return Footprint(states, kept + gathered, phases)


def _attending(sizes: Sizes, n: int, ranks: int, recompute: str, chunks: int, itemsize: int) -> int:
    """While the backward of attention runs, a share of the heads at a time."""
    hidden, dim = sizes.hidden, sizes.head_dim
    query, key = sizes.heads * dim // chunks, sizes.kv_heads * dim // chunks  # of my tokens
    mine, mine_kv = (ranks * dim * -(-heads // chunks // ranks) for heads in (sizes.heads, sizes.kv_heads))  # of my heads
    partial = (mine + 2 * mine_kv) * WIDE
    if recompute != "selective" and chunks == 1:
        there = 0 if recompute == "none" else 2 * hidden + (query + 2 * key) + query
        return n * ((there + query) * itemsize + partial + partial)  # its own results are as large as those they are added to
    flash = partial + mine * itemsize  # and a copy of the gradient that lies as it reads it
    there = (2 + (chunks > 1)) * hidden + 2 * query + 2 * key
    returned = query * itemsize + 2 * key * (WIDE if mine_kv > key else itemsize)
    brought = (3 * mine + 2 * mine_kv) * itemsize
    scratch = n * brought if n * brought <= SCRATCH_BYTES else 0
    return n * (there * itemsize + returned + brought + partial + flash) + scratch

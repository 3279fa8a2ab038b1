"""Closed-form communication volume: collectives and bytes that a rank sends, by axis. Integers only: no torch.

    ulysses    one all-to-all for q, k, v and one for the output in each pass     about 4·N·h/P elements a rank and pass
    ring       keys and values to the ranks that need them, in the forward and again in the backward; gradients back in fp32
    tensor     two regions a layer, each an all-gather and a reduce-scatter, and their adjoints; embedding and loss by rows of
               the vocabulary
    pipeline   hidden states to the next stage, and their gradients to the one before, for every micro-batch

N is the number of tokens of a row, h = heads x head_dim, P the number of ulysses ranks. Tests count collectives and bytes at
the Transport and compare them with these functions by ``==``. Source: arXiv:2309.14509.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from longspan.distributed.layout import Heads, Layout, split

ID_BYTES = 8
"""Bytes of a token id, a label or a position."""


@dataclass(frozen=True)
class Traffic:
    """What one rank sends: the number of collectives it takes part in (on the pipeline axis: messages), and the bytes it sends
    to *other* ranks. Two can be added."""

    collectives: int = 0
    bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.collectives + other.collectives, self.bytes + other.bytes)


def tokens_to_heads_elements(sizes: Sequence[int], widths: Sequence[int], rank: int) -> int:
    """Elements that ``rank`` sends to other ranks in the all-to-all from tokens to heads: its own tokens in their heads.

    Args:
        sizes: for each rank, the number of tokens that it holds.
        widths: for each rank, the elements of one token in the heads that it computes (heads x head dim).
        rank: the sending rank.
    """
    return sizes[rank] * (sum(widths) - widths[rank])


def heads_to_tokens_elements(sizes: Sequence[int], widths: Sequence[int], rank: int) -> int:
    """Elements that ``rank`` sends to other ranks in the all-to-all from heads to tokens: their tokens in its own heads.

    Args:
        sizes: for each rank, the number of tokens that it holds.
        widths: for each rank, the elements of one token in the heads that it computes (heads x head dim).
        rank: the sending rank.
    """
    return (sum(sizes) - sizes[rank]) * widths[rank]


def attention_traffic(
    heads: Heads,
    sizes: Sequence[int],
    key_sizes: Sequence[int],
    ulysses_rank: int,
    *,
    rows: int = 1,
    qk_dim: int,
    v_dim: int,
    itemsize: int,
) -> tuple[Traffic, Traffic]:
    """What one rank sends on the ulysses axis for one attention layer: per pass one all-to-all for q, k, v and one for the
    output.

    With N tokens, h = heads x head_dim and P ulysses ranks, all parts and numbers of heads equal, a rank sends 4·N·h/P ·
    (P-1)/P elements a pass; DeepSpeed-Ulysses (arXiv:2309.14509, section 3.2) states 4·N·h/P for large P.

    Args:
        heads: the partition of heads over the ulysses ranks.
        sizes: for each ulysses rank of this ring rank, its query tokens.
        key_sizes: for each ulysses rank of this ring rank, its key tokens.
        ulysses_rank: the sending rank.
        rows: rows of the batch.
        qk_dim, v_dim: head dims of queries and keys, and of values.
        itemsize: bytes of an element.

    Returns:
        (traffic of the forward, traffic of the backward); zero for one ulysses rank.
    """
    if heads.ulysses == 1:
        return Traffic(), Traffic()
    sent = _sent_elements(heads, None, sizes, key_sizes, ulysses_rank, qk_dim, v_dim)
    forward, backward = sent.qkv_to_heads + sent.out_to_tokens, sent.out_to_heads + sent.qkv_to_tokens
    return Traffic(2, forward * rows * itemsize), Traffic(2, backward * rows * itemsize)


def recomputable_attention_traffic(
    heads: Heads,
    sizes: Sequence[int],
    key_sizes: Sequence[int],
    ulysses_rank: int,
    *,
    rows: int = 1,
    qk_dim: int,
    v_dim: int,
    itemsize: int,
) -> tuple[Traffic, Traffic]:
    """What one rank sends on the ulysses axis for one layer of ``attend(recomputable=True)``.

    Forward, for each head chunk: one all-to-all for q, k, v and one for the output. Backward: one for q, k, v, the output and
    its gradient, and one for the gradients of q, k, v. Selective recomputation itself sends nothing. With N tokens, h = heads x
    head_dim, P ulysses ranks, equal heads and no key/value head in several chunks, the forward equals that of
    ``attention_traffic``, and the backward sends 8·N·h/P · (P-1)/P elements instead of 4·N·h/P · (P-1)/P.

    Args:
        heads: the partition of heads over the ulysses ranks and the head chunks.
        sizes, key_sizes: for each ulysses rank of this ring rank, its query tokens and its key tokens.
        ulysses_rank: the sending rank.
        rows: rows of the batch.
        qk_dim, v_dim: head dims of queries and keys, and of values.
        itemsize: bytes of an element.

    Returns:
        (traffic of the forward, traffic of the backward); zero for one ulysses rank.
    """
    if heads.ulysses == 1:
        return Traffic(), Traffic()
    forward = backward = 0
    for chunk in range(heads.chunks):
        sent = _sent_elements(heads, chunk, sizes, key_sizes, ulysses_rank, qk_dim, v_dim)
        forward += sent.qkv_to_heads + sent.out_to_tokens
        backward += sent.qkv_to_heads + 2 * sent.out_to_heads + sent.qkv_to_tokens
    unit = rows * itemsize
    return Traffic(2 * heads.chunks, forward * unit), Traffic(2 * heads.chunks, backward * unit)


def tensor_region_traffic(
    shares: Sequence[int], tensor_rank: int, *, rows: int = 1, hidden: int, itemsize: int, sum_itemsize: int | None = None
) -> tuple[Traffic, Traffic]:
    """What one rank sends on the tensor axis for one region: an attention or a feed-forward module, of which a layer has two.

    Forward: an all-gather of its tokens and a reduce-scatter of the partial sums. Backward: their adjoints, a reduce-scatter
    and an all-gather. The gathered input is kept for the backward, not gathered again: with N tokens of a row and equal shares
    a layer sends 4 units of N·hidden·(T-1)/T elements forward and 8 a step (Megatron-SP gathers again: 10; arXiv:2205.05198).
    Recomputing a layer repeats its forward without the last reduce-scatter, whose result no backward needs: 11 units a step.

    Args:
        shares: for each tensor rank, its tokens of a row.
        tensor_rank: the sending rank.
        rows: rows of the batch.
        hidden: elements of a hidden state.
        itemsize: bytes of an element of the region's input and of its gradient.
        sum_itemsize: of its partial sums and of their gradients, which autocast computes in bf16; None: the same.

    Returns:
        (traffic of the forward, traffic of the backward); zero for one tensor rank.
    """
    if len(shares) == 1:
        return Traffic(), Traffic()
    gathered, scattered = shares[tensor_rank] * (len(shares) - 1), sum(shares) - shares[tensor_rank]
    ways = (itemsize, sum_itemsize or itemsize)
    forward, backward = (gathered * a + scattered * b for a, b in (ways, ways[::-1]))
    return Traffic(2, forward * rows * hidden), Traffic(2, backward * rows * hidden)


def embedding_traffic(
    shares: Sequence[int], tensor_rank: int, *, rows: int = 1, hidden: int, itemsize: int
) -> tuple[Traffic, Traffic]:
    """What one rank sends on the tensor axis for an embedding that is cut by rows of the vocabulary.

    Forward: an all-gather of ids and a reduce-scatter of the embeddings that each rank has looked up. Backward: an all-gather
    of their gradients.

    Args:
        shares: for each tensor rank, its tokens of a row.
        tensor_rank: the sending rank.
        rows: rows of the batch.
        hidden: elements of an embedding.
        itemsize: bytes of an element of it.

    Returns:
        (traffic of the forward, traffic of the backward); zero for one tensor rank.
    """
    if len(shares) == 1:
        return Traffic(), Traffic()
    gathered, scattered = shares[tensor_rank] * (len(shares) - 1) * rows, (sum(shares) - shares[tensor_rank]) * rows
    return Traffic(2, gathered * ID_BYTES + scattered * hidden * itemsize), Traffic(1, gathered * hidden * itemsize)


def vocabulary_loss_traffic(
    shares: Sequence[int], tensor_rank: int, *, rows: int = 1, hidden: int, itemsize: int, terms: int = 2
) -> tuple[Traffic, Traffic]:
    """What one rank sends on the tensor axis for a chunked loss whose head is cut by rows of the vocabulary.

    Forward: an all-gather of the last hidden states, one of the labels, and an all-to-all of each token's log-sum-exp and
    label's logit, in fp32 (fp64 for fp64), to the rank that holds the token. Backward: the adjoints of the last and the first.
    How many tokens have a label changes nothing.

    Args:
        shares: for each tensor rank, its tokens of a row.
        tensor_rank: the sending rank.
        rows: rows of the batch.
        hidden: elements of a hidden state.
        itemsize: bytes of an element of the last hidden states and of their gradients.
        terms: numbers that a token's loss is formed from; 3 with label smoothing.

    Returns:
        (traffic of the forward, traffic of the backward); zero for one tensor rank.
    """
    if len(shares) == 1:
        return Traffic(), Traffic()
    gathered, scattered = shares[tensor_rank] * (len(shares) - 1) * rows, (sum(shares) - shares[tensor_rank]) * rows
    state, sums = hidden * itemsize, terms * max(itemsize, 4)
    return Traffic(3, gathered * (state + ID_BYTES) + scattered * sums), Traffic(2, gathered * sums + scattered * state)


def head_traffic(vocab: int, tensor: int, *, hidden: int, itemsize: int) -> tuple[Traffic, Traffic]:
    """What one rank sends on the tensor axis where logits are formed by a head that is cut by rows of the vocabulary.

    Forward: an all-gather of the head's rows. Backward: a reduce-scatter of their gradients. A head whose vocabulary the degree
    does not divide is stored whole, and sends nothing.

    Args:
        vocab: rows of the head.
        tensor: the tensor degree.
        hidden: elements of a row.
        itemsize: bytes of an element of the head and of its gradient.

    Returns:
        (traffic of the forward, traffic of the backward); zero for one tensor rank.
    """
    if tensor == 1 or vocab % tensor:
        return Traffic(), Traffic()
    sent = Traffic(1, vocab // tensor * (tensor - 1) * hidden * itemsize)
    return sent, sent


def pipeline_traffic(
    pipeline: int, pipeline_rank: int, stages_per_rank: int = 1, *, micro_batches: int, elements: int, itemsize: int
) -> tuple[Traffic, Traffic]:
    """What one rank sends on the pipeline axis in a step: point-to-point messages, each counted as a collective.

    Each micro-batch's hidden states go from every stage but the last to the next one in the forward, and their gradients from
    every stage but the first to the one before it in the backward. A rank has the stages pipeline_rank, pipeline_rank +
    pipeline, and so on. The order of the messages, which the schedule decides, changes neither their number nor their size.

    Args:
        pipeline: ranks on the axis.
        pipeline_rank: the sending rank.
        stages_per_rank: stages on each of them.
        micro_batches: micro-batches of the step, all of one shape.
        elements: of a micro-batch's hidden states on this rank: its rows x its tokens x hidden.
        itemsize: bytes of an element of hidden states and of their gradients.

    Returns:
        (traffic of the forward, traffic of the backward); zero for one pipeline rank.
    """
    if pipeline == 1:
        return Traffic(), Traffic()
    stages = range(pipeline_rank, pipeline * stages_per_rank, pipeline)
    onward = micro_batches * sum(stage < pipeline * stages_per_rank - 1 for stage in stages)
    back = micro_batches * sum(stage > 0 for stage in stages)
    return Traffic(onward, onward * elements * itemsize), Traffic(back, back * elements * itemsize)


class _Sent(NamedTuple):
    """Elements that a rank sends to other ranks for one row.

    Attributes:
        qkv_to_heads, out_to_heads: of q, k, v and of the output, from tokens to heads.
        qkv_to_tokens, out_to_tokens: of q, k, v and of the output, from heads to tokens.
    """

    qkv_to_heads: int
    out_to_heads: int
    qkv_to_tokens: int
    out_to_tokens: int


def _sent_elements(
    heads: Heads, chunk: int | None, sizes: Sequence[int], key_sizes: Sequence[int], rank: int, qk_dim: int, v_dim: int
) -> _Sent:
    """The elements that ulysses rank ``rank`` sends for one row and head chunk ``chunk``; with None, for all its heads at once.

    Args:
        sizes, key_sizes: for each ulysses rank, its query tokens and its key tokens.
        qk_dim, v_dim: head dims of queries and keys, and of values.
    """
    ranks = range(heads.ulysses)
    q_widths = [len(heads.query_of(p, chunk)) * qk_dim for p in ranks]
    kv_widths = [len(heads.kv_of(p, chunk)) * (qk_dim + v_dim) for p in ranks]
    out_widths = [len(heads.query_of(p, chunk)) * v_dim for p in ranks]
    to_heads, to_tokens = tokens_to_heads_elements, heads_to_tokens_elements
    return _Sent(
        qkv_to_heads=to_heads(sizes, q_widths, rank) + to_heads(key_sizes, kv_widths, rank),
        out_to_heads=to_heads(sizes, out_widths, rank),
        qkv_to_tokens=to_tokens(sizes, q_widths, rank) + to_tokens(key_sizes, kv_widths, rank),
        out_to_tokens=to_tokens(sizes, out_widths, rank),
    )


def ring_traffic(
    leaving: Sequence[int], arriving: Sequence[int], width: int, *, itemsize: int, grad_itemsize: int
) -> tuple[Traffic, Traffic]:
    """What one rank sends on the ring axis for one attention layer.

    Keys and values are sent once in the forward and once in the backward; in the backward each rank also sends the gradients
    of the keys and values that it received to the ranks that hold them.

    Args:
        leaving: keys that this rank sends, for each hop. A hop in which no rank needs a key has no entry and no collective.
        arriving: keys that this rank receives, for each hop.
        width: elements of one key and its value over this rank's heads.
        itemsize: bytes of an element of keys and values.
        grad_itemsize: bytes of an element of their gradients (4 for fp32, 8 for fp64).

    Returns:
        (traffic of the forward, traffic of the backward).
    """
    sent = sum(leaving) * width * itemsize
    returned = sum(arriving) * width * grad_itemsize
    return Traffic(len(leaving), sent), Traffic(2 * len(leaving), sent + returned)


def causal_keys_sent(layout: Layout, ring_rank: int) -> int:
    """The number of keys of one row that ring rank ``ring_rank`` sends in one pass under a causal mask, once for each receiver.

    Contiguous layout: all its keys to every later ring rank. Zigzag: its early piece to every other ring rank, and its late
    piece to the earlier ring ranks, whose own late pieces come after it in the row.
    """
    later_ranks = layout.ring - 1 - ring_rank
    if not layout.zigzag:
        return later_ranks * sum(map(len, layout.runs(ring_rank)))
    pieces = split(layout.tokens, 2 * layout.ring)
    return (layout.ring - 1) * pieces[ring_rank] + ring_rank * pieces[2 * layout.ring - 1 - ring_rank]

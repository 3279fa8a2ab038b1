"""One layer of the Decoder: norm, attention, norm, feed-forward, with a residual connection around each pair.

x --norm--> n --query, key, value--> mix --out--> + x        attention: the only place where tokens interact
x --norm--> n --gate, up, down--> + x                        feed-forward, token by token

B rows   S my tokens   R B * S   M hidden   H heads   K key/value heads   D head dim
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan.distributed.layout import Heads
from longspan.errors import ModelError
from longspan.kernels.matmul import Linear, linear
from longspan.memory.checkpointing import selective_context
from longspan.models.decoder_config import DecoderConfig

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B, S, H, D], k [B, S, K, D], v [B, S, K, D]) -> [B, S, H, D]"""


class Block(nn.Module):
    """One layer of the Decoder: attention, then a gated feed-forward, each added to the residual stream.

    ``forward(x, mix)`` takes and returns hidden states [rows, my tokens, hidden]; ``mix`` computes attention from q, k and v.

    Args:
        config: the sizes.
        head_chunks: parts of the heads that are computed one after another, which saves memory.
    """

    def __init__(self, config: DecoderConfig, head_chunks: int = 1) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config, head_chunks)
        self.ffn_norm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.feed = FeedForward(config)

    def forward(self, x_BSM: Tensor, mix: Mix) -> Tensor:
        attended: Tensor = self.attention(self.attention_norm(x_BSM), mix)
        x_BSM = x_BSM + attended
        fed: Tensor = self.feed(self.ffn_norm(x_BSM))
        return x_BSM + fed


class Attention(nn.Module):
    """The projections to q, k, v and from the output, around ``mix``, which computes attention itself.

    The number of heads is read off the weights' rows, which tensor parallelism cuts. With ``head_chunks`` > 1, the projections,
    attention and output projection run for one chunk of the heads at a time, and are computed again in the backward (attention
    too, unless ``mix`` calls ``attend(recomputable=True)``). Memory is that of one chunk.

    Args:
        config: the sizes.
        head_chunks: the number of chunks.

    Raises:
        ModelError: the chunks would not have equally many query heads per key/value head.
    """

    def __init__(self, config: DecoderConfig, head_chunks: int = 1) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.chunks = chunk_rows(config, head_chunks)
        heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = Linear(config.hidden, heads)
        self.key = Linear(config.hidden, kv_heads)
        self.value = Linear(config.hidden, kv_heads)
        self.out = Linear(heads, config.hidden)

    def forward(self, n_BSM: Tensor, mix: Mix) -> Tensor:
        if len(self.chunks) > 1:
            return self._in_chunks(n_BSM, mix)
        q, k, v = (project(n_BSM).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value))
        out: Tensor = self.out(mix(q, k, v).flatten(-2))
        return out

    def _in_chunks(self, n_BSM: Tensor, mix: Mix) -> Tensor:
        """The sum of the outputs of all head chunks, each computed again in the backward.

        ``n_BSM`` are the normed hidden states, and ``mix`` computes attention.
        """
        n_RM = n_BSM.flatten(0, 1)  # autograd sums the chunks' gradients of n in place only where they are no views
        sum_RM = torch.zeros_like(n_RM)
        for rows, kv_rows in self.chunks:
            weights = (self.query.weight[rows], self.key.weight[kv_rows], self.value.weight[kv_rows], self.out.weight[:, rows])
            sum_RM += checkpoint(
                self._chunk, n_RM, mix, n_BSM.shape[:2], *weights, use_reentrant=False, context_fn=selective_context
            )
        return sum_RM.view(n_BSM.shape)

    def _chunk(
        self, n_RM: Tensor, mix: Mix, shape: torch.Size, query: Tensor, key: Tensor, value: Tensor, out: Tensor
    ) -> Tensor:
        """The output of one head chunk.

        Args:
            n_RM: normed hidden states [rows, hidden].
            mix: computes attention.
            shape: [rows of the batch, my tokens].
            query, key, value, out: the rows, or of ``out`` the columns, of the projection weights that belong to the chunk's
                heads.
        """
        projected = linear(n_RM, torch.cat([query, key, value]))  # one GEMM: its backward forms one gradient of n, not three
        widths = [len(query), len(key), len(value)]
        q, k, v = (x.view(*shape, x.shape[1] // self.head_dim, self.head_dim) for x in projected.split(widths, 1))
        v = v.contiguous()  # a copy, so that attention, which saves it, does not keep the memory of all three
        del projected
        return linear(mix(q, k, v).flatten(2).flatten(0, 1), out)


class FeedForward(nn.Module):
    """The SwiGLU feed-forward: down(silu(gate(n)) * up(n)), of the sizes in ``config``. Source: arXiv:2002.05202."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = Linear(config.hidden, config.ffn)
        self.up = Linear(config.hidden, config.ffn)
        self.down = Linear(config.ffn, config.hidden)

    def forward(self, n_BSM: Tensor) -> Tensor:
        fed: Tensor = self.down(F.silu(self.gate(n_BSM)) * self.up(n_BSM))
        return fed


def chunk_rows(config: DecoderConfig, head_chunks: int) -> tuple[tuple[slice, slice], ...]:
    """For each of ``head_chunks`` chunks of the heads, the rows of the projection weights that compute it.

    The heads are cut into chunks as evenly as possible, the larger ones first.

    Returns:
        For each chunk two slices: the rows of the query weight, and the rows of the key and the value weight.

    Raises:
        ModelError: ``head_chunks`` is less than 1 or more than the query heads, or in some chunk one key/value head would have
            more query heads than another; the message names the legal numbers.
    """

    def is_regular(chunks: int) -> bool:
        split_heads = Heads(config.heads, config.kv_heads, chunks)
        return all(len(split_heads.groups(chunk)) == 1 for chunk in range(chunks))

    if not 1 <= head_chunks <= config.heads or not is_regular(head_chunks):
        legal = ", ".join(str(chunks) for chunks in range(1, config.heads + 1) if is_regular(chunks))
        raise ModelError(
            f"head_chunks={head_chunks} does not cut {config.heads} query heads over {config.kv_heads} key/value heads into "
            f"chunks that share theirs evenly; use {legal}"
        )
    split_heads = Heads(config.heads, config.kv_heads, head_chunks)
    dim = config.head_dim
    return tuple(
        (slice(heads.start * dim, heads.stop * dim), slice(kv_heads.start * dim, kv_heads.stop * dim))
        for heads, kv_heads in ((split_heads.query_of(chunk), split_heads.kv_of(chunk)) for chunk in range(head_chunks))
    )

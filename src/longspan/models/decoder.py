"""The Decoder: a causal language model whose attention and loss are attributes, so that ``parallelize`` can replace them.

    ids --embed--> x --[ block ]-- ... --[ block ]--norm--> hidden --head, cross-entropy, tile by tile--> loss
                        |
                        x + out(mix(query(n), key(n), value(n)))        n = RMSNorm(x)
                        x + feed(n)

``mix`` rotates queries and keys by their position (RoPE) and calls ``model.attention``; only there do tokens interact.
Everything else is token-wise, so the same code runs on a part of the tokens. Independent of ranks, groups and sharding.

    B rows   S my tokens   R B * S   M hidden   H heads   K key/value heads   D head dim
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from longspan.attention.api import attend
from longspan.batch.context import BatchInfo
from longspan.distributed.layout import Heads
from longspan.errors import ModelError
from longspan.kernels.matmul import Linear, linear
from longspan.loss import linear_cross_entropy
from longspan.masks.constructors import Causal
from longspan.memory.checkpointing import selective_context
from longspan.models.rope import rope, rotate
from longspan.planner.memory import Sizes

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B, S, H, D], k [B, S, K, D], v [B, S, K, D]) -> [B, S, H, D]"""


@dataclass(frozen=True)
class DecoderConfig(Sizes):
    """The configuration of a ``Decoder``: its sizes, and the options below.

    Raises:
        ModelError: a size is less than 1, or ``head_dim`` is odd.
        LayoutError: ``heads`` is not a multiple of ``kv_heads``.
    """

    rope_theta: float = 500_000.0
    """Base of the RoPE frequencies."""
    tied: bool = False
    """Use the embedding as the head."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm."""

    def __post_init__(self) -> None:
        for name in ("vocab", "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name}={getattr(self, name)} must be at least 1")
        if self.head_dim % 2:
            raise ModelError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs of dimensions")
        Heads(self.heads, self.kv_heads)

    @property
    def parameters(self) -> int:
        """The number of parameters, equal to ``sum(p.numel() for p in Decoder(config).parameters())``."""
        norms = (2 * self.layers + 1) * self.hidden
        embedding = 0 if self.tied else self.vocab * self.hidden
        return self._matmul_parameters + embedding + norms

    def flops_per_token(self, tokens: int) -> float:
        """The floating-point operations per token of one training step on a causal row of ``tokens`` tokens.

        Forward and backward are counted, recomputation is not: 6 for each parameter of a weight matrix, and, in each layer, 12
        for each dimension of each head and each visible key, of which there are (tokens + 1) / 2 on average.
        """
        attention = 12 * self.layers * self.heads * self.head_dim * (tokens + 1) / 2
        return 6 * self._matmul_parameters + attention

    @property
    def _matmul_parameters(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn) + self.vocab * self.hidden


PRESETS: dict[str, DecoderConfig] = {
    "tiny": DecoderConfig(vocab=256, layers=2, hidden=256, heads=4, kv_heads=2, head_dim=16, ffn=768, rope_theta=10_000.0),
    "small": DecoderConfig(vocab=256, layers=12, hidden=768, heads=12, kv_heads=4, head_dim=64, ffn=2_048),
    "llama-1b": DecoderConfig(vocab=128_256, layers=16, hidden=2_048, heads=32, kv_heads=8, head_dim=64, ffn=8_192, tied=True),
    "llama-8b": DecoderConfig(vocab=128_256, layers=32, hidden=4_096, heads=32, kv_heads=8, head_dim=128, ffn=14_336),
    "llama-70b": DecoderConfig(vocab=128_256, layers=80, hidden=8_192, heads=64, kv_heads=8, head_dim=128, ffn=28_672),
}
"""Configurations by name. ``tiny`` trains on a laptop's CPU in minutes: attention, which takes most time at 8,192 tokens, is
narrow. ``llama-*`` are the published shapes of Llama 3.2 1B, 3.1 8B and 3.1 70B."""


class Output(NamedTuple):
    """The result of ``Decoder.forward``."""

    loss: Tensor | None
    """The mean loss over all labelled tokens of the global batch; None without labels."""
    hidden: Tensor
    """The final hidden states of this rank's tokens, [rows, my tokens, hidden]."""
    head: nn.Linear
    """The linear head, which ``logits`` applies."""

    @property
    def logits(self) -> Tensor:
        """The logits of this rank's tokens, [rows, my tokens, vocab], computed on access; the loss does not form them."""
        logits: Tensor = self.head(self.hidden)
        return logits


class Decoder(nn.Module):
    """A causal language model: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Its initial parameters depend on (config, seed) only, so they are equal on every rank and for every layout.

    Args:
        config: its sizes and options.
        seed: seed of the initial parameters.
        attention: called as ``attend``; ``parallelize`` replaces it by attention over the mesh.
        cross_entropy: called as ``linear_cross_entropy``; ``parallelize`` replaces it too.
        head_chunks: chunks of the heads that each ``Block`` computes one after another.

    Raises:
        ModelError: ``head_chunks`` does not divide the heads into regular groups.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        seed: int = 0,
        attention: Callable[..., Tensor] = attend,
        cross_entropy: Callable[..., Tensor] = linear_cross_entropy,
        head_chunks: int = 1,
    ) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.attention = attention
        self.cross_entropy = cross_entropy
        self.embed = nn.Embedding(config.vocab, config.hidden)
        self.blocks = nn.ModuleList(Block(config, head_chunks) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.initialize(seed)

    def chunk_heads(self, head_chunks: int) -> None:
        """Make every block compute its heads in ``head_chunks`` chunks, one after another, which saves memory (see ``Block``).

        Raises:
            ModelError: in some chunk, one key/value head would have more query heads than another.
        """
        chunks = chunk_rows(self.config, head_chunks)
        for block in self.blocks:
            vars(block)["chunks"] = chunks

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set all parameters in place: norms to 1, other weights drawn from N(0, 0.02²) with a generator of seed ``seed``.

        The weights ``out`` and ``down``, whose results are added to the residual stream, are divided by sqrt(2·layers). Each
        parameter is drawn whole, in fp32, on the CPU, so the values do not depend on dtype, device or sharding. Parameters on
        the meta device are left as they are.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if parameter.ndim == 1:
                parameter.fill_(1)
                continue
            shrink = math.sqrt(2 * self.config.layers) if name.endswith(("out.weight", "down.weight")) else 1.0
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu").normal_(generator=generator)
            drawn.mul_(0.02 / shrink)
            parameter.copy_(_shard(drawn.to(parameter.device), parameter) if isinstance(parameter, DTensor) else drawn)

    def forward(
        self,
        input_ids: Int[Tensor, "rows my_tokens"],
        labels: Int[Tensor, "rows my_tokens"] | None = None,
        shift_labels: Int[Tensor, "rows my_tokens"] | None = None,
        position_ids: Int[Tensor, "rows my_tokens"] | None = None,
        longspan: BatchInfo | None = None,
    ) -> Output:
        """The hidden states of this rank's tokens and, where there are labels, the mean loss over the global batch.

        Call it as ``model(**shard_batch(batch, mesh))`` on a rank, as ``model(input_ids=ids, labels=ids)`` on one device.

        Args:
            input_ids: ids of this rank's tokens.
            labels: the ids of whole rows, shifted here; -100 is ignored. Only where a rank has whole rows.
            shift_labels: labels that are shifted already, as ``shard_batch`` returns them.
            position_ids: positions in the whole row (default: 0, 1, ...).
            longspan: the batch's ``BatchInfo``, from ``shard_batch``.

        Returns:
            An ``Output``, whose ``loss`` is None without labels.

        Raises:
            ModelError: unshifted ``labels`` with a batch that was sharded.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        x_BSM = self.embed(input_ids)
        mix = self._mix(position_ids, x_BSM.dtype, longspan)
        for block in self.blocks:
            x_BSM = block(x_BSM, mix)
        hidden = self.norm(x_BSM)
        targets = _targets(labels, shift_labels, longspan)
        if targets is None:
            return Output(None, hidden, self.head)
        num_labels = longspan.num_labels if longspan else None
        return Output(self.cross_entropy(hidden, self.head.weight, targets, num_labels=num_labels), hidden, self.head)

    def _mix(self, position_ids: Tensor, dtype: torch.dtype, step: BatchInfo | None) -> Mix:
        cos, sin = rope(position_ids, self.config.head_dim, self.config.rope_theta, dtype)
        mask = Causal() if step is None else step.mask_for(Causal())
        tokens = None if step is None else step.tokens

        def mix(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
            return self.attention(rotate(q_BSHD, cos, sin), rotate(k_BSKD, cos, sin), v_BSKD, mask=mask, tokens=tokens)

        return mix


class Block(nn.Module):
    """One layer: attention, then a gated feed-forward, each added to the residual stream.

    With ``head_chunks`` > 1, the projections, attention and output projection run for one chunk of the heads at a time, and are
    computed again in the backward (attention too, unless ``mix`` calls ``attend(recomputable=True)``). Memory is that of one
    chunk.

    Raises:
        ModelError: the chunks would not have equally many query heads per key/value head.
    """

    def __init__(self, config: DecoderConfig, head_chunks: int = 1) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.chunks = chunk_rows(config, head_chunks)
        heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.attention_norm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.query = Linear(config.hidden, heads)
        self.key = Linear(config.hidden, kv_heads)
        self.value = Linear(config.hidden, kv_heads)
        self.out = Linear(heads, config.hidden)
        self.ffn_norm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.feed = FeedForward(config)

    def forward(self, x_BSM: Tensor, mix: Mix) -> Tensor:
        n_BSM = self.attention_norm(x_BSM)
        x_BSM = x_BSM + (self._attend(n_BSM, mix) if len(self.chunks) == 1 else self._attend_in_chunks(n_BSM, mix))
        fed: Tensor = self.feed(self.ffn_norm(x_BSM))
        return x_BSM + fed

    def _attend(self, n_BSM: Tensor, mix: Mix) -> Tensor:
        q, k, v = (project(n_BSM).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value))
        out: Tensor = self.out(mix(q, k, v).flatten(-2))
        return out

    def _attend_in_chunks(self, n_BSM: Tensor, mix: Mix) -> Tensor:
        n_RM = n_BSM.flatten(0, 1)  # autograd sums the chunks' gradients of n in place only where they are no views
        sum_RM = torch.zeros_like(n_RM)
        for chunk in self.chunks:
            sum_RM += checkpoint(
                self._attend_chunk, n_RM, mix, n_BSM.shape[:2], *chunk, use_reentrant=False, context_fn=selective_context
            )
        return sum_RM.view(n_BSM.shape)

    def _attend_chunk(self, n_RM: Tensor, mix: Mix, shape: torch.Size, rows: slice, kv_rows: slice) -> Tensor:
        weights = (self.query.weight[rows], self.key.weight[kv_rows], self.value.weight[kv_rows])
        projected = linear(n_RM, torch.cat(weights))  # one GEMM: its backward forms one gradient of n, not three
        widths = [len(weight) for weight in weights]
        q, k, v = (x.view(*shape, x.shape[1] // self.head_dim, self.head_dim) for x in projected.split(widths, 1))
        v = v.contiguous()  # a copy, so that attention, which saves it, does not keep the memory of all three
        del projected
        return linear(mix(q, k, v).flatten(2).flatten(0, 1), self.out.weight[:, rows])


class FeedForward(nn.Module):
    """The SwiGLU feed-forward: down(silu(gate(n)) * up(n)). Source: arXiv:2002.05202."""

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

    Heads are split over chunks as ``distributed.layout.Heads`` splits them over ulysses ranks.

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


def _shard(whole: Tensor, like: DTensor) -> DTensor:
    """This rank's shard of ``whole``, a tensor that every rank has, with the device mesh and placements of ``like``."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _targets(labels: Tensor | None, shift_labels: Tensor | None, step: BatchInfo | None) -> Tensor | None:
    if shift_labels is not None or labels is None:
        return shift_labels
    if step is not None:
        raise ModelError(
            "the decoder predicts the next token, but its batch was cut with shift=False, and labels cannot be shifted after "
            "the cut; use shard_batch(batch, mesh, shift=True)"
        )
    return F.pad(labels[:, 1:], (0, 1), value=-100)

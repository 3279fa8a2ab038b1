"""The Decoder: a causal language model whose attention and loss are attributes, so that ``parallelize`` can replace them.

    ids --embed--> x --[ block ]-- ... --[ block ]--norm--> hidden --head, cross-entropy, tile by tile--> loss
                        |
                        x + out(mix(query(n), key(n), value(n)))        n = RMSNorm(x)    (block.py)
                        x + feed(n)

``mix`` rotates queries and keys by their position (RoPE) and calls ``model.attention``; only there do tokens interact.
Everything else is token-wise, so the same code runs on a part of the tokens. Independent of ranks, groups and sharding.

    B rows   S my tokens   M hidden   H heads   K key/value heads   D head dim
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from longspan.attention.api import attend
from longspan.batch.context import BatchInfo
from longspan.errors import ModelError
from longspan.loss import linear_cross_entropy
from longspan.masks.constructors import Causal
from longspan.models.block import Block, Mix, chunk_rows
from longspan.models.decoder_config import DecoderConfig
from longspan.models.rope import rope, rotate


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
        attention: called with the arguments of ``attend``; ``parallelize`` replaces it by attention over the mesh.
        cross_entropy: called with the arguments of ``linear_cross_entropy``; ``parallelize`` replaces it too.
        head_chunks: chunks of the heads that each ``Block`` computes one after another.

    Raises:
        ModelError: in some chunk, one key/value head would have more query heads than another.
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

    def chunk_heads(self, head_chunks: int, tensor: int = 1) -> None:
        """Make every block compute its heads in ``head_chunks`` chunks, one after another, which saves memory.

        Args:
            head_chunks: the number of chunks; 1 computes all heads at once.
            tensor: tensor ranks that split the heads; the chunks are those of one rank's heads.

        Raises:
            ModelError: in some chunk, one key/value head would have more query heads than another.
        """
        chunks = chunk_rows(self.config.of_tensor_rank(tensor), head_chunks)
        for block in self.blocks:
            if isinstance(block, Block):  # not a layer of another pipeline stage
                vars(block.attention)["chunks"] = chunks

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set all parameters in place: norms to 1, other weights drawn from N(0, 0.02²) with a generator of seed ``seed``.

        The weights ``out`` and ``down``, whose results are added to the residual stream, are divided by sqrt(2·layers). Each
        parameter is drawn whole, in fp32, on the CPU, so the values do not depend on dtype, device or sharding. Parameters on
        the meta device are left as they are.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
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
        input_ids: Int[Tensor, "rows my_tokens"] | None = None,
        labels: Int[Tensor, "rows my_tokens"] | None = None,
        shift_labels: Int[Tensor, "rows my_tokens"] | None = None,
        position_ids: Int[Tensor, "rows attending_tokens"] | None = None,
        longspan: BatchInfo | None = None,
        inputs_embeds: Float[Tensor, "rows my_tokens hidden"] | None = None,
    ) -> Output:
        """The hidden states of this rank's tokens and, where there are labels, the mean loss over the global batch.

        Call it as ``model(**shard_batch(batch, mesh))`` on a rank, as ``model(input_ids=ids, labels=ids)`` on one device.

        Args:
            input_ids: ids of this rank's tokens; None with ``inputs_embeds``.
            labels: the ids of whole rows, shifted here; -100 is ignored. Only where a rank has whole rows. None: no loss.
            shift_labels: labels that are shifted already, as ``shard_batch`` returns them; they take the place of ``labels``.
            position_ids: positions in the whole row (None: 0, 1, ...). With tensor parallelism ``parallelize`` gathers them:
                attention has the tokens of all tensor ranks.
            longspan: the batch's ``BatchInfo``, from ``shard_batch``; None on one device.
            inputs_embeds: hidden states in place of ``input_ids``: those of the stage before, in a pipeline.

        Returns:
            An ``Output``, whose ``loss`` is None without labels.

        Raises:
            ModelError: unshifted ``labels`` with a batch that was sharded.
        """
        x_BSM = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x_BSM.shape[1], device=x_BSM.device).expand(x_BSM.shape[:2])
        mix = self._mix(position_ids, x_BSM.dtype, longspan)
        for block in self.blocks:
            x_BSM = block(x_BSM, mix)
        hidden = self.norm(x_BSM)
        targets = _targets(labels, shift_labels, longspan)
        if targets is None:
            return Output(None, hidden, self.head)
        return Output(self.cross_entropy(hidden, self.head.weight, targets, longspan=longspan), hidden, self.head)

    def _mix(self, position_ids: Tensor, dtype: torch.dtype, step: BatchInfo | None) -> Mix:
        """The function that ``Block`` calls with q, k and v: rotates q and k by RoPE, then attends with the mask of ``step``.

        Args:
            position_ids: positions in the whole row, [rows, tokens of attention].
            dtype: the dtype of the hidden states.
            step: the batch's BatchInfo; None on one device.
        """
        cos, sin = rope(position_ids, self.config.head_dim, self.config.rope_theta, dtype)
        mask = Causal() if step is None else step.mask_for(Causal())
        tokens = None if step is None else step.tokens

        def mix(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
            return self.attention(rotate(q_BSHD, cos, sin), rotate(k_BSKD, cos, sin), v_BSKD, mask=mask, tokens=tokens)

        return mix


def _shard(whole: Tensor, like: DTensor) -> DTensor:
    """This rank's shard of ``whole``, a tensor that every rank has, as a DTensor with the device mesh and placements of
    ``like``."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _targets(labels: Tensor | None, shift_labels: Tensor | None, step: BatchInfo | None) -> Tensor | None:
    """The label of each of this rank's tokens: ``shift_labels``, or ``labels`` shifted here; None without any.

    Raises:
        ModelError: unshifted ``labels`` with a batch that was sharded.
    """
    if shift_labels is not None or labels is None:
        return shift_labels
    if step is not None:
        raise ModelError(
            "the decoder predicts the next token, but its batch was cut with shift=False, and labels cannot be shifted after "
            "the cut; use shard_batch(batch, mesh, shift=True)"
        )
    return F.pad(labels[:, 1:], (0, 1), value=-100)

"""The configuration of the Decoder: its sizes and options, parameter and FLOP counts, and presets by name."""

from dataclasses import dataclass, replace

from longspan.distributed.layout import Heads
from longspan.errors import ModelError
from longspan.planner.memory import Sizes


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

    def of_tensor_rank(self, tensor: int) -> "DecoderConfig":
        """A copy with the heads and the feed-forward width that each of ``tensor`` tensor ranks computes of a layer."""
        kv_heads = max(1, self.kv_heads // tensor)
        return replace(self, heads=self.heads // tensor, kv_heads=kv_heads, ffn=max(1, self.ffn // tensor))

    def flops_per_token(self, tokens: int) -> float:
        """The floating-point operations per token of one training step on a causal row of ``tokens`` tokens.

        Forward and backward are counted, recomputation is not: 6 for each parameter of a weight matrix, and, in each layer, 12
        for each dimension of each head and each visible key, of which there are (tokens + 1) / 2 on average.
        """
        attention = 12 * self.layers * self.heads * self.head_dim * (tokens + 1) / 2
        return 6 * self._matmul_parameters + attention

    @property
    def _matmul_parameters(self) -> int:
        """The number of parameters in weight matrices that multiply every token, the head included."""
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

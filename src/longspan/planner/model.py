"""The shape of a decoder in numbers: parameters, floating-point operations and widths, without its tensors.

    config.json of Transformers (planner/model_config.py)  --\\
    a preset                                               ---+-->  ModelShape  -->  parameters, FLOPs, widths of a layer
    numbers                                                --/

The work of attention is the area of the bands of each layer's mask (masks/bands.py), so a window, a chunk and a causal layer
are counted by the same integers that a kernel computes. FLOPs count a multiplication and an addition as two.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from longspan.errors import ModelError
from longspan.masks.bands import area
from longspan.masks.constructors import Causal, Mask

CAUSAL = Causal()


@dataclass(frozen=True)
class LayerKind:
    """Layers that are alike: their number, what a token sees in them, and their feed-forwards.

    Attributes:
        count: number of layers of this kind.
        mask: which keys a query sees.
        ffn: width of the feed-forward that every token goes through: a dense one, or the shared experts of an MoE layer.
        experts: number of routed experts; 0 in a dense layer.
        active_experts: routed experts that one token goes through.
        expert_ffn: width of a routed expert.
    """

    count: int
    mask: Mask = CAUSAL
    ffn: int = 0
    experts: int = 0
    active_experts: int = 0
    expert_ffn: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder. All widths are in elements; every property is an integer.

    Attributes:
        name: what messages call the model.
        hidden, heads, kv_heads, vocab: as in a config.
        qk_dim, v_dim: head dim of queries and keys, and of values.
        kinds: the layers, grouped by what they see and by their feed-forwards.
        gated: whether a feed-forward has a gate (three matrices instead of two).
        tied: whether embedding and head are one matrix.
        q_rank, kv_rank, rope_dim: ranks of the compressed queries and keys, and the width of the shared rotary key, of
            multi-head latent attention (MLA); ``kv_rank`` 0 means that there is none. ``q_rank`` 0: queries are not compressed.
        qkv_bias, out_bias, ffn_bias, router_bias, expert_bias, head_bias: whether these projections have a bias.
        norms: norms of a layer over the hidden width; ``norm_bias``: whether a norm has a bias, and ``final_norm`` whether
            there is one after the last layer.
        qk_norm: width of the norms of queries and keys together, in elements.
        extra_layer: parameters of a layer that no other field counts (attention sinks).
        learned_positions: rows of a learned position embedding.
        positions: the longest sequence that the model's positions reach, None if there is no limit.
        whole: axes among "tensor" and "pipeline" that longspan does not split this class of model over (model_classes.py).
        assumed: whether its config's ``model_type`` is unknown here, so that what configs do not name is assumed.

    Raises:
        ModelError: a size is below 1, or the query heads are not a multiple of the key/value heads.
    """

    name: str
    hidden: int
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    vocab: int
    kinds: tuple[LayerKind, ...]
    gated: bool = True
    tied: bool = False
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    head_bias: bool = False
    norms: int = 2
    norm_bias: bool = False
    final_norm: bool = True
    qk_norm: int = 0
    extra_layer: int = 0
    learned_positions: int = 0
    positions: int | None = None
    whole: tuple[str, ...] = ()
    assumed: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden", "heads", "kv_heads", "qk_dim", "v_dim", "vocab", "layers"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name}={getattr(self, name)} of {self.name} must be at least 1")
        if self.heads % self.kv_heads:
            raise ModelError(
                f"{self.name}: {self.heads} query heads cannot share {self.kv_heads} key/value heads evenly; "
                f"the query heads must be a multiple of the key/value heads"
            )
        for kind in self.kinds:
            if kind.active_experts > kind.experts:
                raise ModelError(
                    f"{self.name}: a token cannot go through {kind.active_experts} of {kind.experts} experts; "
                    f"num_experts_per_tok must be at most the number of experts"
                )

    @property
    def layers(self) -> int:
        """The number of layers."""
        return sum(kind.count for kind in self.kinds)

    @property
    def query_width(self) -> int:
        """Elements of one token's queries over all heads."""
        return self.heads * self.qk_dim

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys and values over all key/value heads."""
        return self.kv_heads * (self.qk_dim + self.v_dim)

    @property
    def out_width(self) -> int:
        """Elements of one token's attention output over all heads."""
        return self.heads * self.v_dim

    @property
    def matrices(self) -> int:
        """The number of matrices of a feed-forward: 3 with a gate, else 2."""
        return 3 if self.gated else 2

    @cached_property
    def attention_weights(self) -> int:
        """The number of parameters in the projections of one layer's attention, without biases."""
        if not self.kv_rank:
            return self.hidden * (self.query_width + self.kv_width + self.out_width)
        queries = (self.hidden + self.query_width) * self.q_rank if self.q_rank else self.hidden * self.query_width
        keys = self.hidden * (self.kv_rank + self.rope_dim)
        keys += self.kv_rank * self.heads * (self.qk_dim - self.rope_dim + self.v_dim)
        return queries + keys + self.out_width * self.hidden

    @property
    def _attention_vectors(self) -> int:
        """The number of parameters in biases and inner norms of one layer's attention."""
        biases = self.qkv_bias * (self.query_width + self.kv_width) + self.out_bias * self.hidden
        return biases + self.qk_norm + (self.q_rank + self.kv_rank if self.kv_rank else 0) + self.extra_layer

    def ffn_weights(self, kind: LayerKind, active: bool) -> int:
        """Elements of the matrices of feed-forwards and router in one layer of ``kind``; with ``active`` only what one token
        goes through."""
        experts = kind.active_experts if active else kind.experts
        return self.matrices * self.hidden * (kind.ffn + experts * kind.expert_ffn) + kind.experts * self.hidden

    def _ffn_vectors(self, kind: LayerKind) -> int:
        """The number of parameters in biases of feed-forwards and router in one layer of ``kind``."""
        dense = self.ffn_bias * bool(kind.ffn) * ((self.matrices - 1) * kind.ffn + self.hidden)
        each = self.expert_bias * ((self.matrices - 1) * kind.expert_ffn + self.hidden)
        return dense + kind.experts * (each + self.router_bias)

    @cached_property
    def layer_parameters(self) -> int:
        """The number of parameters of all layers together."""
        norms = self.norms * self.hidden * (1 + self.norm_bias)
        one = self.attention_weights + self._attention_vectors + norms
        return sum(kind.count * (one + self.ffn_weights(kind, active=False) + self._ffn_vectors(kind)) for kind in self.kinds)

    @property
    def embedding_parameters(self) -> int:
        """The number of parameters of the embedding: of the vocabulary and, where they are learned, of positions."""
        return (self.vocab + self.learned_positions) * self.hidden

    @property
    def head_parameters(self) -> int:
        """The number of parameters of the head and of the norm before it; a tied head has no matrix of its own."""
        norm = self.final_norm * self.hidden * (1 + self.norm_bias)
        return norm + (0 if self.tied else self.vocab * self.hidden) + self.head_bias * self.vocab

    @cached_property
    def parameters(self) -> int:
        """The number of all parameters; a tied matrix is counted once."""
        return self.embedding_parameters + self.layer_parameters + self.head_parameters

    @cached_property
    def active_weights(self) -> int:
        """Elements of the matrices of all layers that one token is multiplied by, without embedding and head."""
        return sum(k.count * (self.attention_weights + self.ffn_weights(k, active=True)) for k in self.kinds)

    @cached_property
    def ffn_width(self) -> float:
        """The feed-forward width in elements that one token goes through, as a mean over the layers; of experts, the active
        ones."""
        return sum(k.count * (k.ffn + k.active_experts * k.expert_ffn) for k in self.kinds) / self.layers

    def attention_pairs(self, tokens: int) -> int:
        """(query, key) pairs that all layers together compute in one head for a row of ``tokens``: the area of their bands."""
        return sum(kind.count * _pairs(kind.mask, tokens) for kind in self.kinds)

    def attention_flops(self, tokens: int) -> int:
        """Operations of attention of all layers in the forward of one row: 2 · (qk_dim + v_dim) for each pair of ``tokens``
        and head."""
        return 2 * (self.qk_dim + self.v_dim) * self.heads * self.attention_pairs(tokens)

    def matmul_flops(self, tokens: int) -> int:
        """Operations of all matrices, head included and embedding excluded, in the forward of ``tokens`` tokens."""
        return 2 * tokens * (self.active_weights + self.vocab * self.hidden)

    def training_flops(self, tokens: int) -> int:
        """Operations of forward and backward of a row of ``tokens`` without recomputation: three times those of the forward."""
        return 3 * (self.matmul_flops(tokens) + self.attention_flops(tokens))


@lru_cache(maxsize=4096)
def _pairs(mask: Mask, tokens: int) -> int:
    """The number of (query, key) pairs that ``mask`` shows in a row of ``tokens`` tokens; cached."""
    return area(mask.bands(tokens, tokens))


def dense(
    name: str,
    *,
    layers: int,
    hidden: int,
    heads: int,
    ffn: int,
    vocab: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    gated: bool = True,
    tied: bool = False,
    positions: int | None = None,
) -> ModelShape:
    """The shape of a dense causal decoder from numbers.

    Args:
        name: what messages call it.
        layers, hidden, heads, ffn, vocab: its sizes.
        kv_heads: key/value heads (None: ``heads``).
        head_dim: elements of a head (None: ``hidden // heads``).
        gated: whether a feed-forward has a gate.
        tied: whether embedding and head are one matrix.
        positions: the longest sequence that its positions reach; None: no limit.

    Returns:
        The ModelShape.

    Raises:
        ModelError: the sizes do not fit one another.
    """
    if head_dim is None and hidden % max(heads, 1):
        raise ModelError(f"{name}: hidden={hidden} is not a multiple of heads={heads}; pass head_dim")
    dim = head_dim or hidden // max(heads, 1)
    kinds = (LayerKind(count=layers, ffn=ffn),)
    return ModelShape(
        name=name, hidden=hidden, heads=heads, kv_heads=kv_heads or heads, qk_dim=dim, v_dim=dim, vocab=vocab, kinds=kinds,
        gated=gated, tied=tied, positions=positions,
    )  # fmt: skip


PRESETS = {
    shape.name: shape
    for shape in (
        dense("tiny", layers=2, hidden=256, heads=4, kv_heads=2, head_dim=16, ffn=768, vocab=256),
        dense("small", layers=12, hidden=768, heads=12, kv_heads=4, head_dim=64, ffn=2_048, vocab=256),
        dense("llama-1b", layers=16, hidden=2_048, heads=32, kv_heads=8, ffn=8_192, vocab=128_256, tied=True),
        dense("llama-8b", layers=32, hidden=4_096, heads=32, kv_heads=8, ffn=14_336, vocab=128_256),
        dense("llama-70b", layers=80, hidden=8_192, heads=64, kv_heads=8, ffn=28_672, vocab=128_256),
    )
}
"""Shapes by name: those of ``longspan train --model``."""

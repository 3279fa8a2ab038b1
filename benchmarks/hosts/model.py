"""The decoder and the mesh of a method, on one rank."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from benchmarks.hosts.methods import Method
from longspan import Full, MemoryOptions, ParallelMesh, attend, parallelize
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig


def mesh_of(method: Method, ranks: int) -> ParallelMesh:
    """All ranks by the axis of the method."""
    return ParallelMesh(**method.degrees(ranks), layout=method.layout)


def decoder(method: Method, case: Mapping[str, Any], layers: int, vocab: int) -> Decoder:
    """A decoder with the attention of the method, not parallel yet.

    Args:
        method: the method.
        case: its ``hidden``, ``heads`` and ``ffn``.
        layers, vocab: its other sizes.
    """
    heads = {"heads": case["heads"], "kv_heads": case["heads"], "head_dim": case["hidden"] // case["heads"]}
    config = DecoderConfig(vocab=vocab, layers=layers, hidden=case["hidden"], ffn=case["ffn"], **heads)
    return Decoder(config, attention=ATTENTION[method.mask])


def parallel(model: Decoder, method: Method, mesh: ParallelMesh) -> Decoder:
    """The decoder on the mesh of the method."""
    return parallelize(model, mesh, memory=MemoryOptions(recompute=method.recompute))


def _attend_to_every_key(q: Tensor, k: Tensor, v: Tensor, *, mask: object, **options: Any) -> Tensor:
    """``attend`` without a mask, as ring self-attention does it: every rank needs the keys of every other."""
    return attend(q, k, v, mask=Full(), **options)


ATTENTION: dict[str, Callable[..., Tensor]] = {"causal": attend, "full": _attend_to_every_key}

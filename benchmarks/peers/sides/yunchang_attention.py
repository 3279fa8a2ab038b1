"""yunchang: UlyssesAttention and LongContextAttention with its PyTorch kernels; it has no API for models or losses."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from yunchang import LongContextAttention, UlyssesAttention, set_seq_parallel_pg
from yunchang.globals import PROCESS_GROUP
from yunchang.kernels import AttnType

from benchmarks.peers.rank import resident_mib
from benchmarks.peers.sides.attention_layer import AttentionLayer


def prepare(case: dict[str, Any]) -> AttentionLayer:
    """The work of a case. ``api`` "ring" gives the sequence to the ring, with the implementation that is PyTorch alone."""
    if case["kind"] == "step":
        raise NotImplementedError("yunchang has attention layers alone, none of them for a model or a loss")
    if case.get("document"):
        raise NotImplementedError("UlyssesAttention and LongContextAttention take no boundaries of documents")
    baseline, ranks = resident_mib(), dist.get_world_size()
    ring = case.get("api") == "ring"
    set_seq_parallel_pg(1 if ring else ranks, ranks if ring else 1, dist.get_rank(), ranks)
    attention: Any = (
        LongContextAttention(ring_impl_type="basic_pytorch", attn_type=AttnType.TORCH_FLASH)
        if ring
        else UlyssesAttention(sequence_process_group=PROCESS_GROUP.ULYSSES_PG, attn_type=AttnType.TORCH_FLASH)
    )
    if case["kind"] == "exchange":
        attention.attn_fn = lambda q, k, v, **_: q
    window = (case["window"] - 1, 0) if case.get("window") else (-1, -1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attention(q, k, v, causal=True, window_size=window)
        return out

    return AttentionLayer(case, baseline, attend)

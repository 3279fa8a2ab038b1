"""PyTorch's own ``context_parallel`` around ``scaled_dot_product_attention``."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

from benchmarks.peers.rank import resident_mib
from benchmarks.peers.sides.attention_layer import AttentionLayer


def prepare(case: dict[str, Any]) -> AttentionLayer:
    """The work of a case: causal attention, the only mask that it takes."""
    if case["mask"] != "causal":
        raise NotImplementedError(f"context_parallel takes a causal mask or none; {case['mask']} was asked for")
    baseline = resident_mib()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with context_parallel(mesh, buffers=[torch.empty(1, case["tokens"])], buffer_seq_dims=[1]):
            qkv = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True).transpose(1, 2)

    return AttentionLayer(case, baseline, attend)

"""Program of one rank, for torchrun: loss and gradients of the decoder over the mesh, on the device of LONGSPAN_TEST_DEVICE.

    LONGSPAN_TEST_DEVICE=cuda torchrun --nproc-per-node 2 -m tests.helpers.device_ranks

Ranks that share a GPU exchange by gloo, others by NCCL. A difference from one device is an AssertionError. With the argument
"late" the device is busy before each exchange and each merge of a ring.
"""

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from longspan import MemoryOptions, ParallelMesh, parallelize, shard_batch
from longspan.attention import ring as ring_attention
from longspan.distributed.collectives import Arrival, TorchTransport
from longspan.kernels.protocol import Partial
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig
from tests.helpers.device import DEVICE, occupy

CONFIG = DecoderConfig(vocab=64, layers=2, hidden=64, heads=8, kv_heads=2, head_dim=16, ffn=96)
TOKENS = 301
OPTIONS = [
    (0, MemoryOptions()),
    (3, MemoryOptions()),
    (0, MemoryOptions(recompute="full", tile_tokens=64)),
    (0, MemoryOptions(recompute="selective", head_chunks=2, offload_activations=True)),
]


class LateTransport(TorchTransport):
    """PyTorch's all-to-all of tensors that the device has not finished yet."""

    def all_to_all(
        self, send: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], group: dist.ProcessGroup
    ) -> Arrival:
        occupy()
        return super().all_to_all(send, send_splits, recv_splits, group)


def _late_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Partial:
    occupy()
    return merge(out_a, lse_a, out_b, lse_b)


merge = ring_attention._merge


def compare(mesh: ParallelMesh, zero: int, memory: MemoryOptions) -> None:
    """Assert that loss and gradients over ``mesh`` are those of one device in fp64."""
    ids = torch.randint(64, (mesh.coordinate.data, TOKENS), generator=torch.Generator().manual_seed(1))
    one = Decoder(CONFIG).double()
    expected = one(input_ids=ids, labels=ids).loss
    expected.backward()
    model = parallelize(Decoder(CONFIG).to(mesh.device), mesh, zero=zero, memory=memory)
    row = ids[mesh.coordinate.data_rank][None]
    part = shard_batch({"input_ids": row, "labels": row}, mesh)
    assert part["input_ids"].device == mesh.device
    loss = model(**part).loss
    loss.backward()
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    for (name, parameter), reference in zip(model.named_parameters(), one.parameters()):
        assert parameter.grad is not None
        assert reference.grad is not None
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        error = (grad.double().cpu() - reference.grad).norm() / reference.grad.norm()
        assert error < 1e-4, (name, error)


def main() -> None:
    """Compare every layout of this world with every option."""
    device = None if DEVICE.type == "cuda" else DEVICE
    is_late = "late" in sys.argv
    if is_late:
        ring_attention._merge = _late_merge
    ranks = ParallelMesh(device=device).world_group.size()
    for ulysses, ring in ((ranks, 1), (1, ranks), (1, 1)):
        mesh = ParallelMesh(ulysses, ring, device=device, transport=LateTransport() if is_late else None)
        for zero, memory in OPTIONS:
            compare(mesh, zero, memory)
    if dist.get_rank() == 0:
        print(f"{ranks} ranks on {mesh.device.type}: equal to one device")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

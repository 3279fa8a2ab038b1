"""Reduce-scatter of FSDP2's gradients on CPUs: all-to-alls of pieces, and a sum over the ranks.

    gradients [ranks, shard]   piece by piece   --all-to-all-->   [ranks, piece of my shard]   --sum-->   my shard

gloo's own is an all-reduce on the wire, which sends twice as much and copies the gradients. Here a rank sends (P-1)/P of them
and holds one piece beside them. Independent of models.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.errors import ModelError

PIECE_BYTES = 8 * 2**20
"""Bytes that a rank exchanges at once."""


class CPUReduceScatter:
    """A reduce-scatter as ``FSDPModule.set_custom_reduce_scatter`` takes it (PyTorch's ``Comm`` and ``ReduceScatter``)."""

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor for gradients."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        """Write the sum over the ranks of this rank's shard, or with AVG their mean, to ``output_tensor``.

        Args:
            output_tensor: [shard], flat.
            input_tensor: [ranks * shard], flat. Its memory is freed: FSDP2 would keep it until the next unit's gradients.
            group: the ranks.
            op: ``ReduceOp.SUM`` or ``ReduceOp.AVG``.
            async_op: not used; it returns when it is done.

        Raises:
            ModelError: another ``op``, as FSDP2 has it after ``set_gradient_divide_factor``; on every rank alike.
        """
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ModelError(
                "gradients on CPUs are reduced to their sum or mean, and another divisor was set (set_gradient_divide_factor); "
                "leave it out, and multiply the loss"
            )
        shards = input_tensor.view(group.size(), -1)
        elements = max(1, PIECE_BYTES // (input_tensor.itemsize * group.size()))
        for piece, total in zip(shards.split(elements, 1), output_tensor.split(elements)):
            send = piece.contiguous()
            received = send.clone()  # and not uninitialised: a rank that is rehearsed receives nothing
            dist.all_to_all_single(received, send, group=group)
            torch.sum(received, 0, out=total)
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())
        input_tensor.untyped_storage().resize_(0)

"""One attention layer of a peer, forward and backward, and its exchange alone, given the peer's function of q, k and v."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers import given


class AttentionLayer:
    """The work of "exchange" and "layer".

    Args:
        case: the case.
        baseline: MiB of the process before.
        attend: the peer's attention of this rank's tokens: q, k, v [1, my tokens, heads, dim] -> out, in the same shape.
    """

    def __init__(self, case: dict[str, Any], baseline: float, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.baseline, self.attend, self.alone = baseline, attend, case["kind"] == "exchange"
        self.qkv = given.qkv(case, case["tokens"] // dist.get_world_size())
        self.dout = torch.randn(self.qkv[0].shape, generator=torch.Generator().manual_seed(4))

    def turn(self) -> None:
        if self.alone:
            with torch.no_grad():
                self.attend(*self.qkv)
        else:
            self.results()

    def results(self) -> dict[str, Tensor]:
        out = self.attend(*self.qkv)
        dq, dk, dv = torch.autograd.grad(out, self.qkv, self.dout.view(out.shape))
        return {"out": out.detach().view(self.dout.shape), "dq": dq, "dk": dk, "dv": dv}

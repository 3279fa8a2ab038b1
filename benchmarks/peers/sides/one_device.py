"""PyTorch and Transformers alone: the limits (bare collectives, fused attention, copies), the bare model, and the reference.

The reference of "who is right" computes in fp64 on one device: each document by itself, and the loss from the logits, because
Transformers computes its loss in fp32.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import given
from benchmarks.peers.machine import Gemm
from benchmarks.peers.rank import resident_mib


def prepare(case: dict[str, Any]) -> Any:
    """The work of a case."""
    if case["kind"] == "gemm":
        return Gemm()
    kinds = {"exchange": Bare, "copy": Copy, "layer": Fused, "step": Step, "reference": Reference, "collectives": Collectives}
    return kinds[case["kind"]](case)


class Bare:
    """One ``all_to_all_single`` of as many bytes as q, k and v, and one of as many as q, into memory that is there."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.baseline = resident_mib()
        mine = given.qkv(case, case["tokens"] // dist.get_world_size())
        self.sent = [torch.randn(sum(x.numel() for x in some)) for some in (mine, mine[:1])]
        self.received = [torch.randn_like(x) for x in self.sent]

    def turn(self) -> None:
        for sent, received in zip(self.sent, self.received):
            dist.all_to_all_single(received, sent)


class Copy:
    """A copy of the bytes of ``Bare`` within a rank, into memory that is there."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.baseline = resident_mib()
        self.bare = Bare(case)

    def turn(self) -> None:
        for sent, received in zip(self.bare.sent, self.bare.received):
            received.copy_(sent)


class Reduce:
    """An all-reduce of ``elements`` fp32 numbers in place."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.baseline = resident_mib()
        self.numbers = torch.zeros(case["elements"])

    def turn(self) -> None:
        dist.all_reduce(self.numbers)


class Fused:
    """PyTorch's fused causal attention on a rank's heads, without an exchange; packed: a call for each document."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.baseline = resident_mib()
        ranks = case["ranks"]
        local = case | {"heads": case["heads"] // ranks, "kv_heads": max(1, case["kv_heads"] // ranks)}
        self.q, self.k, self.v = (x.detach().transpose(1, 2).requires_grad_() for x in given.qkv(local, case["tokens"]))
        self.dout = torch.randn(self.q.shape)
        self.lengths = given.documents(case) if case["mask"] == "packed" else (case["tokens"],)

    def turn(self) -> None:
        pieces = zip(*(x.split(self.lengths, 2) for x in (self.q, self.k, self.v)))
        outs = [F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True) for qkv in pieces]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
        torch.autograd.grad(out, (self.q, self.k, self.v), self.dout)


class Step:
    """A training step of the bare model on one device, with Transformers' own loss."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.baseline = resident_mib()
        self.model = given.model(case)
        if case.get("checkpointed"):
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.train()
        self.optimizer, self.row = given.optimizer(self.model.parameters()), given.row(case)

    def turn(self) -> None:
        self.model(input_ids=self.row.input_ids, labels=self.row.labels).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Reference:
    """Loss and gradients in fp64: each document of the row by itself, the loss over all labelled tokens."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.baseline = resident_mib()
        self.model = given.model(case).double()
        self.row = given.row(case)
        self.lengths = given.documents(case) if case.get("document") else (case["tokens"],)

    def results(self) -> dict[str, Any]:
        targets = F.pad(self.row.labels[:, 1:], (0, 1), value=given.IGNORED)
        total: Tensor | float = 0.0
        for ids, labels in zip(self.row.input_ids.split(self.lengths, 1), targets.split(self.lengths, 1)):
            logits = self.model(input_ids=ids).logits
            total = total + F.cross_entropy(logits[0], labels[0], ignore_index=given.IGNORED, reduction="sum")
        assert isinstance(total, Tensor)
        loss = total / (targets != given.IGNORED).sum()
        loss.backward()
        return {"loss": loss.item(), "gradients": {name: p.grad for name, p in self.model.named_parameters()}}


class Collectives:
    """The bare collectives of a step: ``times`` exchanges of ``Bare``, and an all-reduce of the gradients."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.baseline = resident_mib()
        self.bare, self.reduce, self.times = Bare(case), Reduce(case), case["times"]

    def turn(self) -> None:
        for _ in range(self.times):
            self.bare.turn()
        self.reduce.turn()

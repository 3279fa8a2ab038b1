"""longspan, by its own API: attend, parallelize, shard_batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers import given
from benchmarks.peers.rank import resident_mib
from longspan import Causal, Documents, MemoryOptions, ParallelMesh, Window, attend, parallelize, shard_batch
from longspan.attention.ulysses import exchange_to_heads, exchange_to_tokens, plan_exchange
from longspan.distributed.fake_world import FakeTransport


def prepare(case: dict[str, Any]) -> Any:
    """The work of a case."""
    return {"exchange": Exchange, "layer": Layer, "step": Step}[case["kind"]](case)


class Exchange:
    """q, k and v from tokens to heads in one all-to-all, and as much as q back."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.baseline = resident_mib()
        mesh = ParallelMesh(ulysses=dist.get_world_size())
        self.qkv = [x.detach() for x in given.qkv(case, case["tokens"] // dist.get_world_size())]
        shapes = [x.shape for x in self.qkv]
        there, back = plan_exchange(shapes, mesh, case["tokens"]), plan_exchange(shapes[:1], mesh, case["tokens"])
        assert there is not None
        assert back is not None
        self.there, self.back = there, back
        (rows,) = exchange_to_heads(self.qkv, there)
        self.out = rows[:, : back.my_widths[0][0]].contiguous()

    def turn(self) -> None:
        exchange_to_heads(self.qkv, self.there)
        exchange_to_tokens([self.out], self.back, 1)


class Layer:
    """``attend``, forward and backward."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.baseline = resident_mib()
        self.mesh, self.tokens = ParallelMesh(ulysses=dist.get_world_size()), case["tokens"]
        self.q, self.k, self.v = given.qkv(case, case["tokens"] // dist.get_world_size())
        self.dout = torch.randn(self.q.shape, generator=torch.Generator().manual_seed(4))
        self.mask: Any = Causal()
        if case["mask"] == "window":
            self.mask = Window(case["window"] - 1)  # it sees itself and so many tokens before it
        if case["mask"] == "packed":
            self.mask = Documents(given.documents(case)) & Causal()

    def turn(self) -> None:
        self.results()

    def results(self) -> dict[str, Tensor]:
        out = attend(self.q, self.k, self.v, mask=self.mask, mesh=self.mesh, tokens=self.tokens)
        dq, dk, dv = torch.autograd.grad(out, (self.q, self.k, self.v), self.dout)
        return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


class Step:
    """A training step of a Hugging Face model: batch, forward, loss, backward, AdamW.

    ``options`` are the arguments of ``parallelize``, with those of MemoryOptions under "memory". "alone" leaves out every
    exchange between ranks, which gives wrong numbers, but the time of the compute alone.
    """

    def __init__(self, case: dict[str, Any]) -> None:
        self.baseline = resident_mib()
        options = dict(case.get("options", {}))
        memory = MemoryOptions(**options.pop("memory", {}))
        transport = FakeTransport() if case.get("alone") else None
        self.mesh = ParallelMesh(ulysses=dist.get_world_size(), transport=transport)
        self.model = parallelize(given.model(case), self.mesh, memory=memory, **options)
        self.optimizer = given.optimizer(self.model.parameters())
        whole = given.row(case)
        self.batch = {"input_ids": whole.input_ids, "labels": whole.labels, "position_ids": whole.position_ids}
        self.part = shard_batch(self.batch, self.mesh) if case.get("alone") else None
        if case.get("alone"):
            dist.all_reduce = _reduced_nowhere

    def loss(self) -> Tensor:
        part = shard_batch(self.batch, self.mesh) if self.part is None else self.part
        loss: Tensor = self.model(**part).loss
        loss.backward()
        return loss

    def turn(self) -> None:
        self.loss()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def results(self) -> dict[str, Any]:
        loss = self.loss().item()
        gradients = {name: _whole(parameter.grad) for name, parameter in self.model.named_parameters()}
        return {"loss": loss, "gradients": gradients}


def _whole(grad: Any) -> Tensor:
    whole: Tensor = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return whole


class _Reduced:
    """The handle of an all-reduce that is left out: it has ended already."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _reduced_nowhere(*_: Any, **__: Any) -> Any:
    return _Reduced()

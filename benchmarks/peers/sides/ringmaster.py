"""ringmaster: its quickstart (``setup``, ``context_parallel_region``) with FSDP2, and its attention function for one layer.

quickstart            each rank's mean loss; FSDP2 averages the gradients
num_items_in_batch    the model in its ContextParallelContextManager, which is given the number of labels
ring                  the quickstart with the ring backend
"""

from typing import Any

import ringmaster as rm
import torch
import torch.distributed as dist
from ringmaster.adapters.raw import context_parallel_region
from ringmaster.shard import varlen_meta
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.peers import given
from benchmarks.peers.rank import resident_mib
from benchmarks.peers.sides.attention_layer import AttentionLayer
from benchmarks.peers.sides.local_attention import attention_for, layer_module


def prepare(case: dict[str, Any]) -> Any:
    """The work of a case."""
    return Step(case) if case["kind"] == "step" else _layer(case)


def _setup(case: dict[str, Any], inner: str) -> Any:
    ring = case.get("api") == "ring"
    backend = rm.Backend.RING if ring else rm.Backend.ULYSSES
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    config = rm.RingmasterConfig(size=dist.get_world_size(), backend=backend)
    heads = case["kv_heads"]
    return rm.setup(config, num_kv_heads=heads, device_mesh=mesh, device_type="cpu", inner_attn="math" if ring else inner), mesh


def _layer(case: dict[str, Any]) -> AttentionLayer:
    baseline, inner = resident_mib(), attention_for(case, None)
    if not isinstance(inner, str):
        AttentionInterface.register("identity", inner)
        inner = "identity"
    runtime, _ = _setup(case, inner)
    if case["mask"] == "packed" if "mask" in case else False:
        positions = torch.cat([torch.arange(length) for length in given.documents(case)]).unsqueeze(0)
        runtime.varlen = varlen_meta(positions, case["tokens"])
    attention, module = ALL_ATTENTION_FUNCTIONS[runtime.attn_implementation], layer_module(case)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attention(
            module, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None,
            scaling=case["dim"] ** -0.5, dropout=0.0, is_causal=True, sliding_window=case.get("window"),
        )[0]  # fmt: skip
        return out

    return AttentionLayer(case, baseline, attend)


class Step:
    """A training step of the quickstart, sharded by FSDP2 over the ranks that share the sequence."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.baseline, self.case = resident_mib(), case
        runtime, mesh = _setup(case, "sdpa")
        self.model = given.model(case)
        self.model.set_attn_implementation(runtime.attn_implementation)
        rm.wire_recurrent_layers(self.model)
        self.model.train()
        if case.get("checkpointed"):
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        if case.get("api") == "num_items_in_batch":
            rm.ContextParallelContextManager([self.model], runtime.cp_group).install()
        self.optimizer, self.row = given.optimizer(self.model.parameters()), given.row(case)

    def loss(self) -> Tensor:
        row = self.row
        batch = {"input_ids": row.input_ids, "labels": row.labels, "position_ids": row.position_ids}
        if self.case.get("api") == "num_items_in_batch":
            count = (row.labels[:, 1:] != given.IGNORED).sum()
            loss: Tensor = self.model(**batch, use_cache=False, num_items_in_batch=count).loss
        else:
            with context_parallel_region(dict(batch)) as shard:
                loss = self.model(**shard, use_cache=False).loss
        loss.backward()
        return loss

    def turn(self) -> None:
        self.loss()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def results(self) -> dict[str, Any]:
        loss = self.loss().detach()
        dist.all_reduce(loss, dist.ReduceOp.AVG)
        gradients = {name: parameter.grad.full_tensor() for name, parameter in self.model.named_parameters()}
        return {"loss": loss.item(), "gradients": gradients}

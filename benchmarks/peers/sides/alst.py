"""DeepSpeed: UlyssesSPAttentionHF and DistributedAttention for a layer, ALST with ZeRO for a step, as its tutorial has it.

The CPU is asked for by DS_ACCELERATOR, gloo by dist_backend. The optimizer is PyTorch's fused AdamW, passed as a client
optimizer: DeepSpeed's own needs an operator that is compiled.
"""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from itertools import repeat
from typing import Any

import deepspeed
import deepspeed.runtime.sequence_parallel.parallel_state_sp as groups
import torch
import torch.distributed.nn.functional
from deepspeed.runtime.sequence_parallel.ulysses_sp import (
    TiledMLP,
    UlyssesSPAttentionHF,
    UlyssesSPDataLoaderAdapter,
    sequence_tiled_compute,
)
from deepspeed.sequence.layer import DistributedAttention
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from benchmarks.peers import given
from benchmarks.peers.rank import resident_mib
from benchmarks.peers.sides.attention_layer import AttentionLayer
from benchmarks.peers.sides.local_attention import attention_for, layer_module, positions_of

RANKS = 2


def prepare(case: dict[str, Any]) -> Any:
    """The work of a case."""
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    if case["kind"] == "step":
        return Step(case)
    baseline = resident_mib()
    groups.initialize_sequence_parallel(RANKS)
    wrap = _distributed_attention if case.get("api") == "distributed_attention" else _ulysses_sp
    return AttentionLayer(case, baseline, wrap(case, groups.get_sequence_parallel_group()))


def _ulysses_sp(case: dict[str, Any], group: Any) -> Any:
    core, module = attention_for(case, case.get("api")), layer_module(case)
    attention = UlyssesSPAttentionHF(
        attn=ALL_ATTENTION_FUNCTIONS[core] if isinstance(core, str) else core, batch_size=1,
        attn_head_count=case["heads"], attn_head_size=case["dim"], kv_head_count=case["kv_heads"], num_hidden_layers=1,
        process_group=group, local_seq_length=case["tokens"] // RANKS, global_seq_length=case["tokens"],
    )  # fmt: skip
    attention.core_attn_implementation = "sdpa"
    positions = positions_of(case, RANKS, torch.distributed.get_rank())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attention(
            module, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None,
            scaling=case["dim"] ** -0.5, dropout=0.0, position_ids=positions,
        )[0]  # fmt: skip
        return out

    return attend


def _distributed_attention(case: dict[str, Any], group: Any) -> Any:
    attention = DistributedAttention(lambda q, k, v: q, group, scatter_idx=2, gather_idx=1)
    return lambda q, k, v: attention(q, k, v, 0)


class Step:
    """The tutorial's training loop. ``stage``: ZeRO; ``tiled_mlp``, ``tiled_loss``, ``checkpointed``: ALST's memory options."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.baseline, self.case = resident_mib(), case
        core = case.get("core", "sdpa")
        model = given.model(case)
        model.set_attn_implementation(core)
        if case.get("tiled_mlp"):
            for module in (modeling_llama.LlamaMLP, modeling_mistral.MistralMLP):
                module.forward = _tiled_mlp
        if case.get("checkpointed"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        mpu = UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model, core_attn_implementation=core, sequence_parallel_size=RANKS, micro_batch_size=1,
            seq_length=case["tokens"], seq_length_is_variable=False,
        )  # fmt: skip
        config = {
            "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": case["stage"]},
            "zero_allow_untested_optimizer": True, "sequence_parallel_size": RANKS,
        }  # fmt: skip
        optimizer = given.optimizer(model.parameters())
        self.engine, *_ = deepspeed.initialize(config=config, model=model, optimizer=optimizer, mpu=mpu)
        self.group = groups.get_sequence_parallel_group()
        whole = given.row(case)
        row = {"input_ids": whole.input_ids, "labels": whole.labels, "position_ids": whole.position_ids}
        loader = ({name: value.clone() for name, value in one.items()} for one in repeat(row))
        self.batches = UlyssesSPDataLoaderAdapter(
            loader, sp_rank=torch.distributed.get_rank(self.group), sp_group=self.group, sp_world_size=RANKS,
            device=self.engine.device,
        )  # fmt: skip

    def loss(self) -> Tensor:
        """Forward and backward of the next batch; the loss of all ranks."""
        batch = next(self.batches)
        labels = batch["shift_labels"]
        loss = self._tiled_loss(batch) if self.case.get("tiled_loss") else self._whole_loss(batch)
        losses = torch.distributed.nn.functional.all_gather(loss, group=self.group)
        counts = torch.distributed.nn.functional.all_gather((labels != given.IGNORED).sum(), group=self.group)
        total: Tensor = sum(one * count for one, count in zip(losses, counts) if count > 0) / max(sum(counts), 1)
        self.engine.backward(total)
        return total

    def _whole_loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.engine(**batch, use_cache=False).logits
        model = self.engine.module
        loss: Tensor = model.loss_function(
            logits=logits, labels=None, shift_labels=batch["shift_labels"], vocab_size=model.config.vocab_size
        )
        return loss

    def _tiled_loss(self, batch: dict[str, Tensor]) -> Tensor:
        model, labels = self.engine.module, batch["shift_labels"]
        hidden = model.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state
        total = sequence_tiled_compute(
            _summed_loss, labels.shape[1], self.case.get("shards", 4), {"hidden_states": hidden, "shift_labels": labels},
            {"model": model, "vocab_size": model.config.vocab_size}, "hidden_states", [model.lm_head.weight],
            output_unshard_dimension=0, output_reduction="sum",
        )  # fmt: skip
        loss: Tensor = total / max((labels != given.IGNORED).sum(), 1)
        return loss

    def turn(self) -> None:
        self.loss()
        self.engine.step()

    def results(self) -> dict[str, Any]:
        loss = self.loss().item()
        named = self.engine.module.named_parameters()
        return {"loss": loss, "gradients": {name: safe_get_full_grad(parameter) for name, parameter in named}}


def _summed_loss(hidden_states: Tensor, shift_labels: Tensor, model: Any, vocab_size: int) -> Tensor:
    """The loss of one tile, summed over its labels."""
    logits, labelled = model.lm_head(hidden_states), (shift_labels != given.IGNORED).sum()
    if labelled == 0:
        nothing: Tensor = (logits.sum() * 0.0).float()
        return nothing
    loss: Tensor = model.loss_function(logits=logits, labels=None, shift_labels=shift_labels, vocab_size=vocab_size) * labelled
    return loss


def _tiled_mlp(self: Any, x: Tensor) -> Tensor:
    """A feed-forward in ceil(tokens / hidden) tiles; every rank has as many tokens, so no agreement is needed."""
    shards = -(-x.shape[1] // x.shape[2])
    parameters = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
    tiled: Tensor = TiledMLP.apply(_mlp, self, x, shards, parameters)
    return tiled


def _mlp(self: Any, x: Tensor) -> Tensor:
    out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return out

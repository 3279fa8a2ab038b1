"""How do I compute a preference loss (DPO), which needs two forwards before one backward?

    torchrun --nproc-per-node 2 examples/dpo.py

All that changes from call to call travels in ``part["longspan"]``, nothing hangs on the model: forwards may follow one another.
Source of the loss: Direct Preference Optimization, arXiv:2305.18290.
"""

from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from longspan import ParallelMesh, parallelize, shard_batch, unshard

config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip
torch.manual_seed(0)
mesh = ParallelMesh(ulysses="auto", heads=(config.num_attention_heads, config.num_key_value_heads))
model = LlamaForCausalLM(config).to(mesh.device)
frozen = deepcopy(model).requires_grad_(False)  # copied before it is parallel
parallelize(model, mesh)
parallelize(frozen, mesh)


def log_probability(model: Any, ids: Tensor) -> Tensor:
    """Of each whole row, the same number on every rank; differentiable, since ``unshard`` is."""
    part = shard_batch({"input_ids": ids, "labels": ids}, mesh)
    targets = part.pop("shift_labels")
    part.pop("labels")
    mine = model(**part).logits.log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    return unshard(mine * (targets >= 0), mesh, tokens=ids.shape[1]).sum(1)


texts = (b"the better answer ", b"the worse answer! ")
chosen, rejected = (torch.tensor([list(text * 20)], device=mesh.device) for text in texts)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for step in range(3):
    better = log_probability(model, chosen) - log_probability(frozen, chosen)
    worse = log_probability(model, rejected) - log_probability(frozen, rejected)
    loss = -F.logsigmoid(0.1 * (better - worse)).mean()
    loss.backward()  # every rank computes the same loss; gradients are averaged
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(step, round(loss.item(), 4))

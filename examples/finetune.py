"""How do I train a Hugging Face model on sequences that one device cannot hold?

torchrun --nproc-per-node 2 examples/finetune.py        (or plain python: one rank, the same numbers)
"""

from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from longspan import ParallelMesh, clip_grad_norm_, parallelize, shard_batch

config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip
torch.manual_seed(0)
model = LlamaForCausalLM(config)  # yours: LlamaForCausalLM.from_pretrained(folder), on every rank

mesh = ParallelMesh(ulysses="auto", heads=(config.num_attention_heads, config.num_key_value_heads))
model = parallelize(model.to(mesh.device), mesh)  # zero=3 shards parameters, gradients and optimizer states as well
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # after parallelize

text = torch.tensor([list(Path(__file__).read_bytes())], device=mesh.device)  # one row of bytes, of any length
for step in range(3):
    part = shard_batch({"input_ids": text, "labels": text}, mesh)  # every rank passes the whole row
    loss = model(**part).loss
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)  # the norm of the whole gradient, sharded or not
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(step, round(loss.item(), 4))

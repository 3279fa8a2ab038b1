"""How do I keep a loop that is written with accelerate?

    torchrun --nproc-per-node 2 examples/accelerate_loop.py

``OneDevice.over`` tells the Accelerator that there is one device: it places, casts, prints and tracks as before, but wraps the
model in nothing and scales nothing. Its loader has batches of the rows of all data replicas, and each gets its own.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from longspan import ParallelMesh, parallelize, shard_batch
from longspan.integrations.accelerate import OneDevice

config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip
text = torch.tensor(list(Path(__file__).read_bytes()))
rows = [{"input_ids": piece, "labels": piece} for piece in text.unfold(0, 400, 200)]

torch.manual_seed(0)
mesh = ParallelMesh(ulysses="auto", heads=(4, 2))
accelerator = OneDevice.over(Accelerator(cpu=not torch.cuda.is_available()), mesh)
model = parallelize(LlamaForCausalLM(config).to(accelerator.device), mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=default_data_collator)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for step, batch in enumerate(loader):
    part = shard_batch(batch, mesh)
    loss = model(**part).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(step, round(loss.item(), 4))

"""How do I train on several documents packed into one row, none of which sees another?

torchrun --nproc-per-node 2 examples/packed.py
"""

from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from longspan import ParallelMesh, parallelize, shard_batch

documents = [list(source.encode()) for source in Path(__file__).read_text().split("\n\n")]
ids = torch.tensor([[token for document in documents for token in document]])
lengths = [len(document) for document in documents]
starts = [sum(lengths[:count]) for count in range(len(lengths) + 1)]

labels = ids.clone()
labels[0, starts[:-1]] = -100  # the last token of a document does not predict the first of the next
positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(starts)]).unsqueeze(0)

torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16,
)  # fmt: skip
mesh = ParallelMesh(ulysses="auto", heads=(4, 2))
batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
batch = {name: tensor.to(mesh.device) for name, tensor in batch.items()}
model = parallelize(Qwen3ForCausalLM(config).to(mesh.device), mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(3):
    # Positions that restart are what Transformers itself takes for packed documents. To say it outright, for any model:
    # shard_batch(..., mesh, mask=Documents(lengths) & Causal())
    part = shard_batch(batch, mesh)
    loss = model(**part).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(step, round(loss.item(), 4))

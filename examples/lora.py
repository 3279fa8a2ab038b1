"""How do I train adapters (LoRA, through peft) on sequences that one device cannot hold?

torchrun --nproc-per-node 2 examples/lora.py        (pip install peft)
"""

from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from longspan import ParallelMesh, parallelize, shard_batch, unparallelize

config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip
torch.manual_seed(0)
base = LlamaForCausalLM(config)  # yours: LlamaForCausalLM.from_pretrained(folder), on every rank
model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))

mesh = ParallelMesh(ulysses="auto", heads=(config.num_attention_heads, config.num_key_value_heads))
model = parallelize(model.to(mesh.device), mesh)  # zero=3 shards the frozen base as well
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

text = torch.tensor([list(Path(__file__).read_bytes())], device=mesh.device)
for step in range(3):
    loss = model(**shard_batch({"input_ids": text, "labels": text}, mesh)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(step, round(loss.item(), 4))

whole = unparallelize(model)  # one device's again: generate, merge_and_unload, save_pretrained (on one rank)

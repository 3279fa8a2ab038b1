"""How do I get the perplexity of a long document, and the log-probability of each of its tokens?

torchrun --nproc-per-node 2 examples/evaluate.py
"""

from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from longspan import ParallelMesh, parallelize, shard_batch, unshard

config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip
torch.manual_seed(0)
mesh = ParallelMesh(ulysses="auto", heads=(config.num_attention_heads, config.num_key_value_heads))
model = parallelize(LlamaForCausalLM(config).to(mesh.device), mesh).eval()

text = torch.tensor([list(Path(__file__).read_bytes())], device=mesh.device)
part = shard_batch({"input_ids": text, "labels": text}, mesh)
with torch.no_grad():
    output = model(**part)

mine = output.logits.log_softmax(-1)  # [1, my tokens, vocabulary]: never the whole sequence on one rank
chosen = part["shift_labels"].clamp(min=0)  # what follows each of my tokens; the last token of the row has no successor
mine = mine.gather(2, chosen.unsqueeze(2)).squeeze(2)
whole = unshard(mine, mesh, tokens=text.shape[1])  # one number a token, in the order of the text
if dist.get_rank() == 0:
    print("perplexity", round(output.loss.exp().item(), 3))
    print("from the tokens", round((-whole[:, :-1].mean()).exp().item(), 3))

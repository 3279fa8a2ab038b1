"""How do I train an encoder-decoder on documents that one device cannot hold, to summarize or to translate?

torchrun --nproc-per-node 2 examples/encoder_decoder.py        (or plain python: one rank, the same numbers)
"""

from pathlib import Path

import torch
import torch.distributed as dist
from transformers import BartConfig, BartForConditionalGeneration

from longspan import ParallelMesh, parallelize, shard_batch, shift_right

config = BartConfig(
    vocab_size=260, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=2048, dropout=0.0, pad_token_id=256, bos_token_id=257,
    eos_token_id=258, decoder_start_token_id=258,
)  # fmt: skip
torch.manual_seed(0)
model = BartForConditionalGeneration(config)  # yours: BartForConditionalGeneration.from_pretrained(folder), on every rank
mesh = ParallelMesh(ulysses="auto", heads=(4, 4))
model = parallelize(model.to(mesh.device), mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

text = Path(__file__).read_bytes()[:2000]
document = torch.tensor([list(text)], device=mesh.device)
summary = torch.tensor([list(text.splitlines()[0])], device=mesh.device)  # of another length: each is cut by its own
batch = {
    "input_ids": document,
    "decoder_input_ids": shift_right(summary, config.decoder_start_token_id, config.pad_token_id),
    "labels": summary,
}
for step in range(3):
    loss = model(**shard_batch(batch, mesh, shift=False)).loss  # labels stand where they are predicted
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(step, round(loss.item(), 4))

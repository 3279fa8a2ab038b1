"""How do I fine-tune with Transformers' Trainer, or with TRL's SFTTrainer?

    torchrun --nproc-per-node 2 examples/trainer.py

Only the class and ``mesh=`` are new. For TRL, with SFTConfig: ``class LongSFT(LongTrainer, SFTTrainer): pass``.
"""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainingArguments

from longspan import ParallelMesh
from longspan.integrations.trainer import LongTrainer

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip
model = LlamaForCausalLM(config)  # yours: LlamaForCausalLM.from_pretrained(folder), on every rank

text = torch.tensor(list(Path(__file__).read_bytes()))
rows = [{"input_ids": piece, "labels": piece} for piece in text.unfold(0, 400, 200)]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=2, max_steps=4, learning_rate=1e-3, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = LongTrainer(
        model=model,
        args=arguments,  # per_device_...: a data replica's rows; with ulysses="auto" every rank works on the same rows
        train_dataset=rows,
        eval_dataset=rows[:3],
        mesh=ParallelMesh(ulysses="auto", heads=(4, 2)),
    )
    trainer.remove_callback(PrinterCallback)  # it prints how long things took, too
    trainer.train()
    trainer.evaluate()

for line in trainer.state.log_history if trainer.is_world_process_zero() else ():  # what one device would have logged
    for name in ("loss", "eval_loss"):
        if name in line:
            print(line["step"], name, round(line[name], 4))

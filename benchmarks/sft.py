"""TRL's SFTTrainer behind LongTrainer, beside stock SFTTrainer on one device: losses, norms and weights (pip install trl).

    python benchmarks/sft.py

A tiny llama, rows of 9 to 40 words, five steps of SGD over two micro-batches each, then an evaluation. A line says how far the
worst logged loss, gradient norm and eval_loss are from the stock run's, and the weights, all relative.
"""

import argparse
import random
import tempfile
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from longspan import ParallelMesh
from longspan.integrations.trainer import LongTrainer

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(90))]
LAYOUTS: dict[str, dict[str, Any]] = {
    "stock": {"ranks": 1},
    "ulysses=2": {"ranks": 2, "ulysses": 2, "zero": 0},
    "ulysses=2, zero=3": {"ranks": 2, "ulysses": 2, "zero": 3},
    "data=2 x ulysses=2": {"ranks": 4, "ulysses": 2, "zero": 0},
}


class LongSFT(LongTrainer, SFTTrainer):
    """What a user writes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print("| rows | packing | layout | largest difference |\n| --- | --- | --- | --- |", flush=True)
    for rows in ("text", "prompt and completion"):
        for packing in ("none", "bfd", "wrapped") if rows == "text" else ("none",):
            stock = _run(rows, packing, "stock")
            for layout in list(LAYOUTS)[1:]:
                found = _run(rows, packing, layout)
                apart = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, stock, strict=True))
                print(f"| {rows} | {packing} | {layout} | {apart:.1e} |", flush=True)


def _run(rows: str, packing: str, layout: str) -> list[torch.Tensor]:
    """What is logged, and every weight."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, rows, packing, LAYOUTS[layout])
        mp.start_processes(_rank, arguments, nprocs=LAYOUTS[layout]["ranks"], start_method="fork")
        return torch.load(f"{folder}/found")


def _rank(rank: int, folder: str, rows: str, packing: str, layout: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    if layout["ranks"] > 1:
        store = dist.FileStore(f"{folder}/rendezvous", layout["ranks"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=layout["ranks"])
    trainer = _trainer(folder, rows, packing, layout)
    trainer.train()
    trainer.evaluate()
    log = [
        float(line[name]) for line in trainer.state.log_history for name in ("loss", "grad_norm", "eval_loss") if name in line
    ]
    weights = [weight.full_tensor() if layout.get("zero") else weight for weight in trainer.model.state_dict().values()]
    if rank == 0:
        torch.save([*torch.tensor(log).split(1), *weights], f"{folder}/found")
    if layout["ranks"] > 1:
        dist.barrier()
        dist.destroy_process_group()


def _trainer(folder: str, rows: str, packing: str, layout: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
        )
    )  # fmt: skip
    replicas = layout["ranks"] // layout.get("ulysses", 1)
    arguments = SFTConfig(
        folder, max_length=48, per_device_train_batch_size=4 // replicas, per_device_eval_batch_size=4 // replicas,
        gradient_accumulation_steps=2, max_steps=5, logging_steps=1, learning_rate=0.05, optim="sgd", report_to=[], seed=3,
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        packing=packing != "none",
        **({} if packing == "none" else {"packing_strategy": packing}),
    )  # fmt: skip
    data = Dataset.from_list(_rows(rows))
    given = {"args": arguments, "train_dataset": data, "eval_dataset": data.select(range(10)), "processing_class": _tokenizer()}
    if layout["ranks"] == 1:
        trainer: Any = SFTTrainer(model, **given)
    else:
        trainer = LongSFT(model, **given, mesh=ParallelMesh(ulysses=layout["ulysses"]), zero=layout["zero"])
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _rows(kind: str) -> list[dict[str, str]]:
    chance = random.Random(0)

    def say(fewest: int, most: int) -> str:
        return " ".join(chance.choice(WORDS[4:]) for _ in range(chance.randint(fewest, most)))

    if kind == "text":
        return [{"text": say(9, 40)} for _ in range(33)]
    return [{"prompt": say(3, 12), "completion": " " + say(5, 30)} for _ in range(33)]


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


if __name__ == "__main__":
    main()

"""Ray: train with as many GPUs as the cluster has, between 8 and 32. On the head node: python ray_train.py

A worker or a node that is lost ends all workers; Ray starts as many as there is room for, which go on from the newest
checkpoint with the same global rows in each step. Set the folders, which every node sees. --small: a short run on CPUs.
"""

import argparse
import math
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from longspan import MemoryOptions, ParallelMesh, clip_grad_norm_, hf, parallelize, shard_batch
from longspan.integrations.ray import replica_rows, report, restore, torch_trainer

LARGE = {"model": "/shared/models/llama-8b", "tokens": 131_072, "rows": 4, "ulysses": 8, "steps": 2_000, "save_every": 50}
SMALL = {"model": None, "tokens": 64, "rows": 2, "ulysses": 1, "steps": 4, "save_every": 2}


def loop(settings: dict[str, Any]) -> None:
    """The training of one worker; it begins anew, with another number of workers, after a loss."""
    mesh = ParallelMesh(ulysses=math.gcd(settings["ulysses"], dist.get_world_size()))  # any number of workers fits
    dtype = torch.bfloat16 if mesh.device.type != "cpu" else None
    model = parallelize(model_of(settings["model"]), mesh, zero=3, dtype=dtype, memory=MemoryOptions(recompute="selective"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for step in range(restore(model, optimizer) + 1, settings["steps"] + 1):
        ids = global_rows(step, settings)
        part = shard_batch(replica_rows({"input_ids": ids, "labels": ids}, mesh), mesh)
        loss = model(**part).loss
        loss.backward()
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % settings["save_every"] == 0 or step == settings["steps"]:
            report({"loss": loss.item()}, step, model, optimizer)


def model_of(folder: str | None) -> torch.nn.Module:
    """The model of a Hugging Face folder, whose weights ``parallelize`` reads; without a folder a small one, random."""
    if folder is not None:
        return hf.load(folder, dtype=torch.float32)
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def global_rows(step: int, settings: dict[str, Any]) -> torch.Tensor:
    """The rows of a step, the same for any number of workers: here random; yours are read from the text by their numbers."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 256, (settings["rows"], settings["tokens"]), generator=generator)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--storage", default="/shared/runs")
    arguments = parser.parse_args()
    trainer = torch_trainer(
        loop,
        workers=(1, 2) if arguments.small else (8, 32),
        storage=arguments.storage,
        run="longspan",
        settings=SMALL if arguments.small else LARGE,
        gpus=not arguments.small,
        restarts=-1,
    )
    print(trainer.fit().metrics)

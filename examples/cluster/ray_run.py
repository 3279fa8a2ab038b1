"""Ray: longspan train on the workers of a cluster, between 8 and 32 GPUs. On the head node: python ray_run.py

One run folder, as under every launcher: after a lost worker or node the run goes on from the newest checkpoint in it, with as
many workers as there is room for. Set the folders, which every node sees. --small: a short run on CPUs.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist

import longspan
from longspan.cli.config import Train
from longspan.cli.train import work
from longspan.integrations.ray import torch_trainer

LARGE = {
    "model": "hf:/shared/models/llama-8b", "data": ("/shared/text",), "tokens": 131_072, "rows_per_step": 4, "ulysses": 8,
    "zero": 3, "recompute": "selective", "steps": 2_000, "learning_rate": 1e-5, "checkpoint_every_steps": 50,
}  # fmt: skip
SMALL = {"data": (str(Path(longspan.__file__).parent),), "tokens": 64, "steps": 2, "eval_rows": 1, "ulysses": 2}


def loop(settings: dict[str, Any]) -> None:
    """What one worker does: the run of the command line, new or resumed, on however many workers there are."""
    settings["ulysses"] = math.gcd(settings["ulysses"], dist.get_world_size())
    begun = Path(settings["runs_folder"], settings["run"], "config.json").exists()
    work(Train(**settings, resume=settings["run"] if begun else None))
    ray.train.report({})  # a barrier: no worker ends before the others


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--storage", default="/shared/runs")
    arguments = parser.parse_args()
    run = {"run": "longspan", "runs_folder": arguments.storage}
    trainer = torch_trainer(
        loop,
        workers=(1, 2) if arguments.small else (8, 32),
        storage=f"{arguments.storage}/ray",
        run="longspan",
        settings=(SMALL if arguments.small else LARGE) | run,
        gpus=not arguments.small,
        restarts=-1,
    )
    trainer.fit()

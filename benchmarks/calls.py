"""Benchmark: the Python function calls of a training step: torchrun --nproc-per-node 2 benchmarks/calls.py

cProfile counts the calls on rank 0 in the fourth step of a Hugging Face llama (forward, loss, backward), with 4 layers and with
8. Their difference is the cost of a layer. On a GPU these calls must end before the kernels that they launch do.
"""

import cProfile
import pstats

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from longspan import ParallelMesh, parallelize, shard_batch

FEW, MANY = 4, 8  # layers


def main() -> None:
    torch.set_num_threads(1)
    mesh = ParallelMesh(ulysses="auto", heads=(6, 3))
    few, many = (calls_of_a_step(layers, mesh) for layers in (FEW, MANY))
    if dist.get_rank() == 0:
        print(f"{few:,} calls a step of {FEW} layers, {(many - few) // (MANY - FEW):,} for each further layer")
    dist.barrier()
    dist.destroy_process_group()


def calls_of_a_step(layers: int, mesh: ParallelMesh) -> int:
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_hidden_layers=layers, **shape))
    parallelize(model, mesh)
    ids = torch.randint(0, 97, (1, 64), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        model(**shard_batch({"input_ids": ids, "labels": ids}, mesh)).loss.backward()
        model.zero_grad()

    for _ in range(3):
        step()
    with cProfile.Profile() as profile:
        step()
    return int(pstats.Stats(profile).total_calls)


if __name__ == "__main__":
    main()

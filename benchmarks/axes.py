"""What a pipeline and tensor parallelism cost beyond their compute, on two ranks of this machine: benchmarks/axes.py

    pipeline=2, 8 micro-batches    the step / ((m + p - 1) / m x the slowest stage, both ranks computing theirs at once)
    tensor=2                       the step / (the step with a transport that sends nothing + its bytes / the bare rate)

Issue 20 asks for at most 1.15 of each. Medians of the repetitions, alternating within one run; run it on a quiet machine.
"""

import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from longspan import ParallelMesh, forward_backward, parallel_state, parallelize, shard_batch
from longspan.distributed.collectives import CountingTransport, TorchTransport
from longspan.distributed.fake_world import FakeTransport
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig

SHAPE = DecoderConfig(vocab=512, layers=4, hidden=256, heads=4, kv_heads=4, head_dim=64, ffn=768)
TOKENS, MICRO_BATCHES, REPEATS = 512, 8, 7


def seconds(work: Callable[[], object]) -> float:
    """The seconds of ``work``, which both ranks begin together, on the slower of them."""
    dist.barrier()
    began = time.perf_counter()
    work()
    took = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def pipeline() -> list[float]:
    """The ratios of the repetitions."""
    mesh = ParallelMesh(pipeline=2)
    model = parallelize(Decoder(SHAPE), mesh)
    ids = torch.randint(0, SHAPE.vocab, (MICRO_BATCHES, 1, TOKENS), generator=torch.Generator().manual_seed(0))
    parts = shard_batch([{"input_ids": one, "labels": one} for one in ids], mesh)
    state, stage = parallel_state(model), mesh.coordinate.pipeline_rank
    assert state is not None
    assert state.pipeline is not None
    stages, dout = state.pipeline, torch.randn(1, TOKENS, SHAPE.hidden)

    def alone() -> None:
        for part in parts:
            given = {name: value for name, value in part.items() if name != "input_ids"}
            x = part["input_ids"] if stage == 0 else torch.randn(1, TOKENS, SHAPE.hidden, requires_grad=True)
            out = stages.run(stage, x, given)
            out.backward(None if stage else dout)

    def step() -> None:
        forward_backward(model, parts)

    step()
    bubble = (MICRO_BATCHES + 1) / MICRO_BATCHES
    return [seconds(step) / (bubble * seconds(alone)) for _ in range(REPEATS)]


def tensor() -> list[float]:
    """The ratios of the repetitions."""
    mesh = ParallelMesh(tensor=2)
    model = parallelize(Decoder(SHAPE), mesh)
    ids = torch.randint(0, SHAPE.vocab, (1, 4 * TOKENS), generator=torch.Generator().manual_seed(0))
    part = shard_batch({"input_ids": ids, "labels": ids}, mesh)

    def step() -> None:
        model(**part).loss.backward()

    mesh.transport = counting = CountingTransport(TorchTransport())
    step()
    sent, count = counting.traffic.bytes, counting.traffic.collectives
    payload = torch.randn(2, sent // count // 4)  # a row for each rank

    def bare() -> None:
        received = torch.empty_like(payload)
        for _ in range(count):
            dist.all_to_all_single(received, payload, group=mesh.tensor_group)

    ratios = []
    for _ in range(REPEATS):
        mesh.transport = TorchTransport()
        whole = seconds(step)
        mesh.transport = FakeTransport()
        ratios.append(whole / (seconds(step) + seconds(bare)))
    return ratios


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/rendezvous", 2), rank=rank, world_size=2)
    for name, measure in (("pipeline=2", pipeline), ("tensor=2", tensor)):
        ratios = sorted(measure())
        if rank == 0:
            print(f"{name}: {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f}, {REPEATS} repetitions)")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(main, (tempfile.mkdtemp(),), nprocs=2, start_method="fork")

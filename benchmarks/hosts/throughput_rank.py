"""One rank of ``throughput``: seconds of a training step (forward, backward, averaged gradients) of every method in turn."""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.hosts.counters import sent
from benchmarks.hosts.gloo_collectives import faster
from benchmarks.hosts.methods import BY_NAME, Method
from benchmarks.hosts.model import decoder, mesh_of, parallel
from longspan import ParallelMesh, forward_backward, shard_batch

WARM_TOKENS, VOCAB = 256, 256
CHOICE_SHARE = 8
"""The collectives are chosen on this part of the tokens, which is enough to see which is faster."""
GEMM_SECONDS, GEMM_ROWS = 3.0, 2048


def main() -> None:
    """Time every method that the arguments name; rank 0 writes what it found."""
    case = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    found = {"flops_a_rank": _gemm(case["hidden"])}
    found["methods"] = {name: timed_steps(BY_NAME[name], case) for name in case["methods"]}
    if dist.get_rank() == 0:
        Path(case["folder"], "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _gemm(hidden: int) -> float:
    """FLOP/s of matrix products on this rank while all ranks multiply; the mean over the ranks."""
    ParallelMesh()
    a, b = torch.randn(GEMM_ROWS, hidden), torch.randn(hidden, 4 * hidden)
    product = a @ b
    dist.barrier()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < GEMM_SECONDS:
        torch.mm(a, b, out=product)
        count += 1
    mine = torch.tensor(2 * a.numel() * b.shape[1] * count / (time.perf_counter() - start), dtype=torch.float64)
    dist.all_reduce(mine)
    return float(mine) / dist.get_world_size()


def timed_steps(method: Method, case: dict[str, Any]) -> dict[str, Any]:
    """The seconds of each step of a method, the bytes of payload that this host's interface sends in one, and its collectives.

    Args:
        method: the method.
        case: the sizes ``layers``, ``tokens``, ``hidden``, ``heads`` and ``ffn``, the ``rows`` of a step, and the number of
            ``steps``.
    """
    tokens, mesh = case["tokens"], mesh_of(method, dist.get_world_size())
    model = parallel(decoder(method, case, case["layers"], VOCAB), method, mesh)
    chosen = (
        faster(mesh.tensor_group, tokens // CHOICE_SHARE, case["hidden"]) if mesh.coordinate.tensor > 1 else nullcontext({})
    )
    with chosen as names:
        _step(model, mesh, WARM_TOKENS, 1)
        before = sent()
        seconds = [_step(model, mesh, tokens, case["rows"]) for _ in range(case["steps"])]
        counted = sent() - before
    return {"seconds": seconds, "sent": counted.payload // case["steps"], "collectives": names}


def _step(model: Any, mesh: ParallelMesh, tokens: int, rows: int) -> float:
    """Seconds of a step on ``rows`` rows of ``tokens`` tokens (data parallel: shorter ones, one a replica), in turn."""
    at = mesh.coordinate
    ids = torch.randint(VOCAB, (rows, tokens // at.data), generator=torch.Generator().manual_seed(at.data_rank))
    model.zero_grad()
    parts = shard_batch([{"input_ids": row, "labels": row} for row in ids.split(1)], mesh)
    dist.barrier()
    start = time.perf_counter()
    forward_backward(model, parts)
    dist.barrier()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

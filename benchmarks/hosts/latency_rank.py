"""One rank of ``latency``: seconds of the all-to-alls that Ulysses adds to a layer, and of the whole layer, over the tokens."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.hosts.methods import FEWER, MORE, ULYSSES
from benchmarks.hosts.throughput_rank import timed_steps
from longspan import ParallelMesh
from longspan.attention.ulysses import exchange_to_heads, exchange_to_tokens, plan_exchange


def main() -> None:
    """Time every number of tokens in turn, ``repeats`` times; rank 0 writes the medians."""
    case = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    mesh = ParallelMesh(ulysses=case["hosts"])
    found = {
        "exchanges": {tokens: _exchanges(tokens, mesh, case) for tokens in case["tokens"]},
        "layer": {tokens: _layer(tokens, case) for tokens in case["shares"]},
    }
    if dist.get_rank() == 0:
        Path(case["folder"], "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _layer(tokens: int, case: dict[str, Any]) -> float:
    """Seconds of a training step for each layer: the difference of two decoders over that of their layers."""

    def step(layers: int) -> float:
        return float(timed_steps(ULYSSES, case | {"tokens": tokens, "layers": layers, "steps": 1, "rows": 1})["seconds"][0])

    return (step(MORE) - step(FEWER)) / (MORE - FEWER)


def _exchanges(tokens: int, mesh: ParallelMesh, case: dict[str, Any]) -> tuple[float, float]:
    """(forward, step): packing, both all-to-alls of a pass, unpacking; the same calls as those of ``attend``."""
    shape = torch.Size((1, tokens // case["hosts"], case["heads"], case["hidden"] // case["heads"]))
    whole, one = plan_exchange([shape] * 3, mesh, tokens), plan_exchange([shape], mesh, tokens)
    assert whole is not None
    assert one is not None
    qkv, out = [torch.randn(shape) for _ in range(3)], [torch.randn(tokens, one.my_widths[0][0])]
    grads = [torch.randn(tokens, sum(whole.my_widths[0]))]

    def forward() -> None:
        exchange_to_heads(qkv, whole)
        exchange_to_tokens(out, one, 1)

    def step() -> None:
        forward()
        exchange_to_heads(qkv[:1], one)
        exchange_to_tokens(grads, whole, 1)

    step()
    return _seconds(forward, case["repeats"]), _seconds(step, case["repeats"])


def _seconds(action: Callable[[], None], repeats: int) -> float:
    """The median over ``repeats`` of the seconds until the last rank has ended, without those of a barrier."""
    found = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        dist.barrier()
        between = time.perf_counter()
        action()
        dist.barrier()
        found.append((time.perf_counter() - between) - (between - start))
    return median(found)


if __name__ == "__main__":
    main()

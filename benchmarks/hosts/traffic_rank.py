"""One rank of ``traffic``: counts what its host's interface sends for one layer, forward and in a step, for every method.

A decoder of one layer and one of three do the same beside their layers, so half of the difference of their counts is one layer:
rendezvous, agreement, loss and barriers cancel. Weights of the layers are frozen: their gradients are not averaged, so what is
counted is activations. The first rank of each host writes what its interface has counted.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.hosts.counters import Counted, sent
from benchmarks.hosts.methods import BY_NAME, FEWER, MORE, Method
from benchmarks.hosts.model import decoder, mesh_of, parallel
from longspan import shard_batch

VOCAB = 64
SETTLE_SECONDS = 0.4
"""Longer than the kernel delays an acknowledgement."""


def main() -> None:
    """Count every method that the arguments name, and write the counts of this host."""
    case = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    found = {}
    for name in case["methods"]:
        passes = [_passes(BY_NAME[name], layers, case) for layers in (FEWER, MORE)]
        found[name] = [asdict(more - fewer) for fewer, more in zip(*passes)]
    if os.environ["LOCAL_RANK"] == "0":
        Path(case["folder"], f"host{os.environ['GROUP_RANK']}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _passes(method: Method, layers: int, case: dict[str, Any]) -> tuple[Counted, Counted]:
    """(forward, step) of a decoder with so many layers: what this host sends."""
    mesh = mesh_of(method, int(os.environ["WORLD_SIZE"]))
    model = decoder(method, case, layers, vocab=VOCAB)
    model.blocks.requires_grad_(False)
    model = parallel(model, method, mesh)
    ids = torch.arange(case["tokens"]).remainder(VOCAB)[None]
    part = shard_batch({"input_ids": ids, "labels": ids}, mesh)

    def forward() -> None:
        with torch.no_grad():
            model(**part)

    def step() -> None:
        model(**part).loss.backward()

    step()  # connects the ranks
    return _count(forward), _count(step)


def _count(action: Callable[[], object]) -> Counted:
    """What the interface sends during ``action``: the smaller of two counts, because the store sends now and then too."""
    found = []
    for _ in range(2):
        before = _quiet()
        action()
        found.append(_quiet() - before)
    return min(found, key=lambda counted: counted.bytes)


def _quiet() -> Counted:
    """The count once every rank is here and the last acknowledgements have been sent."""
    dist.barrier()
    time.sleep(SETTLE_SECONDS)
    counted = sent()
    dist.barrier()
    return counted


if __name__ == "__main__":
    main()

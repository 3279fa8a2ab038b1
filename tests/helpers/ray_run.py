"""A run on Ray over two single-CPU nodes: a worker is killed, then a node is removed: python -m tests.helpers.ray_run F

    steps 1 .. 3   two workers   rank 1 kills itself in step 4
    steps 4 .. 6   two workers   the second node is removed
    steps 7 .. 9   one worker

Every worker adds a line of JSON for each step to ``F/log``: its process, the number of workers,
its rank, the step, the loss, its rows.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from longspan import ParallelMesh, clip_grad_norm_, parallelize, shard_batch
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig

STEPS, KILLED_IN, REMOVED_AFTER, ROWS, TOKENS = 9, 4, 6, 3, 16
CONFIG = DecoderConfig(vocab=32, layers=2, hidden=16, heads=4, kv_heads=2, head_dim=4, ffn=24)


def global_rows(step: int) -> torch.Tensor:
    """The rows [3, tokens] that all workers together train on in ``step``, whatever their number."""
    return torch.randint(0, CONFIG.vocab, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step))


def made() -> tuple[ParallelMesh, torch.nn.Module, torch.optim.Optimizer]:
    """The mesh of all workers (each a data replica), and the parallel model and optimizer of this one."""
    mesh = ParallelMesh()
    model = parallelize(Decoder(CONFIG, seed=0), mesh, zero=3)
    return mesh, model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step_loss(model: torch.nn.Module, optimizer: torch.optim.Optimizer, part: dict[str, Any]) -> float:
    """Train on ``part``; the loss before the update."""
    loss: torch.Tensor = model(**part).loss
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def losses_of_one_process() -> list[float]:
    """The loss of each step in one process without Ray."""
    mesh, model, optimizer = made()
    found = []
    for step in range(1, STEPS + 1):
        ids = global_rows(step)
        found.append(step_loss(model, optimizer, shard_batch({"input_ids": ids, "labels": ids}, mesh)))
    return found


def loop(settings: dict[str, Any]) -> None:
    from longspan.integrations.ray import replica_rows, report, restore

    folder = Path(settings["folder"])
    mesh, model, optimizer = made()
    workers, rank = mesh.coordinate.data, mesh.coordinate.data_rank
    for step in range(restore(model, optimizer) + 1, STEPS + 1):
        if step == KILLED_IN and rank == 1 and _once(folder / "killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == REMOVED_AFTER + 1 and workers == 2:
            (folder / "remove").touch()
            while not (folder / "removed").exists():
                time.sleep(0.1)
        ids = global_rows(step)
        mine = replica_rows({"input_ids": ids, "labels": ids}, mesh)
        loss = step_loss(model, optimizer, shard_batch(mine, mesh))
        who = {"process": os.getpid(), "workers": workers, "rank": rank}
        line = who | {"step": step, "loss": loss, "rows": mine["input_ids"].tolist()}
        with open(folder / "log", "a") as log:
            log.write(json.dumps(line) + "\n")
        report({"loss": loss}, step, model, optimizer)


def _once(mark: Path) -> bool:
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def main(folder: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from longspan.integrations.ray import torch_trainer

    memory = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **memory})
    second = cluster.add_node(num_cpus=1, **memory)
    cluster.wait_for_nodes()

    def remove_when_asked() -> None:
        while not (folder / "remove").exists():
            time.sleep(0.1)
        cluster.remove_node(second)
        (folder / "removed").touch()

    threading.Thread(target=remove_when_asked, daemon=True).start()
    ray.init(address=cluster.address)
    try:
        trainer = torch_trainer(
            loop, workers=(1, 2), storage=str(folder / "storage"), run="elastic", settings={"folder": str(folder)}
        )
        result = trainer.fit()
        (folder / "result").write_text(json.dumps({"metrics": result.metrics, "checkpoint": result.checkpoint.path}))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

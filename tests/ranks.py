"""Run a test body on real ranks: forked processes, gloo, a file as rendezvous; no ports, no environment variables.

    on_ranks(4, body, *args, tmp_path=tmp_path)  ->  [what body(*args) returned on rank 0, 1, 2, 3]

The body runs inside an initialised process group with one thread a rank. When a rank raises, the others are ended at
once and the test fails with that rank's traceback, so a dead-lock shows as the error that caused it.
"""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # 500 modules that torch.testing.assert_close would import again on every rank
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(ranks: int, body: Callable[..., Any], *args: Any, tmp_path: Path, seconds: float = 60.0) -> list[Any]:
    folder = tempfile.mkdtemp(dir=tmp_path)
    mp.start_processes(_rank, (ranks, body, args, folder, seconds), nprocs=ranks, start_method="fork")
    return [torch.load(f"{folder}/result{rank}", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, body: Callable[..., Any], args: tuple[Any, ...], folder: str, seconds: float) -> None:
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    store = dist.FileStore(f"{folder}/rendezvous", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))
    try:
        torch.save(body(*args), f"{folder}/result{rank}")
    finally:
        dist.destroy_process_group()

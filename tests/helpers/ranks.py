"""Run test bodies on real ranks: forked processes, gloo, a file as rendezvous; no ports, no environment variables.

    on_ranks(4, body, *args, tmp_path=tmp_path)   ->  [what body(*args) returned on rank 0, 1, 2, 3]

    with Ranks(4, tmp_path) as ranks:                 the same ranks for many bodies: what a process group costs is
        ranks.run(body, *args)                        paid once, so hypothesis can ask for hundreds of examples

A body runs inside an initialised process group with one thread a rank. When a rank raises, the others are ended at once
and the test fails with that rank's traceback, so a dead-lock shows as the error that caused it.
"""

import gc
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch._dynamo  # 500 modules that torch.testing.assert_close would import again on every rank
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo

from longspan import ParallelMesh


def on_ranks(ranks: int, body: Callable[..., Any], *args: Any, tmp_path: Path, seconds: float = 240.0) -> list[Any]:
    with Ranks(ranks, tmp_path, seconds) as pool:
        return pool.run(body, *args)


@cache
def mesh_of(ulysses: int = 1, ring: int = 1) -> ParallelMesh:
    """One of each layout for all bodies of a rank: every gloo group keeps a thread that polls, and hundreds take a core."""
    return ParallelMesh(ulysses, ring)


class Ranks:
    """``ranks`` forked processes in one process group; a failure ends them, and the next run forks new ones."""

    def __init__(self, ranks: int, tmp_path: Path, seconds: float = 240.0) -> None:
        self.ranks, self.tmp_path, self.seconds = ranks, tmp_path, seconds
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, body: Callable[..., Any], *args: Any) -> list[Any]:
        if not self.processes:
            self._fork()
        for pipe in self.pipes:
            pipe.send((body, args))
        results: dict[int, Any] = {}
        while len(results) < self.ranks:
            answered = wait([p for rank, p in enumerate(self.pipes) if rank not in results], timeout=self.seconds)
            if not answered:
                self.close()
                raise AssertionError(f"of {self.ranks} ranks only {sorted(results)} answered within {self.seconds:g} s")
            for pipe in answered:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    failure, results[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    failure = f"rank {rank} died"
                if failure is not None:
                    self.close()
                    raise AssertionError(f"on rank {rank} of {self.ranks}:\n{failure}")
        return [results[rank] for rank in range(self.ranks)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _fork(self) -> None:
        folder = tempfile.mkdtemp(dir=self.tmp_path)
        context = mp.get_context("fork")
        gc.collect()
        gc.freeze()  # a rank that collected what it inherits would meet process groups whose threads were not forked
        for rank in range(self.ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(rank, self.ranks, theirs, folder, self.seconds), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(mine)
        gc.unfreeze()


# Every gloo group has two workers, and torch 2.13 lets both write "the last completed collective" into one std::string
# without a lock. A name of more than 15 letters is on the heap (ALLGATHER_COALESCED, which DTensor.full_tensor is to gloo),
# so two that finish together free it twice: some rank aborts, now and then. One worker has nobody to race with;
# torch passes gloo no options, hence the constructor.
_with_two_workers = ProcessGroupGloo.__init__


def _with_one_worker(group: ProcessGroupGloo, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
    options = ProcessGroupGloo._Options()
    options._threads, options._timeout, options._devices = 1, timeout, [ProcessGroupGloo.create_default_device()]
    _with_two_workers(group, store, rank, size, options)


def _rank(rank: int, ranks: int, pipe: Connection, folder: str, seconds: float) -> None:
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    ProcessGroupGloo.__init__ = _with_one_worker
    store = dist.FileStore(f"{folder}/rendezvous", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))
    while True:
        body, args = pipe.recv()
        try:
            pipe.send((None, body(*args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))

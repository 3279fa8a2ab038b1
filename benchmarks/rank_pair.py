"""Two ranks on this machine that judge one model class of Transformers after another, for the matrices of the docs."""

import multiprocessing as mp
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import transformers
from tiny_models import Class

from longspan import ParallelMesh

Judge = Callable[[Class, dict[str, ParallelMesh]], dict[str, Any]]
SECONDS = 90.0
"""A class gets so long, builds and all batches together."""
MEMORY_BYTES = 12 * 2**30
"""What a rank may address."""


class Pair:
    """Two ranks that judge one class after another; ended and forked again after a crash, or when a class takes too long.

    Args:
        judge: what both ranks do with a class; called with it and {layout: mesh}, it returns its cells by name.
        layouts: {name: the degrees of a mesh of two ranks}, such as {"ring": {"ring": 2}}.
    """

    def __init__(self, judge: Judge, layouts: Mapping[str, Mapping[str, int]]) -> None:
        self.arguments = (judge, layouts)
        self.processes: list[Any] = []

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def judge(self, one: Class) -> dict[str, Any]:
        """The cells of a class, on which both ranks agree, or the reason why a rank ended."""
        if not self.processes:
            self._fork()
        for pipe in self.pipes:
            pipe.send(one)
        until, found = time.time() + SECONDS, []
        for pipe in self.pipes:
            try:
                if not pipe.poll(max(0.0, until - time.time())):
                    raise EOFError(f"no answer within {SECONDS:.0f} s")
                found.append(pipe.recv())
            except (EOFError, ConnectionError) as error:
                self._end()
                return {"cells": {}, "reason": f"the rank ended: {error or 'killed'}"}
        if found[0] != found[1] or found[0].get("desynchronised"):
            self._end()
        return self._merged(*found)

    @staticmethod
    def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        """Both ranks must agree: one that is exact alone is wrong."""
        for name, cell in first["cells"].items():
            other = second["cells"].get(name, {"verdict": "nothing"})
            if other["verdict"] != cell["verdict"]:
                reason = f"the ranks differ: {cell}, {other}"
                first["cells"][name] = {"verdict": "wrong", "reason": reason}
        return first

    def _fork(self) -> None:
        folder, context = tempfile.mkdtemp(), mp.get_context("fork")
        pairs = [context.Pipe() for _ in range(2)]
        self.pipes = [mine for mine, _ in pairs]
        self.processes = [
            context.Process(target=_rank, args=(rank, folder, pairs[rank][1], *self.arguments)) for rank in range(2)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def _end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


def _rank(rank: int, folder: str, pipe: Any, judge: Judge, layouts: Mapping[str, Mapping[str, int]]) -> None:
    """The loop of one rank: a class comes in, its cells go out."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/rendezvous", 2), rank=rank, world_size=2)
    meshes = {name: ParallelMesh(**degrees) for name, degrees in layouts.items()}
    while True:
        pipe.send(judge(pipe.recv(), meshes))

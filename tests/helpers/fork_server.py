"""The fork server of the test ranks: a process that has imported torch and has run neither a backward nor CUDA.

    pytest --fork this many, body of module M-->  server: import M, fork  -->  rank 0, rank 1, ... (one thread each)
       \\--------------------------- one pipe a rank: bodies go, results come back ----------------------/

A process that has run a backward, or has used CUDA, holds threads and a context that do not survive a fork, and the process
of pytest soon has. The server only imports modules. It kills ranks when pytest asks, and all of them when pytest has ended.
"""

import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch
import torch._dynamo  # 500 modules that torch.testing.assert_close would import again on every rank
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.testing
import torch.utils.checkpoint
from torch._C._distributed_c10d import FileStore, Store
from torch.distributed import ProcessGroupGloo

from tests.helpers.device import DEVICE, call_on_device

MESSAGE_BYTES, MOST_RANKS = 65_536, 64


def serve(control: socket.socket) -> None:
    """Answer JSON requests on ``control`` until its other end is closed; then kill every rank that is left.

    ``{"fork": {module, folder, seconds, key}}`` with the file descriptors of one pipe per rank: forks the ranks; the answer is
    ``{"ranks": [process ids]}`` or ``{"failure": traceback}``. ``{"end": [process ids]}``: kills them; the answer is ``{}``.
    """
    alive: set[int] = set()
    try:
        while True:
            message, pipes, _, _ = socket.recv_fds(control, MESSAGE_BYTES, MOST_RANKS)
            if not message:
                return
            request = json.loads(message)
            if "end" in request:
                alive -= _ended(request["end"])
                answer: dict[str, Any] = {}
            else:
                answer = _forked(control, pipes, **request["fork"])
                alive |= set(answer.get("ranks", []))
            control.sendall(json.dumps(answer).encode())
    finally:
        _ended(alive)


def _ended(ranks: Any) -> set[int]:
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    for rank in ranks:
        os.waitpid(rank, 0)
    return set(ranks)


def _forked(control: socket.socket, pipes: list[int], module: str, folder: str, seconds: float, key: str) -> dict[str, Any]:
    multiprocessing.current_process().authkey = bytes.fromhex(
        key
    )  # tensors reach pytest through shared memory that it asks for
    try:
        importlib.import_module(module)  # once here, not once on every rank
        if torch.cuda.is_initialized():
            raise RuntimeError(f"importing {module} has initialised CUDA, which ranks cannot inherit")
        gc.collect()
        gc.freeze()  # what is inherited is never collected, so its pages stay shared
        return {"ranks": [_fork(control, pipes, rank, folder, seconds) for rank in range(len(pipes))]}
    except BaseException:
        return {"failure": traceback.format_exc()}
    finally:
        for pipe in pipes:
            os.close(pipe)


def _fork(control: socket.socket, pipes: list[int], rank: int, folder: str, seconds: float) -> int:
    process = os.fork()
    if process:
        return process
    try:
        control.close()
        for other in pipes[:rank] + pipes[rank + 1 :]:
            os.close(other)
        _work(rank, len(pipes), Connection(pipes[rank]), folder, seconds)
    except EOFError:
        os._exit(0)  # pytest has closed its end
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _work(rank: int, ranks: int, pipe: "Connection[Any, Any]", folder: str, seconds: float) -> NoReturn:
    torch.set_num_threads(1)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())  # ranks may share one: gloo carries tensors of a GPU
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    ProcessGroupGloo.__init__ = _with_one_worker  # type: ignore[method-assign, assignment]
    store = FileStore(f"{folder}/rendezvous", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))
    while True:
        body, args = pipe.recv()
        try:
            answer = (None, call_on_device(body, args), groups())
            pipe.send(answer)
        except BaseException:
            pipe.send((traceback.format_exc(), None, groups()))


def groups() -> int:
    """The number of process groups of this rank. Each gloo group keeps a thread that polls; hundreds of them use up a core."""
    return len(dist.distributed_c10d._world.pg_map)


# Every gloo group has two workers, and torch 2.13 lets both write "the last completed collective" into one std::string
# without a lock. A name of more than 15 letters is on the heap (ALLGATHER_COALESCED, which DTensor.full_tensor is to gloo),
# so two that finish together free it twice, and a rank aborts at random. With one worker there is no race. torch passes gloo
# no options, so the constructor is replaced.
_with_two_workers = ProcessGroupGloo.__init__


def _with_one_worker(group: ProcessGroupGloo, store: Store, rank: int, size: int, timeout: timedelta, **later: object) -> None:
    """The constructor of ProcessGroupGloo with options for one worker thread.

    ``later``: keywords that torch versions after 2.13 pass (``enable_reconfigure``); they are not used.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._threads, options._timeout, options._devices = 1, timeout, [ProcessGroupGloo.create_default_device()]
    _with_two_workers(group, store, rank, size, options)


def _rewrite_asserts() -> None:
    """Install pytest's assertion rewriting in this process, so that a failing ``assert`` of a body shows its values."""
    from _pytest.assertion import install_importhook
    from _pytest.config import get_config

    install_importhook(get_config())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then ends the ranks
    with suppress(ImportError):
        _rewrite_asserts()
    for name in sys.argv[2:]:
        importlib.import_module(name)
    serve(socket.socket(fileno=int(sys.argv[1])))

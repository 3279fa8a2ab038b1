"""One rank of a contestant: a process of its own that prepares a piece of work and makes turns of it when it is asked to.

    stdin   {"do": "prepare", "case": {...}}     {"do": "turn"}     {"do": "peak"}     {"do": "results", "to": FILE}
    stdout  one JSON object for each line: what was measured, or {"error": ...}, after which the rank ends

Contestants share no process, because DeepSpeed replaces the attention of every model of a process. Whatever a library prints
goes to standard error. ``fork_server.py`` starts the ranks for ``contestant.py``; the modules of ``sides`` know the work.
"""

import json
import os
import resource
import sys
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def serve(side: str, refusal: str, *, rank: int, ranks: int, folder: str) -> None:
    """Answer the lines of standard input until it ends.

    Args:
        side: the module of ``benchmarks.peers.sides`` that prepares the work.
        refusal: the error of importing that module, which every question is answered with; empty if there was none.
        rank: this rank.
        ranks: ranks of the group.
        folder: where they meet.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory is short, a rank is ended and not the controller
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/rendezvous", ranks), rank=rank, world_size=ranks)
    work: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if refusal:
                answer: dict[str, Any] = {"error": refusal}
            elif asked["do"] == "prepare":
                if asked["case"]["kind"] == "step":  # some libraries import it when they are: no side's memory is to have it
                    import_module("transformers.models.llama.modeling_llama")
                work = import_module(f"benchmarks.peers.sides.{side}").prepare(asked["case"])
                answer = {}
            elif asked["do"] == "results":
                torch.save(work.results(), asked["to"])
                answer = {}
            else:
                answer = {"turn": _turn, "peak": _peak}[asked["do"]](work)
        except Exception as error:  # a peer's own error is a row of the table
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()
        if "error" in answer:
            replies.close()
            os._exit(1)  # the other ranks may wait in a collective, which destroying the group would wait for


def _turn(work: Any) -> dict[str, float]:
    """Seconds of one turn, which all ranks begin together, until the last of them is done; and this rank's CPU seconds."""
    dist.barrier()
    before, began = _cpu_seconds(), time.perf_counter()
    work.turn()
    cpu = _cpu_seconds() - before
    dist.barrier()
    return {"seconds": time.perf_counter() - began, "cpu": cpu}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak(work: Any) -> dict[str, float]:
    """The largest resident memory during one turn and what was resident before anything was prepared, in MiB."""
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    work.turn()
    return {"peak": _status("VmHWM"), "baseline": work.baseline}


def resident_mib() -> float:
    """The resident memory of this process."""
    return _status("VmRSS")


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024

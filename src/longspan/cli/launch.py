r"""Start the ranks of a run on this machine, or join the world of a launcher. Independent of what the ranks compute.

    longspan train --ranks 3                            torchrun --nproc-per-node 3 --no-python -- longspan train
       |            \                                             |
       |             fork server: imports torch once      RANK and WORLD_SIZE in the environment
    torch's           /     |     \                        |       |       |
    elastic agent   rank   rank   rank                    rank    rank    rank

Ranks are forked from a server process without threads: the agent's threads hold locks at any moment, and a rank forked from
the agent would deadlock on them. If one rank fails or is killed, the others are ended too, and the caller gets one exception:
the LongspanError that the ranks raised, or RankDied, which names the rank. Under a launcher the ranks find out themselves which
failure came first (failures.py), and one of them prints it.
"""

import hashlib
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Any

from longspan import errors
from longspan.cli.failures import check_in, first_failure, is_lost_connection, mark_printed
from longspan.distributed.launchers import join_launcher
from longspan.errors import LongspanError, LostRankError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SECONDS_TO_BE_ENDED = 10.0
SECONDS_FOR_OTHERS = 5.0
"""How long ranks that have not met wait for one another before each prints its own refusal."""

CLOSED_PIPE = 128 + signal.SIGPIPE
"""Exit code of a rank, and of the command, if the program that reads its output has closed the pipe: 141, as in a shell."""


class RankDied(RuntimeError):
    """A rank was killed, exited without a message, or raised something other than a LongspanError; or a signal stopped the
    command.

    Args:
        text: what happened, one sentence.
        trace: the rank's traceback, or ``""``.
        code: the exit code for the command: 1, or 128 + the signal.
    """

    def __init__(self, text: str, trace: str = "", code: int = 1) -> None:
        super().__init__(text)
        self.trace, self.code = trace, code


def run(work: str, config: Any, ranks: int) -> int:
    """Run ``work`` on ``ranks`` new processes of this machine; if a launcher started this process, run it as that rank.

    Args:
        work: a function as ``module:function``; every rank calls it with ``config``. It returns an exit code.
        config: its picklable argument.
        ranks: how many ranks to start; not used if a launcher started this process.

    Returns:
        The largest exit code of all ranks; under a launcher that of this rank.

    Raises:
        LongspanError: what the ranks raised.
        RankDied: a rank was killed, or raised something else; or this process was stopped by a signal. Under a launcher its
            text is "" on all ranks but the one that prints.
        BrokenPipeError: the program that reads the output has closed the pipe.
    """
    join_launcher(os.environ)
    if not joins():
        return _start(work, config, ranks)
    try:
        return _work(work, config)
    except Exception as error:
        if isinstance(error, LongspanError) and not isinstance(error, LostRankError):
            mark_printed(check_in()[0])  # the caller prints it
            raise
        died = RankDied(first_failure(error), "".join(traceback.format_exception(error)))
        if is_lost_connection(error):
            _wait_to_be_ended()
        raise died from error


def joins() -> bool:
    """Whether a launcher started this process as one rank of a world: RANK and WORLD_SIZE are in the environment."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_to_report(error: Exception) -> bool:
    """Whether this rank is the one that prints ``error``, which several ranks raise alike under a launcher.

    It is the first of all ranks that calls this with an error of this text. True also without a launcher, and if no store can
    be reached. Ranks that refuse their flags have not met yet: then rank 0 runs a store, for as long as the others may need to
    refuse the same flags.
    """
    with suppress(LongspanError):  # the error may be about these variables
        join_launcher(os.environ)
    if not joins():
        return True
    import torch.distributed as dist

    from longspan import _compat

    name, ranks = f"longspan/{hashlib.sha1(str(error).encode()).hexdigest()}", int(os.environ["WORLD_SIZE"])
    keeps = os.environ["RANK"] == "0" and not dist.is_torchelastic_launched() and not dist.is_initialized()
    with suppress(Exception):  # the rank that holds the store may have ended: printing twice is better than not at all
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = _compat.hosted_store(host, port) if keeps else _compat.tcp_store(host, port, seconds=SECONDS_FOR_OTHERS)
        first: bool = store.add(name, 1) == 1
        until = time.monotonic() + (SECONDS_FOR_OTHERS if keeps else 0)
        while store.add(name, 0) < ranks and time.monotonic() < until:
            time.sleep(0.05)
        return first
    return True


def _start(work: str, config: Any, ranks: int) -> int:
    """Run ``work`` on ``ranks`` new processes by torch's elastic agent; return the largest exit code. Errors are those of
    ``run``."""
    _start_server(work, ranks)

    from longspan import _compat

    ChildFailedError, DefaultLogsSpecs, LaunchConfig, SignalException, elastic_launch = _compat.elastic_launcher()
    _silence_the_agent()
    with tempfile.TemporaryDirectory(prefix="longspan-") as folder:
        agent = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id="longspan",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.05,
            start_method="forkserver",
            shutdown_timeout=5,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            codes: dict[int, int] = elastic_launch(agent, _work_as_a_rank)(work, config)
        except ChildFailedError as failed:
            raise _what_happened(*failed.get_first_failure()) from None
        except SignalException as stopped:
            raise _stopped(stopped.sigval) from None
        finally:
            if sys.stdout.isatty():
                print("\x1b[?25h", end="")  # a rank that is ended while it draws leaves the cursor hidden
    return max(codes.values())


def _start_server(work: str, ranks: int) -> None:
    """Start the fork server from which ranks are forked, unless it runs already; it imports torch while this process does.

    Args:
        work: ``module:function``, whose module the server imports.
        ranks: how many ranks will share this machine's cores; it sets their number of threads.
    """
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores() // ranks))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    multiprocessing.set_forkserver_preload([work.partition(":")[0]])
    forkserver.ensure_running()


def visible_devices(work: str, ranks: int) -> int:
    """The number of accelerators that this process sees.

    It imports torch, and meanwhile starts the fork server, which imports it too.

    Args:
        work, ranks: what ``run`` will be called with if there is no accelerator.
    """
    _start_server(work, ranks)

    from longspan.distributed.device import visible_devices

    return visible_devices()


def _work_as_a_rank(work: str, config: Any) -> int:
    """``_work`` for the agent of ``_start``, which reports the rank that ends first."""
    try:
        return _work(work, config)
    except (LongspanError, RuntimeError) as error:
        if not isinstance(error, LongspanError) or isinstance(error, LostRankError):
            _wait_to_be_ended()
        raise


def _wait_to_be_ended() -> None:
    """Sleep until torch's agent, if there is one, ends this rank, which only lost its peer: the agent shows what ends first."""
    import torch.distributed as dist

    if dist.is_torchelastic_launched():
        time.sleep(SECONDS_TO_BE_ENDED)


def _work(work: str, config: Any) -> int:
    """Join the other ranks and run ``work`` as one of them; SystemExit with ``CLOSED_PIPE`` for a closed pipe.

    Args:
        work: a function as ``module:function``.
        config: its argument.

    Returns:
        What it returns: an exit code.
    """
    import torch
    import torch.distributed as dist

    from longspan.distributed.device import choose_device, join_world

    # The agent's own handlers only run once Python is back from a collective, which may never end.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_DFL)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    join_world(choose_device())
    module, _, function = work.partition(":")
    try:
        code: int = getattr(importlib.import_module(module), function)(config)
    except BrokenPipeError:
        sys.exit(CLOSED_PIPE)
    dist.destroy_process_group()
    return code


def _what_happened(rank: int, failure: "ProcessFailure") -> Exception:
    """The exception for the caller of ``run``, from what torch's agent tells of the rank that failed first.

    Args:
        rank: its number.
        failure: its exit code, and the error that it left.

    Returns:
        The LongspanError that the rank raised; a BrokenPipeError if the reader of the output closed the pipe; else a RankDied.
    """
    if failure.exitcode == CLOSED_PIPE:
        return BrokenPipeError()
    if failure.exitcode == -signal.SIGINT:  # Ctrl-C reaches the ranks at the same time as the agent
        return _stopped(signal.SIGINT)
    if failure.exitcode < 0:
        hint = " (the system does this when memory runs out)" if failure.exitcode == -signal.SIGKILL else ""
        return RankDied(f"rank {rank} was ended by {failure.signal_name()}{hint}, and the other ranks with it")
    message = failure.error_file_data.get("message", {})
    if not isinstance(message, dict):
        return RankDied(f"rank {rank} ended with exit code {failure.exitcode} and left no message")
    kind, _, text = message["message"].partition(": ")
    trace = message["extraInfo"]["py_callstack"]
    refusal = getattr(errors, kind, None)
    if refusal is None:
        return RankDied(f"rank {rank} failed with {kind}: {text.strip().splitlines()[0] if text.strip() else ''}", trace)
    error: LongspanError = refusal(text)
    error.add_note(trace)
    return error


def _stopped(by: signal.Signals) -> RankDied:
    """The RankDied of a command that was stopped by a signal."""
    return RankDied(f"stopped by {by.name}; the ranks were ended", code=128 + by)


def _silence_the_agent() -> None:
    """Switch off the log lines of torch's elastic agent, because the caller prints the end of a rank in one sentence."""
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.addHandler(logging.NullHandler())


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Under a launcher one rank prints the failure that came first, by its name, and every rank ends with an exit code."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longspan.cli.failures import is_lost_connection
from longspan.errors import LostRankError, RunError
from tests.helpers.launched import free_port, srun_tasks, started

RANKS = 3
PROGRAM = """
import sys
from longspan.cli import launch, main
run, launch.run = launch.run, lambda work, config, ranks: run(sys.argv[1], config, ranks)
sys.exit(main.main(["train", "--ulysses", "3", *sys.argv[2:]]))
"""


def one_is_killed(_: object) -> int:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return _wait_for_the_others()


def one_has_a_bug(_: object) -> int:
    if dist.get_rank() == 1:
        raise KeyError("a bug")
    return _wait_for_the_others()


def one_refuses(_: object) -> int:
    if dist.get_rank() == 1:
        raise RunError("rank 1 cannot: so")
    return _wait_for_the_others()


def _wait_for_the_others() -> int:
    dist.all_reduce(torch.zeros(1))
    time.sleep(60)
    return 0


def ran(work: str, folder: Path, *flags: str) -> tuple[list[int], list[str]]:
    """The exit codes of the ranks of a job in which ``work`` runs, as srun starts them, and the lines that they print."""
    command = [sys.executable, "-c", PROGRAM, f"tests.cli.test_failures:{work}", *flags]
    done = started(srun_tasks(RANKS, MASTER_PORT=free_port()), command, folder)
    return [code for code, _ in done], [line for _, text in done for line in text.splitlines() if line.startswith("longspan:")]


def test_a_killed_rank_is_named_by_one_of_the_others(tmp_path: Path) -> None:
    codes, lines = ran("one_is_killed", tmp_path)
    assert codes == [1, -signal.SIGKILL, 1]
    assert len(lines) == 1, lines
    assert lines[0].startswith("longspan: rank 1 has ended without a message, or does not answer; rank ")
    assert "longspan train --resume" in lines[0]


@pytest.mark.parametrize(
    ("work", "code", "line"),
    [("one_has_a_bug", 1, "rank 1 failed with KeyError: 'a bug'"), ("one_refuses", 2, "rank 1 cannot: so")],
)
def test_the_first_failure_is_printed_and_not_what_follows_from_it(work: str, code: int, line: str, tmp_path: Path) -> None:
    codes, lines = ran(work, tmp_path)
    assert codes == [1, code, 1]
    assert [text for text in lines if line in text] == lines
    assert len(lines) == 1


def test_flags_that_are_refused_before_the_ranks_meet_are_refused_once(tmp_path: Path) -> None:
    codes, lines = ran("one_is_killed", tmp_path, "--no-such-flag", "1")
    assert codes == [2, 2, 2]
    assert len(lines) == 1, lines


def test_what_is_a_lost_connection() -> None:
    lost = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3000"
    assert is_lost_connection(RuntimeError(lost))
    assert is_lost_connection(LostRankError("rank 1 waited"))
    assert not is_lost_connection(RuntimeError("CUDA out of memory"))
    assert not is_lost_connection(KeyError("gloo/transport"))

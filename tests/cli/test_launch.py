"""Ranks that start, that refuse, that fail and that are killed: each ends all of them, with one exception for the caller."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longspan.cli import launch
from longspan.cli.metrics import Output
from longspan.errors import LongspanError, RunError
from tests.helpers import processes

pytestmark = pytest.mark.usefixtures("launcher")


def count_off(folder: str) -> int:
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    Path(folder, f"rank{dist.get_rank()}").write_text(f"{int(total)} of {dist.get_world_size()}")
    return 0


def name_the_parent(folder: str) -> int:
    Path(folder, f"parent{dist.get_rank()}").write_text(str(os.getppid()))
    return 0


def one_gives_up(rank: int) -> int:
    return 1 if dist.get_rank() == rank else 0


def all_refuse(text: str) -> int:
    raise RunError(text)


def one_refuses(rank: int) -> int:
    if dist.get_rank() == rank:
        raise RunError(f"rank {rank} cannot: so")
    return _wait_for_ever()


def one_is_killed(rank: int) -> int:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return _wait_for_ever()


def one_has_a_bug(rank: int) -> int:
    if dist.get_rank() == rank:
        raise KeyError("a bug")
    return _wait_for_ever()


def print_for_ever(folder: str) -> int:
    Path(folder, f"rank{dist.get_rank()}").write_text(str(os.getpid()))
    dist.barrier()
    while dist.get_rank() > 0:
        time.sleep(1)
    while True:
        Output().print("a line")


def _wait_for_ever() -> int:
    dist.all_reduce(torch.zeros(1))
    time.sleep(600)
    return 0


def test_ranks_form_one_world(tmp_path: Path) -> None:
    assert launch.run("tests.cli.test_launch:count_off", str(tmp_path), 3) == 0
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(3)] == ["6 of 3"] * 3


def test_ranks_are_not_forked_from_the_process_that_has_the_agent_s_threads(tmp_path: Path) -> None:
    assert launch.run("tests.cli.test_launch:name_the_parent", str(tmp_path), 2) == 0
    parents = {(tmp_path / f"parent{rank}").read_text() for rank in range(2)}
    assert len(parents) == 1
    assert str(os.getpid()) not in parents


def test_the_exit_code_is_that_of_the_worst_rank() -> None:
    assert launch.run("tests.cli.test_launch:one_gives_up", 1, 2) == 1


def test_a_refusal_of_all_ranks_is_raised_once_word_for_word() -> None:
    with pytest.raises(RunError) as error:
        launch.run("tests.cli.test_launch:all_refuse", "no: it cannot be; do that: so", 2)
    assert str(error.value) == "no: it cannot be; do that: so"
    assert "in all_refuse" in "".join(error.value.__notes__)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_refusal_of_one_rank_ends_the_others(rank: int) -> None:
    with pytest.raises(LongspanError, match=f"rank {rank} cannot: so"):
        launch.run("tests.cli.test_launch:one_refuses", rank, 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_ends_the_others(rank: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(launch.RankDied, match=f"rank {rank} was ended by SIGKILL"):
        launch.run("tests.cli.test_launch:one_is_killed", rank, 3)
    assert capfd.readouterr().err == ""


def test_a_bug_is_named_with_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(launch.RankDied, match="rank 1 failed with KeyError: 'a bug'") as died:
        launch.run("tests.cli.test_launch:one_has_a_bug", 1, 2)
    assert "in one_has_a_bug" in died.value.trace
    assert capfd.readouterr().err == ""


def test_under_torchrun_it_joins(tmp_path: Path) -> None:
    program = tmp_path / "joins.py"
    program.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from longspan.cli import launch
sys.exit(launch.run("tests.cli.test_launch:count_off", {str(tmp_path)!r}, 7))
""")
    flags = ["--local-addr=127.0.0.1", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = processes.run([*torchrun, str(program)], env=environment)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["3 of 2"] * 2


def test_a_closed_pipe_and_ctrl_c_end_all_ranks_quietly(tmp_path: Path) -> None:
    """As ``longspan train | head -1``, and as a user who stops it: all processes of a terminal get the signal."""
    program = f"""
import sys
from longspan.cli import launch, main
run, launch.run = launch.run, lambda work, config, ranks: run("tests.cli.test_launch:print_for_ever", {str(tmp_path)!r}, 2)
sys.exit(main.main(["train", "--run", "mine"]))
"""
    for stop, code, output in [
        ("close", 141, ""),
        (
            "signal",
            130,
            "longspan: stopped by SIGINT; the ranks were ended; if it had made a checkpoint, go on from it with: "
            "longspan train --resume mine\n",
        ),
    ]:
        process = processes.start([sys.executable, "-c", program])
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "a line\n"
            if stop == "close":
                process.stdout.close()
                process.stdout = None
            else:
                os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (code, output)
            assert processes.left_of(process.pid) == set()
            for rank in range(2):
                pid = (tmp_path / f"rank{rank}").read_text()
                assert not Path(f"/proc/{pid}").exists()
        finally:
            processes.end(process)

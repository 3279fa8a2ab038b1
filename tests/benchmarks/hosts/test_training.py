"""Training over two hosts of two ranks: the losses of one process; a rank that is killed; going on from its checkpoint."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.hosts import namespaces, ranks
from tests.helpers import processes

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(namespaces.why_not() is not None, reason=str(namespaces.why_not())),
]

HOSTS, RANKS_PER_HOST, TIMEOUT_SECONDS, STEPS = 2, 2, 60, 16
WORDS = ["def", "return", "self", "import", "class", "for", "in", "not", "None", "True", "yield", "lambda", "while", "with"]


@pytest.fixture
def two_hosts() -> Iterator[namespaces.Hosts]:
    with namespaces.hosts(HOSTS) as made:
        yield made


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """A small training run on 24 kB of words that repeat."""
    choose = random.Random(0)
    documents = [" ".join(choose.choices(WORDS, k=120)) for _ in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    steps = [
        "--steps",
        str(STEPS),
        "--tokens",
        "64",
        "--eval-rows",
        "2",
        "--warmup-steps",
        "2",
        "--checkpoint-every-steps",
        "4",
    ]
    return [*steps, "--data", str(tmp_path / "text.jsonl")]


def _start(hosts: namespaces.Hosts, arguments: Sequence[str]) -> list["subprocess.Popen[str]"]:
    program = ["-m", "--", "longspan.cli.main", "train", "--timeout-seconds", str(TIMEOUT_SECONDS), *arguments]
    commands = [ranks.torchrun(hosts, host, RANKS_PER_HOST, program, elastic=True) for host in range(HOSTS)]
    environment = {name: value for name, value in ranks.environment().items() if name != "GLOO_SOCKET_IFNAME"}  # it is derived
    return [processes.start(command, env=environment, cwd=ranks.ROOT) for command in commands]


def _end(running: Sequence["subprocess.Popen[str]"], timeout: float) -> list[tuple[int, str]]:
    """(exit code, output) of every host."""
    try:
        outputs = ["".join(process.communicate(timeout=timeout)) for process in running]
    finally:
        for process in running:
            processes.end(process)
    return [(process.returncode, output) for process, output in zip(running, outputs)]


def _records(folder: Path, run: str) -> list[dict[str, float]]:
    path = folder / run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if "loss" in record]


def _column(folder: Path, run: str, name: str) -> list[float]:
    return [record[name] for record in _records(folder, run)]


def _rank_process(hosts: namespaces.Hosts, host: int, rank: int) -> int:
    """The id of the process that is a rank on a host."""
    found = subprocess.run(["ip", "netns", "pids", hosts.names[host]], capture_output=True, text=True, check=True)
    of_rank = f"RANK={rank}".encode()
    (pid,) = [int(pid) for pid in found.stdout.split() if of_rank in Path("/proc", pid, "environ").read_bytes().split(b"\0")]
    return pid


def test_losses_are_those_of_one_process(two_hosts: namespaces.Hosts, flags: list[str], tmp_path: Path) -> None:
    folder = ["--runs-folder", str(tmp_path)]
    alone = [sys.executable, "-m", "longspan.cli.main", "train", *flags, "--ranks", "1", "--ulysses", "1", "--run", "one"]
    assert processes.run([*alone, *folder], env=ranks.environment() | {"GLOO_SOCKET_IFNAME": "lo"}, timeout=600).returncode == 0
    layout = ["--ulysses", "2", "--ring", "2", "--run", "four"]
    assert [code for code, _ in _end(_start(two_hosts, [*flags, *layout, *folder]), 600)] == [0, 0]
    assert _column(tmp_path, "four", "loss") == pytest.approx(_column(tmp_path, "one", "loss"), rel=1e-5)
    assert _column(tmp_path, "four", "grad_norm") == pytest.approx(_column(tmp_path, "one", "grad_norm"), rel=1e-4)
    assert len(_records(tmp_path, "four")) == STEPS


def test_a_killed_rank_ends_both_hosts_and_the_run_goes_on_bit_by_bit(
    two_hosts: namespaces.Hosts, flags: list[str], tmp_path: Path
) -> None:
    layout = ["--ulysses", "4", "--runs-folder", str(tmp_path)]
    assert [code for code, _ in _end(_start(two_hosts, [*flags, *layout, "--run", "whole"]), 600)] == [0, 0]

    running = _start(two_hosts, [*flags, *layout, "--run", "killed"])
    until = time.monotonic() + 600
    while len(_records(tmp_path, "killed")) < 6 and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(_rank_process(two_hosts, host=1, rank=3), signal.SIGKILL)
    killed = time.monotonic()
    ended = _end(running, 300)
    assert time.monotonic() - killed < TIMEOUT_SECONDS
    assert 4 < len(_records(tmp_path, "killed")) < STEPS
    assert [code for code, _ in ended] == [1, 1]
    outputs = [output for _, output in ended]
    assert re.search(r"Root Cause(.|\n)*rank +: 3 \(local_rank: 1\)\n +exitcode +: -9 ", outputs[1])
    # rank 2 too, where torchrun has ended it with its neighbour before it could check in
    assert re.search(r"longspan: (rank 2 or )?rank 3 has ended without a message", "\n".join(outputs))

    resumed = _end(_start(two_hosts, ["--resume", "killed", "--runs-folder", str(tmp_path)]), 600)
    assert [code for code, _ in resumed] == [0, 0]
    for name in ("step", "loss", "grad_norm", "learning_rate"):
        assert _column(tmp_path, "killed", name) == _column(tmp_path, "whole", name)

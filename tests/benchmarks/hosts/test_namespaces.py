"""Hosts on one machine: what the kernel counts, the limit of a link, and that nothing is left after a failure or Ctrl-C."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.hosts import namespaces, ranks
from benchmarks.hosts.counters import HEADER_BYTES, Counted
from tests.helpers import processes

needs_root = pytest.mark.skipif(namespaces.why_not() is not None, reason=str(namespaces.why_not()))

RECEIVE = """
import socket, sys
server = socket.create_server(("", 5555))
print("listening", flush=True)
connection, _ = server.accept()
while connection.recv(1 << 20):
    pass
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 5555)) as connection:
    connection.sendall(bytes(int(sys.argv[2])))
"""
WAIT = """
import signal, sys, time
from benchmarks.hosts import namespaces
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with Ctrl-C ignored
with namespaces.hosts(2) as made:
    namespaces.subprocess.Popen(made.command(1, ["sleep", "600"]))
    print(made.names[0].rpartition("-")[0], flush=True)
    time.sleep(600)
"""


def _mine(prefix: str = f"{namespaces.PREFIX}{os.getpid()}-") -> list[str]:
    return [name for name in namespaces.existing() if name.startswith(prefix)]


def test_without_root_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert namespaces.why_not() == (
        "several hosts on one machine need root, which may make network namespaces; run it as root on Linux"
    )
    with pytest.raises(RuntimeError, match="need root"), namespaces.hosts(2):
        pass


def test_without_iproute2_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert namespaces.why_not() == "several hosts on one machine need ip and tc of iproute2; install the package iproute2"


def test_the_command_is_skipped_with_that_sentence() -> None:
    program = """
import os, sys
os.geteuid = lambda: 1000
sys.argv[1:] = ["traffic"]
from benchmarks.hosts.__main__ import main
main()
"""
    done = processes.run([sys.executable, "-c", program], cwd=ranks.ROOT, env=ranks.environment())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("skipped: several hosts on one machine need root")
    assert len(done.stdout.splitlines()) == 1


def test_headers_are_not_payload() -> None:
    assert (Counted(10_000, 12) - Counted(1_000, 2)).payload == 9_000 - 10 * HEADER_BYTES


@needs_root
def test_the_kernel_counts_what_a_program_sends_and_headers() -> None:
    with namespaces.hosts(2) as made:
        receiver = processes.start(made.command(0, [sys.executable, "-c", RECEIVE]))
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "listening\n"
        before = Counted(*made.sent(1))
        done = processes.run(made.command(1, [sys.executable, "-c", SEND, made.address(0), "1000000"]))
        assert done.returncode == 0, done.stderr
        receiver.communicate(timeout=60)
        counted = Counted(*made.sent(1)) - before
    # The address is asked for, and the connection opened; a busy machine sends a segment that is late again.
    assert -100 < counted.payload - 1_000_000 < 100 + 2 * namespaces.MTU
    assert counted.frames >= 1_000_000 / (namespaces.MTU - HEADER_BYTES + 14), "frames are counted, not longer segments"
    assert counted.bytes < 1.03 * 1_000_000


@needs_root
def test_a_link_has_its_rate_at_both_ends() -> None:
    with namespaces.hosts(2, mbit=200) as made:
        switch = f"{made.names[0].rpartition('-')[0]}-switch"
        for place, interface in ((made.names[1], namespaces.INTERFACE), (switch, "port1")):
            shown = processes.output(["ip", "netns", "exec", place, "tc", "qdisc", "show", "dev", interface])
            assert shown.startswith("qdisc tbf")
            assert "rate 200Mbit" in shown


@needs_root
def test_nothing_is_left_after_a_failure() -> None:
    before = processes.output(["ip", "-o", "link", "show"]).count("\n")
    started = []

    def fail_on_hosts() -> None:
        with namespaces.hosts(2) as made:
            started.append(subprocess.Popen(made.command(0, ["sleep", "600"])))
            assert len(_mine()) == 3
            assert processes.output(["ip", "-o", "link", "show"]).count("\n") == before, (
                "the machine's own network is unchanged"
            )
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_on_hosts()
    assert _mine() == []
    assert started[0].wait(10) == -signal.SIGKILL


@needs_root
def test_nothing_is_left_if_a_host_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "MTU", -5)
    with pytest.raises(RuntimeError, match="failed"), namespaces.hosts(2):
        pass
    assert _mine() == []


@needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_after_ctrl_c_or_the_next_run(number: signal.Signals) -> None:
    with processes.start([sys.executable, "-c", WAIT], cwd=ranks.ROOT, env=ranks.environment()) as running:
        try:
            assert running.stdout is not None
            prefix = running.stdout.readline().strip()
            assert len(_mine(f"{prefix}-")) == 3
            os.kill(running.pid, number)
            running.wait(30)
        finally:
            processes.end(running)
    if number == signal.SIGKILL:  # no program can clear up after that; the next one does
        namespaces.clear_leftovers()
    assert _mine(f"{prefix}-") == []


@needs_root
@pytest.mark.long
def test_a_failing_rank_ends_all_hosts_and_is_shown(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import os, time\nassert os.environ['RANK'] != '1', 'rank 1 is broken'\ntime.sleep(600)\n")
    with namespaces.hosts(2) as made:
        started = time.monotonic()
        with pytest.raises(RuntimeError, match=r"ranks of host 1 failed:(.|\n)*rank 1 is broken"):
            ranks.run(made, 1, [str(program)], timeout=300)
        assert time.monotonic() - started < 300
        for name in made.names:
            assert processes.output(["ip", "netns", "pids", name]) == ""

"""Several hosts on one machine: Linux network namespaces on a bridge, with a rate limit on every link.

    host 0             host 1              a host has its own interface, address and counters
     eth0               eth0
      | veth             | veth            tbf on both ends of a link limits what a host sends and what it receives
    port0 --- br0 --- port1                in a namespace of its own: the machine's own network gets nothing new

Needs root and iproute2; ``why_not`` says what is missing. The names carry the id of this process, so several runs can be on one
machine, and one that was killed by SIGKILL is cleared by the next. The kernel here has no netem: links have a rate, no delay.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PREFIX = "longspan"
INTERFACE = "eth0"
MTU = 9000
"""Jumbo frames, as clusters use them: 66 bytes of headers a frame are 0.7 % of it; of frames of 1500 bytes they are 4.6 %."""
BURST_BYTES = 3 * MTU
"""What tbf lets pass at once: less than a segment of 64 KiB, which it therefore cuts into frames before they are counted."""
QUEUE_BYTES = 256 * 2**20
"""The queue of tbf, so long that it drops nothing: TCP then sends nothing twice, and bytes over the rate is the time."""


@dataclass(frozen=True)
class Hosts:
    """The hosts that exist: ``names`` of their namespaces, host 0 first."""

    names: tuple[str, ...]

    def address(self, host: int) -> str:
        """The address of a host, inside the namespaces only."""
        return f"10.77.{(host + 1) // 256}.{(host + 1) % 256}"

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """``command`` as it is run on a host."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def sent(self, host: int) -> tuple[int, int]:
        """(bytes, frames) that the kernel has counted at the interface of a host as sent."""
        (link,) = json.loads(_run("ip", "-n", self.names[host], "-s", "-j", "link", "show", INTERFACE))
        return int(link["stats64"]["tx"]["bytes"]), int(link["stats64"]["tx"]["packets"])

    def end_processes(self) -> None:
        """Kill every process that runs on a host."""
        for name in self.names:
            _end_processes(name)


def why_not() -> str | None:
    """None where hosts can be made on this machine, else one sentence that says what is missing."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "several hosts on one machine need root, which may make network namespaces; run it as root on Linux"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"several hosts on one machine need {' and '.join(missing)} of iproute2; install the package iproute2"
    name = f"{PREFIX}{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    if tried.returncode:
        return f"this machine refuses network namespaces ({tried.stderr.strip()}); run it where root has CAP_SYS_ADMIN"
    return None


@contextmanager
def hosts(count: int, mbit: float | None = None) -> Iterator[Hosts]:
    """Context manager that makes ``count`` hosts and removes them, with all their processes, also after a failure or Ctrl-C.

    Args:
        count: the number of hosts.
        mbit: the rate of every link in each direction, in Mbit/s; None: as fast as the machine is.

    Raises:
        RuntimeError: where ``why_not`` gives a reason, or a command of iproute2 fails.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    clear_leftovers()
    names = [f"{PREFIX}{os.getpid()}-{host}" for host in range(count)]
    switch = f"{PREFIX}{os.getpid()}-switch"
    made = Hosts(tuple(names))
    try:
        _make_switch(switch)
        for host, name in enumerate(names):
            _make_host(name, switch, host, made.address(host), mbit)
        for name in names:
            _introduce(name, made)
        yield made
    finally:
        with _undisturbed():
            for name in [*names, switch]:
                _remove(name)


def clear_leftovers() -> None:
    """Remove the namespaces of earlier processes that have ended without removing them."""
    for name in existing():
        owner = re.match(rf"{PREFIX}(\d+)-", name)
        if owner and not Path("/proc", owner[1]).exists():
            _remove(name)


def existing() -> list[str]:
    """The names of all network namespaces of this machine."""
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]


def _make_switch(switch: str) -> None:
    _run("ip", "netns", "add", switch)
    _run("ip", "-n", switch, "link", "add", "name", "br0", "mtu", str(MTU), "type", "bridge")
    _run("ip", "-n", switch, "link", "set", "br0", "up")


def _make_host(name: str, switch: str, host: int, address: str, mbit: float | None) -> None:
    port = f"port{host}"
    _run("ip", "netns", "add", name)
    own = ("name", INTERFACE, "address", _hardware_address(host), "netns", name)
    _run("ip", "link", "add", *own, "type", "veth", "peer", "name", port, "netns", switch)
    for place, interface in ((name, INTERFACE), (switch, port)):
        # without IPv6 nothing but the ranks sends; with one segment a buffer the kernel counts frames as a wire carries them
        _run("ip", "netns", "exec", place, "sh", "-c", f"echo 1 > /proc/sys/net/ipv6/conf/{interface}/disable_ipv6 || true")
        _run("ip", "-n", place, "link", "set", interface, "mtu", str(MTU), "gso_max_segs", "1")
        if mbit is not None:
            _limit(place, interface, mbit)
    _run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
    _run("ip", "-n", name, "link", "set", "lo", "up")
    _run("ip", "-n", name, "addr", "add", f"{address}/16", "dev", INTERFACE)
    _run("ip", "-n", name, "link", "set", INTERFACE, "up")


def _hardware_address(host: int) -> str:
    return f"02:00:00:00:{host // 256:02x}:{host % 256:02x}"


def _introduce(name: str, made: Hosts) -> None:
    """Let the host called ``name`` know the hardware addresses of all hosts of ``made``.

    Else each asks for every other, which is traffic too, and the kernel keeps 1,024 answers for all namespaces together: 40
    hosts have 1,560, and some of them would not connect.
    """
    known = [
        f"neigh replace {made.address(host)} lladdr {_hardware_address(host)} dev {INTERFACE} nud permanent"
        for host in range(len(made.names))
        if made.names[host] != name
    ]
    _run("ip", "-n", name, "-batch", "-", given="\n".join(known))


def _limit(place: str, interface: str, mbit: float) -> None:
    rate = ("rate", f"{round(mbit * 1e6)}bit", "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES))
    _run("ip", "netns", "exec", place, "tc", "qdisc", "add", "dev", interface, "root", "tbf", *rate)


def _remove(name: str) -> None:
    if name in existing():
        _end_processes(name)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _end_processes(name: str) -> None:
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    for pid in found.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Context manager in which a second Ctrl-C does not stop the removal."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run(*command: str, given: str = "") -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout

"""The network interface on which gloo and NCCL connect ranks of several hosts: that of the route to MASTER_ADDR.

    rank 0, on a    a is MASTER_ADDR, here a loopback address  --+--> store -->   the route to 10.0.0.2      eth0
    rank 1, on b    the route to a begins at 10.0.0.2          --+                10.0.0.2 belongs to        eth1

Left alone, gloo takes the interface of the host's name, which on many clusters is a loopback address or a network for logins.
GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are set where they are unset, only for ranks on several hosts, and on Linux only.
"""

import fcntl
import json
import platform
import socket
import struct
from collections.abc import MutableMapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from longspan.errors import RunError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
READ_ADDRESS = 0x8915
"""SIOCGIFADDR, the ioctl that returns the IPv4 address of an interface."""
IPV6_ADDRESSES = Path("/proc/net/if_inet6")
"""A line for each IPv6 address: 32 hexadecimal digits, four numbers, the interface."""
REMEDY = f"set {GLOO} (and {NCCL}) on each host to the interface that the other hosts reach; ip addr lists them"


def choose_interface(environment: MutableMapping[str, str], store: Any, rank: int, ranks: int) -> str | None:
    """Where ranks are on several hosts, set those of GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME that are unset.

    Both get the interface of this host's route to MASTER_ADDR, on that host itself of its route to another rank's host; if
    gloo's is set, NCCL gets the same.

    Args:
        environment: of this rank, with MASTER_ADDR.
        store: the ``torch.distributed.Store`` in which the ranks have met; all of them must call this.
        rank, ranks: of this process.

    Returns:
        The interface that gloo uses; None where all ranks are on one host, whose choice is left to gloo.

    Raises:
        RunError: on every rank alike, where some rank names an interface that its host does not have, or where the interface
            of a route cannot be found.
    """
    if ranks == 1 or environment.get("LOCAL_WORLD_SIZE") == str(ranks):
        return None
    address = source_address(environment["MASTER_ADDR"])
    addresses = _exchange("address", address, store, rank, ranks)
    others = [other for other in addresses if other]
    if len(set(addresses)) == 1:
        return None
    named, master = environment.get(GLOO, ""), environment["MASTER_ADDR"]
    name = named or interface_of(address or source_address(others[0]))
    asked = f"{GLOO}={named}" if named else f"the interface on the route to MASTER_ADDR={master}"
    legal = [] if name and set(name.split(",")) <= set(interfaces()) else interfaces()
    mine = json.dumps([platform.node(), asked, legal])
    for other, (host, asked, legal) in enumerate(map(json.loads, _exchange("interface", mine, store, rank, ranks))):
        if legal:
            raise RunError(f"{asked} of rank {other} is not among those of its host {host}: {', '.join(legal)}; {REMEDY}")
    environment.setdefault(GLOO, name)
    environment.setdefault(NCCL, f"={name}")  # without "=" NCCL takes every interface whose name begins so
    return name


def interfaces() -> list[str]:
    """The names of this host's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def source_address(host: str) -> str:
    """The address from which this host reaches ``host``: "" if it is a loopback address, or if there is no route."""
    try:
        family, *_, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # of a datagram socket: it looks up the route, and sends nothing
            found = str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return ""
    return "" if ip_address(found).is_loopback else found


def interface_of(address: str) -> str:
    """The interface of this host that has ``address``; "" if there is none, or if this is not Linux."""
    wanted = ip_address(address) if address else None
    return next((name for name, own in _own_addresses() if ip_address(own) == wanted), "")


def _own_addresses() -> list[tuple[str, str]]:
    """(interface, address) of this host: each interface's first IPv4 address, and all IPv6 addresses."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in interfaces():
            try:
                answer = fcntl.ioctl(probe.fileno(), READ_ADDRESS, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address, or another system than Linux
                continue
            found.append((name, socket.inet_ntoa(answer[20:24])))
    lines = IPV6_ADDRESSES.read_text().splitlines() if IPV6_ADDRESSES.exists() else []
    return found + [(line.split()[-1], socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line.split()[0]))) for line in lines]


def _exchange(what: str, mine: str, store: Any, rank: int, ranks: int) -> Sequence[str]:
    """Each rank's text, in rank order."""
    store.set(f"longspan/{what}/{rank}", mine)
    return [text.decode() for text in store.multi_get([f"longspan/{what}/{other}" for other in range(ranks)])]

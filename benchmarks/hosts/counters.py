"""The kernel's counters of this host's interface: bytes and frames sent. Run inside a network namespace.

A frame of TCP has 66 bytes of headers: 14 of Ethernet, 20 of IPv4, 32 of TCP with timestamps. An acknowledgement is a frame
without anything else. So ``bytes - 66 * frames`` is what the program gave to its sockets, whatever the size of the frames, as
long as nothing is sent twice.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.hosts.namespaces import INTERFACE

HEADER_BYTES = 14 + 20 + 32


@dataclass(frozen=True)
class Counted:
    """What one interface has sent: bytes on the wire, and frames. Two can be subtracted."""

    bytes: int
    frames: int

    def __sub__(self, other: "Counted") -> "Counted":
        return Counted(self.bytes - other.bytes, self.frames - other.frames)

    @property
    def payload(self) -> int:
        """The bytes that are not headers or acknowledgements."""
        return self.bytes - HEADER_BYTES * self.frames


def sent() -> Counted:
    """What the interface of the namespace that this process is in has sent so far."""
    folder = Path("/sys/class/net", INTERFACE, "statistics")
    return Counted(*(int((folder / name).read_text()) for name in ("tx_bytes", "tx_packets")))

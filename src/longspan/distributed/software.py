"""What each rank runs: versions of libraries, a hash of longspan's own code, and the host; compared before anything else.

    rank 0   host a   torch 2.13.0   code 81fc...    \\
    rank 1   host a   torch 2.13.0   code 81fc...     >   equal, or one error: what differs, on which ranks and hosts
    rank 2   host b   torch 2.12.1   code 81fc...    /

Ranks with different code or libraries would take part in different collectives, or round differently. Independent of meshes.
"""

import hashlib
import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch.distributed as dist

import longspan
from longspan.distributed.consensus import first_difference, gather
from longspan.errors import LayoutError, RunError

LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """One rank: the mesh that it asks for, as text; the host that it runs on; what it runs, by name."""

    mesh: str
    host: str
    software: dict[str, str]


@cache
def software() -> dict[str, str]:
    """Versions of Python, the libraries and longspan, and a hash of longspan's source files, by name."""
    libraries = {name: version(name) for name in LIBRARIES if find_spec(name)}
    return {"Python": platform.python_version(), **libraries, "longspan": longspan.__version__, "longspan's code": _code_hash()}


def compare_ranks(mesh: str, group: dist.ProcessGroup) -> tuple[str, ...]:
    """Compare what all ranks run and the mesh that they ask for.

    Args:
        mesh: what this rank asks for, as text.
        group: all ranks, on gloo.

    Returns:
        The host of each rank.

    Raises:
        RunError: on every rank alike, where versions or code differ.
        LayoutError: on every rank alike, where the meshes differ.
    """
    ranks = gather(RankFacts(mesh=mesh, host=socket.gethostname(), software=software()), group)
    refuse_other_software(ranks)
    for rank, other in enumerate(ranks):
        if other.mesh != ranks[0].mesh:
            raise LayoutError(
                f"rank 0 asks for {ranks[0].mesh} but rank {rank} for {other.mesh}; every rank must ask for the same mesh"
            )
    return tuple(rank.host for rank in ranks)


def refuse_other_software(ranks: Sequence[RankFacts]) -> None:
    """Raise RunError if ranks run different software; the message names all that differs, one rank that has it, and hosts."""
    difference = first_difference([rank.software for rank in ranks])
    if difference is None:
        return
    first, other = ranks[0], ranks[difference.rank]
    names = sorted({**first.software, **other.software})
    differ = [name for name in names if first.software.get(name) != other.software.get(name)]
    listed = "; ".join(
        f"{name} is {first.software.get(name, 'missing')} on rank 0 and {other.software.get(name, 'missing')} on rank "
        f"{difference.rank}"
        for name in differ
    )
    raise RunError(
        f"ranks run different software: {listed} (rank 0 is on host {first.host}, rank {difference.rank} on {other.host}); "
        f"install the same versions, and the same files of longspan, for all ranks"
    )


def _code_hash() -> str:
    """A hash of the names and contents of longspan's Python files."""
    root, digest = Path(longspan.__file__).parent, hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()

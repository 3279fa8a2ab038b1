"""The rank that a launcher gave this process, read from its environment. Integers and text only: no torch, no sockets.

    torchrun            RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    mpirun (Open MPI)   OMPI_COMM_WORLD_RANK _SIZE _LOCAL_RANK _LOCAL_SIZE
    mpiexec (Intel MPI, MPICH)      PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS
    srun                SLURM_PROCID SLURM_NTASKS SLURM_LOCALID SLURM_NODELIST

A Kubernetes TrainJob sets PET_NNODES, PET_NPROC_PER_NODE and more, which torchrun reads in place of its flags.
``join_launcher`` adds torchrun's variables to the environment of another launcher's process, so that all code (PyTorch and
accelerate too) reads one set of names. The address of rank 0 is the first host of the node list, or this machine where all
ranks are on it, unless MASTER_ADDR is set; the port is made of the job's number, unless MASTER_PORT is set.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

from longspan.errors import RunError

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables that a process needs to join its world."""
LOOPBACK = "127.0.0.1"
FIRST_PORT, PORTS = 10_000, 20_000
"""Ports below those that Linux gives to outgoing connections."""
JOBS = ("SLURM_JOB_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
"""Environment variables of launchers and schedulers that have the same value on all ranks of a job, and identify it."""


@dataclass(frozen=True, kw_only=True)
class LaunchedRank:
    """One of several ranks that a launcher other than torchrun started, and the address and port at which the ranks meet.

    Attributes:
        launcher: its name, for messages: "Slurm (srun)".
        rank: this process among all ``ranks`` ranks, from 0.
        local_rank: its number on its machine, from 0.
        address, port: host name or IP, and TCP port, of rank 0's machine.
    """

    launcher: str
    rank: int
    ranks: int
    local_rank: int
    local_ranks: int | None
    """The ranks on this machine; None where the launcher does not say."""
    address: str
    port: int


def joins_world(environment: Mapping[str, str]) -> bool:
    """Whether ``environment`` has all variables of ``TORCHRUN``, with which a process can join a world as one of its ranks."""
    return environment.keys() >= set(TORCHRUN)


def join_launcher(environment: MutableMapping[str, str]) -> LaunchedRank | None:
    """Add torchrun's variables to an ``environment`` in which Open MPI, Intel MPI, MPICH or Slurm started one of several ranks.

    Args:
        environment: ``os.environ``, which is changed in place.

    Returns:
        The rank that was found; None, with nothing changed, where torchrun's variables are there already, or where no launcher
        or one that starts a single process is found.

    Raises:
        RunError: for variables that contradict each other, where the machine of rank 0 cannot be known, or for the variables
            of a Kubernetes job whose torchrun is missing.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return None
    found = launched_rank(environment)
    if found is None and environment.get("PET_NNODES", "1").partition(":")[0] not in ("0", "1"):
        raise RunError(
            f"PET_NNODES={environment['PET_NNODES']} asks torchrun for ranks on several machines, but torchrun did not start "
            f"this process; start it by torchrun loop.py, or by torchrun --no-python -- longspan train"
        )
    if found is not None:
        environment.update({
            "RANK": str(found.rank), "WORLD_SIZE": str(found.ranks), "LOCAL_RANK": str(found.local_rank),
            "MASTER_ADDR": found.address, "MASTER_PORT": str(found.port),
        })  # fmt: skip
        if found.local_ranks is not None:
            environment["LOCAL_WORLD_SIZE"] = str(found.local_ranks)
    return found


def started_by(environment: Mapping[str, str]) -> str:
    """The name of the launcher that started this process, for an error message: "Slurm (srun)".

    If only torchrun's variables are there: "a launcher (RANK and WORLD_SIZE are set)".
    """
    found = launched_rank(environment)
    return "a launcher (RANK and WORLD_SIZE are set)" if found is None else found.launcher


def launched_rank(environment: Mapping[str, str]) -> LaunchedRank | None:
    """The rank that Open MPI, PMI (Intel MPI, MPICH) or Slurm gave this process, read from its variables in ``environment``.

    The first of them, in this order, whose variables are there decides, because mpirun inside a Slurm job passes on the job's
    variables, which describe the job and not the rank.

    Returns:
        None if the variables of none are there, or if the launcher that decides started one rank only.

    Raises:
        RunError: its variables contradict each other, or the machine of rank 0 cannot be known.
    """
    for read in (_of_open_mpi, _of_pmi, _of_slurm):
        found = read(environment)
        if found is not None:
            return found if found.ranks > 1 else None
    return None


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: ``first_host("gpu[03-05,9],login") == "gpu03"``."""
    first = re.match(r"[^,\[]*(?:\[[^\]]*\][^,\[]*)*", node_list.strip())
    assert first is not None  # the pattern also matches nothing
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def ranks_per_node(counts: str) -> list[int]:
    """The number of tasks on each node, from Slurm's short form: ``ranks_per_node("8(x2),4") == [8, 8, 4]``."""
    found: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        found += [int(count)] * int(times or 1)
    return found


def _of_open_mpi(environment: Mapping[str, str]) -> LaunchedRank | None:
    """The rank that Open MPI's variables in ``environment`` describe; None if they are not there."""
    name = "OMPI_COMM_WORLD_"
    if not environment.keys() >= {f"{name}RANK", f"{name}SIZE"}:
        return None
    return _launched(
        environment,
        launcher="Open MPI",
        rank=f"{name}RANK",
        ranks=f"{name}SIZE",
        local_rank=f"{name}LOCAL_RANK",
        local_ranks=lambda: _integer(environment, f"{name}LOCAL_SIZE"),
    )


def _of_pmi(environment: Mapping[str, str]) -> LaunchedRank | None:
    """The rank that the PMI variables of Intel MPI or MPICH in ``environment`` describe; None if they are not there."""
    if not environment.keys() >= {"PMI_RANK", "PMI_SIZE"}:
        return None
    # srun --mpi=pmi2 sets these beside its own, which tell the local rank.
    local_rank = next(
        (name for name in ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID") if name in environment), "MPI_LOCALRANKID"
    )
    local_ranks = next((name for name in ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE") if name in environment), "MPI_LOCALNRANKS")
    return _launched(
        environment,
        launcher="Intel MPI or MPICH",
        rank="PMI_RANK",
        ranks="PMI_SIZE",
        local_rank=local_rank,
        local_ranks=lambda: _integer(environment, local_ranks),
    )


def _of_slurm(environment: Mapping[str, str]) -> LaunchedRank | None:
    """The rank that Slurm's variables of a task (srun) in ``environment`` describe; None if they are not there."""
    ranks = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") if name in environment), "")
    if "SLURM_PROCID" not in environment or not ranks:
        return None

    def local_ranks() -> int | None:
        counts = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ""))
        each, node = ranks_per_node(counts), _integer(environment, "SLURM_NODEID") or 0
        return each[node] if node < len(each) else None

    return _launched(
        environment,
        launcher="Slurm (srun)",
        rank="SLURM_PROCID",
        ranks=ranks,
        local_rank="SLURM_LOCALID",
        local_ranks=local_ranks,
    )


def _launched(
    environment: Mapping[str, str],
    *,
    launcher: str,
    rank: str,
    ranks: str,
    local_rank: str,
    local_ranks: Callable[[], int | None],
) -> LaunchedRank:
    """The rank that a launcher describes in the variables of the given names.

    Args:
        environment: the variables; ``rank`` and ``ranks`` are among them.
        launcher: its name, for messages.
        rank, ranks, local_rank: the names of the variables with this rank, the number of ranks, and the rank on this machine.
        local_ranks: returns the number of ranks on this machine; None if it is not known.

    Raises:
        RunError: the variables contradict each other, or the machine of rank 0 cannot be known.
    """
    number, count = _integer(environment, rank), _integer(environment, ranks)
    if number is None or count is None or not 0 <= number < count:
        raise RunError(
            f"{launcher} started this process with {rank}={environment[rank]} and {ranks}={environment[ranks]}, which is no "
            f"rank of a world; start the ranks by torchrun, or unset {rank}"
        )
    local, here = _integer(environment, local_rank), local_ranks()
    alone = here == count or (here is None and local in (None, number) and not _several_nodes(environment))
    return LaunchedRank(
        launcher=launcher,
        rank=number,
        ranks=count,
        local_rank=number if local is None else local,
        local_ranks=count if alone else here,
        address=environment.get("MASTER_ADDR") or (LOOPBACK if alone else _first_node(environment, launcher)),
        port=_given_port(environment) or _port(environment),
    )


def _several_nodes(environment: Mapping[str, str]) -> bool:
    """Whether Slurm's variables say that the job has more than one node; False if they are not there."""
    nodes = next((name for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES") if name in environment), "")
    return (_integer(environment, nodes) or 1) > 1 or len(
        re.sub(r"\[[^\]]*[,-][^\]]*\]", ",", _nodes(environment)).split(",")
    ) > 1


def _nodes(environment: Mapping[str, str]) -> str:
    """Slurm's node list of the step or job, such as "gpu[03-05]"; "" if there is none."""
    names = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    return next((environment[name] for name in names if environment.get(name)), "")


def _first_node(environment: Mapping[str, str], launcher: str) -> str:
    """The host name of the first node in the job step's node list, or in the job's if the step has none: there rank 0 is.

    Args:
        environment: the variables of this process.
        launcher: the name of the launcher, for the error.

    Raises:
        RunError: there is no node list.
    """
    if not _nodes(environment):
        raise RunError(
            f"{launcher} started this process on one of several machines, and no node list says on which one rank 0 is; set "
            f"MASTER_ADDR on every rank to the name of that machine"
        )
    return first_host(_nodes(environment))


def _given_port(environment: Mapping[str, str]) -> int | None:
    """The port in MASTER_PORT; None if it is not set.

    Raises:
        RunError: it is no port from 1 to 65535.
    """
    port = _integer(environment, "MASTER_PORT")
    if environment.get("MASTER_PORT") and not 0 < (port or 0) < 65_536:
        raise RunError(f"MASTER_PORT={environment['MASTER_PORT']} is no port; set it to a number from 1 to 65535, or unset it")
    return port


def _port(environment: Mapping[str, str]) -> int:
    """A port from 10,000 to 29,999 computed from the job's number: equal on all ranks of a job, most likely not on another
    job's."""
    job = next((environment[name] for name in JOBS if environment.get(name)), "")
    text = f"{job} {environment.get('SLURM_STEP_ID', '')}"
    return FIRST_PORT + int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % PORTS


def _integer(environment: Mapping[str, str], name: str) -> int | None:
    """The value of the variable ``name`` as an integer; None if it is not set or not decimal digits."""
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else None

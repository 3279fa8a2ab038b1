"""The ranks of srun, Open MPI, Intel MPI and MPICH are found in their environment, and real processes train as one run."""

import sys
from pathlib import Path

import pytest

from longspan.distributed.launchers import (
    FIRST_PORT,
    PORTS,
    LaunchedRank,
    first_host,
    join_launcher,
    launched_rank,
    ranks_per_node,
)
from longspan.errors import RunError
from tests.helpers.launched import free_port, started

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_NODEID": "1"}
NODES = {"SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "8(x2)"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "1"}.items()}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}


def where(environment: dict[str, str]) -> tuple[int, int, int, int | None, str]:
    found = launched_rank(environment)
    assert found is not None
    assert FIRST_PORT <= found.port < FIRST_PORT + PORTS
    return found.rank, found.ranks, found.local_rank, found.local_ranks, found.address


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("gpu03", "gpu03"),
        ("gpu03,gpu04", "gpu03"),
        ("gpu[03-05,9],login", "gpu03"),
        ("gpu[9,03-05]", "gpu9"),
        ("rack[1-2]node[07-08]", "rack1node07"),
        ("a-b.c[10-11].site", "a-b.c10.site"),
    ],
)
def test_the_first_host_of_a_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


def test_the_tasks_of_each_node() -> None:
    assert ranks_per_node("8(x2),4") == [8, 8, 4]
    assert ranks_per_node("3") == [3]
    assert ranks_per_node("") == []


def test_each_launcher_names_its_rank() -> None:
    assert where(SLURM | NODES) == (11, 16, 3, 8, "gpu03")
    assert where(SLURM | NODES | {"SLURM_STEP_NUM_TASKS": "12", "SLURM_STEP_NODELIST": "gpu[04,06]"}) == (11, 12, 3, 8, "gpu04")
    one_node = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}
    assert where(one_node) == (1, 2, 1, 2, "127.0.0.1")
    assert where(one_node | {"SLURM_JOB_NODELIST": "gpu03", "SLURM_TASKS_PER_NODE": "2"}) == (1, 2, 1, 2, "127.0.0.1")
    assert where(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}) == (1, 2, 1, 2, "127.0.0.1")
    assert where(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "gpu01"}) == (1, 2, 1, 1, "gpu01")
    assert where(PMI) == (1, 2, 1, 2, "127.0.0.1")
    assert where(PMI | {"MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1", **NODES}) == (1, 2, 0, 1, "gpu03")


def test_mpirun_inside_a_slurm_job_is_open_mpi_s_rank_and_not_the_job_s() -> None:
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0", **NODES}
    assert where(batch_script | OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}) == (1, 2, 1, 1, "gpu03")
    assert where(SLURM | NODES | {"PMI_RANK": "11", "PMI_SIZE": "16"}) == (11, 16, 3, None, "gpu03")


def test_a_single_process_and_torchrun_s_ranks_are_left_alone() -> None:
    for alone in ({}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "8"}, {"PMI_RANK": "0", "PMI_SIZE": "1"}):
        environment = dict(alone)
        assert join_launcher(environment) is None
        assert environment == alone
    torchrun = SLURM | NODES | {"RANK": "0", "WORLD_SIZE": "2"}
    assert join_launcher(torchrun) is None
    assert torchrun["RANK"] == "0"


def test_torchrun_s_names_are_added_and_those_of_the_user_kept() -> None:
    environment = SLURM | NODES | {"MASTER_PORT": "1234"}
    assert isinstance(join_launcher(environment), LaunchedRank)
    added = {name: environment[name] for name in environment.keys() - (SLURM | NODES).keys()}
    assert added == {
        "RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "1234",
    }  # fmt: skip


def test_two_jobs_and_two_steps_of_a_job_have_ports_of_their_own() -> None:
    jobs = [SLURM | NODES | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step} for job in ("7", "8") for step in ("0", "1")]
    ports = [found.port for job in jobs if (found := launched_rank(job))]
    assert len(set(ports)) == 4


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        (
            {"SLURM_PROCID": "2", "SLURM_NTASKS": "2"},
            r"SLURM_PROCID=2 and SLURM_NTASKS=2, which is no rank of a world; .*torchrun",
        ),
        ({"PMI_RANK": "x", "PMI_SIZE": "2"}, r"PMI_RANK=x and PMI_SIZE=2, which is no rank"),
        (PMI | {"MPI_LOCALRANKID": "0"}, r"no node list says on which one rank 0 is; set MASTER_ADDR on every rank"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, r"Open MPI started this process on one of several machines"),
        (SLURM | NODES | {"MASTER_PORT": "http"}, r"MASTER_PORT=http is no port; .* from 1 to 65535"),
    ],
)
def test_what_cannot_be_joined_is_refused(environment: dict[str, str], text: str) -> None:
    with pytest.raises(RunError, match=text):
        launched_rank(environment)


TRAIN = """
import torch
from longspan import ParallelMesh, cross_entropy, shard_batch
mesh = ParallelMesh(ulysses=2)
ids = torch.arange(8).view(1, 8)
part = shard_batch({"input_ids": ids, "labels": ids}, mesh)
print(repr(mesh), mesh.coordinate.ulysses_rank, part["input_ids"].tolist(), part["longspan"].num_labels)
"""


def slurm_tasks(job: str) -> list[dict[str, str]]:
    return [{"SLURM_JOB_ID": job, "SLURM_NTASKS": "2", "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]


def processes_of(launcher: str) -> list[dict[str, str]]:
    names = {
        "srun": {"SLURM_PROCID": None, "SLURM_NTASKS": "2", "SLURM_LOCALID": None, "SLURM_JOB_NODELIST": "localhost"},
        "Open MPI": {"OMPI_COMM_WORLD_RANK": None, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": None},
        "Intel MPI": {"PMI_RANK": None, "PMI_SIZE": "2", "MPI_LOCALRANKID": None},
    }[launcher]
    return [{name: rank if value is None else value for name, value in names.items()} for rank in "01"]


@pytest.mark.long  # tests/cli/test_launched_runs.py joins the same world by the command
@pytest.mark.parametrize("launcher", ["srun", "Open MPI", "Intel MPI"])
def test_two_processes_become_one_world_in_a_loop_of_one_s_own(launcher: str, tmp_path: Path) -> None:
    port = {"MASTER_PORT": free_port()}
    found = started([one | port for one in processes_of(launcher)], [sys.executable, "-c", TRAIN], tmp_path)
    mesh = "ParallelMesh(data=1, ring=1, ulysses=2, device='cpu')"
    assert found == [(0, f"{mesh} 0 [[0, 1, 2, 3]] 7\n"), (0, f"{mesh} 1 [[4, 5, 6, 7]] 7\n")]


ALONE = """
import sys
from longspan.distributed import device, mesh
device.JOIN_SECONDS = 1
try:
    mesh.ParallelMesh()
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def test_a_task_whose_others_never_start_ends_with_a_sentence(tmp_path: Path) -> None:
    ((code, text),) = started([slurm_tasks("9")[0] | {"MASTER_PORT": free_port()}], [sys.executable, "-c", ALONE], tmp_path)
    assert code == 1
    assert "RunError: Slurm (srun) started this process as rank 0 of 2" in text
    assert "torchrun" in text

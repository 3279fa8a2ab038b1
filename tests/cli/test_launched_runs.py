"""``longspan train`` under each launcher is one run: the same losses, one folder, exit code 0, output of rank 0."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.helpers import processes
from tests.helpers.launched import free_port, srun_tasks, started

COMMAND = [
    "-m",
    "longspan.cli.main",
    "train",
    "--data",
    "text.txt",
    "--tokens",
    "64",
    "--steps",
    "2",
    "--eval-rows",
    "1",
    "--ulysses",
    "2",
]
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def open_mpi() -> list[dict[str, str]]:
    job = {"PMIX_NAMESPACE": "7", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    return [job | {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank} for rank in "01"]


def intel_mpi() -> list[dict[str, str]]:
    return [{"PMI_RANK": rank, "PMI_SIZE": "2", "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": "2"} for rank in "01"]


def trainjob_pods() -> list[dict[str, str]]:
    """Two pods of one process, as Kubeflow's runtime torch-distributed describes them."""
    job = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": free_port()}
    return [job | {"PET_NODE_RANK": rank} for rank in "01"]


def torchrun_c10d() -> list[dict[str, str]]:
    """Two nodes of one process that meet at the first, the variables of a Slurm job around them: ``srun torchrun``."""
    job = {"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "PET_RDZV_ID": "7"}
    return [one | job | {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_LOCAL_ADDR": "127.0.0.1"} for one in srun_tasks(2)]


LAUNCHERS = {
    "srun": (PYTHON, lambda: srun_tasks(2)),
    "mpirun": (PYTHON, open_mpi),
    "mpiexec": (PYTHON, intel_mpi),
    "a TrainJob's pods": (TORCHRUN, trainjob_pods),
    "srun torchrun": (TORCHRUN, torchrun_c10d),
}


def losses(folder: Path) -> list[float]:
    assert [run.name for run in (folder / "runs").glob("train-*")] == ["train-001"]
    records = [json.loads(line) for line in (folder / "runs/train-001/metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"paragraph {number} of a text that is long enough" * 4 for number in range(60)))
    return path


@pytest.fixture(scope="module")
def of_local_ranks(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run whose ranks longspan starts itself."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "text.txt").symlink_to(text)
    done = processes.run([*PYTHON, *COMMAND], cwd=folder, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return losses(folder)


@pytest.mark.long  # make test has torchrun in test_launch.py
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_s_ranks_are_one_run(launcher: str, text: Path, of_local_ranks: list[float], tmp_path: Path) -> None:
    (tmp_path / "text.txt").symlink_to(text)
    program, environments = LAUNCHERS[launcher]
    port = {} if program == TORCHRUN else {"MASTER_PORT": free_port()}
    done = started([one | port for one in environments()], [*program, *COMMAND], tmp_path)
    assert [code for code, _ in done] == [0, 0], done
    assert losses(tmp_path) == of_local_ranks
    spoke = [rank for rank, (_, output) in enumerate(done) if "held-out text" in output]
    assert len(spoke) == 1, "rank 0 alone speaks"


def test_a_pod_whose_command_is_not_torchrun_is_refused(text: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").symlink_to(text)
    ((code, output),) = started(trainjob_pods()[:1], [*PYTHON, *COMMAND], tmp_path)
    assert code == 2
    assert "PET_NNODES=2 asks torchrun for ranks on several machines" in output
    assert not (tmp_path / "runs").exists()

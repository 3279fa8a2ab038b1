"""The files of examples/cluster parse: by bash, by torchrun's and longspan's parsers, by a scheduler's where installed."""

import os
import re
import shlex
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from longspan.cli import main as cli
from longspan.cli.config import Train
from tests.helpers import processes

FOLDER = Path(__file__).parents[1] / "examples" / "cluster"
SLURM, TRAINJOB, SKYPILOT, DSTACK = "slurm.sub", "trainjob.yaml", "skypilot.yaml", "longspan.dstack.yml"
VARIABLES = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SKYPILOT_NUM_NODES": "4", "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "DSTACK_NODES_NUM": "4", "DSTACK_GPUS_PER_NODE": "8",
    "DSTACK_NODE_RANK": "1", "DSTACK_MASTER_NODE_IP": "10.0.0.1",
}  # fmt: skip
"""What each scheduler sets on the second of four nodes, by its documentation."""
PET = {
    "PET_NNODES": "4",
    "PET_NPROC_PER_NODE": "8",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "10.0.0.1",
    "PET_MASTER_PORT": "29500",
}


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def script(name: str) -> str:
    """The shell script in a file."""
    if name == SLURM:
        return (FOLDER / name).read_text()
    held = read(name)
    commands = {
        TRAINJOB: lambda: held["spec"]["trainer"]["args"],
        SKYPILOT: lambda: [held["run"]],
        DSTACK: lambda: held["commands"],
    }
    return "\n".join(commands[name]())


def stub(folder: Path, name: str, body: str) -> None:
    """A program for PATH that takes the place of one that this machine lacks."""
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def environment(folder: Path, **variables: str) -> dict[str, str]:
    return {**VARIABLES, "SLURM_JOB_NODELIST": "gpu[03-06]", **variables, "PATH": f"{folder}:{os.environ['PATH']}"}


def torchrun_call(name: str, folder: Path) -> list[str]:
    """The words with which the script of a file calls torchrun on the second node."""
    stub(folder, "torchrun", 'printf "%s\\n" "$@" > "$OUT"')
    stub(folder, "srun", 'shift; exec "$@"')
    stub(folder, "scontrol", "echo gpu03; echo gpu04")
    out = folder / "words"
    done = subprocess.run(["bash", "-c", script(name)], env=environment(folder, OUT=str(out)), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return out.read_text().splitlines()


@pytest.mark.parametrize("name", [SLURM, TRAINJOB, SKYPILOT, DSTACK])
def test_a_file_starts_the_run_on_every_gpu_of_four_nodes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = torchrun_call(name, tmp_path)
    for variable, value in PET.items() if name == TRAINJOB else ():
        monkeypatch.setenv(variable, value)
    parsed = get_args_parser().parse_args(words)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.no_python, parsed.training_script) == ("4", "8", True, "longspan")
    if name == SLURM:
        assert (parsed.rdzv_backend, parsed.rdzv_endpoint, parsed.rdzv_id) == ("c10d", "gpu03:10007", "7")
    else:
        assert (parsed.node_rank, parsed.master_addr, parsed.master_port) == (1, "10.0.0.1", 29500)
    assert parsed.training_script_args[0] == "train"
    found = cli.parse("train", parsed.training_script_args[1:])
    assert isinstance(found, Train)
    assert (found.model, found.tokens, found.ulysses, found.zero) == ("hf:/shared/models/llama-8b", 131_072, 8, 3)
    assert found.rows_per_step == 4 * 8 // found.ulysses, "one row for each data replica"
    assert (found.run, found.runs_folder) == ("job-7" if name == SLURM else "longspan", "/shared/runs")


def test_a_requeued_job_resumes_and_ends_with_the_code_of_srun(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (runs / "job-7").mkdir(parents=True)
    (runs / "job-7" / "config.json").write_text("{}")
    stub(tmp_path, "srun", 'echo "$@"; exit 3')
    stub(tmp_path, "scontrol", "echo gpu03")
    text = script(SLURM).replace("RUNS=/shared/runs", f"RUNS={runs}")
    done = subprocess.run(["bash", "-c", text], env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 3
    assert "longspan train --resume job-7 --runs-folder" in done.stdout


def test_the_signal_before_the_end_requeues_the_job(tmp_path: Path) -> None:
    stub(tmp_path, "srun", 'touch "$OUT/started"; exec sleep 60')
    stub(tmp_path, "scontrol", '[ "$1" = show ] && echo gpu03 || echo "$@" > "$OUT/asked"')
    with processes.start(["bash", str(FOLDER / SLURM)], env=environment(tmp_path, OUT=str(tmp_path))) as process:
        try:
            until = time.monotonic() + 60
            while not (tmp_path / "started").exists() and time.monotonic() < until:
                time.sleep(0.05)
            os.kill(process.pid, signal.SIGUSR1)
            assert process.wait(timeout=60) == 0
        finally:
            processes.end(process)
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def test_bash_accepts_the_scripts_and_slurm_s_options_are_those_that_the_script_needs() -> None:
    for name in (SLURM, TRAINJOB, SKYPILOT, DSTACK):
        subprocess.run(["bash", "-n"], input=script(name), text=True, check=True)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script(SLURM), re.MULTILINE))
    assert options["ntasks-per-node"] == "1"  # torchrun starts the ranks of a node
    assert options["gpus-per-node"] == "8"
    assert options["signal"] == "B:USR1@120"  # B: to the script, whose trap it is
    assert {"requeue", "open-mode"} <= set(options)


def test_the_trainjob_has_the_fields_that_its_runtime_reads() -> None:
    job = read(TRAINJOB)
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"]["runtimeRef"]["name"] == "torch-distributed"
    trainer = job["spec"]["trainer"]
    assert set(trainer) == {"image", "numNodes", "numProcPerNode", "resourcesPerNode", "command", "args"}
    assert trainer["command"] == ["/bin/bash", "-c"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"] == 8
    (patch,) = job["spec"]["runtimePatches"]
    (replica,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replica["template"]["spec"]["template"]["spec"]
    assert replica["name"] == pod["containers"][0]["name"] == "node"  # the names that torch-distributed gives them
    assert [mount["name"] for mount in pod["containers"][0]["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]


def test_skypilot_and_dstack_have_their_fields() -> None:
    sky, task = read(SKYPILOT), read(DSTACK)
    assert set(sky) == {"name", "workdir", "num_nodes", "resources", "volumes", "setup", "run"}
    assert sky["resources"]["accelerators"] == task["resources"]["gpu"] == "H100:8"
    assert sky["num_nodes"] == task["nodes"] == 4
    assert set(task) == {"type", "name", "nodes", "image", "commands", "shell", "resources", "volumes", "retry"}
    assert task["retry"]["on_events"] == ["interruption", "error"]


def test_the_dockerfile_copies_what_the_package_is_built_from() -> None:
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert [word for word, _ in lines] == ["ARG", "FROM", "COPY", "COPY", "RUN", "WORKDIR"]
    root = FOLDER.parents[1]
    copied = [source for word, rest in lines if word == "COPY" for source in shlex.split(rest)[:-1]]
    assert all((root / source).exists() for source in copied)
    needed = {"pyproject.toml", "src", "README.md", "LICENSE"}  # readme and license-files of pyproject.toml
    assert set(copied) == needed


@pytest.mark.skipif(
    find_spec("kubeflow_trainer_api") is None, reason="kubeflow_trainer_api, the schema of a TrainJob, is not installed"
)
def test_kubeflow_s_schema_reads_every_field_of_the_trainjob() -> None:
    from kubeflow_trainer_api import models

    job = read(TRAINJOB)
    read_back = models.TrainerV1alpha1TrainJob.from_dict(job).to_dict()
    assert _lost(job, read_back) == []


@pytest.mark.skipif(find_spec("sky") is None, reason="SkyPilot is not installed")
def test_skypilot_reads_its_file() -> None:
    import sky

    task = sky.Task.from_yaml(str(FOLDER / SKYPILOT))
    assert task.num_nodes == 4
    assert [(resources.accelerators, resources.use_spot) for resources in task.resources] == [({"H100": 8}, True)]


@pytest.mark.skipif(find_spec("dstack") is None, reason="dstack is not installed")
def test_dstack_reads_its_file() -> None:
    from dstack._internal.core.models.configurations import parse_run_configuration

    task = parse_run_configuration(read(DSTACK))
    assert (task.type, task.nodes, task.resources.gpu.count.min) == ("task", 4, 8)


def _lost(given: Any, kept: Any, place: str = "") -> list[str]:
    """The places of values in ``given`` that ``kept`` does not have."""
    if isinstance(given, dict):
        return [lost for key, value in given.items() for lost in _lost(value, (kept or {}).get(key), f"{place}.{key}")]
    if isinstance(given, list):
        return [lost for at, value in enumerate(given) for lost in _lost(value, (kept or [])[at], f"{place}[{at}]")]
    return [] if given == kept else [place]

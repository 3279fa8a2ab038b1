"""Training on Ray over two single-CPU nodes: a worker is killed, a node is removed; the losses are those of one process."""

import json
import os
import sys
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from tests.helpers import processes, ray_run

HAS_RAY = find_spec("ray") is not None
ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """For a program with a Ray cluster of its own on this machine."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",  # else Ray writes a key into the user's folder
        "RAY_worker_niceness": "0",  # workers would wait for every other process of a busy machine
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed, so the sentence for its absence is not raised")
def test_without_ray_the_import_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"longspan.integrations.ray needs Ray 2.60 or newer .* pip install 'ray\[train\]'"):
        import longspan.integrations.ray  # noqa: F401


@pytest.mark.long
@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install 'ray[train]' where this test shall run")
def test_a_killed_worker_and_a_removed_node_leave_the_losses_of_one_process(tmp_path: Path) -> None:
    done = processes.run([sys.executable, "-m", "tests.helpers.ray_run", str(tmp_path)], timeout=1_500, env=environment())
    assert done.returncode == 0, done.stderr[-4_000:]
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    of_rank_0 = [line for line in lines if line["rank"] == 0]
    first, second, last = ([line["step"] for line in run] for _, run in groupby(of_rank_0, key=lambda line: line["process"]))
    # A run goes on from the newest checkpoint that Ray had registered: a step that was lost with its worker is done again.
    assert (first[0], first[-1]) == (1, ray_run.KILLED_IN - 1)
    assert (second[0] in (2, 3, 4), second[-1]) == (True, ray_run.REMOVED_AFTER)
    assert (last[0] in (5, 6, 7), last[-1]) == (True, ray_run.STEPS)
    assert [line["workers"] for line in of_rank_0] == [2] * len(first + second) + [1] * len(last)

    losses = ray_run.losses_of_one_process()
    for line in lines:
        assert line["loss"] == pytest.approx(losses[line["step"] - 1], rel=1e-5)
    for step, workers in {(line["step"], line["workers"]) for line in lines}:
        held = {line["rank"]: line["rows"] for line in lines if (line["step"], line["workers"]) == (step, workers)}
        assert [row for rank in range(workers) for row in held[rank]] == ray_run.global_rows(step).tolist()

    result = json.loads((tmp_path / "result").read_text())
    assert result["metrics"]["step"] == ray_run.STEPS
    saved = FileSystemReader(result["checkpoint"]).read_metadata().state_dict_metadata
    assert {"model.embed.weight", "step", "random"} <= set(saved)


@pytest.mark.long
@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install 'ray[train]' where this test shall run")
def test_the_command_line_s_run_on_ray_has_one_folder(tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "examples/cluster/ray_run.py"), "--small", "--storage", str(tmp_path)]
    done = processes.run(program, timeout=900, env=environment())
    assert done.returncode == 0, done.stderr[-4_000:]
    assert (tmp_path / "longspan/checkpoints/step-000002/run.json").exists()


@pytest.mark.long
@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install 'ray[train]' where this test shall run")
def test_the_example_trains_on_a_cluster_of_this_machine(tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "examples/cluster/ray_train.py"), "--small", "--storage", str(tmp_path)]
    done = processes.run(program, timeout=900, env=environment())
    assert done.returncode == 0, done.stderr[-4_000:]
    assert "'step': 4}" in done.stdout.splitlines()[-1]


@pytest.mark.long
@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install 'ray[train]' where this test shall run")
def test_numbers_and_rows_that_are_not_possible_are_refused(tmp_path: Path) -> None:
    from longspan import ParallelMesh
    from longspan.errors import BatchError, RunError
    from longspan.integrations.ray import replica_rows, torch_trainer

    for keywords in (
        {"workers": 0},
        {"workers": (3, 2)},
        {"workers": 1, "keep_checkpoints": 0},
        {"workers": 1, "restarts": -2},
    ):
        with pytest.raises(RunError, match="at least 1"):
            torch_trainer(print, storage=str(tmp_path), run="x", **keywords)
    with pytest.raises(BatchError, match=r"\{'a': 2, 'b': 3\} rows"):
        replica_rows({"a": torch.zeros(2, 4), "b": torch.zeros(3, 4)}, ParallelMesh())

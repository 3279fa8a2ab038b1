"""What is given as a mesh and is none: each public function that takes a mesh refuses it as users call it.

The script runs by itself, because here annotations are checked before a function is called.
"""

import inspect
import subprocess
import sys

import pytest

import longspan

CALLS = """
import torch
from torch.distributed.device_mesh import DeviceMesh
import longspan

x, labels = torch.zeros(1, 8, 2, 4), torch.zeros(1, 8, dtype=torch.long)
arguments = {
    "attend": {"q": x, "k": x, "v": x, "mask": longspan.Causal()},
    "average_gradients": {"module": torch.nn.Linear(2, 2)},
    "cross_entropy": {"logits": x[0], "labels": labels[:, :2]},
    "heads_to_tokens": {"x_BTGD": x, "heads": 2},
    "linear_cross_entropy": {"hidden": x[0], "weight": torch.zeros(8, 4), "labels": labels[:, :2]},
    "parallelize": {"model": torch.nn.Linear(2, 2)},
    "shard_batch": {"batch": {"input_ids": labels}},
    "sync_batches": {"parts": []},
    "tokens_to_heads": {"x_BSHD": x},
    "unshard": {"tensor": labels},
}
for name, given in arguments.items():
    for mesh in (DeviceMesh("cpu", [0], _init_backend=False, _rank=0), 2):
        try:
            getattr(longspan, name)(**given, mesh=mesh)
        except longspan.LayoutError as error:
            print(name, error)
"""


@pytest.fixture(scope="module")
def refusals() -> list[str]:
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


TAKES_A_MESH = [
    name for name in longspan.__all__ if inspect.isfunction(getattr(longspan, name))
    and "mesh" in inspect.signature(getattr(longspan, name)).parameters
]  # fmt: skip


@pytest.mark.parametrize("name", TAKES_A_MESH)
def test_what_is_no_mesh_is_refused_by_its_type(name: str, refusals: list[str]) -> None:
    way_out = (
        "is no ParallelMesh; make one with ParallelMesh(ulysses=...), or of a DeviceMesh with "
        "ParallelMesh.from_device_mesh(...)"
    )
    assert [line for line in refusals if line.startswith(f"{name} ")] == [
        f"{name} mesh={kind} {way_out}" for kind in ("DeviceMesh", "int")
    ]

"""Two ranks on the device of LONGSPAN_TEST_DEVICE, sharing one GPU or not, and the kit's own needs: `make test-gpu`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.device import DEVICE

ROOT = Path(__file__).parents[2]
ABSENT = ["beartype", "xdist", "pytest_benchmark", "tyro"]


def run(*words: str) -> str:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    alone = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, *words], env=os.environ | alone, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def torchrun(ranks: int) -> list[str]:
    words = "-m torch.distributed.run --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --nproc-per-node"
    return [*words.split(), str(ranks), "-m", "tests.helpers.device_ranks"]


@pytest.mark.long
@pytest.mark.parametrize("late", [[], ["late"]], ids=["", "late"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_one_device(ranks: int, late: list[str]) -> None:
    """Late: the device is busy before each exchange and merge, so that a copy that does not wait for it takes old bytes."""
    assert f"{ranks} ranks on" in run(*torchrun(ranks), *late)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs LONGSPAN_TEST_DEVICE=cuda: the sanitizer watches the streams of a GPU")
def test_the_sanitizer_finds_no_race_in_head_chunks_and_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_SANITIZER", "1")
    assert "1 ranks on" in run(*torchrun(1))


def test_the_kit_needs_no_package_that_a_gpu_image_lacks() -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {ABSENT}: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import pytest\n"
        "options = '-q -c /dev/null --rootdir . --confcutdir tests/gpu -p no:cacheprovider --collect-only tests/gpu'\n"
        "sys.exit(pytest.main(options.split()))"
    )
    assert "test_fp32_is_exact" in run("-c", code)

"""A decoder block with ``attend`` compiles as one full graph, forward and backward; so does a Hugging Face model as it is.

Dynamo cannot trace functions that jaxtyping and beartype wrap, so these run in a Python of their own, without the shape hook.
"""

import subprocess
import sys
from pathlib import Path

import pytest

LONG = pytest.mark.long  # one layout shows a graph break and a wrong fake shape; the others show those of their own rows


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("compiled_block", ["2", "2"]), pytest.param("compiled_block", ["1", "1"], marks=LONG),
        pytest.param("compiled_block", ["2", "1"], marks=LONG),
        ("compiled_llama", ["plain"]), pytest.param("compiled_llama", ["packed"], marks=LONG),
    ],
)  # fmt: skip
def test_it_is_one_graph_and_exact(script: str, arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"tests.helpers.{script}", str(tmp_path), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split()[-1] == "exact"

"""A decoder block with ``attend`` compiles as one full graph, forward and backward; so does a Hugging Face model as it is.

Dynamo cannot trace functions that jaxtyping and beartype wrap, so these run in a Python of their own, without the shape hook.
"""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("script", "printed"), [("compiled_block", "1x1 exact 2x1 exact 2x2 exact"), ("compiled_llama", "exact")]
)
def test_it_is_one_graph_and_exact(script: str, printed: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"tests.helpers.{script}", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " ".join(result.stdout.split()).endswith(printed)

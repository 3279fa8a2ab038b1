"""A decoder block with ``attend`` compiles as one full graph, forward and backward. Runs in a process without the shape hook.

Dynamo cannot trace functions that jaxtyping and beartype wrap, so this file starts its own Python.
"""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("compiled_block.py")


def test_a_block_is_one_graph_on_two_ranks_and_on_one(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["1", "exact", "2", "exact"]

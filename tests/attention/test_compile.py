"""A decoder block with ``attend`` compiles as one full graph, forward and backward; so does a Hugging Face model as it is.

Dynamo cannot trace functions that jaxtyping and beartype wrap, so these run in a Python of their own, without the shape hook.
"""

import sys
from pathlib import Path

import pytest

from longspan import _compat
from tests.helpers import processes

BLOCKS = [
    ("2", "2", "aot_eager"),
    ("1", "1", "inductor"),
    ("2", "1", "inductor"),
    ("2", "2", "inductor"),
]  # ranks, rows, backend
NEWER = pytest.mark.skipif(not _compat.PLANS_ARE_CONSTANTS, reason="before PyTorch 2.13 each attention breaks the graph")


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        pytest.param("compiled_block", BLOCKS[0], marks=NEWER),  # shows a graph break and a wrong fake shape
        *(pytest.param("compiled_block", block, marks=[NEWER, pytest.mark.long]) for block in BLOCKS[1:]),
        *(
            pytest.param("compiled_llama", (rows,), marks=pytest.mark.long)
            for rows in ("plain", "packed", "chunked", "sharded")
        ),
    ],
)
def test_it_is_one_graph_and_exact(script: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"tests.helpers.{script}", str(tmp_path), *arguments]
    result = processes.run(command, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split()[-1] == "exact"

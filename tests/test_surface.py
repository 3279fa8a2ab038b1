"""The surface is pinned: the public names, the README's code, and its tree of the files."""

import contextlib
import io
import re
import tomllib
from pathlib import Path

import pytest

import longspan
from tests.helpers.ranks import on_ranks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

NAMES = [
    "AutoMemory", "BatchError", "BatchInfo", "Bias", "BlockSparse", "Causal", "Chunked",
    "DataError", "Documents", "Full", "Kernel", "KernelError", "LayoutError",
    "LongspanError", "Mask", "MaskError", "MemoryOptions", "ModelError", "ParallelMesh", "PrefixLM",
    "RunError", "SinkTokens", "Span", "Transport", "Window", "attend",
    "clip_grad_norm_", "cross_entropy", "forward_backward", "heads_to_tokens", "linear_cross_entropy", "parallel_state",
    "parallelize", "shard_batch",
    "shard_local", "shift_right", "sync_batches", "tiled", "tokens_to_heads", "unparallelize",
    "unshard",
]  # fmt: skip


def test_the_public_names() -> None:
    assert sorted(longspan.__all__) == sorted(NAMES)
    assert all(hasattr(longspan, name) for name in NAMES)


def test_the_readme_s_code_runs_on_one_rank_and_on_two_alike(tmp_path: Path) -> None:
    """Its blocks are one program, but for the last, which asks for a whole sequence on one rank."""
    *blocks, last = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (alone,) = on_ranks(1, _printed, "\n".join([*blocks, last]), tmp_path=tmp_path)
    losses = re.compile(r"^\d (\d\.\d+)$", re.MULTILINE)
    one = [float(loss) for loss in losses.findall(alone)]
    assert len(one) == 3
    for printed in on_ranks(2, _printed, "\n".join(blocks), tmp_path=tmp_path):
        assert [float(loss) for loss in losses.findall(printed)] == pytest.approx(one, rel=1e-5)


def _printed(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "README.md", "exec"), {})
    return out.getvalue()


def test_the_readme_s_tree_is_the_package() -> None:
    tree = README.split("## The code")[1].split("```")[1]
    named, folder = set(), ""
    for line in tree.strip().splitlines():
        indented, files = line.startswith(" "), re.findall(r"[\w/]+(?:\.py|/)(?=\s|$)", line)
        folder = folder if indented else ""
        named |= {folder + file for file in files if file.endswith(".py")}
        folder = folder if indented else next((file for file in files if file.endswith("/")), "")
    package = ROOT / "src" / "longspan"
    files = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert named == files


def test_the_version_is_one_literal() -> None:
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
    assert f"\nversion: {longspan.__version__}\n" in (ROOT / "CITATION.cff").read_text()

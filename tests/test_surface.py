"""The surface is pinned: the public names, the README's tree of the files, the version."""

import re
import tomllib
from pathlib import Path

import longspan

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

NAMES = [
    "AutoMemory", "BatchError", "BatchInfo", "Bias", "BlockSparse", "Causal", "Chunked",
    "DataError", "Documents", "Full", "Kernel", "KernelError", "LayoutError",
    "LongspanError", "Mask", "MaskError", "MemoryOptions", "ModelError", "ParallelMesh", "PrefixLM",
    "RunError", "SinkTokens", "Span", "Transport", "Window", "attend", "average_gradients",
    "clip_grad_norm_", "cross_entropy", "forward_backward", "heads_to_tokens", "linear_cross_entropy", "parallel_state",
    "parallelize", "shard_batch",
    "shard_local", "shift_right", "sync_batches", "tiled", "tokens_to_heads", "unparallelize",
    "unshard",
]  # fmt: skip


def test_the_public_names() -> None:
    assert sorted(longspan.__all__) == sorted(NAMES)
    assert all(hasattr(longspan, name) for name in NAMES)


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

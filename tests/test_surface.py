"""The surface is pinned: the public names, the tree of files and of tests, the version."""

import ast
import importlib
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import longspan

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "longspan"
ROOT_FILES = {"__init__.py", "parallelize.py", "loss.py", "errors.py", "tuning.py", "_compat.py"}
README = (ROOT / "README.md").read_text()

NAMES = [
    "AutoMemory", "BatchError", "BatchInfo", "Bias", "BlockSparse", "Causal", "Chunked",
    "DataError", "Documents", "Full", "Kernel", "KernelError", "LayoutError",
    "LongspanError", "Mask", "MaskError", "MemoryOptions", "ModelError", "ParallelMesh", "PipelineOptions", "PrefixLM",
    "RunError", "SinkTokens", "Span", "Transport", "Window", "attend", "average_gradients",
    "clip_grad_norm_", "cross_entropy", "forward_backward", "heads_to_tokens", "linear_cross_entropy", "parallel_state",
    "parallelize", "plan", "shard_batch",
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
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert named == files


def test_the_package_root_holds_what_every_folder_may_use_and_no_more() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == ROOT_FILES


def test_every_module_of_the_folders_below_has_a_test_of_its_own() -> None:
    """tests/<folder>/test_<module>.py: where a reader looks for what a module promises."""
    missing = []
    for folder in ("batch", "distributed", "hf"):
        modules = [path.stem.lstrip("_") for path in (PACKAGE / folder).glob("*.py") if path.stem != "__init__"]
        tests = [ROOT / "tests" / folder / f"test_{module}.py" for module in modules]
        missing += [str(test.relative_to(ROOT)) for test in tests if not test.exists()]
    assert missing == []


def test_every_name_of_longspan_in_a_text_exists() -> None:
    """An error that names a function as the way out must not name one that is not there."""
    named = set()
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings]
        named |= {
            name for text in texts if isinstance(text, str) for name in re.findall(r"\blongspan(?:\.[a-zA-Z_]\w*)+", text)
        }
    assert {"longspan.hf.save", "longspan.tiled"} <= named
    assert sorted(name for name in named if not _exists(name)) == []


def _exists(name: str) -> bool:
    """Whether the dotted ``name`` is a module, which may need an extra that is not installed, or an attribute of one."""
    folder, _, last = name.rpartition(".")
    inside = importlib.import_module(folder)
    return hasattr(inside, last) or (hasattr(inside, "__path__") and find_spec(name) is not None)


def test_no_test_imports_a_test() -> None:
    """What several tests share lies in tests/helpers: a test that imports a test runs with it, and moves with it."""
    found = []
    for path in (ROOT / "tests").rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in nodes:
            inside = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [f"{inside}.{alias.name}" for alias in node.names]
            found += [f"{path.name}: {name}" for name in names if re.search(r"(^|\.)test_\w+", name)]
    assert found == []


def test_the_version_is_one_literal() -> None:
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
    assert f"\nversion: {longspan.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_no_file_is_over_400_lines() -> None:
    files = [path for top in ("src", "tests", "benchmarks", "examples") for path in (ROOT / top).rglob("*.py")]
    assert [str(path) for path in files if len(path.read_text().splitlines()) > 400] == []

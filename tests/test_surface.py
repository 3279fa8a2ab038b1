"""The surface is pinned: the public names, the README's code, and its tree of the files."""

import re
import subprocess
import sys
from pathlib import Path

import longspan

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

NAMES = [
    "Band", "Bands", "BatchError", "BlockSparse", "Causal", "Chunked", "DataError", "Documents", "Full", "KernelError",
    "LayoutError", "LongspanError", "Mask", "MaskError", "ModelError", "Only", "ParallelMesh", "PrefixLM", "RunError",
    "Sinks", "Step",
    "Window", "agree", "attend", "cross_entropy", "cut", "heads_to_tokens", "parallelize", "shard", "tokens_to_heads",
    "unparallelize", "unshard",
]  # fmt: skip


def test_the_public_names() -> None:
    assert sorted(longspan.__all__) == sorted(NAMES)
    assert all(hasattr(longspan, name) for name in NAMES)


def test_the_readme_s_code_runs_on_one_rank_and_on_two_alike(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL)))
    losses = re.compile(r"^\d \d\.\d+$", re.MULTILINE)
    alone = _run([sys.executable, str(script)])
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --local-ranks-filter 0"
    launcher = [sys.executable, *torchrun.split()]
    together = _run([*launcher, str(_first_block(tmp_path))])
    one, two = ([float(line.split()[1]) for line in losses.findall(text)] for text in (alone, together))
    assert len(one) == len(two) == 3
    assert all(abs(mine - other) < 1e-5 * mine for mine, other in zip(one, two))


def _first_block(folder: Path) -> Path:
    script = folder / "first.py"
    script.write_text(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0])
    return script


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_readme_s_tree_is_the_package() -> None:
    tree = README.split("## The code")[1].split("```")[1]
    told, folder = set(), ""
    for line in tree.strip().splitlines():
        name = line.split()[0]
        folder = "" if not line.startswith(" ") else folder
        folder = name if name.endswith("/") and not line.startswith(" ") else folder
        told.add(folder + name if line.startswith(" ") else name)
    package = ROOT / "src" / "longspan"
    files = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert {name for name in told if name.endswith(".py")} == files

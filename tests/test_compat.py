"""Private and version-dependent PyTorch symbols: only _compat.py names them, and a missing one is one sentence."""

import ast
import builtins
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from longspan import _compat
from tests.helpers import processes

SRC = Path(__file__).resolve().parents[1] / "src" / "longspan"
FILES = [path for path in sorted(SRC.rglob("*.py")) if path.name != "_compat.py"]
PRIVATE_MODULES = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.ops.aten", "torch.ops.mkldnn")
"""Public by name, but other versions have other members."""
VERSION_DEPENDENT = {"AuxRequest", "set_reduce_scatter_unused_params"}
PYTHONS_OWN = {"_replace", "_fields", "_asdict"}  # of NamedTuple


def is_for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker reads."""
    for child in ast.iter_child_nodes(tree):
        if not is_for_types_alone(child):
            yield child
            yield from nodes(child)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names() -> set[str]:
    """The private names that longspan itself defines: functions, attributes that a class sets, names kept in a constant."""
    names = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("_longspan"):
                names.add(node.value)
    return names


def foreign_symbols(source: str, own: set[str]) -> Iterator[str]:
    """The private symbols of other libraries in ``source``, and those in the tables above."""
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            on_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            on_itself |= ast.unparse(node.value) == "super()"  # a method that a subclass extends
            if (
                (is_private(node.attr) and node.attr not in own | PYTHONS_OWN and not on_itself)
                or whole.startswith(PRIVATE_MODULES)
                or node.attr in VERSION_DEPENDENT
            ):
                yield whole
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for alias in node.names:
                whole = f"{module}.{alias.name}" if module else alias.name
                parts = whole.split(".")
                private = parts[0] == "torch" and any(map(is_private, parts))
                if private or whole.startswith(PRIVATE_MODULES) or parts[-1] in VERSION_DEPENDENT:
                    yield whole


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo", "from torch._library import opaque_object", "from torch import _C", "torch._C._graph()",
        "mesh._flatten('x')", "torch.ops.aten.mm", "from torch.nn.attention.flex_attention import AuxRequest",
        "from torch.distributed.elastic.multiprocessing.api import PContext", "state = model._get_fsdp_state()",
        "model.set_reduce_scatter_unused_params(True)", "import torch.distributed._functional_collectives as functional",
    ],
)  # fmt: skip
def test_a_private_symbol_is_found(line: str) -> None:
    assert list(foreign_symbols(line, set()))


@pytest.mark.parametrize(
    "line",
    [
        "self._mine",
        "super()._save()",
        "band._replace(lo=0)",
        "from longspan import _compat",
        "x.__class__",
        "torch.ops.longspan.a",
    ],
)
def test_public_and_own_names_are_not_found(line: str) -> None:
    assert not list(foreign_symbols(line, set()))


def test_only_compat_names_private_symbols() -> None:
    own = own_names()
    found = [f"{path.relative_to(SRC)}: {name}" for path in FILES for name in foreign_symbols(path.read_text(), own)]
    assert not found, "\n".join(
        ["", *found, "give each a function in src/longspan/_compat.py, with a sentence for its absence"]
    )


class _Anything:
    """An object that has every attribute, and can be called."""

    def __getattr__(self, name: str) -> Any:
        return _Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Anything()


class _FSDPModule:
    """What ``_compat`` needs of an FSDPModule, with a state that has nothing."""

    def modules(self) -> list[object]:
        return [self]

    def _get_fsdp_state(self) -> object:
        return object()


USES: dict[str, tuple[str, Callable[[], object]]] = {
    "autograd_below_autograd": ("_ForceDispatchKeyGuard", _compat.autograd_below_autograd),
    "flash forward on the CPU": (
        "_scaled_dot_product_flash_attention_for_cpu",
        lambda: _compat.attention_operators("flash cpu"),
    ),
    "flash backward on the CPU": (
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        lambda: _compat.attention_operators("flash cpu"),
    ),
    "flash forward on CUDA": ("_flash_attention_forward", lambda: _compat.attention_operators("flash cuda")),
    "flash backward on CUDA": ("_flash_attention_backward", lambda: _compat.attention_operators("flash cuda")),
    "memory-efficient forward": ("_efficient_attention_forward", lambda: _compat.attention_operators("efficient")),
    "cuDNN's backward": (
        "_scaled_dot_product_cudnn_attention_backward",
        lambda: _compat.attention_operators("cudnn"),
    ),
    "has_cpu_gemm": ("_is_mkldnn_bf16_supported", lambda: _compat.has_cpu_gemm(torch.bfloat16)),
    "flex_lse_request": ("AuxRequest", _compat.flex_lse_request),
    "flattened": ("_flatten", lambda: _compat.flattened(_Anything(), "both")),  # type: ignore[arg-type]
    "after_backward": ("queue_callback", lambda: _compat.after_backward(print)),
    "accumulates_gradient": ("_will_engine_execute_node", lambda: _compat.accumulates_gradient(nn.Parameter(torch.ones(1)))),
    "fsdp_backward_is_unfinished": ("_state_ctx", lambda: _compat.fsdp_backward_is_unfinished(_FSDPModule())),
    "fsdp_gathered_parameters": ("_fsdp_param_group", lambda: _compat.fsdp_gathered_parameters(_FSDPModule())),
    "fsdp_fill_unused_gradients": ("_fsdp_param_group", lambda: _compat.fsdp_fill_unused_gradients(_FSDPModule())),
    "hash_store": ("HashStore", _compat.hash_store),
    "tcp_store": ("TCPStore", lambda: _compat.tcp_store("localhost", 1, seconds=1)),
    "hosted_store": ("TCPStore", lambda: _compat.hosted_store("localhost", 1)),
    "elastic_launcher": ("SignalException", _compat.elastic_launcher),
    "event_tree": ("kineto_results", lambda: _compat.event_tree(_Anything())),
}


@pytest.mark.parametrize("use", USES)
def test_a_missing_symbol_is_one_sentence(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missing, call = USES[use]

    def getattr_without(root: Any, name: str, *default: Any) -> Any:
        return default[0] if name == missing and default else builtins.getattr(root, name, *default)

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(_compat, "getattr", getattr_without, raising=False)
    with pytest.raises(ImportError) as raised:
        call()
    text = str(raised.value)
    assert text.startswith(f"PyTorch {torch.__version__} has no ")
    assert missing in text.partition(", which longspan needs for ")[0]
    assert text.endswith("; install a version that longspan is tested with, such as torch 2.13")
    assert "\n" not in text


def test_a_missing_module_is_one_sentence() -> None:
    with pytest.raises(ImportError, match=r"^PyTorch \S+ has no Agent, which longspan needs for launching; install "):
        _compat._imported("torch.no_such_module", "Agent", "launching")


def test_every_function_has_a_row_at_the_top_of_the_file() -> None:
    table = (_compat.__doc__ or "").split("\n\n")[1]
    rows = [name for row in table.splitlines()[1:] for name in row.split("   ")[1].replace(",", " ").split()]
    tree = ast.parse(Path(_compat.__file__).read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not is_private(node.name)]
    assert {name for name in functions if not name.startswith("fsdp_")} <= set(rows)


@pytest.mark.parametrize("modules", ["longspan", "longspan.cli.train, longspan.hf.adapter, longspan.integrations.trainer"])
def test_an_import_in_a_fresh_process_writes_nothing(modules: str) -> None:
    done = processes.run([sys.executable, "-c", f"import {modules}"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

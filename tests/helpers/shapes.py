"""Check the array shapes of signatures while the tests run (jaxtyping and beartype); import this before longspan.

jaxtyping's import hook wraps every function, also those without a shape, whose types mypy checks already. That doubles the time
of a small model's step, so here only functions and dataclasses whose annotations have a shape are wrapped.
"""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import jaxtyping
from beartype import beartype
from jaxtyping import _import_hook


def check_shapes(function: Any) -> Any:
    """beartype under another name, because jaxtyping's cache of compiled modules is keyed by the name of the checker."""
    return beartype(function)


class _ShapesOnly(_import_hook.JaxtypingTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        if _has_shape(node.args) or (node.returns is not None and _has_shape(node.returns)):
            return super().visit_FunctionDef(node)
        return self.generic_visit(node) or node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        if any(isinstance(field, ast.AnnAssign) and _has_shape(field.annotation) for field in node.body):
            return super().visit_ClassDef(node)
        return self.generic_visit(node) or node


def _has_shape(annotation: ast.AST) -> bool:
    """Whether ``annotation`` contains a jaxtyping shape like ``Float[Tensor, "batch tokens"]``, or a name in ALIASES."""
    for part in ast.walk(annotation):
        if isinstance(part, ast.Name) and part.id in ALIASES:
            return True
        if isinstance(part, ast.Subscript) and isinstance(part.value, ast.Name):
            kind = getattr(jaxtyping, part.value.id, None)
            if isinstance(kind, type) and issubclass(kind, jaxtyping.AbstractDtype):
                return True
    return False


def _aliases() -> set[str]:
    """The names that any module of longspan assigns to a shape, as in ``Ids = Integer[np.ndarray, "tokens"]``."""
    spec = importlib.util.find_spec("longspan")
    assert spec is not None
    assert spec.origin is not None
    modules = [ast.parse(path.read_text()) for path in Path(spec.origin).parent.rglob("*.py")]
    assigned = [line for module in modules for line in module.body if isinstance(line, ast.Assign) and _has_shape(line.value)]
    return {name.id for line in assigned for name in line.targets if isinstance(name, ast.Name)}


ALIASES: set[str] = set()
ALIASES |= _aliases()
_import_hook.JaxtypingTransformer = _ShapesOnly  # type: ignore[misc]
_import_hook.install_import_hook("longspan", f"{__name__}.{check_shapes.__name__}")

"""Scripts that no other test runs, since they need a GPU, hours or the drawings: what they import is there."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from tests.runs import ROOT

SCRIPTS = sorted([*(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_names_that_a_script_imports_exist(path: Path) -> None:
    """Names of pixtune, and of the scripts beside it by their text."""
    beside = {other.stem: ast.parse(other.read_text(encoding="utf-8")) for other in SCRIPTS}
    missing = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        names = {alias.name for alias in node.names}
        if node.module.split(".")[0] == "pixtune":
            module = importlib.import_module(node.module)
            missing += [name for name in names if not hasattr(module, name) and not submodule(node.module, name)]
        elif node.module in beside:
            missing += sorted(names - defined(beside[node.module]))
    assert not missing


def submodule(package: str, name: str) -> bool:
    return importlib.util.find_spec(f"{package}.{name}") is not None


def defined(tree: ast.Module) -> set[str]:
    """Names at a module's top, imported ones included."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names

"""Which module may import which: products do not know benchmarks or commands, and no circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import budwood

ROOT = Path(budwood.__file__).parent
ABOVE = ("budwood.bench", "budwood.cli")
TUNE = (
    *("equations", "base_model", "saved", "config", "data", "tasks", "slim"),
    *("training", "methods", "evaluate", "finetuning"),
)
"""Modules and folders of ``budwood.tune``; each imports only itself and those before it."""


def name_of(path: Path) -> str:
    parts = ("budwood", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports_of(module: str, *, inside_functions: bool) -> Iterator[str]:
    """Modules of budwood that a module imports, also under ``TYPE_CHECKING``."""
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _nodes(tree, inside_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                imported = submodule if submodule in MODULES else node.module
                if imported in MODULES:
                    yield imported


def _nodes(node: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            continue
        yield child
        yield from _nodes(child, inside_functions)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in order:
                visit(other)
            if other in stack:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == order[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in sorted(graph):
        if module not in order:
            visit(module)
    return found


def test_products_do_not_import_benchmarks_or_commands():
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        if not module.startswith(ABOVE)
        for other in imports_of(module, inside_functions=True)
        if other.startswith(ABOVE)
    ]
    assert wrong == []


def test_benchmarks_do_not_import_commands():
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        if module.startswith("budwood.bench")
        for other in imports_of(module, inside_functions=True)
        if other.startswith("budwood.cli")
    ]
    assert wrong == []


def test_parts_of_tune_import_only_those_before_them():
    parts = [module.split(".")[:3] for module in MODULES]
    mine = {m: p[2] for m, p in zip(MODULES, parts) if len(p) == 3 and p[1] == "tune"}
    assert set(mine.values()) == set(TUNE)
    wrong = [
        f"{module} imports {other}"
        for module, part in mine.items()
        for other in imports_of(module, inside_functions=True)
        if other == "budwood.tune" or (other in mine and TUNE.index(mine[other]) > TUNE.index(part))
    ]
    assert wrong == []


def test_no_import_circles():
    graph = {
        module: set(imports_of(module, inside_functions=False)) - {module} for module in MODULES
    }
    assert circles(graph) == []


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(graph) == [["b", "c"]]

"""Layers whose weight a model reads without calling them, found in its source."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

_NO_VALUE = ("dtype", "device", "shape")
"""Attributes of a weight that tell nothing of its values."""
_SETTINGS = (ast.Name, ast.Attribute, ast.Constant, ast.Compare, ast.cmpop, ast.expr_context)


def reads_weight(parent: nn.Module, name: str) -> bool:
    """Whether a module may read the weight of one of its layers instead of calling the layer.

    Mamba's fused kernels do, with ``out_proj`` and others: what is put in the layer's place is
    then passed by. The source of the module's class tells. Branches that the module's settings
    close do not count, such as those of BLOOM for several devices.

    Args:
        parent: the module.
        name: of the layer in it.
    """
    weight = f"self.{name}.weight"
    search = _Search(parent, weight)
    for method in _methods(type(parent)):
        source = _source(method)
        if weight in source:
            search.visit(_parsed(source))
    return search.found


class _Search(ast.NodeVisitor):
    """Looks for reads of a weight.

    Args:
        parent: the module whose methods are searched.
        weight: as they name it, such as ``self.out_proj.weight``.

    Attributes:
        found: whether there is one.
    """

    def __init__(self, parent: nn.Module, weight: str) -> None:
        self.parent, self.found = parent, False
        self._weight = weight

    def visit_If(self, node: ast.If) -> None:
        self._visit_branches(node, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._visit_branches(node, [node.body], [node.orelse])

    def _visit_branches(
        self, node: ast.If | ast.IfExp, body: Sequence[ast.AST], orelse: Sequence[ast.AST]
    ) -> None:
        """Visit the branch that the module's settings leave open, or all of the node."""
        holds = _holds(node.test, self.parent)
        if holds is None:
            self.generic_visit(node)
            return
        for part in body if holds else orelse:
            self.visit(part)

    def visit_Call(self, node: ast.Call) -> None:
        call = ast.unparse(node.func)
        if call == "isinstance":
            return
        if re.fullmatch(rf"{re.escape(self._weight)}(\.data)?\.\w+_", call):  # changes it in place
            for part in (*node.args, *node.keywords):
                self.visit(part)
            return
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _NO_VALUE and ast.unparse(node.value) == self._weight:
            return
        self.found |= ast.unparse(node) == self._weight
        self.generic_visit(node)


def _holds(test: ast.expr, parent: nn.Module) -> bool | None:
    """Whether a condition on a module's settings holds; None where it depends on other things."""
    if isinstance(test, ast.BoolOp):
        decides = isinstance(test.op, ast.Or)
        parts = [_holds(part, parent) for part in test.values]
        if decides in parts:
            return decides
        return None if None in parts else not decides
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        holds = _holds(test.operand, parent)
        return None if holds is None else not holds
    nodes = list(ast.walk(test))
    if not all(isinstance(node, _SETTINGS) for node in nodes):
        return None
    if any(getattr(node, "id", "self") != "self" for node in nodes):
        return None
    if any(getattr(node, "attr", "") == "training" for node in nodes):
        return None
    try:
        return bool(eval(ast.unparse(test), {"self": parent}))
    except Exception:  # an attribute that is set in a pass, or a tensor
        return None


def _methods(kind: type) -> Iterator[Any]:
    """The methods that a class and those above it run in a forward pass."""
    for one in kind.__mro__:
        if one.__module__.startswith("torch."):
            return
        for name, method in vars(one).items():
            if inspect.isfunction(method) and not re.match(r"_*(init|reset|extra_repr)", name):
                yield method


@functools.cache
def _source(method: Any) -> str:
    try:
        return inspect.getsource(inspect.unwrap(method))
    except (OSError, TypeError):  # made in a console, or compiled
        return ""


@functools.cache
def _parsed(source: str) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(source))
    except SyntaxError:  # of a lambda, the lines around it
        return ast.Module([], [])

"""Optax's own test classes, run on other optimizers.

Optax ships its tests in its wheel. Their tables of optimizers are module constants that the
decorators read while the class is being made, so a module is loaded anew here with other tables in
place of its own. What stands in Optax's files is executed, not copied.
"""

import ast
import importlib.util
import types
import unittest
from collections.abc import Mapping
from typing import Any

import jax
import optax

Tables = Mapping[str, Any]


class _Rewriter(ast.NodeTransformer):
    """Frees a test module of some of its constants and of the tests that read none of them."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def visit_Module(self, node: ast.Module) -> ast.Module:
        node.body = [self.visit(statement) for statement in node.body if not self._drops(statement)]
        return node

    def _drops(self, statement: ast.stmt) -> bool:
        if isinstance(statement, ast.Assign):
            # os.environ["XLA_FLAGS"] = ... contradicts the devices that conftest.py configures.
            targets = statement.targets
            return any(self._is_table(t) or isinstance(t, ast.Subscript) for t in targets)
        if isinstance(statement, ast.AugAssign):
            return self._is_table(statement.target)
        if isinstance(statement, ast.For):
            return self._is_table(statement.iter)
        return isinstance(statement, ast.FunctionDef) and statement.name in self.names

    def _is_table(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id in self.names

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        node.body = [
            statement
            for statement in node.body
            if not self.names or not _is_test(statement) or _tables_of(statement) & self.names
        ]
        self.generic_visit(node)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.Compare:
        """Compares versions as numbers: the string "0.10.2" is less than "0.7.2", so they skip."""
        if ast.unparse(node.left) == "jax.__version__":
            node.left = ast.parse("jax.__version_info__", mode="eval").body
            node.comparators = [
                ast.parse(repr(tuple(map(int, c.value.split(".")))), mode="eval").body
                for c in node.comparators
                if isinstance(c, ast.Constant)
            ]
        return node


def _is_test(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.FunctionDef) and statement.name.startswith("test")


def _tables_of(method: ast.stmt) -> set[str]:
    """The constants that a test's decorators read."""
    assert isinstance(method, ast.FunctionDef)
    return {
        name.id
        for decorator in method.decorator_list
        for name in ast.walk(decorator)
        if isinstance(name, ast.Name)
    }


def _source(module: str) -> ast.Module | None:
    """The syntax tree of an Optax module; None where the installed Optax does not have it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    with open(spec.origin, encoding="utf-8") as file:
        return ast.parse(file.read(), spec.origin)


def exists(module: str) -> bool:
    """Whether the installed Optax ships this test module."""
    return importlib.util.find_spec(module) is not None


def load(module: str, replaced: Tables) -> types.ModuleType:
    """Executes an Optax test module with other values in place of some of its constants.

    Args:
      module: its dotted name.
      replaced: the constants' (or functions') names and the values that they get. Every test
        whose decorators read none of them is left out: it does not concern our optimizers. If
        empty, the module stays as Optax wrote it.

    Returns:
      A module of its own, not to be found in ``sys.modules``.
    """
    tree = _source(module)
    assert tree is not None, f"the installed Optax {optax.__version__} has no {module}"
    missing = set(replaced) - {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert not missing, f"{module} has no {sorted(missing)} any more"
    tree = ast.fix_missing_locations(_Rewriter(set(replaced)).visit(tree))
    loaded = types.ModuleType(module)
    vars(loaded).update(replaced)
    exec(compile(tree, f"<{module}>", "exec"), vars(loaded))
    # Some tables are extended or looped over where they are made; ours hold entries as they come.
    vars(loaded).update(replaced)
    return loaded


def adopt(
    base: type[unittest.TestCase], name: str, namespace: dict[str, Any]
) -> type[unittest.TestCase]:
    """Puts a test class under another name into a test module, where pytest collects it.

    A test that would skip fails: Optax skips what it does not know of an optimizer or of a version
    of JAX, and a suite that skips proves nothing.
    """

    def skip_test(self: unittest.TestCase, reason: Any) -> None:
        self.fail(f"the suite would skip this test: {reason}")

    def tear_down(self: unittest.TestCase) -> None:
        # Their float64 test leaves x64 on when it fails, which would spoil every test after it.
        jax.config.update("jax_enable_x64", False)
        base.tearDown(self)

    members = {"skipTest": skip_test, "tearDown": tear_down, "__module__": namespace["__name__"]}
    adopted = type(name, (base,), members)
    namespace[name] = adopted
    return adopted

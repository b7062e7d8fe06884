"""Imports point down, and no module hides a public function."""

import ast
import pathlib
import types

import optax_spd

ROOT = pathlib.Path(optax_spd.__file__).parent
LEVELS = [{"layers"}, {"anchors", "sharding"}, {"wrappers"}, {"core"}, {"methods", "posthoc"}]
TOP = len(LEVELS)  # recipes, report, and the package itself


def level(part: str) -> int:
    return next((i for i, parts in enumerate(LEVELS) if part in parts), TOP)


def test_imports_point_down_and_never_from_one_method_to_another() -> None:
    seen = 0
    for path in ROOT.rglob("*.py"):
        own = (*path.relative_to(ROOT).with_suffix("").parts, "")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                package, *parts = (*name.split("."), "", "")
                if package != "optax_spd" or own[0] == "__init__":
                    continue
                seen += 1
                assert level(parts[0]) <= level(own[0]), f"{path} imports {name}"
                if own[0] == parts[0] == "methods":
                    assert own[1] == parts[1], f"{path} imports {name}"
    assert seen > 100


def test_no_module_is_reachable_under_the_name_of_a_public_function() -> None:
    for name in optax_spd.__all__:
        assert not isinstance(getattr(optax_spd, name), types.ModuleType), name
        assert not (ROOT / name).with_suffix(".py").exists(), name
        assert not (ROOT / name).is_dir(), name

"""The files of the package form no circle, and nobody outside it asks which class a scheme is of."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import quantizers as Q

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "quantizers"
SCHEME_CLASSES = {cls.__name__ for cls in Q.Scheme.known.values()} | {"Scheme"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports() -> dict[str, set[str]]:
    """Which files of the package each of them imports: anywhere in it, for type checking too."""
    names = {module_name(path) for path in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        used = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, path
                longer = {f"{node.module}.{alias.name}" for alias in node.names} & names
                used |= longer or {str(node.module)}
        found[module_name(path)] = used & names
    return found


def names_in(node: ast.AST) -> set[str]:
    """The classes that an expression names, but for torch's own."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            found.add(part.id)
        elif isinstance(part, ast.Attribute) and not (isinstance(part.value, ast.Name) and part.value.id == "nn"):
            found.add(part.attr)
    return found


def test_there_is_no_circle_of_files() -> None:
    graph = imports()
    assert len(graph) > 15
    assert graph["quantizers.network"] >= {"quantizers.layers", "quantizers.scheme"}
    while graph:
        free = {name for name, used in graph.items() if not used & set(graph)}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: used for name, used in graph.items() if name not in free}


def test_nothing_knows_the_schemes_that_come_with_the_package_but_their_own_files() -> None:
    allowed = {"quantizers", "quantizers.binary_training", "quantizers.pruning.filters", "quantizers.pruning"}
    for name, used in imports().items():
        if not name.startswith("quantizers.schemes") and name not in allowed:
            assert not {other for other in used if other.startswith("quantizers.schemes")}, name


@pytest.mark.parametrize("room", ["haq", "envs", "hw_models", "quantizers"])
def test_no_isinstance_asks_for_a_scheme(room: str) -> None:
    """What a scheme can do is said by its attributes and methods."""
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"):
                continue
            asked = names_in(node.args[1])
            # Whether an argument is a scheme already, and not its name, is the one thing that can't be asked otherwise.
            by_name = path == PACKAGE / "scheme.py" and asked == {"Scheme"}
            assert by_name or not asked & SCHEME_CLASSES, f"{path}:{node.lineno}"

"""The package is what it says: rooms that don't import upwards, light imports, typed, licensed, two commands in the README."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "quantizers": set(),
    "hw_models": set(),
    "envs": {"quantizers", "hw_models"},
    "haq": {"quantizers", "hw_models", "envs"},
}
# Who stands on whom in haq: imports go to lower floors only.
FLOORS = {
    "store": 1,
    "console": 2,
    "data": 2,
    "deployment": 2,
    "reporting": 2,
    "networks": 3,
    "attacks": 4,
    "problem": 5,
    "solvers": 6,
    "training": 6,
    "study": 7,
    "commands": 8,
}


@functools.cache
def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_no_room_imports_upwards(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        used = {name.partition(".")[0] for name in imports(path)} & (set(MAY_IMPORT) | {"experiments", "tests"})
        assert used <= MAY_IMPORT[room] | {room}, path


def files(package: str) -> dict[str, Path]:
    """The modules of a package by their dotted names."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


def arrows(package: str) -> dict[str, set[str]]:
    """Which modules of a package each of its modules imports, wherever in the file, for type checking too."""
    modules = files(package)
    return {name: (imports(path) & set(modules)) - {name} for name, path in modules.items()}


@pytest.mark.parametrize("package", [*MAY_IMPORT, "experiments"])
def test_no_circle_of_files(package: str) -> None:
    left = arrows(package)
    # A package's face hands on names of its own files; whoever imports a file has run the face before.
    faces = {name for name in left if (ROOT / name.replace(".", "/") / "__init__.py").is_file()}
    left = {name: used - faces for name, used in left.items() if name not in faces}
    while free := [name for name, used in left.items() if not used & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these import each other in a circle: {', '.join(left)}"


def room(module: str) -> str:
    """The room of a module of haq; of a command: commands."""
    parts = module.split(".")
    if len(parts) > 2 and parts[-1] == "__main__":
        return "commands"
    if len(parts) == 1 or parts[1] in ("__main__", "version"):
        return parts[-1] if len(parts) > 1 else "front door"
    return "commands" if (ROOT / "haq" / f"{parts[1]}.py").is_file() else parts[1]


def test_rooms_import_downwards_only() -> None:
    for name, used in arrows("haq").items():
        if room(name) in ("front door", "__main__"):
            continue
        for other in used:
            if room(other) in (room(name), "version", "front door"):
                continue
            assert FLOORS[room(other)] < FLOORS[room(name)], f"{name} imports {other}"


def test_the_top_of_haq_is_small() -> None:
    here = [path for path in (ROOT / "haq").iterdir() if path.name != "__pycache__"]
    assert len(here) <= 30
    assert {path.name for path in here if path.is_dir()} == {*FLOORS, "assets"} - {"commands"}
    assert max(FLOORS.values()) <= 8


def test_no_command_imports_another() -> None:
    for name, used in arrows("haq").items():
        if room(name) == "commands":
            assert not {other for other in used if room(other) == "commands"}, name


def test_quantizers_import_only_torch() -> None:
    """Its cost over `import torch` is that of its own few files (`make bench` prints the seconds)."""
    code = (
        "import sys, torch; before = set(sys.modules); import quantizers;"
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(done.stdout.split()) <= {"quantizers"} | set(sys.stdlib_module_names)


def test_the_distribution() -> None:
    files = {str(file) for file in metadata.files("haq") or []}
    about = metadata.metadata("haq")
    assert about["License-Expression"] == "Apache-2.0"
    extras = set(about.get_all("Provides-Extra") or [])
    assert {"tvm", "rpc", "onnx", "robustness", "report", "ray", "zoo", "dev"} <= extras
    assert files
    for room in MAY_IMPORT:
        assert (ROOT / room / "py.typed").is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_readme_and_guide_name_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "guide").glob("*.md"))
    modules = set(re.findall(r"python -m ((?:haq|experiments)\.\w+)", text + pages))
    commands = set(re.findall(r"(?:^|`)haq ([a-z]+)", pages, re.MULTILINE))
    assert "haq.search" in modules
    assert {"search", "finetune", "evaluate", "sweep", "runs", "list"} <= commands
    listings = {"networks", "solvers", "schemes", "completion"}
    modules |= {f"haq.{command}" for command in commands - listings}
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for mark in ("<!-- main -->", "<!-- test -->"):
        assert text.count(mark) == 1
    # Pins are installed from the one file that CI uses.
    assert text.count("-c constraints.txt") >= 2


def test_every_dependency_is_pinned_for_tests() -> None:
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = {re.split(r"[<>=;\[ ]", requirement)[0].lower() for requirement in metadata.requires("haq") or []}
    assert wanted - pinned == {"haq"}

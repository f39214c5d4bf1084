"""The package is what it says: rooms that don't import upwards, light imports, typed, licensed, two commands in the README."""

from __future__ import annotations

import ast
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
COMMANDS = ("search", "train", "finetune", "evaluate", "deploy", "hardware", "robustness", "report", "runs", "sweep")


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


def test_no_command_imports_another() -> None:
    for path in (ROOT / "haq").rglob("*.py"):
        assert not imports(path) & {f"haq.{name}" for name in COMMANDS if name != path.stem}, path


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


def test_the_readme_names_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    modules = set(re.findall(r"python -m ((?:haq|experiments)\.\w+)", text))
    assert {"haq.search", "haq.finetune", "haq.evaluate"} <= modules
    for module in modules:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for mark in ("<!-- main -->", "<!-- test -->"):
        assert text.count(mark) == 1
    # Pins are installed from the one file that CI uses.
    assert text.count("-c constraints.txt") >= 2


def test_every_dependency_is_pinned_for_tests() -> None:
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = {re.split(r"[<>=;\[ ]", requirement)[0].lower() for requirement in metadata.requires("haq") or []}
    assert wanted - pinned == {"haq"}

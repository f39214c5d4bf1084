"""Folders that plug-ins are found in: one that packages are installed into, and the current one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def install(folder: Path, package: str, group: str, points: dict[str, str], code: str = "") -> None:
    """Put a package of one module and its metadata into a folder, as pip does."""
    (folder / f"{package}.py").write_text(code)
    metadata = folder / f"{package}-1.5.dist-info"
    metadata.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {package}", "Version: 1.5", "Summary: Wheels of all kinds"]
    (metadata / "METADATA").write_text("\n".join(lines) + "\n")
    rows = [f"{name} = {value}" for name, value in points.items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{group}]", *rows]) + "\n")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that packages can be installed into."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; it can't be imported from yet."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder

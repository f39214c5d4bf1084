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


def break_packages(folder: Path, group: str) -> None:
    """Put packages into a folder whose files are broken, each in another way."""
    for name, points, metadata in (
        ("no_equals", b"oak", b"Name: no_equals\nVersion: 1"),
        ("no_utf8", b"oak\xff = no:Thing", b"Name: no_utf8\nVersion: 1"),
        ("no_value", b"ash = ?!", b"Name: no_value\nVersion: 1"),
        ("no_metadata", b"elm = no:Thing", None),
        ("no_utf8_metadata", b"fir = no:Thing", b"Name: \xff\nVersion: 1"),
    ):
        about = folder / f"{name}-1.dist-info"
        about.mkdir()
        (about / "entry_points.txt").write_bytes(b"[" + group.encode() + b"]\n" + points + b"\n")
        if metadata is not None:
            (about / "METADATA").write_bytes(metadata + b"\n")


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

"""The folder of a compiled network is checked before anything in it is used: every damage is one sentence, and no crash."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haq.deployment import folder as folders
from haq.deployment.folder import CONSTANTS, DESCRIPTION, LIBRARY

CONTENT: dict[str, Any] = {
    "policy": {"conv": [4, 4]},
    "target": {"kind": "llvm"},
    "threads": 1,
    "machine": {"processor": "Z80"},
    "unpack": ["unpack_0"],
    "calls": ["steps_0"],
    "arguments": [
        *(["input", [1, 8, 8], "float32"], ["output", [1, 1, 4], "float32"]),
        *(["const_int8", [64], "int8"], ["packed", [32], "uint8"]),
    ],
    "steps": [{"name": "conv", "code": "bytes"}],
    "values": {"x": ["const_int8", 0, [8, 8]]},
    "frames": {},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Whole, but for what is code in it."""
    made = tmp_path / "deployed"
    made.mkdir()
    (made / LIBRARY).write_bytes(bytes(range(256)))
    np.savez_compressed(made / CONSTANTS, packed=np.arange(32, dtype=np.uint8))
    folders.write(made, CONTENT)
    return made


def test_a_whole_folder_is_read_as_it_was_written(folder: Path) -> None:
    """What lies beside the three files is nobody's affair; nor is how the description is laid out."""
    (folder / "images.npy").write_bytes(b"anything")
    content = folders.read(folder)
    assert {key: content[key] for key in CONTENT} == CONTENT
    assert content["files"][LIBRARY]["bytes"] == 256
    (folder / DESCRIPTION).write_text(json.dumps(dict(reversed(content.items()))))
    assert folders.read(folder) == content


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace(path: Path) -> None:
    """One bit, at the same size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def link(path: Path) -> None:
    shutil.move(path, path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("name", [LIBRARY, CONSTANTS, DESCRIPTION])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"bytes, not the [\d,]+ that were written|its SHA-256|is not the description|^$"),
        (replace, "by its SHA-256|is not the description"),
        (link, "is a symbolic link, which isn't followed"),
        (dangle, "is a symbolic link, which isn't followed"),
        (pipe, "is no ordinary file"),
        (directory, "is no ordinary file"),
        (Path.unlink, "has no"),
    ],
)
def test_a_damaged_file_is_refused(folder: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    damage(folder / name)
    if name == DESCRIPTION and damage is truncate:
        folders.read(folder)  # its last character is the end of the line
        return
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        folders.read(folder)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 2}, "isn't as it was written, by its SHA-256"),
        ({"threads": "1"}, "'threads' is '1'; it must be a whole number"),
        ({"threads": 10**30}, "'threads' is 1"),
        ({"calls": []}, "'calls' has 0 entries"),
        ({"arguments": 7}, "'arguments' is 7; it must be a list"),
        ({"arguments": CONTENT["arguments"][1:]}, "'arguments' "),
        ({"arguments": [*CONTENT["arguments"], ["work", [2**34], "float32"]]}, "'arguments' take .* at most"),
        ({"arguments": [*CONTENT["arguments"], ["work", [1], "object"]]}, "'arguments.4.2' is 'object'"),
        ({"values": {"x": ["const_int8", 1, [8, 8]]}}, "value 'x' isn't within 'const_int8'"),
        ({"files": {"../network.so": {"bytes": 1, "sha256": "0" * 64}}}, "'files' has '../network.so'"),
        ({"target": None}, "'target' is nothing; it must be a mapping"),
        ({"format": "haq-deployed-2"}, "is of format 'haq-deployed-2', not 'haq-deployed-3': deploy the network again"),
        ({"files": ...}, "is of an older version of haq, without sizes and hashes of its files: deploy the network again"),
        ({"calls": ...}, "'calls' is missing"),
        ({"unpack": ...}, "'unpack' is missing"),
        ({"arguments": CONTENT["arguments"][:-1]}, "'arguments' must have 'packed', bytes of constants.npz"),
    ],
)
def test_a_changed_description_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    content = folders.read(folder) | change
    (folder / DESCRIPTION).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(ValueError, match=message) as error:
        folders.read(folder)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not the description of a deployed network"),
        ("[]", "it must be an object, not a list"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"format": "haq-deployed-3", "files": ' + '{"a": ' * 5000 + "1" + "}" * 5001, "nested too deeply|'files"),
        ('{"threads": 1, "threads": 1}', "'threads' is there twice"),
        ('{"format": "haq-deployed-3", "files": {}, "threads": ' + "9" * 5000 + "}", "is not the description"),
        ("\0" * 34_000_000, "was not read; at most"),
    ],
)
def test_what_is_no_description_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / DESCRIPTION).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        folders.read(folder)
    assert len(str(error.value)) < 400


def test_no_change_of_a_byte_goes_unnoticed(folder: Path) -> None:
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    content = folders.read(folder)
    chance = random.Random(0)
    for number in range(300):
        name = chance.choice(sorted(whole))
        changed = bytearray(whole[name])
        for _ in range(chance.choice((1, 1, 5, 50))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        (folder / name).write_bytes(bytes(changed[: chance.choice((len(changed), chance.randrange(len(changed))))]))
        found = content  # another space, or the byte that was there
        with suppress(ValueError, FileNotFoundError):
            found = folders.read(folder)
        assert found == content, number
        (folder / name).write_bytes(whole[name])


def test_a_file_or_nothing_in_place_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no network.json: python -m haq.deploy RUN --to tvm"):
        folders.read(tmp_path / "nothing")
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match="is a file; the folder of a deployed network is expected"):
        folders.read(tmp_path / "file")
    with pytest.raises(ValueError, match="can't be read as a deployed network"):
        folders.read(tmp_path / ("long" * 200))

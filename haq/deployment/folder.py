"""The folder of a compiled network: three files, and the one reader and the one writer of what describes them.

    network.so        the code
    network.json      what the network is and what it was compiled for, with the size and the SHA-256 of the other two
    constants.npz     weights at their bits, and other constants, in one array of bytes (`hw_models.tvm_cpu.packing`)

`read` looks at everything before anything is loaded: a library that is cut short ends the process that calls it, and changed
weights give other answers without a word. Who made the folder no hash can tell: its library is code. Importing this needs
neither torch nor TVM.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from haq.store import files
from haq.store.files import quoted
from haq.store.records import MOST, Count, Names, Record, Settings
from haq.store.units import describe_bytes

FORMATS = "haq-deployed-"  # of any version
FORMAT = f"{FORMATS}3"
LIBRARY = "network.so"
DESCRIPTION = "network.json"
CONSTANTS = "constants.npz"
INPUT = "input"
OUTPUT = "output"
PACKED = "packed"  # the array of constants.npz
MOST_THREADS = 1024
MOST_DIMS = 8
MOST_BYTES = 2**34  # of all arenas together
AGAIN = "deploy the network again"

Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, le=MOST_BYTES)]
Sizes = Annotated[list[Size], Field(min_length=1, max_length=3)]
Dims = Annotated[list[Size], Field(min_length=2, max_length=MOST_DIMS)]
Type = Literal["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]


class FileEntry(Record):
    """The size of a file in bytes, and its SHA-256."""

    bytes: Count
    sha256: Hash


class Step(Record):
    """A step of the network, and the kernel that computes it."""

    name: str
    code: str


class Description(Record):
    """network.json, as far as a network is run by it. What else it says of the network is for its readers."""

    WHAT = "the description of a deployed network"

    files: dict[str, FileEntry]
    target: Settings
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)]
    machine: Settings
    unpack: Names
    calls: Annotated[Names, Field(min_length=1)]
    arguments: Annotated[list[tuple[str, Sizes, Type]], Field(min_length=2, max_length=MOST)]
    input_dims: Dims | None = None  # torch's shapes for one image, of folders that are young enough
    output_dims: Dims | None = None
    steps: Annotated[list[Step], Field(max_length=MOST)]
    values: Annotated[dict[str, tuple[str, Size, Sizes]], Field(max_length=MOST)]
    frames: Annotated[dict[str, tuple[Size, Size, Size, Size]], Field(max_length=MOST)]
    sha256: Hash  # of all other entries

    @model_validator(mode="after")
    def _check_files(self) -> Description:
        if set(self.files) != {LIBRARY, CONSTANTS}:
            raise ValueError(f"'files' has {quoted(', '.join(self.files))}; it must have {LIBRARY} and {CONSTANTS}")
        return self

    @model_validator(mode="after")
    def _check_arguments(self) -> Description:
        names = [name for name, _, _ in self.arguments]
        for name in (INPUT, OUTPUT):
            shapes = [shape for known, shape, _ in self.arguments if known == name]
            if len(shapes) != 1 or len(shapes[0]) != 3:
                raise ValueError(f"'arguments' must have {name!r} once, with three sizes")
        if len(set(names)) != len(names):
            raise ValueError("'arguments' has a name twice")
        if [dtype for name, _, dtype in self.arguments if name == PACKED] != ["uint8"]:
            raise ValueError(f"'arguments' must have {PACKED!r}, bytes of {CONSTANTS}")
        size = sum(math.prod(shape) * np.dtype(dtype).itemsize for _, shape, dtype in self.arguments)
        if size > MOST_BYTES:
            raise ValueError(
                f"'arguments' take {describe_bytes(size)} of memory; at most {describe_bytes(MOST_BYTES)} are given"
            )
        return self

    @model_validator(mode="after")
    def _check_dims(self) -> Description:
        shapes = {name: shape for name, shape, _ in self.arguments}
        for name, dims in ((INPUT, self.input_dims), (OUTPUT, self.output_dims)):
            if dims is not None and (dims[0] != 1 or math.prod(dims) != math.prod(shapes[name])):
                raise ValueError(f"'{name}_dims' are {dims}, which is no shape of {math.prod(shapes[name]):,} numbers")
        return self

    @model_validator(mode="after")
    def _check_values(self) -> Description:
        elements = {name: math.prod(shape) for name, shape, _ in self.arguments}
        for name, (arena, start, shape) in self.values.items():
            if start + math.prod(shape) > elements.get(arena, -1):
                raise ValueError(f"value {quoted(name)} isn't within {quoted(arena)}")
        return self


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Describe a folder whose other files are written.

    Args:
        folder: The folder.
        content: What `Description` and its readers want to know, without sizes and hashes.
    """
    described = {"format": FORMAT, **content}
    described["files"] = {name: _entry(folder / name) for name in (LIBRARY, CONSTANTS)}
    described["sha256"] = _own_hash(described)
    files.write(folder / DESCRIPTION, json.dumps(described, indent=1, allow_nan=False) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """Check a folder, and read its description. Nothing outside of it is opened, and nothing in it is executed.

    Args:
        folder: The folder.

    Returns:
        What network.json says, all of it.

    Raises:
        FileNotFoundError: If one of the three files isn't there.
        ValueError: For the first file that isn't as it was written, and for one of another version.
    """
    try:
        content = _described(folder)
        for name, entry in content["files"].items():
            _check_file(folder / name, entry["bytes"], entry["sha256"])
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{folder} can't be read as a deployed network: {error.strerror or error}") from error
    return content


def _described(folder: Path) -> dict[str, Any]:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; the folder of a deployed network is expected")
    path = folder / DESCRIPTION
    if not path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{folder} has no {DESCRIPTION}: python -m haq.deploy RUN --to tvm writes such a folder")
    _check_plain(path)
    content = files.read_json(path, Description.WHAT)
    if content.get("format") != FORMAT:
        found = str(content.get("format"))[:40]
        raise ValueError(f"{path} is of format {found!r}, not {FORMAT!r}: {AGAIN}")
    if "files" not in content:
        raise ValueError(f"{path} is of an older version of haq, without sizes and hashes of its files: {AGAIN}")
    _check_description(content, path)
    return content


def _check_description(content: dict[str, Any], path: Path) -> None:
    Description.from_dict(content, path)
    if content["sha256"] != _own_hash(content):
        raise ValueError(f"{path} isn't as it was written, by its SHA-256: {AGAIN}")


def _check_plain(path: Path) -> None:
    """Raise an error unless a path is an ordinary file, and no link to one."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}: {AGAIN}") from None
    if stat.S_ISLNK(kind):
        raise ValueError(f"{path} is a symbolic link, which isn't followed: put the file itself there, or {AGAIN}")
    if not stat.S_ISREG(kind):
        raise ValueError(f"{path} is no ordinary file: {AGAIN}")


def _check_file(path: Path, size: int, digest: str) -> None:
    _check_plain(path)
    found = path.stat().st_size
    if found != size:
        raise ValueError(f"{path} has {found:,} bytes, not the {size:,} that were written: {AGAIN}")
    if _entry(path)["sha256"] != digest:
        raise ValueError(f"{path} isn't as it was written, by its SHA-256: {AGAIN}")


def _entry(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _own_hash(content: Mapping[str, Any]) -> str:
    """Hash all of a description but the hash itself, whatever its spaces."""
    others = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()

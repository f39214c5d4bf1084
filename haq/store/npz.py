"""Arrays from an .npz file that nobody vouches for: no pickle, and no more memory than is allowed beforehand."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from haq.store.files import check_file
from haq.store.units import describe_bytes

HEADER = 1024  # bytes that an array's description takes in a file, at most, if it is one of ours
COMPRESSED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # ways of which no more is unpacked than is asked for
KINDS = "biufU"  # of NumPy's types: truth values, integers, floats, text


def read(path: Path, names: set[str] | None, most: int, unpacked: int | None = None) -> dict[str, NDArray[Any]]:
    """Read the arrays of a file that `numpy.savez` wrote.

    Args:
        path: The file.
        names: The names that the arrays must have; None takes whatever there is.
        most: Bytes up to which the file is read.
        unpacked: Bytes that the arrays of a compressed file may take in memory; None refuses compressed ones.

    Returns:
        The arrays by name, not writable.

    Raises:
        ValueError: If the file has more bytes, is damaged, or holds anything else.
    """
    check_file(path, most)
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
            _check_entries(entries, names, unpacked)
            return {_name(entry): _array(file.read(entry)) for entry in entries}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:  # the last: encrypted
        raise ValueError(f"it is damaged: {error}") from error


def _check_entries(entries: list[zipfile.ZipInfo], names: set[str] | None, unpacked: int | None) -> None:
    found = [_name(entry) for entry in entries]
    if names is None:
        names = set(found)
    wrong = sorted(set(found) ^ names)
    if not wrong and len(found) > len(names):
        wrong = sorted(name for name in found if found.count(name) > 1)
    if wrong:
        raise ValueError(f"the array {wrong[0][:40]!r} is missing, or there once too often")
    if unpacked is not None:
        if any(entry.compress_type not in COMPRESSED for entry in entries):
            raise ValueError("it is compressed in another way than ours are")
        # No more is unpacked of an entry than it says.
        size = sum(entry.file_size for entry in entries)
        if size > unpacked:
            raise ValueError(f"its arrays take {describe_bytes(size)} in memory, and {describe_bytes(unpacked)} are allowed")
        return
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, which nothing of ours is")


def _name(entry: zipfile.ZipInfo) -> str:
    return entry.filename.removesuffix(".npy")


def _array(content: bytes) -> NDArray[Any]:
    stream = io.BytesIO(content)
    if npy.read_magic(stream) == (1, 0):
        shape, fortran, dtype = npy.read_array_header_1_0(stream)
    else:
        shape, fortran, dtype = npy.read_array_header_2_0(stream)
    if dtype.hasobject:
        raise ValueError(f"an array of {dtype} isn't read, it may hold code")
    if dtype.kind not in KINDS:
        raise ValueError(f"an array of {dtype} isn't read")
    if math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ValueError("an array isn't of the size that it says")
    values: NDArray[Any] = np.frombuffer(content, dtype, offset=stream.tell())
    if fortran:
        return values.reshape(shape[::-1]).T
    return values.reshape(shape)

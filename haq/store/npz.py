"""Arrays from an .npz file that nobody vouches for: no pickle, nothing unpacked, no more memory than the file has bytes."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from haq.store.files import check_file


def read(path: Path, names: set[str], most: int) -> dict[str, NDArray[Any]]:
    """The arrays of a file that `numpy.savez` wrote, which must have these names.

    Raises ValueError if the file has more than `most` bytes, is damaged, or holds anything else.
    """
    check_file(path, most)
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
            found = [entry.filename.removesuffix(".npy") for entry in entries]
            if wrong := sorted(set(found) ^ names) or (len(found) > len(names) and found):
                raise ValueError(f"the array {wrong[0][:40]!r} is missing, or there once too often")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed, which nothing of ours is")
            return {entry.filename.removesuffix(".npy"): _array(file.read(entry)) for entry in entries}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:  # the last: encrypted
        raise ValueError(f"it is damaged: {error}") from error


def _array(content: bytes) -> NDArray[Any]:
    stream = io.BytesIO(content)
    header = npy.read_array_header_1_0 if npy.read_magic(stream) == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.hasobject or dtype.kind not in "biufU" or fortran:
        raise ValueError(f"an array of {dtype} isn't read" + (", it may hold code" if dtype.hasobject else ""))
    if math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ValueError("an array isn't of the size that it says")
    values: NDArray[Any] = np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape)
    return values

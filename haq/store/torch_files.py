"""What `torch.save` wrote, from anybody: tensors and plain data are read, code never is, in no more memory than the file has.

Nothing is unpacked and nothing is multiplied: a few bytes of a file can say that they are gigabytes (a compressed entry, a
tensor that repeats one value), and such a file is refused before they are asked for.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from haq.store.files import check_file

SPARE = 2**20  # bytes by which tensors may exceed their file: small ones share a page of it


def load(path: Path, most: int) -> Any:
    """Read a file; its tensors are copies of their own, on the CPU.

    Args:
        path: The file.
        most: Bytes up to which it is read.

    Returns:
        What was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        pickle.UnpicklingError: For a file that holds anything but tensors and plain data.
        ValueError: For one that is damaged, or whose tensors aren't plain ones.
    """
    check_file(path, most)
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        if is_zip:
            _check_entries(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused in our own words
            # Mapped, a tensor can't reach beyond the file, whatever size it says it has.
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)
    except (pickle.UnpicklingError, ValueError):
        raise
    except Exception as error:
        # Of a damaged file anything may come, down to KeyError and AssertionError.
        raise ValueError(f"it is truncated or of another kind ({type(error).__name__})") from error
    return _Copies(path.stat().st_size).of(content)


def _check_entries(path: Path) -> None:
    """Raise ValueError if the entries of a zip are more bytes than it has."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, UnicodeDecodeError) as error:
        raise ValueError("it is truncated or of another kind (no whole zip)") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, which nothing is that torch.save writes")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its entries are larger than the file")


class _Copies:
    """Copies of the tensors in what was loaded, each of them checked, in at most a few times the bytes of the file."""

    def __init__(self, size: int) -> None:
        self._left = 2 * size + SPARE  # two names may be of the same weights
        self._seen: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        """Replace tensors by copies of their own, in dictionaries and lists in place; a thing that is there twice is one."""
        if not isinstance(value, (Tensor, dict, list, tuple)):
            return value
        if id(value) in self._seen:
            return self._seen[id(value)][1]
        made = value
        if isinstance(value, Tensor):
            made = self._copy(value)
        # Kept beside its copy, a thing keeps its id for itself. A thing that holds itself meets itself here.
        self._seen[id(value)] = value, made
        if isinstance(value, dict):
            for key, item in value.items():
                value[key] = self.of(item)
        elif isinstance(value, list):
            value[:] = [self.of(item) for item in value]
        elif isinstance(value, tuple):
            made = tuple(self.of(item) for item in value)
            self._seen[id(value)] = value, made
        return made

    def _copy(self, tensor: Tensor) -> Tensor:
        kind = kind_of_tensor(tensor)
        if kind:
            raise ValueError(f"it holds a {kind} tensor; a checkpoint of plain ones is expected: save its state_dict()")
        size = tensor.numel() * tensor.element_size()
        if size > tensor.untyped_storage().nbytes():
            raise ValueError("it holds a tensor that repeats its values (an expanded one): save a copy, .contiguous()")
        self._left -= size
        if self._left < 0:
            raise ValueError("its tensors are several times as large as the file: they share their values")
        return tensor.detach().clone(memory_format=torch.preserve_format)


def kind_of_tensor(tensor: Tensor) -> str:
    """Say what is unusual about a tensor that isn't plain numbers in memory: "sparse"; nothing if it is."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return type(tensor).__name__
    if tensor.is_meta:
        return "meta"
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.device.type != "cpu":
        return str(tensor.device)
    return ""

"""Objects on their way to another process: what is on a GPU travels by memory, and arrives on the receiver's own device.

A pickled tensor would come back on the device that it is from, wherever that is: all workers would share the first GPU, and
there may be none where they are. So tensors are written as those of the CPU, with a note that they, and whatever names their
device, are to be moved; they are when they are read.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import cloudpickle
import torch
from torch import Tensor, nn

from haq.problem.device import CPU, find_device

STAYING = (CPU, "meta")  # kinds of devices whose tensors arrive as they are
_here = [torch.device(CPU)]  # where what is being read is to be


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc,name-defined]
    """A pickler that writes everything as if it were on the CPU."""

    def reducer_override(self, given: Any) -> Any:
        if isinstance(given, torch.device) and given.type not in STAYING:
            return _device_here, ()
        if isinstance(given, Tensor) and given.device.type not in STAYING:
            return _tensor_here, (given.detach().cpu(), given.requires_grad, isinstance(given, nn.Parameter))
        return super().reducer_override(given)


def dump(given: Any, file: IO[bytes]) -> None:
    """Write an object into a file."""
    _Pickler(file).dump(given)


def dumps(given: Any) -> bytes:
    """Return an object as bytes."""
    file = io.BytesIO()
    dump(given, file)
    return file.getvalue()


def load(content: Any, device: str = CPU) -> Any:
    """Read an object.

    Args:
        content: Bytes, or what can be read as such.
        device: Where its tensors are to be that were on no CPU.

    Returns:
        The object.
    """
    with _reading_for(device):
        return pickle.loads(content)


@contextmanager
def _reading_for(device: str) -> Iterator[None]:
    before = _here[0]
    _here[0] = find_device(device)
    try:
        yield
    finally:
        _here[0] = before


def _device_here() -> torch.device:
    return _here[0]


def _tensor_here(tensor: Tensor, requires_grad: bool, is_parameter: bool) -> Tensor:
    moved = tensor.to(_here[0])
    if is_parameter:
        return nn.Parameter(moved, requires_grad)
    return moved.requires_grad_(requires_grad)

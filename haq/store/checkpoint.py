"""A file with what it takes to go on exactly where something was interrupted; reading one can't execute anything."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from haq.store import torch_files
from haq.store.files import check_file, write

MOST = 2**30  # bytes that are read


@dataclass(frozen=True)
class Checkpoint:
    """A file of tensors and plain data, and what it belongs to: a file of something else is refused with the difference.

    Attributes:
        path: Where it is.
        asked: What it belongs to, by name, in words.
    """

    path: Path
    asked: dict[str, str]

    def write(self, content: dict[str, Any]) -> None:
        """Write tensors, numbers, strings and containers of them, beside and renamed; the same bytes for the same content."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()  # torch's own error on a full disk doesn't say so
        torch.save(_apart({"asked": self.asked, **content}, {}), file)
        write(self.path, file.getvalue())

    def read(self, most: int = MOST) -> dict[str, Any] | None:
        """Read what was written last.

        Args:
            most: Bytes up to which it is read.

        Returns:
            The content; None if there is no file.

        Raises:
            ValueError: With what to do, for a file that can't be read, is of something else, or has more bytes.
        """
        if not self.path.exists():
            return None
        check_file(self.path, most)
        try:
            content: dict[str, Any] = torch_files.load(self.path, most)
            asked = dict(content["asked"])
        except Exception as error:
            raise ValueError(f"{self.path} can't be resumed from ({type(error).__name__}); delete it to start anew") from error
        for key in sorted(set(asked) | set(self.asked)):
            if asked.get(key) != self.asked.get(key):
                raise ValueError(
                    f"{self.path} is of something else: {key} was {asked.get(key)!r} and is {self.asked.get(key)!r} now; "
                    "ask for the same again, or delete it to start anew"
                )
        return content

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Say in one sentence, of whatever is raised while what was read is put back, that it doesn't fit.

        Raises:
            ValueError: With the reason, and what to do about it.
        """
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{self.path} doesn't fit what goes on from it ({reason}); delete it to start anew") from error


def _apart(value: Any, strings: dict[str, str]) -> Any:
    """Return the same, with equal strings one object and every container one of its own.

    A pickle tells objects from equal ones, so that otherwise its bytes would depend on where values come from.
    """
    if isinstance(value, str):
        return strings.setdefault(value, value)
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        return value.detach().cpu()  # it can be read wherever it is gone on with
    if isinstance(value, dict):
        return {_apart(key, strings): _apart(item, strings) for key, item in value.items()}
    if isinstance(value, list):
        return [_apart(item, strings) for item in value]
    if isinstance(value, tuple):
        return tuple(_apart(item, strings) for item in value)
    return value

"""Files that are never half written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside another to write to, within a `with`; then the file is renamed over the other."""
    partial = Path(f"{os.fspath(path)}.part")
    yield partial
    partial.replace(path)

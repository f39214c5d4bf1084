"""Decoded images that are kept, so that every file is decoded once: in memory, or in a file of the cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haq.data.download import cache_folder
from haq.data.memory import show_bytes
from haq.store import files

FOLDER = "decoded"
ENDING = ".uint8"
VERSION = 1  # of how files are decoded: another one decodes anew
LEFT_FREE = 0.1  # share of a disk's free space that is left alone
SUM_BYTES = 4  # of a checksum

logger = logging.getLogger("haq")
_one_makes = threading.Lock()


Stamp = tuple[int, int] | None


class DecodedImages:
    """Images of a list of files, each kept once it is decoded.

    On disk they lie in one file: a checksum for every image, and then the images. An image whose checksum isn't right is taken
    as not there: one that was never written, was written half, or is damaged is decoded anew. The file is named after all
    files that it is of, their sizes and times and the size of the images, so it can't be of others. An image whose file was
    changed since is not given either.
    """

    def __init__(self, paths: Sequence[Path], size: int, resize: int, *, in_memory: bool) -> None:
        """Name the files; nothing is read or written until an image is asked for.

        Args:
            paths: The files.
            size: Height and width of the images, in pixels.
            resize: What shorter sides are resized to before that, in pixels.
            in_memory: Whether images are kept in memory, and not on disk.
        """
        self.paths = paths
        self.size = size
        self.resize = resize
        self.in_memory = in_memory
        self._images: dict[int, tuple[Stamp, NDArray[np.uint8]]] = {}
        self._is_full = False  # no more is written

    @property
    def image_bytes(self) -> int:
        """Count the bytes of one image."""
        return 3 * self.size * self.size

    @property
    def total_bytes(self) -> int:
        """Count the bytes of all images, with their checksums."""
        return (self.image_bytes + SUM_BYTES) * len(self.paths)

    def get(self, place: int, values: NDArray[np.uint8]) -> bool:
        """Write an image into an array.

        Args:
            place: Of its file in the list.
            values: Takes the image, uint8 (size, size, 3).

        Returns:
            Whether it is kept; if not, the array may hold anything.
        """
        if self.in_memory:
            before, image = self._images.get(place, (None, None))
            if image is None or before != _stamp_of(self.paths[place]):
                return False
            values[:] = image
            return True
        try:
            if self.stamps[place] != _stamp_of(self.paths[place]):
                return False
            sums, images = self._opened()
        except (OSError, ValueError):
            return False
        values[:] = images[place]
        return int(sums[place]) == _sum_of(values)

    def put(self, place: int, values: NDArray[np.uint8]) -> None:
        """Keep an image. What can't be written (a full disk) isn't kept; it is decoded again when it is asked for.

        Args:
            place: Of its file in the list.
            values: The image, uint8 (size, size, 3).
        """
        if self.in_memory:
            self._images[place] = _stamp_of(self.paths[place]), values.copy()
            return
        if self._is_full or self.stamps[place] != _stamp_of(self.paths[place]):
            return
        try:
            with _one_makes:
                if not self._is_full and not self._is_there():
                    self._make()
            if self._is_full:
                return
            with open(self.path, "r+b", buffering=0) as file:
                # Not through the memory map: a full disk would end the process there.
                os.pwrite(file.fileno(), values.tobytes(), SUM_BYTES * len(self.paths) + place * self.image_bytes)
                os.pwrite(file.fileno(), np.uint32(_sum_of(values)).tobytes(), SUM_BYTES * place)
        except OSError as error:
            self._stop(str(error))

    @cached_property
    def stamps(self) -> list[Stamp]:
        """Return what tells every file from a later one of its name."""
        return [_stamp_of(path) for path in self.paths]

    @cached_property
    def path(self) -> Path:
        """Return the file that the images are kept in."""
        digest = hashlib.sha256(f"{VERSION} {self.size} {self.resize}".encode())
        for path, stamp in zip(self.paths, self.stamps, strict=True):
            digest.update(f"{path.absolute()}\0{stamp}\n".encode("utf-8", "surrogateescape"))
        return cache_folder() / FOLDER / f"{digest.hexdigest()[:32]}{ENDING}"

    def _is_there(self) -> bool:
        try:
            return self.path.stat().st_size == self.total_bytes
        except OSError:
            return False

    def _opened(self) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """Map the file into memory. Raises OSError or ValueError if there is none, or one of another size."""
        if not self._is_there():
            raise FileNotFoundError(self.path)
        count = len(self.paths)
        mapped: Any = np.memmap(self.path, np.uint8, "r", shape=(self.total_bytes,))
        sums = mapped[: SUM_BYTES * count].view(np.uint32)
        return sums, mapped[SUM_BYTES * count :].reshape(count, self.size, self.size, 3)

    def _make(self) -> None:
        """Make an empty file of the full size, beside and renamed; it takes space only as images come in."""
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if self.total_bytes > (1 - LEFT_FREE) * free:
            self._stop(f"all of them would take {show_bytes(self.total_bytes)}, and {show_bytes(free)} are free")
            return
        files.reserve(self.path, self.total_bytes)
        logger.info(
            "%s decoded images are kept in %s, %s at most (haq data cache shows and clears it)",
            f"{len(self.paths):,}",
            self.path,
            show_bytes(self.total_bytes),
        )

    def _stop(self, reason: str) -> None:
        self._is_full = True
        logger.warning("decoded images are not kept in %s (%s): they are decoded whenever they are needed", self.path, reason)


def _sum_of(values: NDArray[np.uint8]) -> int:
    return zlib.crc32(values.data.cast("B"))


def _stamp_of(path: Path) -> Stamp:
    """Return size and time of a file; None if it isn't there."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_size, about.st_mtime_ns


def kept_files() -> list[tuple[Path, int]]:
    """List the files of decoded images in the cache folder, with the bytes that each takes on disk."""
    folder = cache_folder() / FOLDER
    if not folder.is_dir():
        return []
    kept = [path for path in sorted(folder.iterdir()) if path.name.endswith((ENDING, files.PART))]
    return [(path, path.stat().st_blocks * 512) for path in kept]


def clear() -> int:
    """Delete all decoded images of the cache folder; return how many bytes they took on disk."""
    freed = 0
    for path, size in kept_files():
        path.unlink(missing_ok=True)
        freed += size
    return freed

"""Image files: read as a viewer shows them, brought to a size, and kept once they are."""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haq.data.decoded import DecodedImages

if TYPE_CHECKING:
    from PIL.Image import Image

_one_large = threading.Lock()
MOST_PIXELS = 89_478_485  # of an image file: above it Pillow itself warns
LARGE = 2**24  # pixels; of images above it one is decoded at a time
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # by content, whatever a file's name ends in
ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held
ORIENTATIONS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


@dataclass(frozen=True)
class ImageFiles:
    """Image files, decoded when asked for: shorter side resized to `resize`, centre `size` x `size` kept.

    With a place to keep them, `decoded`, every file is decoded once.
    """

    paths: tuple[Path, ...]
    size: int
    resize: int
    decoded: DecodedImages | None = field(default=None, compare=False, repr=False)
    places: tuple[int, ...] = field(default=(), compare=False, repr=False)  # of the files in `decoded`

    def __len__(self) -> int:
        """Count the files."""
        return len(self.paths)

    @property
    def nbytes(self) -> int:
        """Count the bytes of all images, decoded."""
        return 3 * self.size * self.size * len(self.paths)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Decode the images of these indices: uint8 (N, 3, size, size). Raises ValueError for a file that can't be one."""
        with warnings.catch_warnings():
            # Of what Pillow warns of, too many pixels are an error here, and broken EXIF data are no fault of the picture.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            numbers = index.tolist()
            # Memory of its own: what threads allocate otherwise stays theirs once it is free.
            memory = mmap.mmap(-1, max(1, 3 * self.size * self.size * len(numbers)))
            values = np.ndarray((len(numbers), self.size, self.size, 3), np.uint8, memory)
            # As many as there are cores: large photographs take much memory while they are decoded.
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for _ in pool.map(self._fill, values, numbers):
                    pass
        return torch.from_numpy(values).permute(0, 3, 1, 2)

    def subset(self, index: Tensor) -> ImageFiles:
        """Take the files of these indices.

        Args:
            index: Integers, shape (count,).

        Returns:
            The same kind of source, of these files in this order; nothing is decoded.
        """
        numbers = index.tolist()
        places: tuple[int, ...] = ()
        if self.places:
            places = tuple(self.places[i] for i in numbers)
        return ImageFiles(tuple(self.paths[i] for i in numbers), self.size, self.resize, self.decoded, places)

    def keeping(self, most: int) -> ImageFiles:
        """Return the same files, whose images are kept once they are decoded.

        Args:
            most: How many bytes they may take in memory, all together; otherwise they are kept on disk.

        Returns:
            The files, with a place for their decoded images.
        """
        decoded = DecodedImages(self.paths, self.size, self.resize, in_memory=self.nbytes <= most)
        return ImageFiles(self.paths, self.size, self.resize, decoded, tuple(range(len(self.paths))))

    def _fill(self, values: NDArray[np.uint8], number: int) -> None:
        """Write the image of one file into an array of shape (size, size, 3)."""
        if self.decoded is None:
            values[:] = self._decode(self.paths[number])
            return
        place = self.places[number]
        if not self.decoded.get(place, values):
            values[:] = self._decode(self.paths[number])
            self.decoded.put(place, values)

    def _decode(self, path: Path) -> NDArray[np.uint8]:
        image = read_image(path)
        scale = self.resize / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        if width * height > MOST_PIXELS:
            raise ValueError(
                f"{path} is {image.width} x {image.height} pixels, too long a strip to be cut to {self.size} x {self.size}: "
                "leave it out"
            )
        left = (width - self.size) // 2
        top = (height - self.size) // 2
        image = image.resize((width, height), _pillow().Resampling.BICUBIC)
        image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image)


def _pillow() -> Any:
    # It is needed only where images are files.
    from PIL import Image

    return Image


def read_image(path: Path) -> Image:
    """Read an image file as a viewer shows it: in RGB, upright, what is transparent on white, of an animation the first image.

    Raises ValueError, in one sentence, for a file that isn't a readable image of at most MOST_PIXELS pixels.
    """
    # A pipe or a device would be waited for.
    if not path.is_file():
        raise ValueError(f"{path} is not a readable image: it is no regular file")
    pillow = _pillow()
    # Pillow raises its own errors for too many pixels, and almost any for a damaged file.
    try:
        with pillow.open(path, formats=FORMATS) as file:
            pixels = file.width * file.height
            if pixels > MOST_PIXELS:
                raise pillow.DecompressionBombError(f"its {file.width} x {file.height} pixels are too many")
            if pixels <= LARGE:
                return _as_seen(file)
            with _one_large:
                return _as_seen(file)
    except pillow.DecompressionBombError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is refused ({reason}): an image may have {MOST_PIXELS:,} pixels, make it smaller") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a readable image: {reason or type(error).__name__}") from error


def _as_seen(file: Any) -> Image:
    """Decode an image to RGB, and turn it upright."""
    pillow = _pillow()
    file.load()
    image = file
    if file.mode == "I" or file.mode.startswith("I;16"):
        # Pillow itself cuts values off at 255.
        values = np.asarray(file)
        if values.min() < 0 or values.max() > 65535 or (file.mode == "I" and file.format != "PNG"):
            raise ValueError("its values are 32-bit integers of unknown range; save it with 8 or 16 bits")
        image = pillow.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif file.mode == "F":
        raise ValueError("its values are floats of unknown range; save it with 8 or 16 bits")
    elif "A" in file.mode.upper().replace("LAB", "") or "transparency" in file.info:
        layer = file.convert("RGBA")
        image = pillow.new("RGB", file.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    try:
        orientation = file.getexif().get(ORIENTATION)
    except Exception:
        orientation = None  # damaged EXIF data: the picture is as it is
    image = image.convert("RGB")
    if orientation in ORIENTATIONS:
        image = image.transpose(getattr(pillow.Transpose, ORIENTATIONS[orientation]))
    made: Image = image
    return made

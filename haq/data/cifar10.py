"""CIFAR-10 (Krizhevsky 2009): 32x32 colour photographs of ten classes."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import torch

from haq.data.dataset import Dataset, Split, balanced, without
from haq.data.download import cache_folder, download

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# The binary edition, because the other one is a pickle: rows of one label byte and 3x32x32 pixels.
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9dddda3db29a59bca1d"
FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILE = "test_batch.bin"
ROW_BYTES = 1 + 3 * 32 * 32


class CIFAR10:
    """The data set: 60,000 images."""

    def __call__(self) -> Dataset:
        """Load it. Raises FileNotFoundError, with the command that gets it, if it isn't there, ValueError if it is damaged."""
        folder = cache_folder() / FOLDER
        missing = [name for name in (*TRAIN_FILES, TEST_FILE) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"CIFAR-10 is not in {folder} ({missing[0]} is missing): get it with `python -m haq.data cifar10` (170 MB)"
            )
        train = _read(folder, TRAIN_FILES)
        test = _read(folder, (TEST_FILE,))
        chosen = balanced(train.labels, 0, 500)
        search = train.subset(chosen)
        train = train.subset(without(len(train), chosen))
        return Dataset("cifar10", CLASSES, train, search, test, str(folder))

    def fetch(self) -> None:
        """Download it if it isn't there, and unpack it."""
        if (cache_folder() / FOLDER).is_dir():
            return
        archive = cache_folder() / "cifar-10-binary.tar.gz"
        download(URL, archive, f"sha256:{SHA256}")
        unpack(archive)


def unpack(archive: Path) -> None:
    """Unpack the data files of an archive into a folder beside it."""
    # Member by member and by name alone, so that no path inside the archive can lead elsewhere.
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.name.endswith(".bin"):
                continue
            source = tar.extractfile(member)
            if source is not None:
                target = archive.parent / FOLDER / Path(member.name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())


def _read(folder: Path, names: tuple[str, ...]) -> Split:
    """Read files of rows. Raises ValueError for one that is truncated."""
    parts = []
    for name in names:
        row = np.fromfile(folder / name, np.uint8)
        if row.size == 0 or row.size % ROW_BYTES:
            raise ValueError(f"{folder / name} has {row.size} bytes, not a multiple of {ROW_BYTES}: it is truncated")
        parts.append(row.reshape(-1, ROW_BYTES))
    rows = np.concatenate(parts)
    images = torch.from_numpy(rows[:, 1:].reshape(-1, 3, 32, 32).copy())
    return Split(images, torch.from_numpy(rows[:, 0].astype(np.int64)))


CIFAR_10 = CIFAR10()

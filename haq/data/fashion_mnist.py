"""Fashion-MNIST (Xiao et al. 2017): 28x28 grey images of clothes, and the part of it that ships with haq."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haq.data.dataset import Dataset, Split, balanced, without
from haq.data.download import cache_folder, download

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# SHA-256 of the files' *unpacked* content: Debian packs the same bytes anew.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
# Of the packed files, as their authors publish them.
PACKED = {
    "train-images-idx3-ubyte": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "md5:25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "md5:bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "md5:bb300cfdad3c16e7a12a480ee83cd310",
}


def embedded() -> Dataset:
    """Load the 12,000 images that ship with haq: 8,000 train, 2,000 search and 2,000 test images."""
    packed = resources.files("haq").joinpath("assets/fashion-mnist-12k.npz.xz").read_bytes()
    with np.load(io.BytesIO(lzma.decompress(packed)), allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays["images"]).unsqueeze(1)
        labels = torch.from_numpy(arrays["labels"].astype(np.int64))
    train, search, test = (Split(images[a:b], labels[a:b]) for a, b in ((0, 8000), (8000, 10000), (10000, 12000)))
    return Dataset("fashion-mnist-12k", CLASSES, train, search, test, "shipped with haq")


def fashion_mnist_12k_rows(train_labels: Tensor, test_labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of the full data set that make up `fashion-mnist-12k`.

    The search rows lie inside the full data set's search split and the train rows inside its train split, so a network
    trained on `fashion-mnist` has not seen what `fashion-mnist-12k` searches and tests on.

    Args:
        train_labels: Labels of the 60,000 train images.
        test_labels: Labels of the 10,000 test images.

    Returns:
        Row numbers of the train, search and test splits; those of train and search are rows of the train files.
    """
    return balanced(train_labels, 500, 800), balanced(train_labels, 0, 200), balanced(test_labels, 0, 200)


class FashionMNIST:
    """The full data set: 70,000 images."""

    def __call__(self) -> Dataset:
        """Load it. Raises FileNotFoundError, with the commands that get it, if it isn't there, ValueError if it is damaged."""
        folder = find_folder()
        arrays = {name: read_idx(folder / f"{name}.gz", digest) for name, digest in FILES.items()}
        train = _split(arrays["train-images-idx3-ubyte"], arrays["train-labels-idx1-ubyte"])
        test = _split(arrays["t10k-images-idx3-ubyte"], arrays["t10k-labels-idx1-ubyte"])
        chosen = balanced(train.labels, 0, 500)
        search = train.subset(chosen)
        train = train.subset(without(len(train), chosen))
        return Dataset("fashion-mnist", CLASSES, train, search, test, str(folder))

    def fetch(self) -> None:
        """Download what isn't there."""
        try:
            find_folder()
            return
        except FileNotFoundError:
            folder = cache_folder() / "fashion-mnist"
        for name, digest in FILES.items():
            path = folder / f"{name}.gz"
            download(f"{URL}{name}.gz", path, PACKED[name])
            read_idx(path, digest)


def find_folder() -> Path:
    """Return the first folder that has all four files. Raises FileNotFoundError, with the commands that get them."""
    folders = (DEBIAN, cache_folder() / "fashion-mnist")
    for folder in folders:
        if all((folder / f"{name}.gz").is_file() for name in FILES):
            return folder
    raise FileNotFoundError(
        f"Fashion-MNIST is in none of {', '.join(map(str, folders))}: get it with `python -m haq.data fashion-mnist` "
        "(30 MB) or `apt-get install dataset-fashion-mnist`, or use --data fashion-mnist-12k, which ships with haq"
    )


def read_idx(path: Path, sha256: str) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of bytes. Raises ValueError unless its unpacked content has this SHA-256."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} can't be unpacked ({error}): delete it and fetch it again") from error
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise ValueError(f"{path} isn't the published file (SHA-256 differs): delete it and fetch it again")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()


def _split(images: NDArray[np.uint8], labels: NDArray[Any]) -> Split:
    return Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))


FASHION_MNIST = FashionMNIST()

"""Data sets by name, each cut into the three splits that a search needs.

`train` is for training and fine-tuning, `search` is what a policy is judged on while searching, `test` is what results
are reported on. The three are disjoint and depend on nothing but the data set (never on a run's seed), so that a network
trained on `train` has seen neither of the others.

    python -m haq.data fashion-mnist        # fetch the data set if it is missing, then show its splits
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import importlib
import io
import lzma
import os
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 0
DEFAULT = "fashion-mnist-12k"
NAMES = ("fashion-mnist-12k", "fashion-mnist", "cifar10", "imagefolder:PATH", "images:PATH", "module:function")
UNLABELLED = -1

FASHION_CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# SHA-256 of the files' *unpacked* content: Debian packs the same bytes anew.
FASHION_FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9dddda3db29a59bca1d"
CIFAR_FOLDER = "cifar-10-batches-bin"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Images(Protocol):
    """Anything that gives images by index: a tensor, or files decoded when they are asked for."""

    def __getitem__(self, index: Tensor) -> Tensor: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Split:
    """Images, uint8 of shape (N, C, H, W) (or float, taken as they are), and their labels, int64 of shape (N,)."""

    images: Images
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels), in order, or shuffled by `generator`."""
        count = len(self)
        order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        for index in order.split(size):
            yield self.images[index], self.labels[index]

    def subset(self, index: Tensor) -> Split:
        images = self.images.subset(index) if isinstance(self.images, ImageFiles) else self.images[index]
        return Split(images, self.labels[index])


@dataclass(frozen=True)
class ImageFiles:
    """Image files, decoded when asked for: shorter side resized to `resize`, centre `size` x `size` kept."""

    paths: tuple[Path, ...]
    size: int
    resize: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Tensor:
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(lambda i: self._decode(self.paths[i]), index.tolist())))

    def subset(self, index: Tensor) -> ImageFiles:
        return ImageFiles(tuple(self.paths[i] for i in index.tolist()), self.size, self.resize)

    def _decode(self, path: Path) -> Tensor:
        from PIL import Image

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} is not a readable image: {error}") from error
        scale = self.resize / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class Dataset:
    """A named data set: its class names and its three disjoint splits. One without labels has no classes, and UNLABELLED for
    every label."""

    name: str
    classes: tuple[str, ...]
    train: Split
    search: Split
    test: Split
    origin: str = field(default="")

    def __post_init__(self) -> None:
        for name in ("train", "search", "test"):
            labels = getattr(self, name).labels
            if len(labels) == 0:
                raise ValueError(f"the {name} split of {self.name} is empty")
            if self.classes and (labels.min() < 0 or labels.max() >= len(self.classes)):
                raise ValueError(
                    f"the {name} split of {self.name} has labels from {int(labels.min())} to {int(labels.max())}, "
                    f"outside its {len(self.classes)} classes"
                )

    def describe(self) -> str:
        """The splits in one line."""
        classes = f"{len(self.classes)} classes" if self.classes else "no labels"
        return (
            f"{self.name} ({self.origin}): {classes}, {len(self.train):,} train / "
            f"{len(self.search):,} search / {len(self.test):,} test images, disjoint, split seed {SPLIT_SEED}"
        )

    def fair(self, count: int) -> Tensor:
        """Indices of `count` train images, of every class as many, in an order that never changes."""
        labels, classes = (self.train.labels, len(self.classes)) if self.classes else (torch.zeros_like(self.train.labels), 1)
        return balanced(labels, 0, -(-count // classes))[:count]

    def signature(self) -> str:
        """A hash of the labels of every split and of the first search images: what a resumed run compares."""
        digest = hashlib.sha256()
        for split in (self.train, self.search, self.test):
            digest.update(split.labels.numpy().tobytes())
        digest.update(self.search.images[torch.arange(min(64, len(self.search)))].numpy().tobytes())
        return digest.hexdigest()[:16]


def load(name: str = DEFAULT, *, image_size: int = 224) -> Dataset:
    """Load a data set by name.

    `image_size` (pixels) is used only where images have no size of their own: `imagefolder:PATH`, `images:PATH`.
    Raises ValueError for an unknown name and FileNotFoundError, with the command that gets it, for missing data.
    """
    if name == "fashion-mnist-12k":
        return _fashion_mnist_12k()
    if name == "fashion-mnist":
        return _fashion_mnist(_fashion_folder())
    if name == "cifar10":
        return _cifar10(cache_folder() / CIFAR_FOLDER)
    if name.startswith("imagefolder:"):
        return _imagefolder(Path(name.partition(":")[2]), image_size)
    if name.startswith("images:"):
        return _images(Path(name.partition(":")[2]), image_size)
    if ":" in name:
        return _from_function(name)
    close = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.3)
    raise ValueError(
        f"unknown data set {name!r}; did you mean {' or '.join(close) or 'one of these'}? Known: {', '.join(NAMES)}"
    )


def cache_folder() -> Path:
    """Where downloaded data sets are kept: $HAQ_DATA, or ~/.cache/haq."""
    return Path(os.environ.get("HAQ_DATA") or Path.home() / ".cache" / "haq")


def balanced(labels: Tensor, skip: int, take: int) -> Tensor:
    """Indices of `take` items of every class, after skipping `skip`, in a random order that never changes.

    NumPy's RandomState is used because its stream is frozen: a split must be the same under every version.
    """
    random, chosen = np.random.RandomState(SPLIT_SEED), []
    for label in range(int(labels.max()) + 1):
        of_class = random.permutation(np.flatnonzero(labels.numpy() == label))
        chosen.append(of_class[skip : skip + take])
    return torch.from_numpy(random.permutation(np.concatenate(chosen)))


def without(count: int, index: Tensor) -> Tensor:
    """The indices 0..count-1 that are not in `index`, ascending."""
    keep = torch.ones(count, dtype=torch.bool)
    keep[index] = False
    return keep.nonzero().flatten()


def _fashion_mnist_12k() -> Dataset:
    packed = resources.files("haq").joinpath("assets/fashion-mnist-12k.npz.xz").read_bytes()
    with np.load(io.BytesIO(lzma.decompress(packed)), allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays["images"]).unsqueeze(1)
        labels = torch.from_numpy(arrays["labels"].astype(np.int64))
    train, search, test = (Split(images[a:b], labels[a:b]) for a, b in ((0, 8000), (8000, 10000), (10000, 12000)))
    return Dataset("fashion-mnist-12k", FASHION_CLASSES, train, search, test, "shipped with haq")


def fashion_mnist_12k_rows(train_labels: Tensor, test_labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the full data set that make up `fashion-mnist-12k`: train, search (of its train files), test.

    The search rows lie inside the full data set's search split and the train rows inside its train split, so a
    network trained on `fashion-mnist` has not seen what `fashion-mnist-12k` searches and tests on.
    """
    return balanced(train_labels, 500, 800), balanced(train_labels, 0, 200), balanced(test_labels, 0, 200)


def _fashion_mnist(folder: Path) -> Dataset:
    arrays = {name: _read_idx(folder / f"{name}.gz", digest) for name, digest in FASHION_FILES.items()}
    images = torch.from_numpy(arrays["train-images-idx3-ubyte"]).unsqueeze(1)
    labels = torch.from_numpy(arrays["train-labels-idx1-ubyte"].astype(np.int64))
    test = Split(
        torch.from_numpy(arrays["t10k-images-idx3-ubyte"]).unsqueeze(1),
        torch.from_numpy(arrays["t10k-labels-idx1-ubyte"].astype(np.int64)),
    )
    search = balanced(labels, 0, 500)
    train = without(len(labels), search)
    return Dataset(
        "fashion-mnist",
        FASHION_CLASSES,
        Split(images[train], labels[train]),
        Split(images[search], labels[search]),
        test,
        str(folder),
    )


def _fashion_folder() -> Path:
    """The first folder that has all four files."""
    folders = (FASHION_DEBIAN, cache_folder() / "fashion-mnist")
    for folder in folders:
        if all((folder / f"{name}.gz").is_file() for name in FASHION_FILES):
            return folder
    raise FileNotFoundError(
        f"Fashion-MNIST is in none of {', '.join(map(str, folders))}: get it with `python -m haq.data fashion-mnist` "
        "(30 MB) or `apt-get install dataset-fashion-mnist`, or use --data fashion-mnist-12k, which ships with haq"
    )


def _read_idx(path: Path, sha256: str) -> np.ndarray:
    """Read a gzipped IDX file of bytes whose unpacked content must have this SHA-256."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} can't be unpacked ({error}): delete it and fetch it again") from error
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise ValueError(f"{path} isn't the published file (SHA-256 differs): delete it and fetch it again")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()


def _cifar10(folder: Path) -> Dataset:
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"CIFAR-10 is not in {folder} ({missing[0]} is missing): get it with `python -m haq.data cifar10` (170 MB)"
        )
    # The binary edition, because the other one is a pickle: rows of one label byte and 3x32x32 pixels.
    rows = {name: np.fromfile(folder / name, np.uint8) for name in names}
    for name, row in rows.items():
        if row.size == 0 or row.size % 3073:
            raise ValueError(f"{folder / name} has {row.size} bytes, not a multiple of 3073: it is truncated")

    def split(parts: list[str]) -> Split:
        data = np.concatenate([rows[part].reshape(-1, 3073) for part in parts])
        return Split(
            torch.from_numpy(data[:, 1:].reshape(-1, 3, 32, 32).copy()),
            torch.from_numpy(data[:, 0].astype(np.int64)),
        )

    everything = split(names[:5])
    search = balanced(everything.labels, 0, 500)
    train = without(len(everything), search)
    return Dataset(
        "cifar10",
        CIFAR_CLASSES,
        everything.subset(train),
        everything.subset(search),
        split(names[5:]),
        str(folder),
    )


def _imagefolder(path: Path, size: int) -> Dataset:
    train_folder, test_folder = path / "train", path / "val"
    for folder in (train_folder, test_folder):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing: imagefolder:PATH wants PATH/train/CLASS/* and PATH/val/CLASS/*")
    classes = tuple(sorted(entry.name for entry in train_folder.iterdir() if entry.is_dir()))
    unknown = sorted({entry.name for entry in test_folder.iterdir() if entry.is_dir()} - set(classes))
    if not classes or unknown:
        raise ValueError(f"{path}: classes {unknown or '(none)'} of val/ are not among the {len(classes)} of train/")

    def split(folder: Path) -> Split:
        files = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((folder / name).glob("*"))
            if file.suffix.lower() in IMAGE_ENDINGS
        ]
        if not files:
            raise ValueError(f"{folder} holds no image ending in {', '.join(IMAGE_ENDINGS)}")
        return Split(_files([file for file, _ in files], size), torch.tensor([label for _, label in files]))

    everything = split(train_folder)
    search = balanced(everything.labels, 0, max(1, min(2000, len(everything) // 5) // len(classes)))
    train = without(len(everything), search)
    return Dataset(
        f"imagefolder:{path}",
        classes,
        everything.subset(train),
        everything.subset(search),
        split(test_folder),
        str(path),
    )


def _images(path: Path, size: int) -> Dataset:
    """Photographs in any layout of folders, without labels."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder: images:PATH wants one with photographs, in folders of any kind")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS and file.is_file())
    held = min(2000, len(files) // 5)
    if not held:
        raise ValueError(
            f"{path} holds {len(files)} images ending in {', '.join(IMAGE_ENDINGS)}; three splits take at least 5"
        )
    everything = Split(_files(files, size), torch.full((len(files),), UNLABELLED))
    order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(len(files)))
    search, test, train = (everything.subset(index) for index in order.split([held, held, len(files) - 2 * held]))
    return Dataset(f"images:{path}", (), train, search, test, str(path))


def _files(paths: list[Path], size: int) -> ImageFiles:
    # 256/224 is the customary margin of ImageNet's evaluation.
    return ImageFiles(tuple(paths), size, round(size * 256 / 224))


def _from_function(name: str) -> Dataset:
    """`module:function` returns a Dataset, or a dict of (images, labels) under train, test and perhaps search."""
    made = call_by_name(name)
    if isinstance(made, Dataset):
        return made
    if not isinstance(made, dict) or not {"train", "test"} <= set(made) <= {"train", "search", "test"}:
        raise ValueError(
            f"{name} returned {type(made).__name__}; it must return a haq.data.Dataset, or a dict with train and test "
            "(and perhaps search), each (images, labels)"
        )
    splits = {key: Split(torch.as_tensor(x), torch.as_tensor(y).long()) for key, (x, y) in made.items()}
    classes = tuple(str(i) for i in range(int(max(split.labels.max() for split in splits.values())) + 1))
    if "search" not in splits:
        everything = splits["train"]
        held = balanced(everything.labels, 0, max(1, len(everything) // 5 // len(classes)))
        splits["search"] = everything.subset(held)
        splits["train"] = everything.subset(without(len(everything), held))
    return Dataset(name, classes, splits["train"], splits["search"], splits["test"], "your function")


def call_by_name(name: str) -> Any:
    """Import and call `module:function`; the current folder can be imported from, as with `python -m`."""
    module_name, _, function_name = name.partition(":")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{name!r} is of Python itself, where there are neither networks nor data sets; give module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0] and error.name != module_name:
            raise
        raise ValueError(f"{name!r} is no known name, and no module {module_name!r} can be imported") from error
    function: Callable[[], Any] | None = getattr(module, function_name, None)
    if function is None:
        close = difflib.get_close_matches(function_name, dir(module), n=3)
        raise ValueError(f"module {module_name} has no {function_name!r}; close: {', '.join(close) or 'nothing'}")
    return function()


def fetch(name: str) -> None:
    """Download what `name` needs, checksummed, into `cache_folder()`; nothing is done for what is already there."""
    if name == "fashion-mnist":
        try:
            _fashion_folder()
        except FileNotFoundError:
            for file, digest in FASHION_FILES.items():
                path = cache_folder() / "fashion-mnist" / f"{file}.gz"
                _download(f"{FASHION_URL}{file}.gz", path)
                _read_idx(path, digest)
    if name == "cifar10" and not (cache_folder() / CIFAR_FOLDER).is_dir():
        archive = cache_folder() / "cifar-10-binary.tar.gz"
        _download(CIFAR_URL, archive)
        _unpack_cifar10(archive, CIFAR_SHA256)


def _unpack_cifar10(archive: Path, sha256: str) -> None:
    if hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{archive} isn't the published file (SHA-256 differs): delete it and fetch it again")
    # Member by member and by name alone, so that no path inside the archive can lead elsewhere.
    with tarfile.open(archive) as tar:
        for member in tar:
            source = tar.extractfile(member) if member.name.endswith(".bin") else None
            if source:
                target = archive.parent / CIFAR_FOLDER / Path(member.name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())


def _download(url: str, path: Path) -> None:
    """Download to `path`, beside it first, with a progress bar."""
    from rich.progress import wrap_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, partial.open("wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            with wrap_file(response, total=total, description=path.name) as reader:
                while block := reader.read(1 << 20):
                    file.write(block)
    except OSError as error:
        raise FileNotFoundError(f"{url} could not be downloaded ({error}); put the file at {path} yourself") from error
    partial.replace(path)

"""Data sets come by name, in three disjoint balanced splits that never change; what is missing or broken is said."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from haq import data
from haq.data import cifar10, download, fashion_mnist


class Server(NamedTuple):
    """A web server, what it serves, and what it was asked for."""

    url: str
    folder: Path
    asked: list[str]


def contents(split: data.Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images[torch.arange(len(split))]}


def check_disjoint(dataset: data.Dataset) -> None:
    train, search, test = (contents(getattr(dataset, name)) for name in ("train", "search", "test"))
    assert not train & search
    assert not train & test
    assert not search & test


def test_the_embedded_data_set() -> None:
    dataset = data.load()
    assert (len(dataset.train), len(dataset.search), len(dataset.test)) == (8000, 2000, 2000)
    check_disjoint(dataset)
    for split in (dataset.train, dataset.search, dataset.test):
        assert torch.bincount(split.labels).tolist() == [len(split) // 10] * 10
    assets = resources.files("haq").joinpath("assets")
    assert len(assets.joinpath("fashion-mnist-12k.npz.xz").read_bytes()) < 6e6
    licence = assets.joinpath("FASHION-MNIST-LICENSE").read_text(encoding="utf-8")
    assert "MIT License" in licence
    assert "Zalando" in licence
    assert "8,000 train / 2,000 search / 2,000 test" in dataset.describe()


def test_splits_never_change() -> None:
    assert data.load().signature() == "afe190d710b99979"


def full_or_skip() -> data.Dataset:
    try:
        return data.load("fashion-mnist")
    except FileNotFoundError:
        pytest.skip("Fashion-MNIST is not installed (apt-get install dataset-fashion-mnist)")


def test_the_full_data_set_trains_on_nothing_that_the_embedded_one_judges_by() -> None:
    full, embedded = full_or_skip(), data.load()
    assert (len(full.train), len(full.search), len(full.test)) == (55000, 5000, 10000)
    check_disjoint(full)
    assert not contents(full.train) & (contents(embedded.search) | contents(embedded.test))
    assert contents(embedded.train) <= contents(full.train)


def test_batches_are_in_order_or_shuffled_by_the_generator() -> None:
    split = data.Split(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10))
    assert torch.cat([labels for _, labels in split.batches(3)]).tolist() == list(range(10))
    shuffled = [
        torch.cat([y for _, y in split.batches(3, torch.Generator().manual_seed(seed))]).tolist() for seed in (0, 0, 1)
    ]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert sorted(shuffled[0]) == list(range(10))


@pytest.mark.parametrize(("name", "close"), [("fashion-mnst", "fashion-mnist"), ("cifar", "cifar10")])
def test_unknown_names_list_the_close_ones(name: str, close: str) -> None:
    with pytest.raises(ValueError, match=f"unknown data set '{name}'; did you mean .*{close}"):
        data.load(name)


def test_missing_data_say_which_command_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAQ_DATA", str(tmp_path))
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"python -m haq\.data fashion-mnist.*apt-get install dataset-fashion-mnist"):
        data.load("fashion-mnist")
    with pytest.raises(FileNotFoundError, match=r"python -m haq\.data cifar10"):
        data.load("cifar10")
    with pytest.raises(FileNotFoundError, match="PATH/train/CLASS"):
        data.load(f"imagefolder:{tmp_path}")


def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path)
    for name in fashion_mnist.FILES:
        (tmp_path / f"{name}.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"train-images.*can't be unpacked.*fetch it again"):
        data.load("fashion-mnist")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x01a"))
    with pytest.raises(ValueError, match="SHA-256 differs"):
        data.load("fashion-mnist")


def make_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive in CIFAR-10's binary layout, of random images."""
    random = np.random.default_rng(0)
    archive = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "../../evil.bin"]:
            rows = random.integers(0, 256, (1200 if "data" in name else 20, 3073), dtype=np.uint8)
            rows[:, 0] = np.arange(len(rows)) % 10
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = rows.size
            tar.addfile(info, io.BytesIO(rows.tobytes()))
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    return archive


def test_cifar10_from_its_binary_edition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    archive = make_cifar(home, monkeypatch)
    monkeypatch.setenv("HAQ_DATA", str(home))
    # The archive is there already, and is what it should be: nothing is downloaded.
    monkeypatch.setattr(cifar10, "URL", "http://127.0.0.1:9/nowhere")
    data.fetch("cifar10")
    assert not (tmp_path / "evil.bin").exists()
    assert not (home.parent / "evil.bin").exists()
    dataset = data.load("cifar10")
    assert (len(dataset.train), len(dataset.search), len(dataset.test)) == (1000, 5000, 20)
    check_disjoint(dataset)
    assert dataset.test.images[torch.arange(1)].shape == (1, 3, 32, 32)
    with (home / cifar10.FOLDER / "test_batch.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="truncated"):
        data.load("cifar10")
    archive.write_bytes(b"x")
    shutil.rmtree(home / cifar10.FOLDER)
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        data.fetch("cifar10")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A web server of this machine for the files of a folder."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "TRIES", 1)
    folder = tmp_path / "served"
    folder.mkdir()
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, format: str, *arguments: Any) -> None:
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield Server(f"http://127.0.0.1:{running.server_port}/", folder, asked)
        running.shutdown()
        thread.join()


def test_a_download_is_checked_and_done_once(server: Server, tmp_path: Path) -> None:
    content = b"abc" * 100_000
    (server.folder / "file.bin").write_bytes(content)
    path = tmp_path / "cache" / "file.bin"
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    for _ in range(2):
        download.download(f"{server.url}file.bin", path, checksum)
        assert path.read_bytes() == content
    assert server.asked == ["/file.bin"]
    # What is damaged is fetched again; what comes damaged is not kept.
    path.write_bytes(b"damaged")
    download.download(f"{server.url}file.bin", path, checksum)
    assert path.read_bytes() == content
    (server.folder / "file.bin").write_bytes(b"other")
    other = tmp_path / "cache" / "other.bin"
    with pytest.raises(ValueError, match=r"isn't the published file \(its checksum differs\).*put the file at"):
        download.download(f"{server.url}file.bin", other, checksum)
    with pytest.raises(FileNotFoundError, match=r"nowhere could not be downloaded.*put the file at"):
        download.download(f"{server.url}nowhere", other, checksum)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded"):
        download.download("http://127.0.0.1:9/file.bin", other, checksum)
    assert [file.name for file in path.parent.iterdir()] == ["file.bin"]


def test_data_sets_are_fetched(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAQ_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(fashion_mnist, "URL", server.url)
    for name in fashion_mnist.FILES:
        labels = "labels" in name
        count = 5100 if "train" in name else 20
        shape = (count,) if labels else (count, 28, 28)
        head = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
        values = np.arange(count, dtype=np.uint8) % 10 if labels else np.zeros(shape, np.uint8)
        packed = gzip.compress(head + values.tobytes())
        (server.folder / f"{name}.gz").write_bytes(packed)
        monkeypatch.setitem(fashion_mnist.FILES, name, hashlib.sha256(head + values.tobytes()).hexdigest())
        monkeypatch.setitem(fashion_mnist.PACKED, name, f"md5:{hashlib.md5(packed).hexdigest()}")
    data.fetch("fashion-mnist")
    assert len(data.load("fashion-mnist").test) == 20
    data.fetch("fashion-mnist")
    assert len(server.asked) == 4
    archive = make_cifar(server.folder, monkeypatch)
    monkeypatch.setattr(cifar10, "URL", f"{server.url}{archive.name}")
    data.fetch("cifar10")
    assert len(data.load("cifar10").search) == 5000
    for name in ("images:anywhere", "fashion-mnist-12k"):
        data.fetch(name)
    with pytest.raises(ValueError, match="did you mean cifar10"):
        data.fetch("cifar")


def test_an_image_folder(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 3)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    dataset = data.load(f"imagefolder:{tmp_path}", image_size=32)
    assert dataset.classes == ("cat", "dog")
    assert (len(dataset.train), len(dataset.search), len(dataset.test)) == (16, 4, 6)
    check_disjoint(dataset)
    batch, labels = next(dataset.search.batches(4))
    assert batch.shape == (4, 3, 32, 32)
    assert batch.dtype == torch.uint8
    assert sorted(labels.tolist()) == [0, 0, 1, 1]
    (tmp_path / "val" / "cat" / "0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"0\.png is not a readable image"):
        list(dataset.test.batches(8))
    (tmp_path / "val" / "bird").mkdir()
    with pytest.raises(ValueError, match="bird"):
        data.load(f"imagefolder:{tmp_path}")


MODULE = """
import torch
def splits():
    x, y = torch.rand(50, 1, 8, 8), torch.arange(50) % 5
    return {"train": (x, y), "test": (x[:10] + 1, y[:10])}
def wrong(): return 3
def outside():
    return {"train": (torch.rand(2, 1, 1, 1), torch.tensor([0, -1])), "test": (torch.rand(1, 1, 1, 1), torch.tensor([0]))}
"""


def test_a_function_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_data.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    dataset = data.load("my_own_data:splits")
    assert (len(dataset.train), len(dataset.search), len(dataset.test), len(dataset.classes)) == (
        40,
        10,
        10,
        5,
    )
    check_disjoint(dataset)
    for name, message in (
        ("my_own_data:wrong", "returned int; it must return"),
        ("my_own_data:split", "close: splits"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("my_own_data:outside", "labels from -1"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(name)


PLUG_IN = """
import torch
def tiny(image_size=224):
    x = torch.zeros(40, 1, image_size, image_size)
    return {"train": (x, torch.arange(40) % 2), "test": (x[:4], torch.arange(4) % 2)}
number = 3
"""


def test_an_installed_package_offers_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more_data.py").write_text(PLUG_IN)
    about = tmp_path / "more_data-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: more-data\nVersion: 1.0\nSummary: tiny images\n")
    (about / "entry_points.txt").write_text("[haq.data]\ntiny = more_data:tiny\nbroken = more_data:number\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert ("tiny", "more-data 1.0", "tiny images") in data.DATASETS.rows()
    dataset = data.load("tiny", image_size=6)
    assert dataset.name == "tiny"
    assert dataset.test.images[torch.arange(1)].shape == (1, 1, 6, 6)
    data.fetch("tiny")
    with pytest.raises(ValueError, match="data set 'broken' can't be used: it lacks a way to be called"):
        data.load("broken")


def test_listing_data_imports_no_torch() -> None:
    code = (
        "import sys; from haq.data import DATASETS, DEFAULT; from haq.networks import NETWORKS;"
        "DATASETS.rows(), NETWORKS.rows(); assert DEFAULT in DATASETS; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def grey(count: int, kind: torch.dtype = torch.uint8, size: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, size, size), generator=torch.Generator().manual_seed(count)).to(kind)


def of_classes(count: int) -> torch.Tensor:
    return torch.arange(count) % 4


GOOD = (grey(40), of_classes(40))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            {"test": (grey(8, torch.float32), of_classes(8))},
            r"the test split of .* has images of type torch.float32, its train split torch.uint8; both must be of one type",
        ),
        (
            {"search": (grey(8, size=9), of_classes(8))},
            r"the search split of .* has images of shape \(1, 9, 9\), its train split \(1, 8, 8\); both must be of one shape",
        ),
        (
            {"train": (grey(40).float() / 255, of_classes(40)), "test": (grey(8).float(), of_classes(8))},
            r"the test split of .* has values of 12\d on average, its train split 0\.\d+; both must be on one scale",
        ),
        (
            {"test": (grey(2), torch.tensor([0.9, 7.9]))},
            "the test split of .* has labels of type torch.float32; they must be whole numbers",
        ),
        ({"test": (grey(2), torch.tensor([True, False]))}, "the test split of .* has labels of type torch.bool"),
        (
            {"test": (grey(4), torch.eye(4).long())},
            r"the test split of .* has labels of shape \(4, 4\); they must be class numbers",
        ),
        ({"test": (grey(0), of_classes(0))}, "the test split of .* is empty; it must have at least one image"),
        ({"test": (grey(5), of_classes(4))}, "the test split of .* has 5 images but 4 labels; it must have as many of both"),
        ({"test": (grey(4), -of_classes(4))}, r"the test split of .* has labels from -3 to 0; they must be 0, 1, 2 \.\.\."),
        ({"test": (grey(4, torch.int64), of_classes(4))}, "the test split of .* has images of type torch.int64; they must be"),
        ({"test": (grey(4)[:, 0], of_classes(4))}, r"the test split of .* has images of shape \(4, 8, 8\); it must be"),
        (
            {"test": (grey(4).float() / torch.arange(4).view(-1, 1, 1, 1), of_classes(4))},
            "the test split of .* has images with values that are not finite",
        ),
        (
            {"train": (grey(4), of_classes(4)), "test": (grey(4), of_classes(4))},
            "the train split of .* has no class with two images",
        ),
        ({"test": grey(4)}, r"the test split of .* is a Tensor; it must be \(images, labels\)"),
        ({"test": (["a"], ["b"])}, "the test split of .* holds what is no tensor or array of numbers"),
    ],
)
def test_splits_that_cannot_be_used_are_named(made: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "made_here", lambda: {"train": GOOD, "test": GOOD} | made, raising=False)
    with pytest.raises(ValueError, match=message):
        data.load(f"{__name__}:made_here")


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (data.Split(grey(8, torch.float32), of_classes(8)), "the test split of mine has images of type torch.float32"),
        (data.Split(grey(8), of_classes(8).float()), "the test split of mine has labels of type torch.float32"),
        (data.Split(grey(8), of_classes(8).bool()), "the test split of mine has labels of type torch.bool"),
        (data.Split(grey(0), of_classes(0)), "the test split of mine is empty"),
    ],
)
def test_a_data_set_of_splits_that_cannot_be_used_is_not_made(test: data.Split, message: str) -> None:
    good = data.Split(*GOOD)
    with pytest.raises(ValueError, match=message):
        data.Dataset("mine", tuple("abcd"), good, good, test)


def raising() -> None:
    raise KeyError("disk\n7")


def needing(folder: str) -> None: ...


def test_a_function_that_cannot_be_called_is_named() -> None:
    with pytest.raises(ValueError, match=r"test_data:raising raised KeyError \('disk.*7'\): mend that function"):
        data.load(f"{__name__}:raising")
    with pytest.raises(ValueError, match="test_data:needing needs the argument 'folder'; .* may only need image_size"):
        data.load(f"{__name__}:needing")

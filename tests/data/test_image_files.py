"""Image files come as a viewer shows them; what can't be one is named, in bounded time and memory."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from haq import data
from haq.data.dataset import ORIENTATIONS, batch_count, for_search, read_image, stratified

RAMP = np.tile(np.linspace(0, 255, 8).astype(np.uint8), (8, 1))
GREY = Image.fromarray(RAMP)
BLACK = Image.fromarray(RAMP * 0)
SEEN = Image.merge("RGBA", [BLACK, BLACK, BLACK, GREY])  # black, and from left to right less transparent


def png(width: int, height: int) -> bytes:
    """A black picture of so many pixels, packed row by row."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(width + 1) * min(height, 10))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("image", "name", "options", "expected"),
    [
        (GREY, "grey.png", {}, RAMP),
        (Image.fromarray(RAMP.astype(np.uint16) * 257), "16bit.png", {}, RAMP),
        (GREY.convert("1"), "1bit.png", {}, np.asarray(GREY.convert("1")) * 255),
        (SEEN, "rgba.png", {}, 255 - RAMP),
        (Image.merge("LA", [BLACK, GREY]), "la.png", {}, 255 - RAMP),
        (GREY, "key.png", {"transparency": 0}, np.where(RAMP == 0, 255, RAMP)),
        (GREY.convert("P"), "palette.png", {"transparency": bytes([0] + [255] * 255)}, np.where(RAMP == 0, 255, RAMP)),
        (GREY.convert("CMYK"), "cmyk.tif", {}, RAMP),
        (GREY, "moving.png", {"save_all": True, "append_images": [BLACK]}, RAMP),
    ],
)
def test_images_come_as_a_viewer_shows_them(
    image: Image.Image, name: str, options: dict[str, Any], expected: np.ndarray, tmp_path: Path
) -> None:
    image.save(tmp_path / name, **options)
    shown = np.asarray(read_image(tmp_path / name))
    assert shown.shape == (8, 8, 3)
    assert np.abs(shown.astype(int) - np.asarray(expected, int)[:, :, None]).max() <= 1


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_photographs_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    from PIL import ImageOps

    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as file:
        upright = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    assert np.array_equal(read_image(tmp_path / "a.png"), upright)
    assert not np.array_equal(upright, np.asarray(image.convert("RGB")))


def test_damaged_exif_data_are_no_fault_of_the_picture(tmp_path: Path) -> None:
    GREY.save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage", quality=100)
    files = data.ImageFiles((tmp_path / "a.jpg",), 8, 8)
    assert np.abs(files[torch.tensor([0])][0, 0].numpy().astype(int) - RAMP).max() < 5


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    GREY.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-30])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "floats.tif")
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "integers.tif")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name in ("cut.png", "empty.png", "script.png", "floats.tif", "integers.tif", "pipe.png", "loop.png"):
        with pytest.raises(ValueError, match=rf"{name} is not a readable image: \w") as raised:
            read_image(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_images_of_too_many_pixels_are_refused(tmp_path: Path) -> None:
    """Nothing is decoded, and Pillow's own warning isn't shown beside the sentence."""
    for name, width, height in (("bomb.png", 30_000, 30_000), ("large.png", 10_000, 9_000)):
        (tmp_path / name).write_bytes(png(width, height))
        files = data.ImageFiles((tmp_path / name,), 8, 8)
        with pytest.raises(ValueError, match=rf"{name} is refused .* an image may have 89,478,485 pixels, make it smaller"):
            files[torch.tensor([0])]
    (tmp_path / "strip.png").write_bytes(png(60_000, 1))
    with pytest.raises(ValueError, match=r"strip\.png is 60000 x 1 pixels, too long a strip"):
        data.ImageFiles((tmp_path / "strip.png",), 224, 256)[torch.tensor([0])]


def photographs(folder: Path, count: int = 5) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(RAMP + np.uint8(i)).save(folder / f"{i}.PNG", format="png")


def test_what_hides_in_a_folder_is_no_class_and_no_image(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            photographs(tmp_path / part / name)
            (tmp_path / part / name / "._0.png").write_bytes(b"what a Mac leaves")
            (tmp_path / part / name / "Thumbs.db").write_bytes(b"")
        for name in (".git", "__MACOSX", "@eaDir", ".ipynb_checkpoints"):
            photographs(tmp_path / part / name, 1)
        (tmp_path / part / "dog" / "loop").symlink_to(tmp_path)
    dataset = data.load(f"imagefolder:{tmp_path}", image_size=8)
    assert dataset.classes == ("cat", "dog")
    assert len(dataset.train) + len(dataset.search) == len(dataset.test) == 10
    loose = data.load(f"images:{tmp_path}", image_size=8)
    assert sum(len(split) for split in (loose.train, loose.search, loose.test)) == 20
    dataset.test.images[torch.arange(10)]


def test_classes_without_images_and_pipes_are_refused(tmp_path: Path) -> None:
    for part in ("train", "val"):
        photographs(tmp_path / part / "cat")
        photographs(tmp_path / part / "dog", 0)
    with pytest.raises(ValueError, match=r"train.dog holds no image ending in .*: add some, or remove the folder"):
        data.load(f"imagefolder:{tmp_path}")
    os.mkfifo(tmp_path / "train" / "dog" / "a.jpg")
    for form in ("imagefolder", "images"):
        with pytest.raises(ValueError, match=r"a\.jpg is named like an image and is no readable file \(a pipe"):
            data.load(f"{form}:{tmp_path}")


def test_a_class_of_few_images_keeps_half_of_them_for_training(tmp_path: Path) -> None:
    for name, count in (("cat", 25), ("dog", 3), ("owl", 1)):
        photographs(tmp_path / "train" / name, count)
        photographs(tmp_path / "val" / name, 1)
    dataset = data.load(f"imagefolder:{tmp_path}", image_size=8)
    assert dataset.search.labels.bincount().tolist() == [1, 1]
    assert dataset.train.labels.bincount().tolist() == [24, 2, 1]
    assert for_search(torch.tensor([0] * 40 + [1] * 4), 4, "it").sort().values[-2:].min() >= 40


def test_a_folder_of_one_image_in_each_class_is_refused(tmp_path: Path) -> None:
    for part in ("train", "val"):
        photographs(tmp_path / part / "cat", 1)
    with pytest.raises(ValueError, match="train has no class with two images, one of which could be held out for the search"):
        data.load(f"imagefolder:{tmp_path}")


def test_every_format_that_is_read_is_found(tmp_path: Path) -> None:
    for ending in ("gif", "tif", "TIFF", "bmp", "webp", "jpg"):
        GREY.save(tmp_path / f"a.{ending}")
    dataset = data.load(f"images:{tmp_path}", image_size=8)
    assert sum(len(split) for split in (dataset.train, dataset.search, dataset.test)) == 6


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(129, 128, [129]), (130, 128, [128, 2]), (257, 128, [128, 129]), (1, 128, [1]), (3, 1, [1, 1, 1]), (6, 3, [3, 3])],
)
def test_no_batch_ends_with_a_single_image(count: int, size: int, sizes: list[int]) -> None:
    split = data.Split(torch.arange(count).view(-1, 1, 1, 1), torch.arange(count))
    batches = [labels.tolist() for _, labels in split.batches(size)]
    assert [len(batch) for batch in batches] == sizes
    assert [label for batch in batches for label in batch] == list(range(count))
    assert batch_count(count, size) == len(sizes)


def test_a_sample_has_every_class_in_its_share() -> None:
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)
    chosen = stratified(labels, 100)
    assert len(set(chosen.tolist())) == 100
    assert labels[chosen].bincount().tolist() == [60, 30, 10]
    assert labels[chosen[:50]].unique().tolist() == [0, 1, 2]
    assert torch.equal(chosen, stratified(labels, 100))

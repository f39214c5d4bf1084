"""Samples that don't fit into memory are streamed, with the same results; decoded images are kept, and are never stale."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import haq
from haq import data, networks
from haq.data import decoded, memory
from haq.problem.samples import KeptSamples, Prepared, StreamedSamples, samples_of
from haq.study.config import SearchConfig
from haq.study.task import SearchTask
from tests.conftest import brightest, images, small_network

X = images(300)
Y = brightest(X)


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels by index."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


class Batches:
    """Batches again and again, counting how often."""

    def __init__(self, size: int = 50) -> None:
        self.size, self.passes = size, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return iter(zip(X.split(self.size), Y.split(self.size), strict=True))


def problem(search: Any, **options: Any) -> haq.Problem:
    return haq.Problem(small_network(), calibrate=X[:32], search=search, target="edge", budget=0.9, **options)


def test_streamed_samples_give_the_same_to_the_last_bit() -> None:
    kept, streamed = problem((X, Y)), problem(Pairs(), memory="10kB")
    assert isinstance(kept.evaluator.samples, KeptSamples)
    assert isinstance(streamed.evaluator.samples, StreamedSamples)
    assert streamed.float_result == kept.float_result
    for bits in (2, 4):
        policy = kept.uniform(bits)
        assert streamed.evaluate(policy) == kept.evaluate(policy)
        assert streamed.evaluator.evaluate(kept.uniform(bits + 1), 1.0) == kept.evaluator.evaluate(kept.uniform(bits + 1), 1.0)
    for one, other in zip(streamed.evaluator.samples, kept.evaluator.samples, strict=True):
        assert all(map(torch.equal, one, other))


def test_streamed_batches_give_the_same_accuracy() -> None:
    kept, batches = problem((X, Y)), Batches()
    streamed = problem(batches, memory="10kB")
    assert streamed.float_result.accuracy == kept.float_result.accuracy
    before = batches.passes
    found = streamed.evaluator.evaluate(kept.uniform(3), 1.0)  # nothing ends early: no part of them is a fair sample
    assert batches.passes == before + 1
    assert found.images == 300
    assert found.accuracy == kept.evaluate(kept.uniform(3)).accuracy
    assert found.loss == pytest.approx(kept.evaluate(kept.uniform(3)).loss)


class Noisy(Pairs):
    """Of which a later sample is another each time."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 200:
            return X[index] + torch.rand(1), Y[index]
        return X[index], Y[index]


def test_a_data_set_that_changes_later_is_named() -> None:
    with pytest.raises(
        ValueError, match="`search` gives other data each time it is read .batch . differs from the first time"
    ):
        problem(Noisy(), memory="10kB")


def test_what_fits_stays_in_memory() -> None:
    batches = Batches()
    made = problem(batches)
    made.evaluate(made.uniform(3))
    assert batches.passes == 2  # the second saw whether the first batch is the same
    assert isinstance(made.evaluator.samples, KeptSamples)
    with pytest.raises(ValueError, match="`calibrate` gives 300 samples, too many for the memory"):
        haq.Problem(small_network(), calibrate=Pairs(), search=(X, Y), target="edge", memory=1000)


def test_images_stay_as_they_came_where_floats_do_not_fit() -> None:
    pixels = (X * 255).byte()
    split, network = data.Split(pixels, Y), networks.Network("it", small_network(), (1, 8, 8))
    few, many = (samples_of(split, network.preprocess, most) for most in (100_000, 10**9))
    assert isinstance(few, StreamedSamples)
    assert isinstance(many, list)
    for one, other in zip(few, KeptSamples(many), strict=True):
        assert all(map(torch.equal, one, other))
    again = pickle.loads(pickle.dumps(few))
    assert torch.equal(next(iter(again))[0], next(iter(few))[0])
    assert torch.equal(few.example()[0], network.preprocess(pixels[:1]))
    assert isinstance(Prepared(network.preprocess)(pixels[:2]), Tensor)


@pytest.mark.parametrize(
    ("text", "wanted"), [("4GB", 4 * 10**9), ("500MB", 5 * 10**8), ("1.5 GiB", 3 * 2**29), ("12B", 12), ("64KB", 64000)]
)
def test_amounts_of_memory(text: str, wanted: int) -> None:
    assert memory.parse_bytes(text) == wanted


@pytest.mark.parametrize("text", ["4", "0GB", "-1GB", "4 G B", "GB", "all", "4gigs", "nanGB"])
def test_what_is_no_amount_of_memory_is_said(text: str) -> None:
    with pytest.raises(ValueError, match=r"--memory '.*' is not understood: give an amount such as 4GB or 500MB"):
        SearchConfig(memory=text)


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("400000000\n")
    monkeypatch.setattr(memory, "CGROUPS", (tmp_path / "max", tmp_path / "limit", tmp_path / "none"))
    assert memory.default_bytes() == 10**8


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of four classes, which the default small network can tell apart by their brightest quarter."""
    monkeypatch.setenv("HAQ_DATA", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for part, count in (("train", 30), ("val", 10)):
        for label in range(4):
            folder = tmp_path / "photos" / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 128, (16, 16, 3), dtype=np.uint8)
                row, column = divmod(label, 2)
                pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 100
                Image.fromarray(pixels).save(folder / f"{number}.png")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return tmp_path / "photos"


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    layers.input_shape = (3, 16, 16)  # type: ignore[assignment]
    return layers


def task(folder: Path, **options: Any) -> SearchTask:
    here = f"{Path(__file__).stem}:network"
    return SearchTask.build(SearchConfig(network=here, data=f"imagefolder:{folder}", budget="0.9", **options))


def test_a_search_on_streamed_photographs_finds_the_same(photographs: Path) -> None:
    kept, streamed = task(photographs), task(photographs, memory="40kB")
    assert isinstance(streamed.problem.evaluator.samples, StreamedSamples)
    assert streamed.problem.float_result == kept.problem.float_result
    policy = kept.problem.uniform(3)
    assert streamed.problem.evaluate(policy) == kept.problem.evaluate(policy)
    assert streamed.signature() == kept.signature()
    assert streamed.outline() == kept.outline()
    assert [path for path, _ in decoded.kept_files()] != []


def test_the_search_split_is_as_large_as_one_says(photographs: Path) -> None:
    assert task(photographs).problem.evaluator.count == 24
    assert task(photographs, search_images=60).problem.evaluator.count == 60
    with pytest.raises(ValueError, match=r"--search-images is 61; .* has 120 images: it can be up to 60"):
        task(photographs, search_images=61)
    with pytest.raises(ValueError, match="--search-images is 0; it must be an integer of at least 1"):
        SearchConfig(search_images=0)
    with pytest.raises(ValueError, match="--search-images is 5, and fashion-mnist-12k has a search split of its own"):
        data.load(search_images=5)


def files_of(folder: Path, most: int) -> Any:
    return data.load(f"imagefolder:{folder}", image_size=16, memory=most).train.images


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    asked: list[Path] = []
    decode = data.ImageFiles._decode

    def counted(self: data.ImageFiles, path: Path) -> Any:
        asked.append(path)
        return decode(self, path)

    monkeypatch.setattr(data.ImageFiles, "_decode", counted)
    return asked


@pytest.mark.parametrize("most", [10**9, 1000], ids=["in memory", "on disk"])
def test_a_file_is_decoded_once_and_again_if_it_changed(photographs: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    asked = count_decoding(monkeypatch)
    files, everything = files_of(photographs, most), torch.arange(96)
    first = files[everything]
    assert len(asked) == 96
    assert torch.equal(files.subset(torch.arange(5, 60))[torch.arange(20)], first[5:25])
    assert len(asked) == 96
    assert (decoded.kept_files() == []) == (most > 1000)
    path = files.paths[7]
    Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(path)
    os.utime(path, ns=(1, 1))
    assert torch.equal(files[torch.tensor([7])], torch.full((1, 3, 16, 16), 9, dtype=torch.uint8))
    assert torch.equal(files_of(photographs, most)[torch.tensor([7])], torch.full((1, 3, 16, 16), 9, dtype=torch.uint8))


def test_another_process_finds_what_is_decoded(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_decoding(monkeypatch)
    first = files_of(photographs, 1000)[torch.arange(50)]
    assert torch.equal(files_of(photographs, 1000)[torch.arange(50)], first)
    assert len(asked) == 50
    # Of another size they are others.
    other = data.load(f"imagefolder:{photographs}", image_size=8, memory=1000)
    assert other.train.images[torch.arange(3)].shape == (3, 3, 8, 8)
    assert len(decoded.kept_files()) == 2


def test_what_is_damaged_is_decoded_anew(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = files_of(photographs, 1000)[torch.arange(96)]
    ((path, size),) = decoded.kept_files()
    assert size > 0
    asked = count_decoding(monkeypatch)
    content = bytearray(path.read_bytes())
    content[4 * 120 + 768 * 3] ^= 1  # of the fourth image
    path.write_bytes(content)
    assert torch.equal(files_of(photographs, 1000)[torch.arange(96)], first)
    assert len(asked) == 1
    path.write_bytes(content[: len(content) // 2])  # cut short
    assert torch.equal(files_of(photographs, 1000)[torch.arange(96)], first)
    assert len(asked) == 97
    path.unlink()
    assert torch.equal(files_of(photographs, 1000)[torch.arange(96)], first)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_full_disk_is_said_and_nothing_is_lost(
    photographs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = files_of(photographs, 10**9)[torch.arange(20)]

    class Usage:
        free = 1000

    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda folder: Usage)
    assert torch.equal(files_of(photographs, 1000)[torch.arange(20)], wanted)
    assert caplog.text.count("decoded images are not kept in") == 1
    assert "are free" in caplog.text
    assert decoded.kept_files() == []


def test_decoded_images_are_shown_and_cleared(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from haq.data.__main__ import main

    files_of(photographs, 1000)[torch.arange(96)]
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "1 file" in shown
    assert str(data.cache_folder()) in shown.replace("\n", "")
    assert main(["cache", "--clear"]) == 0
    assert decoded.kept_files() == []
    assert "freed" in capsys.readouterr().out


def typed_network() -> nn.Module:
    """One that no other test names."""
    return network()


def test_a_network_that_is_typed_may_be_code(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from haq.data.__main__ import main

    assert main([f"imagefolder:{photographs}", "--network", "test_any_size:typed_network"]) == 0
    assert "3 x 16 x 16" in capsys.readouterr().out

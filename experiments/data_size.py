"""A search on more images than memory holds: how much memory it takes, how long, and whether it finds the same.

    OMP_NUM_THREADS=1 python -m experiments.data_size [--images 20000] [--memory 1GB] [--save FOLDER]

Photographs (JPEG, 400 x 300, smooth and random) are written to a folder of a class each. A small network, whose first
convolution takes every 16th pixel, is searched on all of them: calibrated, run in float, and run at several policies that
differ in every layer, so that nothing is kept from one to the next. That is done by a process of its own for each row of the
table: with all decoded images in memory, and within the memory that is allowed, once with nothing kept on disk yet and once
with all images decoded by the run before. A further process tells what can't be avoided: the time of decoding all images
once, and that of the same forward passes on inputs that are in memory already (on a tenth of them, times ten).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from experiments.shared import verdict
from haq import data
from haq.data import decoded
from haq.data.memory import parse_bytes, show_bytes
from haq.problem.evaluator import evaluation_mode
from haq.problem.samples import Prepared
from haq.study.config import SearchConfig
from haq.study.task import SearchTask

SIZE = 224
POLICIES = (8, 6, 4)  # widths of the policies that are evaluated; first and last layer are among them
CLASSES = 2
SLACK = 0.5e9  # bytes that a process may take besides its samples
BAR = 1.3  # times what can't be avoided


def network() -> nn.Module:
    """Make the small network, with random weights that are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.Conv2d(3, 32, 16, 16),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, CLASSES),
        )
    layers.input_shape = (3, SIZE, SIZE)  # type: ignore[assignment]
    return layers


def write_photographs(folder: Path, count: int) -> None:
    """Write so many photographs for the search, as many again for training, and a few to test.

    Those for training are links to the others: they are decoded by nobody but calibration.
    """
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(count):
        label = number % CLASSES
        for part in ("train", "val"):
            (folder / part / str(label)).mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = folder / "train" / str(label) / f"{number}.jpg"
        Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC).save(path, quality=85)
        os.link(path, path.with_name(f"{number}-again.jpg"))
        if number < 20 * CLASSES:
            os.link(path, folder / "val" / str(label) / path.name)


def build(folder: Path, count: int, memory: str) -> SearchTask:
    """Put the search together, on `count` images."""
    return SearchTask.build(
        SearchConfig(
            network="experiments.data_size:network",
            data=f"imagefolder:{folder}",
            search_images=count,
            memory=memory,
            budget="1.0",
        )
    )


def searched(folder: Path, count: int, memory: str) -> dict[str, Any]:
    """Search, and tell what was found, in how much time and memory."""
    began = time.perf_counter()
    task = build(folder, count, memory)
    values = [task.problem.evaluate(task.problem.uniform(bits)).accuracy for bits in POLICIES]
    return {
        "seconds": time.perf_counter() - began,
        "float": task.problem.float_accuracy,
        "values": values,
        "loss": task.problem.evaluate(task.problem.uniform(POLICIES[-1])).loss,
        "images": task.problem.evaluator.count,
        "bytes": peak_bytes(),
    }


def unavoidable(folder: Path, count: int) -> dict[str, Any]:
    """Tell the time of decoding all images once, and of the forward passes on inputs in memory."""
    dataset = data.load(f"imagefolder:{folder}", image_size=SIZE, search_images=count)
    files = dataset.search.images
    plain = data.ImageFiles(files.paths, files.size, files.resize)
    began = time.perf_counter()
    for part in torch.arange(len(plain)).split(125):
        plain[part]
    decoding = time.perf_counter() - began
    few = max(2, count // 10)
    task = build(folder, few, "20GB")
    began = time.perf_counter()
    with evaluation_mode(task.network.module), torch.inference_mode():
        for batch in task.problem.evaluator.samples or ():
            task.network.module(batch[0])
    for bits in POLICIES:
        task.problem.evaluate(task.problem.uniform(bits))
    return {"decoding": decoding, "passes": (time.perf_counter() - began) * len(plain) / task.problem.evaluator.count}


def preprocessing(folder: Path, count: int) -> float:
    """Return the seconds that scaling all images once takes."""
    dataset = data.load(f"imagefolder:{folder}", image_size=SIZE, search_images=count)
    prepare = Prepared(build(folder, 2 * CLASSES, "1GB").network.preprocess)
    batch = dataset.search.source.take(torch.arange(min(125, count)))
    began = time.perf_counter()
    for _ in range(4):
        prepare(batch)
    return (time.perf_counter() - began) / 4 * count / len(batch[1])


def peak_bytes() -> int:
    """Return the most memory that this process was ever resident with."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system doesn't say how much memory a process takes")


def in_a_process(*arguments: str) -> dict[str, Any]:
    """Run one part of this in a process of its own, and return what it found."""
    command = [sys.executable, "-m", "experiments.data_size", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(folder: Path, count: int, memory: str) -> tuple[Table, list[str], list[list[str]]]:
    """Measure everything; return the table, the sentences about the bars, and the rows."""
    common = ["--folder", str(folder), "--images", str(count)]
    floor = in_a_process("--part", "unavoidable", *common)
    decoded.clear()
    everything = f"{count * 3 * SIZE * SIZE / 1e9 * 2 + 1:.0f}GB"  # also those that are no search images
    found = {
        "all in memory": in_a_process("--part", "search", "--memory", everything, *common),
        f"{memory}, nothing kept yet": in_a_process("--part", "search", "--memory", memory, *common),
        f"{memory}, decoded before": in_a_process("--part", "search", "--memory", memory, *common),
    }
    least = floor["decoding"] + floor["passes"]
    table = Table("", "resident, at most", "seconds", "times what can't be avoided", "float", *(f"{w} bits" for w in POLICIES))
    rows = []
    for name, one in found.items():
        shares = [f"{100 * value:.3f} %" for value in (one["float"], *one["values"])]
        row = [name, show_bytes(one["bytes"]), f"{one['seconds']:.0f}", f"{one['seconds'] / least:.2f}", *shares]
        rows.append(row)
        table.add_row(*row)
    whole, first, _ = found.values()
    same = all(first[key] == whole[key] for key in ("float", "values", "loss", "images"))
    most = parse_bytes(memory) + SLACK
    words = [
        f"Decoding {count:,} images once takes {floor['decoding']:.0f} s, the forward passes {floor['passes']:.0f} s.",
        f"{verdict(first['bytes'] < most)}: resident memory below {show_bytes(most)} ({show_bytes(first['bytes'])})",
        f"{verdict(same)}: the same accuracies and losses to the last bit as with all in memory",
        f"{verdict(first['seconds'] <= BAR * least)}: at most {BAR} times decoding once and the forward passes "
        f"({first['seconds'] / least:.2f})",
    ]
    return table, words, rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and keep what was found if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--folder", type=Path, help="of photographs that are there already")
    parser.add_argument("--save", type=Path, help="folder for data_size.md")
    parser.add_argument("--part", choices=("search", "unavoidable"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part == "search":
        print(json.dumps(searched(options.folder, options.images, options.memory)))
        return
    if options.part == "unavoidable":
        print(json.dumps(unavoidable(options.folder, options.images)))
        return
    place = Path(tempfile.mkdtemp(prefix="haq-data-size-"))
    os.environ["HAQ_DATA"] = str(place / "cache")
    try:
        folder = options.folder
        if folder is None:
            folder = place / "photographs"
            write_photographs(folder, options.images)
        table, words, rows = compared(folder, options.images, options.memory)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    console = Console(width=160)
    console.print(table)
    for sentence in words:
        console.print(sentence)
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "data_size.md").write_text(page(options, table, words, rows), encoding="utf-8")


def page(options: argparse.Namespace, table: Table, words: list[str], rows: list[list[str]]) -> str:
    """Write what was found as Markdown."""
    heads = [str(column.header) for column in table.columns]
    lines = [
        "# More images than memory holds",
        "",
        "Made by `experiments/data_size.py`, which says what is compared and how.",
        "",
        f"    OMP_NUM_THREADS=1 python -m experiments.data_size --images {options.images} --memory {options.memory}",
        "",
        f"{options.images:,} images of {SIZE} x {SIZE} pixels, {os.cpu_count()} cores.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'|'.join('---' for _ in heads)}|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *(f"* {sentence}" for sentence in words),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

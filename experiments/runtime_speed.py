"""Do the layers' times on `--hw onnxruntime` and `--hw openvino` add up to what the whole network takes? One thread.

    OMP_NUM_THREADS=1 python -m experiments.runtime_speed [--networks NAME ...] [--runtimes NAME ...] [--rounds N] [--quick]

ResNet-18 at 64x64 and MobileNetV2 at 96x96, with random weights. The whole network is exported by torch.onnx and, for 8 bits,
quantized by onnxruntime.quantization.quantize_static (QuantizeLinear and DequantizeLinear, weights int8 per channel,
activations uint8, calibrated on random images); both runtimes run the same two files, warm, one image, and OpenVINO computes
in float32 what isn't integers.

A round is a cost table measured from an empty cache. Whenever a layer is about to be measured the whole networks are read, so
both meet the same weather on the machine; a reading is the shortest of four calls in a row. Times are those of the process,
which others on the machine don't add to, but they do empty its caches, and a whole network feels that more than a layer: where
the machine isn't quiet, the lowest tenths of the readings, given beside the medians, are nearer to what it takes by itself.
Given are medians over the rounds. The bar is a sum of layers within 15 % of the whole at 8 bits.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import hw_models
from experiments import rivals, shared
from experiments.cpu_speed import empty_cache
from haq import networks
from haq.console.errors import run_command
from hw_models.runtimes.measure import clock_of
from hw_models.widths import FLOAT, place_of

NAME = "runtime_speed"
FOLDER = Path("docs/experiments")
SIZES = {"torchvision:resnet18": 64, "timm:mobilenetv2_100": 96}
RUNTIMES = ("onnxruntime", "openvino")
WIDTHS = {"8/8": 8, "float": FLOAT}
ROUNDS = 3
CALIBRATION = 64
BATCHES = 3
CALLS = 4  # in a row, of which the shortest counts: others only ever make one longer
BAR = 0.15
COLUMNS = (
    "network",
    "runtime",
    "pair",
    "layers us",
    "whole us",
    "lowest tenth",
    "layers/whole",
    "to lowest tenth",
    "not trusted",
)
IN_WORDS = COLUMNS[:3]

Say = Callable[[str], None]


@dataclass
class Sums:
    """What was measured of a network in a runtime at a pair: seconds of all layers, by round, and of the whole network."""

    network: str
    runtime: str
    pair: str
    layers: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    doubtful: int = 0

    @property
    def total(self) -> float:
        return statistics.median(self.layers)

    @property
    def ratio(self) -> float:
        return self.total / statistics.median(self.whole)

    @property
    def least(self) -> float:
        return float(np.percentile(self.whole, 10))

    def row(self) -> list[str]:
        times = [1e6 * value for value in (self.total, statistics.median(self.whole), self.least)]
        ratios = [self.ratio, self.total / self.least]
        words = [f"{value:.0f}" for value in times] + [f"{value:.2f}" for value in ratios]
        return [self.network, self.runtime, self.pair, *words, str(self.doubtful)]

    def verdict(self) -> str:
        """Say whether the layers add up at 8 bits, and else by how much they miss it."""
        claim = f"{self.runtime}, {self.network}: layers within {BAR:.0%} of the whole at {self.pair}"
        apart = self.ratio - 1
        sentence = f"{shared.verdict(abs(apart) <= BAR)}: {claim} (they take {abs(apart):.1%} "
        if apart < 0:
            return sentence + "less)"
        return sentence + "more)"


def network_of(name: str) -> nn.Module:
    """Load a network with random weights, its batch norms set by a few batches of random images."""
    torch.manual_seed(0)
    module = networks.load(name, pretrained=False).module
    module.train()
    with torch.no_grad():
        for _ in range(BATCHES):
            module(torch.randn(32, 3, SIZES[name], SIZES[name]))
    return module.eval()


def wholes(runtime: str, module: nn.Module, size: int) -> dict[str, Callable[[], object]]:
    """Make what runs the whole network, at 8 bits and in float."""
    image = torch.randn(1, 3, size, size)
    calibration = torch.randn(CALIBRATION, 3, size, size)
    models = {"8/8": rivals._quantized(module, image, calibration), "float": rivals._exported(module, image)}
    if runtime == "onnxruntime":
        return {pair: rivals.onnxruntime_rival(pair, model, image.numpy()).call for pair, model in models.items()}
    onnx = importlib.import_module("onnx")
    made = {}
    for pair, model in models.items():
        made[pair] = rivals.openvino_rival(pair, onnx.load_from_string(model), image.numpy(), "f32").call
    return made


def study(name: str, runtime: str, rounds: int, say: Say) -> list[Sums]:
    """Measure cost tables and whole networks of one network in one runtime."""
    say(f"{name} on {runtime}: preparing")
    module = network_of(name)
    calls = wholes(runtime, module, SIZES[name])
    workload = hw_models.trace(module, torch.zeros(1, 3, SIZES[name], SIZES[name]))
    found = {pair: Sums(name, runtime, pair) for pair in calls}
    clock = clock_of(1)

    def seconds_of(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    def progress(done: int, total: int, note: str) -> None:
        for pair, call in calls.items():
            call()  # what ran before has the caches
            found[pair].whole.append(min(seconds_of(call) for _ in range(CALLS)))

    for number in range(rounds):
        say(f"{name} on {runtime}: round {number + 1} of {rounds}")
        target = hw_models.load_target(runtime, progress=progress, notice=lambda sentence: None)
        with empty_cache():
            table = target.cost_table(workload)
        words = table.provenance.partition("busy in ")[2]
        for pair, sums in found.items():
            place = place_of(WIDTHS[pair])
            sums.layers.append(float(table.metric("latency")[:, place, place].sum()))
            if words:
                sums.doubtful = max(sums.doubtful, int(words.split()[0]))
    return list(found.values())


def save(folder: Path, command: str, setting: str, every: list[Sums]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rules = ["---:"] * len(COLUMNS)
    for column in IN_WORDS:
        rules[COLUMNS.index(column)] = "---"
    lines = [COLUMNS, rules, *(sums.row() for sums in every)]
    parts = [
        "# Layers and whole networks in ONNX Runtime and OpenVINO",
        f"Made by `experiments/{NAME}.py`:\n\n    {command}",
        (__doc__ or "").partition("--quick]")[2].strip(),
        setting,
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        "`not trusted`: layers, of the round that has most of them, whose times were marked because the machine was busy.",
        "\n".join(f"* {sums.verdict()}" for sums in every if sums.pair == "8/8"),
    ]
    (folder / f"{NAME}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(SIZES), default=list(SIZES), metavar="NAME")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--quick", action="store_true", help="one round; saves nothing unless --out is given")
    parser.add_argument("--out", type=Path, help=f"folder for the table (default: {FOLDER})")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rounds = options.rounds
    if options.quick:
        rounds = 1
    console = Console()
    if console.width < 130:
        console = Console(width=130)
    out = shared.folder_for(options.out, options.quick, FOLDER)
    targets = [hw_models.load_target(runtime) for runtime in options.runtimes]
    setting = f"One image, rounds: {rounds}. " + "; ".join(target.provenance for target in targets) + "."
    command = " ".join([f"OMP_NUM_THREADS=1 python -m experiments.{NAME}", *(arguments or sys.argv[1:])])
    every: list[Sums] = []

    def say(what: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')} {what}", markup=False)

    for runtime in options.runtimes:
        for name in options.networks:
            every += study(name, runtime, rounds, say)
            if out is not None:
                save(out, command, setting, every)
    table = Table(title="Layers and whole networks", box=box.SIMPLE_HEAD, pad_edge=False)
    shared.add_columns(table, COLUMNS, left=IN_WORDS)
    for sums in every:
        table.add_row(*sums.row())
    console.print(table)
    console.print(setting)
    for sums in every:
        if sums.pair == "8/8":
            console.print(sums.verdict(), markup=False)
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(run_command(main))

"""Do runtimes execute the files of `haq deploy --to onnx` as fast as files that were quantized for them? One thread.

    OMP_NUM_THREADS=1 python -m experiments.onnx_speed [--networks NAME ...] [--seconds N] [--bits N] [--quick]

The default network, ResNet-18 at 64x64 and MobileNetV2 at 96x96 (these two with random weights), every layer at 8 bits and
residual quantizers of 8 bits, as `haq search --residuals 8` has them; written for any runtime, and for OpenVINO. The rivals
are files of onnxruntime.quantization.quantize_static (weights int8 per channel, activations uint8) and float ones of
torch.onnx. All run one image, warm, in one process and in turn: every reading is the shortest of four calls in a row, in
seconds of the process, which others on the machine don't add to. Given are medians, and the lowest tenths of the readings.

What OpenVINO doesn't compute in integers it computes in float32, and it is told that there is one image.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
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
from torch import Tensor, nn

import quantizers as Q
from experiments import rivals, shared
from haq import networks
from haq.console.errors import run_command
from haq.deployment import onnx as files
from haq.deployment.graph import capture
from hw_models.runtimes.measure import clock_of

NAME = "onnx_speed"
FOLDER = Path("docs/experiments")
DEFAULT = "default"
SIZES = {DEFAULT: (1, 28), "torchvision:resnet18": (3, 64), "timm:mobilenetv2_100": (3, 96)}
# What a file must be worth against float, and against ONNX Runtime's own, which OpenVINO reads too.
AGAINST_FLOAT = {DEFAULT: 1.15, "torchvision:resnet18": 3.5, "timm:mobilenetv2_100": 1.6}
AGAINST_STATIC = 0.97
CALIBRATION = 32
BATCHES = 3
CALLS = 4
SECONDS = 30.0
OURS, FOR_OPENVINO, STATIC, FLOAT = "haq", "haq --for openvino", "quantize_static", "float"
COLUMNS = ("network", "runtime", "file", "us", "lowest tenth", "float/it", "quantize_static/it", "in integers", "answers")
IN_WORDS = (*COLUMNS[:3], *COLUMNS[7:])


@dataclass
class Reading:
    """A file in a runtime: seconds of every reading, how many layers are integers, and what its verification says."""

    network: str
    runtime: str
    file: str
    call: Callable[[], object]
    integers: str = ""
    answers: str = ""
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def network_of(name: str) -> nn.Module:
    """Load a network; one of random weights has batch norms that have seen a few batches of random images."""
    torch.manual_seed(0)
    if name == DEFAULT:
        return networks.load().module.eval()
    channels, size = SIZES[name]
    module = networks.load(name, pretrained=False).module
    module.train()
    with torch.no_grad():
        for _ in range(BATCHES):
            module(torch.randn(16, channels, size, size))
    return module.eval()


def quantized(module: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """Quantize every layer, and what enters additions and average pools."""
    policy = Q.BitPolicy.uniform(module, w=bits, a=bits)
    with_residuals = Q.insert_residual_quantizers(module, images)
    return Q.quantize(with_residuals, policy, scheme=Q.Linear(calibration="max"), calibrate=images).eval()


def prepare(name: str, bits: int, place: Path) -> list[Reading]:
    """Write all files of a network, verify ours, and load them."""
    onnx = importlib.import_module("onnx")
    channels, size = SIZES[name]
    draw = torch.randn
    if name == DEFAULT:
        draw = torch.rand
    module = network_of(name)
    image, images = draw(1, channels, size, size), draw(CALIBRATION, channels, size, size)
    network = quantized(module, images, bits)
    graph = capture(network, image)
    made: dict[str, bytes] = {
        STATIC: rivals._quantized(module, image, images),
        FLOAT: rivals._exported(module, image),
    }
    words: dict[str, tuple[str, str]] = {}
    for file, flavour in ((OURS, None), (FOR_OPENVINO, "openvino")):
        path = place / f"{file}.onnx"
        files.export(graph, network, path, flavour)
        found = files.verify(path, network, images)
        words[file] = found.further[0][1], f"{round(found.same_answers * found.images)} of {found.images}"
        made[file] = path.read_bytes()
    readings = []
    for file, content in made.items():
        integers, answers = words.get(file, ("", ""))
        if file != FOR_OPENVINO:
            call = rivals.onnxruntime_rival(file, content, image.numpy()).call
            readings.append(Reading(name, "onnxruntime", file, call, integers, answers))
        model = onnx.load_from_string(content)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        rival = rivals.openvino_rival(file, model, image.numpy(), "f32")
        readings.append(Reading(name, "openvino", file, rival.call, rival.note, answers))
    return readings


def measure(readings: list[Reading], seconds: float) -> None:
    """Read all files in turn, for so long."""
    clock = clock_of(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for reading in readings:
            reading.call()  # what ran before has the caches
            times = []
            for _ in range(CALLS):
                start = clock()
                reading.call()
                times.append(clock() - start)
            reading.seconds.append(min(times))


def rows_of(readings: list[Reading]) -> list[list[str]]:
    rows = []
    for reading in readings:
        rival = {other.file: other.median for other in readings if other.runtime == reading.runtime}
        times = [f"{1e6 * reading.median:.0f}", f"{1e6 * float(np.percentile(reading.seconds, 10)):.0f}"]
        ratios = [f"{rival[file] / reading.median:.2f}" for file in (FLOAT, STATIC)]
        rows.append([reading.network, reading.runtime, reading.file, *times, *ratios, reading.integers, reading.answers])
    return rows


def verdicts(readings: list[Reading]) -> list[str]:
    """Hold ours against the bars."""
    held: dict[tuple[str, str], float] = {(reading.runtime, reading.file): reading.median for reading in readings}
    name = readings[0].network
    ours = held["onnxruntime", OURS]
    claims = [
        ("onnxruntime", OURS, STATIC, held["onnxruntime", STATIC] / ours, AGAINST_STATIC),
        ("onnxruntime", OURS, FLOAT, held["onnxruntime", FLOAT] / ours, AGAINST_FLOAT[name]),
        ("openvino", FOR_OPENVINO, STATIC, held["openvino", STATIC] / held["openvino", FOR_OPENVINO], AGAINST_STATIC),
    ]
    made = []
    for runtime, file, rival, ratio, bar in claims:
        made.append(f"{shared.verdict(ratio >= bar)}: {name}, {runtime}: {file} is {ratio:.2f} x {rival} (bar: {bar:.2f})")
    return made


def save(folder: Path, command: str, setting: str, rows: list[list[str]], lines: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rules = ["---:"] * len(COLUMNS)
    for column in IN_WORDS:
        rules[COLUMNS.index(column)] = "---"
    parts = [
        "# Files of `haq deploy --to onnx` in ONNX Runtime and OpenVINO",
        f"Made by `experiments/{NAME}.py`:\n\n    {command}",
        (__doc__ or "").partition("--quick]")[2].strip(),
        setting,
        "\n".join(f"| {' | '.join(line)} |" for line in [list(COLUMNS), rules, *rows]),
        "\n".join(f"* {line}" for line in lines),
    ]
    (folder / f"{NAME}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(SIZES), default=list(SIZES), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of each network (default: {SECONDS:.0f})")
    parser.add_argument("--bits", type=int, default=8, help="of weights and inputs of all layers (default: 8)")
    parser.add_argument("--quick", action="store_true", help="a second; saves nothing unless --out is given")
    parser.add_argument("--out", type=Path, help=f"folder for the table (default: {FOLDER})")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seconds = options.seconds
    if options.quick:
        seconds = 1.0
    console = Console()
    if console.width < 150:
        console = Console(width=150)
    out = shared.folder_for(options.out, options.quick, FOLDER)
    command = " ".join([f"OMP_NUM_THREADS=1 python -m experiments.{NAME}", *(arguments or sys.argv[1:])])
    versions = [f"{name} {importlib.import_module(name).__version__}" for name in ("onnxruntime", "openvino", "torch")]
    setting = f"One image, {seconds:.0f} s for each network. {', '.join(versions)}."
    rows: list[list[str]] = []
    lines: list[str] = []
    for name in options.networks:
        console.print(f"{time.strftime('%H:%M:%S')} {name}", markup=False)
        with tempfile.TemporaryDirectory() as place:
            readings = prepare(name, options.bits, Path(place))
        measure(readings, seconds)
        rows += rows_of(readings)
        lines += verdicts(readings)
        if out is not None:
            save(out, command, setting, rows, lines)
    table = Table(title="Files of --to onnx", box=box.SIMPLE_HEAD, pad_edge=False)
    shared.add_columns(table, COLUMNS, left=IN_WORDS)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(setting)
    for line in lines:
        console.print(line, markup=False)
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(run_command(main))

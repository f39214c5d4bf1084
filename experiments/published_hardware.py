"""The hardware models beside what was published about the hardware: prints ours next to theirs.

    python -m experiments.published_hardware [--reference FOLDER]

FOLDER holds layer-by-layer tables (haq_cloud_cycles.csv, bitfusion_layers.csv, bismo_rtl_cycles.csv), of which the tests carry
some rows of their own; with it, every row is compared.

Sources: HAQ (Wang et al., CVPR 2019) for the latencies of MobileNets on BISMO; BISMO (Umuroglu et al., FPL 2018) for its
peaks; for BitFusion against Eyeriss, the result files that BitFusion's authors (Sharma et al., ISCA 2018) publish with their
simulator: cycles and accesses of Eyeriss per network, an access counted in energies of one multiplication, DRAM scaled by
0.15.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import hw_models
from experiments.shared import add_columns
from haq import networks
from hw_models.bismo_overlay import BismoOverlayTarget
from hw_models.bitfusion import BitFusionTarget, Shape

# Milliseconds per batch at 4, 5, 6 and 8 bits, first convolution and classifier excluded; but three values seem to include the
# first convolution at 8 bits (docs/explanation/edge.md).
HAQ_LATENCIES_MS = {
    ("cloud", "mobilenetv1_100"): (57.49, 77.52, 99.86, 151.09),
    ("cloud", "mobilenetv2_100"): (74.46, 99.43, 127.07, 189.82),
    ("edge", "mobilenetv1_100"): (45.45, 57.75, 70.67, 96.20),
    ("edge", "mobilenetv2_100"): (52.15, 66.94, 82.49, 115.84),
}
WIDTHS = (4, 5, 6, 8)
WITH_FIRST = [("edge", "mobilenetv1_100", bits) for bits in (4, 5, 6)]
PEAK_TOPS = {"bismo-overlay": "6.5", "bismo-overlay-ultra96": "15.4"}


class Benchmark(NamedTuple):
    """A network of BitFusion's paper, batch 16, with the published ratios.

    Layers are (count, kernel, output size, stride, inputs, outputs, weight bits, activation bits), the first of them on the
    image. Eyeriss's cycles and energy are in multiplications of 16 bits.
    """

    layers: tuple[tuple[int, ...], ...]
    eyeriss_cycles: int
    eyeriss_energy: float
    speedup: str
    energy: str


def _energy(alu: int, dram: int, buffer: int, array: int, registers: int) -> float:
    return alu + 0.15 * dram + buffer + array + registers


def _resnet(width: int = 128) -> tuple[tuple[int, ...], ...]:
    layers = [(1, 7, 112, 2, 3, width, 8, 8), (2, 1, 56, 1, width, width, 4, 4), (2, 3, 56, 1, width, width, 4, 4)]
    for stage, size in ((2, 28), (4, 14), (8, 7)):
        channels = width * stage
        layers += [(1, 1, size, 2, channels // 2, channels, 4, 4), (1, 1, size, 1, channels, channels, 4, 4)]
        layers += [(2, 3, size, 1, channels, channels, 4, 4)]
    return tuple(layers)


def _vgg_like(width: int, first_weight_bits: int, bits: int) -> tuple[tuple[int, ...], ...]:
    """Three pairs of 3x3 convolutions at 32x32, 16x16 and 8x8, and three linear layers."""
    layers = [(1, 3, 32, 1, 3, width, first_weight_bits, 8), (1, 3, 32, 1, width, width, bits, bits)]
    for stage, size in ((2, 16), (4, 8)):
        layers += [(1, 3, size, 1, width * stage // 2, width * stage, bits, bits)]
        layers += [(1, 3, size, 1, width * stage, width * stage, bits, bits)]
    linear = ((16 * width * 4, 1024), (1024, 1024), (1024, 10))
    return (*layers, *((1, 1, 1, 1, inputs, outputs, bits, bits) for inputs, outputs in linear))


BENCHMARKS = {
    "AlexNet": Benchmark(
        (
            *((2, 11, 55, 4, 3, 96, 8, 8), (2, 5, 27, 1, 96, 256, 4, 4), (2, 3, 13, 1, 512, 384, 4, 4)),
            *((2, 3, 13, 1, 384, 384, 4, 4), (2, 3, 13, 1, 384, 256, 4, 4), (1, 1, 1, 1, 18432, 8192, 4, 4)),
            *((1, 1, 1, 1, 8192, 8192, 4, 4), (1, 1, 1, 1, 8192, 1000, 8, 8)),
        ),
        70286336,
        _energy(11608143872, 22968294400, 922167552, 1421881408, 46775287808),
        "1.87",
        "1.56",
    ),
    "SVHN": Benchmark(
        _vgg_like(64, 1, 1),
        11296768,
        _energy(2530115584, 4453113600, 152467776, 359259712, 10234101760),
        "8.57",
        "10.57",
    ),
    "CIFAR10": Benchmark(
        _vgg_like(128, 8, 2),
        44153856,
        _energy(9875128320, 13397011200, 439659072, 1229059904, 39953891328),
        "13.41",
        "14.77",
    ),
    "LeNet-5": Benchmark(
        ((1, 5, 32, 1, 1, 32, 2, 2), (1, 5, 16, 1, 32, 64, 2, 2), (1, 1, 1, 1, 4096, 512, 2, 2), (1, 1, 1, 1, 512, 10, 2, 2)),
        1117696,
        _energy(257245184, 887232000, 34321536, 52917888, 1055391744),
        "2.72",
        "4.30",
    ),
    "VGG-7": Benchmark(
        (
            (2, 3, 32, 1, 3, 128, 2, 2),
            (2, 3, 16, 1, 128, 256, 2, 2),
            (2, 3, 8, 1, 256, 512, 2, 2),
            (1, 1, 1, 1, 8192, 1024, 2, 2),
        ),
        21625856,
        _energy(5095817216, 9484262400, 360025344, 950759680, 20685258752),
        "7.66",
        "9.87",
    ),
    "ResNet-18": Benchmark(
        _resnet(),
        95485952,
        _energy(18034458624, 32760460800, 982813824, 1695979136, 72600256512),
        "1.95",
        "1.85",
    ),
    "RNN": Benchmark(
        ((1, 1, 1, 1, 4096, 4096, 4, 4),),
        1048576,
        _energy(268435456, 3394764800, 101842944, 66846720, 1073741824),
        "2.66",
        "5.14",
    ),
    "LSTM": Benchmark(
        ((1, 1, 1, 1, 3600, 3600, 4, 4),),
        820800,
        _energy(207360000, 2638080000, 113356800, 57292800, 840499200),
        "2.43",
        "4.78",
    ),
}
EYERISS_JOULES = 16 * 0.2e-12  # of one multiplication


class Comparison(NamedTuple):
    network: str
    cycles: int
    speedup: float
    energy: float
    published_speedup: str
    published_energy: str


def over_eyeriss() -> list[Comparison]:
    """BitFusion's speedup and energy reduction over Eyeriss, for the eight networks of its paper at a batch of 16."""
    target = hw_models.load_target("bitfusion")
    assert isinstance(target, BitFusionTarget)
    rows = []
    for name, benchmark in BENCHMARKS.items():
        cycles = 0
        joules = 0.0
        for count, kernel, size, stride, inputs, outputs, w, a in benchmark.layers:
            square = (kernel, kernel)
            shape = Shape(square, square, (stride, stride), (size, size), inputs, outputs, 16, im2col=inputs <= 3)
            best = target.schedule(shape, np.array([w]), np.array([a]))
            cycles += count * int(best.cycles[0])
            joules += count * float(best.energy_j[0])
        speedup = benchmark.eyeriss_cycles / cycles
        energy = EYERISS_JOULES * benchmark.eyeriss_energy / joules
        rows.append(Comparison(name, cycles, speedup, energy, benchmark.speedup, benchmark.energy))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.published_hardware", description=__doc__)
    parser.add_argument("--reference", type=Path, help="folder of layer-by-layer tables")
    options = parser.parse_args()
    console = Console()
    workloads = {
        name: hw_models.trace(networks.load(f"timm:{name}", pretrained=False).module, torch.zeros(1, 3, 224, 224))
        for name in ("mobilenetv1_100", "mobilenetv2_100")
    }
    console.print(_haq(workloads))
    console.print(_overlay())
    console.print(_bitfusion())
    if options.reference:
        console.print(_references(options.reference, workloads["mobilenetv2_100"]))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    add_columns(table, columns, left=("target", "network", "table"))
    return table


def _haq(workloads: dict[str, hw_models.Workload]) -> Table:
    columns = ("target", "network", "bits", "published", "ours", "difference", "with first layer", "difference")
    table = _table("HAQ's MobileNets on BISMO, ms per batch, without first and last layer", *columns)
    for (name, network), published in HAQ_LATENCIES_MS.items():
        latency = hw_models.load_target(name).cost_table(workloads[network]).latency_s
        assert latency is not None
        for bits, theirs in zip(WIDTHS, published, strict=True):
            body = 1e3 * latency[1:-1, bits - 1, bits - 1].sum()
            first = 1e3 * latency[0, 7, 7]
            cells = _compared(body, theirs)
            if (name, network, bits) in WITH_FIRST:
                cells += _compared(body + first, theirs)
            table.add_row(name, network, str(bits), f"{theirs:.2f}", *cells)
    return table


def _compared(ours: float, theirs: float) -> list[str]:
    text = f"{ours:.2f}"
    if text == f"{theirs:.2f}":
        return [text, "–"]
    return [text, f"{ours / theirs - 1:+.2%}"]


def _overlay() -> Table:
    table = _table("Peak of the BISMO overlay, binary TOPS", "target", "published", "ours")
    for name, published in PEAK_TOPS.items():
        target = hw_models.load_target(name)
        assert isinstance(target, BismoOverlayTarget)
        table.add_row(name, published, f"{target.peak_binary_tops:.2f}")
    return table


def _bitfusion() -> Table:
    columns = ("network", "cycles", "speedup, published", "ours", "energy, published", "ours")
    table = _table("BitFusion over Eyeriss, batch 16", *columns)
    rows = over_eyeriss()
    for row in rows:
        ours = f"{row.speedup:.2f}", f"{row.energy:.2f}"
        table.add_row(row.network, f"{row.cycles:,}", row.published_speedup, ours[0], row.published_energy, ours[1])
    means = [math.exp(np.log([getattr(row, x) for row in rows]).mean()) for x in ("speedup", "energy")]
    table.add_section()
    table.add_row("geometric mean", "", "3.93", f"{means[0]:.2f}", "5.12", f"{means[1]:.2f}")
    return table


def _references(folder: Path, mobilenetv2: hw_models.Workload) -> Table:
    """How many rows of the published tables come out, and how far off the others are."""
    table = _table("Rows of the published tables", "table", "rows", "equal in every integer", "largest difference of cycles")

    def rows(name: str) -> list[dict[str, str]]:
        with (folder / name).open() as file:
            return list(csv.DictReader(file))

    def add(name: str, pairs: list[tuple[list[int], list[int]]]) -> None:
        equal = sum(ours == theirs for ours, theirs in pairs)
        worst = max(abs(ours[0] / theirs[0] - 1) for ours, theirs in pairs)
        table.add_row(name, str(len(pairs)), str(equal), f"{worst:.2%}")

    cycles = hw_models.load_target("cloud").cost_table(mobilenetv2).cycles
    assert cycles is not None
    haq = rows("haq_cloud_cycles.csv")
    cells = [cycles[int(r["layer"]), int(r["w_bits"]) - 1, int(r["a_bits"]) - 1] for r in haq]
    add("haq_cloud_cycles.csv", [([int(c)], [int(r["cycles_batch16"])]) for c, r in zip(cells, haq, strict=True)])

    pairs = []
    for r in rows("bitfusion_layers.csv"):
        number = {key: int(r[key]) for key in ("K", "O", "S", "IC", "OC", "groups", "im2col", "batch", "wbits", "abits")}
        name = "bitfusion-16bit"
        if r["config"] == "bf_e":
            name = "bitfusion"
        machine = hw_models.load_target(name)
        assert isinstance(machine, BitFusionTarget)
        inputs, outputs, times = number["IC"], number["OC"], 1
        if r["dw_mode"] == "per_channel_x_C":
            inputs, outputs, times = 1, 1, number["groups"]
        elif r["dw_mode"] == "as_IC1_OCC":
            inputs = 1
        kernel, stride, size = ((number[key], number[key]) for key in ("K", "S", "O"))
        shape = Shape(kernel, kernel, stride, size, inputs, outputs, number["batch"], bool(number["im2col"]))
        best = machine.schedule(shape, np.array([number["wbits"]]), np.array([number["abits"]]))
        theirs = [
            int(r[key]) for key in ("total_cycles", "compute_cycles", "mem_stall_cycles", "dram_rd_bits", "dram_wr_bits")
        ]
        theirs += [int(r[f"{buffer}buf_{access}_bits"]) for buffer in ("w", "i", "o") for access in ("rd", "wr")]
        pairs.append(([times * int(x[0]) for x in (best.cycles, *best.counters.values())], theirs))
    add("bitfusion_layers.csv", pairs)

    pairs = []
    for r in rows("bismo_rtl_cycles.csv"):
        overlay = hw_models.load_target("bismo-overlay")
        assert isinstance(overlay, BismoOverlayTarget)
        sizes = {key.lower(): int(r[key]) for key in ("Dm", "Dk", "Dn", "lhs_entries", "rhs_entries")}
        gemm = overlay.model_copy(update=sizes).gemm(*(int(r[key]) for key in ("M", "K", "N", "wbits", "abits")))
        columns = ["cycles", "rd_bytes", "wr_bytes", "ideal_exec_cycles", "n_exec_runs", "n_fetch_runs"]
        pairs.append((list(gemm), [int(r[key]) for key in columns]))
    add("bismo_rtl_cycles.csv", pairs)
    return table


if __name__ == "__main__":
    main()

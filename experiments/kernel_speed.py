"""Single layers, one thread: our low-bit kernels beside the int8 of ONNX Runtime, torch (fbgemm, oneDNN) and OpenVINO.

    OMP_NUM_THREADS=1 python -m experiments.kernel_speed [--layers]

Without arguments, four layers at the bits of a reference that was measured on Zen 4; with `--layers`, every distinct layer of
MobileNetV2 at 96x96 and of ResNet-18 at 64x64, in int8.

What is timed is bytes in, bytes out: preparing and packing the activations and the requantization count. In a network the
layer before does that preparing as it writes, if no other layer reads the same; rows "prepared" are without it. Ours is, for
each pair of bits, the fastest of the kernels that `--hw cpu` would measure; all that is compared is measured in turn, round
by round, and medians of the rounds are given (spread: half the interquartile range, in percent of the median). A library's
time is what one more such layer would cost in a network: to run a graph costs ONNX Runtime and OpenVINO some microseconds,
whatever is in it, so theirs is the time of a graph that has the layer several times side by side (as often as the caches
hold, at most 16 times), less that of a graph with next to nothing in it, divided by how often. torch calls its operators one
by one, as it does in a network.

Without `--layers`, every result of ours, as it is timed, is checked to be exact, and the libraries' to be at most one step
away; with it, nothing is checked (fbgemm's depthwise kernels saturate). OpenVINO's plan is always read back: a layer that it
wouldn't run in 8 bits is refused.

A ratio holds if it is at least nine tenths of the reference; a layer of `--layers` counts as slower if ours takes more than
1.1 times as long as the fastest library.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.rivals import INT8_LIBRARIES, TORCH_ENGINES, Int8Layer, Rival, torch_float_layer, torch_layer
from experiments.shared import add_columns, verdict
from haq import networks
from hw_models import trace
from hw_models.tvm_cpu.conv import Conv, activation_range, fma, reference, weight_range, zero_point
from hw_models.tvm_cpu.cpu import Cpu
from hw_models.tvm_cpu.kernel import Kernel
from hw_models.tvm_cpu.kernels import candidates
from hw_models.tvm_cpu.measure import measure

ROUNDS, READING_S = 21, 0.002
TOLERANCE = 1.1
FACTOR = 2.0**-10  # of the kernels' epilogue
NETWORKS = {"timm:mobilenetv2_100": 96, "torchvision:resnet18": 64}
# Weight bits, activation bits, signed (one bit of both: -1 or +1).
BITS = {
    "w8a8": (8, 8, False),
    "w1a1": (1, 1, True),
    "w1a2": (1, 2, False),
    "w2a2": (2, 2, False),
    "w1a4": (1, 4, False),
    "w3a3": (3, 3, False),
    "w4a8": (4, 8, False),
    "w2a8": (2, 8, False),
}
SHAPES = {
    "3x3 256-256 @14": Conv(256, 256, (14, 14), (14, 14), (3, 3), (1, 1), (1, 1)),
    "1x1 384-64 @14": Conv(384, 64, (14, 14), (14, 14)),
    "fc 4096-1000": Conv(4096, 1000, (1, 1), (1, 1)),
    "3x3 64-64 @56": Conv(64, 64, (56, 56), (56, 56), (3, 3), (1, 1), (1, 1)),
}
# How many times as fast as the best of ONNX Runtime and torch int8; the last row, as torch float32. One Zen 4.
REFERENCE = {
    "w8a8": (1.07, 1.21, 1.39, 1.00),
    "w1a1": (5.8, 6.0, 14.6, 6.21),
    "w1a2": (2.9, 3.1, 8.6, 3.05),
    "w2a2": (1.43, 1.57, 3.7, 1.54),
    "w1a4": (1.40, 1.55, 4.7, 1.53),
    "w3a3": (0.62, 0.70, 1.48, 0.66),
}
OVER_FLOAT = (27, 26, 200, 27)
IN_REFERENCE = ("ONNX Runtime", *(f"torch {engine}" for engine in TORCH_ENGINES))
INT8 = (*IN_REFERENCE, "OpenVINO")
PREPARED = "prepared"
MOST_COPIES, COPIES_BYTES = 16, 512 << 10


@dataclass
class Ours:
    """A kernel, compiled, with its buffers."""

    kernel: Kernel
    seconds: Callable[[], float]
    prepared: Callable[[], float]
    run: Callable[[], NDArray[Any]]
    expected: NDArray[Any] | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", action="store_true", help="all layers of MobileNetV2 and ResNet-18, in int8")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        if arguments.layers:
            print_layers()
        else:
            print_shapes()


# The reference table

HEADINGS = (
    *("", "us", "spread", "x best of ORT, torch", "reference", ""),
    *("x best of all", "x float32", "reference", "", "kernel"),
)


def print_shapes() -> None:
    found = {name: compare(conv, list(BITS), True) for name, conv in track(SHAPES.items(), "measuring")}
    console = Console(width=150)
    for index, (name, (times, kernels)) in enumerate(found.items()):
        best = min(times[rival].median for rival in IN_REFERENCE)
        best_of_all = min(times[rival].median for rival in INT8)
        table = Table(title=f"{name}, one thread, medians of {ROUNDS} rounds", box=box.SIMPLE_HEAD)
        add_columns(table, HEADINGS, left=("", "kernel"))
        for what, time_of in times.items():
            cells = [what, f"{1e6 * time_of.median:.1f}", f"{time_of.spread:.0%}", f"{best / time_of.median:.2f}"]
            if what in REFERENCE:
                cells += judged(best / time_of.median, REFERENCE[what][index])
            else:
                cells += ["", ""]
            over_float = times["torch float32"].median / time_of.median
            cells += [f"{best_of_all / time_of.median:.2f}", f"{over_float:.1f}"]
            if what == "w1a1":
                cells += judged(over_float, OVER_FLOAT[index])
            else:
                cells += ["", ""]
            table.add_row(*cells, kernels.get(what, ""))
        console.print(table)


def judged(ratio: float, target: float) -> list[str]:
    return [f"{target}", verdict(ratio >= target / TOLERANCE, "falls short")]


# All layers


def print_layers() -> None:
    console = Console(width=150)
    for network, size in NETWORKS.items():
        workload = trace(networks.load(network, pretrained=False).module, torch.zeros(1, 3, size, size))
        convs: dict[Conv, list[str]] = {}
        for layer in workload.layers:
            convs.setdefault(Conv.of(layer), []).append(layer.name)
        table = Table(title=f"{network} at {size}x{size}, int8, one thread, us", box=box.SIMPLE_HEAD)
        headings = ("layer", "", "times", "ours", "spread", *INT8, "ours / best", "kernel")
        add_columns(table, headings, left=("layer", "", "kernel"))
        slower = []
        total = dict.fromkeys(("ours", "best"), 0.0)
        for conv, names in track(convs.items(), network):
            times, kernels = compare(conv, ["w8a8"], False)
            ours = times.pop("w8a8")
            best = min(time_of.median for time_of in times.values())
            ratio = ours.median / best
            total["ours"] += len(names) * ours.median
            total["best"] += len(names) * best
            mark = ""
            if ratio > TOLERANCE:
                mark = " slower"
                slower.append(f"{names[0]} ({describe(conv)}): {ratio:.2f}")
            cells = [f"{1e6 * times[rival].median:.1f}" for rival in INT8]
            row = (f"{1e6 * ours.median:.1f}", f"{ours.spread:.0%}", *cells, f"{ratio:.2f}{mark}", kernels["w8a8"])
            table.add_row(names[0], describe(conv), str(len(names)), *row)
        console.print(table)
        console.print(
            f"Sum over all layers: ours {1e3 * total['ours']:.3f} ms, the best library for each {1e3 * total['best']:.3f} ms. "
            f"{len(slower)} of {len(convs)} distinct layers are slower by more than {TOLERANCE - 1:.0%}"
        )
        for line in slower:
            console.print(f"  {line}")


def describe(conv: Conv) -> str:
    kernel = "x".join(map(str, conv.kernel))
    kind = f"{kernel} {conv.in_channels}-{conv.out_channels}"
    if conv.groups > 1:
        kind = f"depthwise {kernel} {conv.in_channels}"
    if conv.stride[0] > 1:
        kind += f" /{conv.stride[0]}"
    return f"{kind} @{conv.input_size[0]}"


# Measuring


@dataclass
class Time:
    median: float
    spread: float


def compare(conv: Conv, bits: list[str], check: bool) -> tuple[dict[str, Time], dict[str, str]]:
    """Seconds of the fastest kernel at each pair of bits and of every rival, and the names of those kernels."""
    rng = np.random.default_rng(0)
    layer = int8_layer(conv, rng)
    ours = fastest(conv, bits, rng, check)
    copies = min(max(1, COPIES_BYTES // (layer.weights.nbytes + layer.outputs)), MOST_COPIES)
    # The graph, the one with next to nothing in it, and how often the layer is in it.
    rivals = {name: (make(layer, copies), make(NOTHING, 1), copies) for name, make in INT8_LIBRARIES.items()}
    alone = [torch_layer(layer, engine) for engine in TORCH_ENGINES] + [torch_float_layer(layer)] * check
    for name, (rival, _, _) in rivals.items():
        if rival.note != f"{copies} in u8" and name == "OpenVINO":
            raise SystemExit(f"OpenVINO runs {conv} not in 8 bits: {rival.note}")
    if check:
        for name, made in ours.items():
            if made.expected is None or not np.array_equal(made.run(), made.expected):
                raise SystemExit(f"{made.kernel.name} ({name}) is not exact on {conv}")
        expected = quantized(reference(conv, layer.weights, layer.image) + layer.bias, layer.scale, np.float32(128))
        for rival in [rival for rival, _, _ in rivals.values()] + alone[: len(TORCH_ENGINES)]:
            if np.abs(rival.run(layer.image).reshape(-1).astype(int) - expected).max() > 1:
                raise SystemExit(f"{rival.name} computes something else on {conv}")
    readers: dict[str, Callable[[], float]] = {name: made.seconds for name, made in ours.items()}
    if check:
        readers |= {f"{name} {PREPARED}": made.prepared for name, made in ours.items() if "prepare" in made.kernel.arguments()}
    readers |= {rival.name: Reading(rival) for rival in alone}
    readers |= {name: Share(Reading(rival), Reading(nothing), copies) for name, (rival, nothing, copies) in rivals.items()}
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(ROUNDS):
        # In another order each time: what else the machine does may have a rhythm, too.
        for name in rng.permutation(list(readers)):
            seconds[name].append(readers[name]())
    times = {}
    for name, values in seconds.items():
        low, median, high = np.percentile(values, (25, 50, 75))
        times[name] = Time(float(median), float(high - low) / 2 / float(median))
    return times, {name: made.kernel.name for name, made in ours.items()}


class Reading:
    """Seconds of one call, over as many as take READING_S."""

    def __init__(self, rival: Rival) -> None:
        self.call, self.count = rival.call, 10
        self()
        self.count = max(2, int(READING_S / self()))

    def __call__(self) -> float:
        call = self.call
        start = time.perf_counter()
        for _ in range(self.count):
            call()
        return (time.perf_counter() - start) / self.count


class Share:
    """Seconds of one of the layers in a graph."""

    def __init__(self, graph: Reading, nothing: Reading, copies: int) -> None:
        self.graph, self.nothing, self.copies = graph, nothing, copies

    def __call__(self) -> float:
        return (self.graph() - self.nothing()) / self.copies


def int8_layer(conv: Conv, rng: np.random.Generator) -> Int8Layer:
    weights = draw(weight_range(8), 8, True, (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel), rng)
    image = draw((0, 255), 8, False, (conv.batch, *conv.input_size, conv.in_channels), rng)
    # Outputs all over their range.
    scale = rng.uniform(20, 60, conv.out_channels) / (74 * 147 * np.sqrt(conv.taps))
    bias = rng.integers(-1000, 1000, conv.out_channels)
    return Int8Layer(conv, weights.astype(np.int8), scale.astype(np.float32), bias.astype(np.int32), image.astype(np.uint8))


def draw(
    bounds: tuple[int, int], bits: int, signed: bool, shape: tuple[int, ...], rng: np.random.Generator
) -> NDArray[np.int64]:
    if bits == 1 and signed:
        return rng.choice([-1, 1], shape)
    return rng.integers(bounds[0], bounds[1] + 1, shape)


NOTHING = int8_layer(Conv(16, 16, (1, 1), (1, 1), batch=2), np.random.default_rng(0))


def fastest(conv: Conv, bits: list[str], rng: np.random.Generator, check: bool) -> dict[str, Ours]:
    """For each pair of bits, the fastest kernel, ready to run on random values."""
    import tvm

    cpu = Cpu.host()
    choices = {name: candidates(conv, *BITS[name], cpu) for name in bits}
    timings = measure(list(dict.fromkeys(kernel for kernels in choices.values() for kernel in kernels)), cpu)
    best = {name: min(kernels, key=lambda kernel: timings[kernel].median_s) for name, kernels in choices.items()}
    functions: dict[str, Any] = {}
    for name, kernel in best.items():
        functions |= kernel.functions(name)
    module = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(cpu.target)).mod
    return {name: prepared(module, name, kernel, rng, check) for name, kernel in best.items()}


def prepared(module: Any, name: str, kernel: Kernel, rng: np.random.Generator, check: bool) -> Ours:
    import tvm

    conv = kernel.conv
    w_bits, a_bits, signed = BITS[name]
    shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel)
    weights = draw(weight_range(w_bits), w_bits, True, shape, rng)
    image = draw(activation_range(a_bits, signed), a_bits, signed, (conv.batch, *conv.input_size, conv.in_channels), rng)
    spread = max(1.0, float(np.abs(weights).mean() * np.abs(image).mean() * np.sqrt(conv.taps)))
    multiplier = (rng.uniform(20, 60, conv.out_channels) / spread / FACTOR).astype(np.float32)
    offset = np.full(conv.out_channels, 128 / FACTOR, np.float32)
    values = kernel.constants(weights, multiplier, offset)
    values["input"] = (image + zero_point(a_bits, signed)).astype(np.uint8).reshape(-1)
    stages = kernel.arguments()
    buffers = {
        a.name: tvm.runtime.tensor(values.get(a.name, np.zeros(a.shape, a.dtype)).reshape(-1))
        for arguments in stages.values()
        for a in arguments
    }
    calls = [(f"{name}_{stage}", [buffers[a.name] for a in arguments]) for stage, arguments in stages.items()]
    timers = [
        (module.time_evaluator(function, tvm.cpu(0), number=1, repeat=1, min_repeat_ms=int(1000 * READING_S)), given)
        for function, given in calls
    ]

    def seconds() -> float:
        return float(sum(timer(*given).results[0] for timer, given in timers))

    def without_preparing() -> float:
        every = zip(stages, timers, strict=True)
        return float(sum(timer(*given).results[0] for stage, (timer, given) in every if stage != "prepare"))

    def run() -> NDArray[Any]:
        for function, given in calls:
            module[function](*given)
        return np.asarray(buffers["output0"].numpy())

    expected = None
    if check:
        expected = quantized(reference(conv, weights, image), multiplier, offset, FACTOR)
    return Ours(kernel, seconds, without_preparing, run, expected)


def quantized(
    sums: NDArray[np.int64],
    multiplier: NDArray[np.float32],
    offset: NDArray[np.float32] | np.float32 | float,
    factor: float = 1.0,
) -> NDArray[np.uint8]:
    """What kernels make of their sums, in float32."""
    scale = np.broadcast_to(multiplier, sums.shape)
    v = fma(sums.astype(np.float32), scale, offset) * np.float32(factor)
    return np.rint(np.clip(v, 0, 255)).astype(np.uint8).reshape(-1)


if __name__ == "__main__":
    main()

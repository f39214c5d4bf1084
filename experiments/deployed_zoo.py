"""Do networks of the zoo compile, and does their code compute what their integer programs say, bit for bit?

    OMP_NUM_THREADS=1 python -m experiments.deployed_zoo [--networks NAME ...] [--policies NAME ...] [--again] [--quick]

Networks of torchvision, timm and pytorchcv and two on sounds, with random weights whose batch norms have seen random images,
each at two policies: 8 bits everywhere, and 2 to 8 bits drawn layer by layer for weights and activations. Each is captured,
lowered to a program of integers, compiled and run on random images. Compared are all outputs of the compiled code with those
of `haq.deployment.interpreter`, which is slow and exact, and the integers that enter the layers with those of the
fake-quantized network.

Whichever kernel computes a layer, integers are the same. So kernels are not measured, which takes most of the time of
`haq deploy`: they are taken in turn from those that can compute a layer. What a network's latency is can't be told from this.

What was found is written after every network, and a later call goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

import quantizers as Q
from experiments import shared
from haq import networks
from haq.console.errors import run_command
from haq.deployment import interpreter
from haq.deployment import tvm as tvm_code
from haq.deployment.graph import Graph, capture
from haq.deployment.lowering import lower
from haq.deployment.program import Program
from hw_models import load_target
from hw_models.measured.timing import Timing
from hw_models.tvm_cpu import kernels
from hw_models.tvm_cpu.choose import Choice
from hw_models.tvm_cpu.target import CpuTarget

NAME = "deployed-zoo"
FOLDER = Path("docs/experiments")
POLICIES = ("8 bits", "mixed")
CALIBRATION = 8
COMPARED = 2
BATCHES = 2
SCHEME = Q.Linear(calibration="max")  # which is fast, and integers are integers
WIDTHS = range(2, 9)
LAYERS = ("Convolution", "FloatConvolution", "Quantize")


class Case(NamedTuple):
    """A network and the size of its images; a sound has so many samples."""

    name: str
    size: int


NETWORKS = (
    Case("torchvision:mobilenet_v3_small", 96),
    Case("audio:plain", 4000),
    Case("audio:dilated", 2000),
    Case("torchvision:squeezenet1_1", 32),
    Case("torchvision:shufflenet_v2_x0_5", 32),
    Case("pytorchcv:shufflenet_g3_wd4", 32),
    Case("timm:efficientnet_lite0", 32),
    Case("torchvision:mnasnet0_5", 32),
    Case("timm:ghostnet_100", 32),
    Case("timm:mobileone_s0", 32),
    Case("pytorchcv:proxylessnas_cpu", 32),
    Case("pytorchcv:densenet40_k12_cifar10", 32),
    Case("timm:lcnet_050", 32),
    Case("timm:tinynet_e", 32),
    Case("pytorchcv:preresnet20_cifar10", 32),
    Case("pytorchcv:resnet20_cifar10", 32),
    Case("pytorchcv:mobilenet_wd4", 32),
    Case("timm:repvgg_a0", 32),
    Case("timm:regnety_002", 32),
    Case("timm:seresnet18", 64),
    Case("torchvision:resnet18", 64),
    Case("timm:resnet18d", 32),
    Case("torchvision:mobilenet_v2", 32),
    Case("torchvision:efficientnet_b0", 64),
    Case("pytorchcv:igcv3_wd4", 32),
    Case("pytorchcv:menet108_8x1_g3", 32),
    Case("timm:semnasnet_075", 32),
    Case("timm:hardcorenas_a", 32),
    Case("timm:mobilenetv4_conv_small_050", 32),
    Case("timm:dla46_c", 32),
    Case("pytorchcv:peleenet", 32),
    Case("pytorchcv:hardnet39ds", 32),
    Case("timm:fbnetc_100", 32),
    Case("timm:repghostnet_050", 32),
    Case("timm:spnasnet_100", 32),
    Case("pytorchcv:shufflenet_g1_wd2", 32),
    Case("pytorchcv:shufflenetv2_wd2", 32),
    Case("torchvision:densenet121", 32),
    Case("torchvision:mobilenet_v3_large", 32),
    Case("torchvision:squeezenet1_0", 32),
    Case("torchvision:shufflenet_v2_x1_0", 32),
    Case("torchvision:googlenet", 32),
    Case("torchvision:regnet_y_400mf", 32),
    Case("timm:mobilenetv2_100", 32),
    Case("timm:mobilenetv3_small_100", 32),
    Case("timm:mnasnet_100", 32),
    Case("timm:mixnet_s", 32),
    Case("timm:ese_vovnet19b_slim_dw", 32),
    Case("timm:rexnet_100", 32),
    Case("timm:hrnet_w18_small", 32),
)


@dataclass(frozen=True)
class Row:
    """What was found of a network at a policy. `result` is "equal", "UNEQUAL" or why there is no code of it."""

    network: str
    size: int
    policy: str
    result: str
    layers: int = 0
    steps: str = ""
    outputs: int = 0
    unequal: int = 0
    integers: int = 0
    rounded_otherwise: int = 0
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, int, str]:
        """What was asked."""
        return self.network, self.size, self.policy


class PlainAudio(nn.Module):
    """Four convolutions over a sound: M5 of Dai et al., "Very Deep Convolutional Neural Networks for Raw Waveforms"."""

    def __init__(self, classes: int = 35) -> None:
        super().__init__()
        widths = (1, 24, 24, 48, 96)
        blocks: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            kernel, stride = 3, 1
            if number == 0:
                kernel, stride = 80, 16
            blocks += [nn.Conv1d(inputs, outputs, kernel, stride), nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(4)]
        self.blocks = nn.Sequential(*blocks[:-1], nn.AdaptiveAvgPool1d(1))
        self.last = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(x).flatten(1))  # type: ignore[no-any-return]


class DilatedAudio(nn.Module):
    """Residual convolutions over a sound, wider and wider apart, with gates and SiLU; a value for every 8 samples."""

    def __init__(self, width: int = 20, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, width, 9, 8, 4), nn.BatchNorm1d(width), nn.SiLU())
        self.signals = nn.ModuleList(self._block(width, 2**number) for number in range(blocks))
        self.gates = nn.ModuleList(self._block(width, 2**number) for number in range(blocks))
        self.last = nn.Conv1d(width, 3, 1)

    def _block(self, width: int, dilation: int) -> nn.Module:
        return nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for signal, gate in zip(self.signals, self.gates, strict=True):
            x = x + signal(x).tanh() * gate(x).sigmoid()
        return self.last(x)  # type: ignore[no-any-return]


SOUNDS = {"audio:plain": PlainAudio, "audio:dilated": DilatedAudio}


def network_of(case: Case) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network with random weights, its batch norms set by a few batches, and the shape of its input."""
    torch.manual_seed(0)
    if case.name in SOUNDS:
        network: nn.Module = SOUNDS[case.name]()
        shape: tuple[int, ...] = (1, case.size)
    else:
        network = networks.load(case.name, pretrained=False).module
        shape = (3, case.size, case.size)
        features: Any = getattr(network, "features", None)
        if isinstance(getattr(features, "final_pool", None), nn.AvgPool2d):
            # Its 7x7 are all of the map that images of 224x224 become.
            features.final_pool = nn.AdaptiveAvgPool2d(1)
    network.train()
    with torch.no_grad():
        for _ in range(BATCHES):
            network(torch.randn(CALIBRATION, *shape))
    return network.eval(), shape


def policy_of(network: nn.Module, name: str) -> Q.BitPolicy:
    """Return a policy: 8 bits everywhere, or widths drawn for every layer but the first and the last."""
    even = Q.BitPolicy.uniform(network, w=8, a=8)
    if name == "8 bits":
        return even
    draw = random.Random(0)
    drawn = {layer: (draw.choice(WIDTHS), draw.choice(WIDTHS)) for layer in even}
    return Q.BitPolicy({**drawn, **Q.ends(list(even))})


class Unmeasured(CpuTarget):
    """This machine's processor, but kernels are taken in turn, not by their times."""

    def fastest(self, wanted: Iterable[tvm_code.Layer]) -> dict[tvm_code.Layer, Choice]:
        """Take one of the kernels that can compute a layer, for each another one."""
        chosen: dict[tvm_code.Layer, Choice] = {}
        for layer in dict.fromkeys(wanted):
            able = kernels.candidates(*layer, self.cpu, tiles=1)
            chosen[layer] = Choice(able[len(chosen) % len(able)], Timing(0.0, 0.0, 0))
        return chosen


def unmeasured(threads: int = 1) -> Unmeasured:
    """Return the target."""
    here: Any = load_target("cpu", threads=threads)
    return Unmeasured(here.cpu, here.processor, here.features)


def study(case: Case, policies: Sequence[str]) -> Iterator[Row]:
    """Deploy a network at some policies and compare; a row for each."""
    start = time.perf_counter()
    for policy in policies:
        try:
            if policy == policies[0]:
                captured = Captured.of(case)
            yield captured.compared(case, policy, start)
        except (ValueError, RuntimeError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            yield Row(*case, policy, reason, seconds=time.perf_counter() - start)
            if policy == policies[0]:
                return  # what can't be captured can't be so at other bits
        start = time.perf_counter()


@dataclass(frozen=True)
class Captured:
    """A network, random images, and its graph, which is the same at all policies."""

    network: nn.Module
    images: Tensor
    graph: Graph

    @staticmethod
    def of(case: Case) -> Captured:
        """Build a network and write down what it computes."""
        network, shape = network_of(case)
        images = torch.randn(CALIBRATION, *shape, generator=torch.Generator().manual_seed(1))
        quantized = Q.quantize(network, policy_of(network, POLICIES[0]), calibrate=images, scheme=SCHEME).eval()
        return Captured(network, images, capture(quantized, images))

    def compared(self, case: Case, policy: str, start: float) -> Row:
        """Deploy it at a policy, and compare; ValueError, naming the layer, where that can't be done."""
        images = self.images[:COMPARED]
        bits = policy_of(self.network, policy)
        quantized = Q.quantize(self.network, bits, calibrate=self.images, scheme=SCHEME).eval()
        program = lower(self.graph, quantized, self.images)
        comparison = interpreter.compare(quantized, program, images)
        if comparison.fault:
            interpreter.check(quantized, program, images)
        with tempfile.TemporaryDirectory() as place:
            deployed = tvm_code.compile_program(program, unmeasured(), Path(place) / "deployed", {})
            outputs = deployed(images.numpy())
        expected, _ = interpreter.run(program, images.numpy())
        unequal = int((outputs != expected).sum())
        result = "equal"
        if unequal:
            result = "UNEQUAL"
        seconds = time.perf_counter() - start
        return Row(
            *case,
            policy,
            result,
            layers=len(program.layers),
            steps=steps_of(program),
            outputs=expected.size,
            unequal=unequal,
            integers=comparison.values,
            rounded_otherwise=comparison.own,
            seconds=seconds,
        )


def steps_of(program: Program) -> str:
    """Count the steps of a program that are no layers, and those of layers that end in a function of a table or a slope."""
    counts = Counter(type(step).__name__ for step in program.steps if type(step).__name__ not in LAYERS)
    for step in program.steps:
        epilogue = getattr(step, "epilogue", None)
        if epilogue is not None and epilogue.table is not None:
            counts["table"] += 1
        if epilogue is not None and epilogue.slope is not None:
            counts["slope"] += 1
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def read(path: Path) -> list[Row]:
    """Read what was found before."""
    if not path.is_file():
        return []
    types: dict[str, Any] = {"int": int, "float": float, "str": str}
    with path.open(encoding="utf-8", newline="") as file:
        return [Row(**{f.name: types[str(f.type)](line[f.name]) for f in fields(Row)}) for line in csv.DictReader(file)]


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write the table and the page, beside their places and then there."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{NAME}"
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        names = [f.name for f in fields(Row)]
        writer.writerow(names)
        writer.writerows(shared.rounded(getattr(row, name) for name in names) for row in rows)
    shutil.move(beside, folder / f"{NAME}.csv")
    beside.write_text(document(rows), encoding="utf-8")
    shutil.move(beside, folder / f"{NAME}.md")


def document(rows: Sequence[Row]) -> str:
    """Write the page."""
    compared = {row.network for row in rows}
    policies: dict[str, set[str]] = {network: set() for network in compared}
    for row in rows:
        if row.result == "equal":
            policies[row.network].add(row.policy)
    equal = [network for network in compared if policies[network] == set(POLICIES)]
    text = [
        "# Networks of the zoo that compile",
        "",
        "Made with `python -m experiments.deployed_zoo`: random weights, uniform 8 bits and 2 to 8 bits drawn layer by layer, "
        f"{COMPARED} random images. Kernels were taken in turn and not measured: integers are the same whichever is taken.",
        "",
        f"{len(equal)} of {len(compared)} networks compile at both policies, and all outputs of their code are the integer "
        "program's, bit for bit.",
        "",
        "| network | input | policy | layers | other steps | outputs | unequal | integers | rounded otherwise | result |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row.network, row.policy)):
        numbers = (row.layers, row.steps, f"{row.outputs:,}", row.unequal, f"{row.integers:,}", row.rounded_otherwise)
        cells = (row.network, row.size, row.policy, *numbers, row.result.replace("|", "/"))
        text.append(f"| {' | '.join(map(str, cells))} |")
    text += [
        "",
        '"Integers" are those that enter layers; "rounded otherwise" is how many of them differ from those of the '
        "fake-quantized network though all before were the same: ties and the last digits of float32. Images have so many "
        "rows and columns, sounds so many samples. Other steps are those that no layer does; a table is a function (SiLU, "
        "Hardswish, ...) at a step's end, a slope a PReLU. Networks of pytorchcv made for images of one size pool "
        "over all of their last map.",
        "",
    ]
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", help="only those whose name contains one of these")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--again", action="store_true", help="those that were compared before, too")
    parser.add_argument("--quick", action="store_true", help="one small network; only to see that it runs")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if given.quick:
        given.networks = ["resnet20_cifar10"]
    cases: tuple[Case, ...] = NETWORKS
    if given.networks:
        cases = tuple(case for case in NETWORKS if any(part in case.name for part in given.networks))
    if not cases:
        raise ValueError(f"no network of the list is named {' or '.join(given.networks)}")
    out = shared.folder_for(given.out, given.quick, FOLDER)
    rows = [] if out is None else read(out / f"{NAME}.csv")
    console = Console()
    for case in cases:
        done = {row.key for row in rows if row.result == "equal" and not given.again}
        missing = [policy for policy in given.policies if (*case, policy) not in done]
        for row in study(case, missing):
            rows = [other for other in rows if other.key != row.key] + [row]
            console.print(f"{row.network} ({row.policy}): {row.result}; {row.layers} layers, {row.steps}; {row.seconds:.0f} s")
            if out is not None:
                write(rows, out)
    return int(any(row.result != "equal" for row in rows))


if __name__ == "__main__":
    sys.exit(run_command(main))

"""What quantization costs: a training step and an inference pass beside Brevitas and torch.ao, and calibration.

    OMP_NUM_THREADS=1 python -m experiments.quantizer_speed

MobileNetV2 at 96x96, batch 32, 4-bit weights per channel and 4-bit activations per tensor in every convolution and linear
layer, straight-through gradients. Every contender has the same float network under it; a step is forward, loss and
backward. Processor time, medians over rounds in which every contender runs once, the first round not counted; ratios to the
float network are what counts. Our bars: 1.6 for a step, 1.3 for inference, and faster than both rivals.

Every contender lives in a process of its own, because what one leaves in the allocator changes the time of the next.
Inference is measured twice. Before the first step, glibc may give large memory back to the system at every layer and ask for
it anew, which costs the float network up to 40 % of its pass, and the others more, less or nothing, by what their setting up
happened to leave: ratios of that column have come out between 0.8 and 1.4 for the same code. Between steps, as in validation
between epochs, every process keeps its memory, and what remains is what quantization costs: the bar is on that column.

Then comes the time of `set_policy` on the same calibrated network, for which the bar is a millisecond, and that of
calibration by each rule and of GPTQ, for all widths, beside the forward pass over the images (EfficientNet-Lite0's layers
with random weights, 30 images; `--calibration` prints nothing else). The bar of rule `output` is a second per million
weights.

Brevitas is installed for this benchmark only: pip install -c constraints.txt -e ".[zoo]" brevitas
"""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq import networks
from quantizers.observers import WEIGHT_RULES

ROUNDS, BITS = 15, 4
# What is measured, in this order: inference in a process that hasn't trained, steps, and inference between them.
BARS = {"untrained": None, "step": 1.6, "inference": 1.3}
SCHEMES = ("linear", "lsq", "pact", "dorefa")
RIVALS = ("torch.ao fake quantize", "Brevitas")


def main() -> None:
    # Processes that start anew: a fork would inherit the allocator's state.
    context = multiprocessing.get_context("spawn")
    contenders: dict[str, Connection] = {}
    missing: dict[str, str] = {}
    for name in ("float", *SCHEMES, *RIVALS):
        ours, theirs = context.Pipe()
        context.Process(target=contend, args=(name, theirs), daemon=True).start()
        if problem := ours.recv():
            missing[name] = problem
        else:
            contenders[name] = ours

    def ask(name: str, what: str) -> float:
        contenders[name].send(what)
        taken: float = contenders[name].recv()
        return taken

    seconds: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in contenders for kind in BARS}
    for phase in (("untrained",), ("step", "inference")):
        for _ in track(range(ROUNDS + 1), "measuring " + " and ".join(phase)):
            for kind in phase:
                for name in contenders:
                    seconds[name, kind].append(ask(name, kind))
    median = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    policy = statistics.median(ask("linear", "policy") for _ in range(ROUNDS))
    for connection in contenders.values():
        connection.send("end")
    table = Table(title=f"MobileNetV2, 96x96, batch 32, w{BITS}/a{BITS}, one thread, medians of {ROUNDS}", box=box.SIMPLE_HEAD)
    table.add_column("contender")
    for heading in ("inference, untrained: ms", "step: ms", "inference between steps: ms"):
        table.add_column(heading, justify="right")
        table.add_column("x float", justify="right")
    for name in ("float", *SCHEMES, *RIVALS):
        label = name
        if name in SCHEMES:
            label = f"ours, {name}"
        if name in missing:
            table.add_row(label, f"not installed ({missing[name]})")
            continue
        cells = []
        for kind, bar in BARS.items():
            ratio = f"{median[name, kind] / median['float', kind]:.2f}"
            if name == "linear" and bar:
                ratio += f", bar {bar}"
            cells += [f"{1e3 * median[name, kind]:.1f}", ratio]
        table.add_row(label, *cells)
    console = Console(width=127)
    console.print(table)
    console.print(f"set_policy: {1e3 * policy:.2f} ms (bar 1 ms)")
    console.print(calibration_table())


def calibration_table() -> Table:
    """Measure what calibration of all widths takes beside the forward pass, once for each way."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(30, 3, 224, 224)
    network = Q.fold_batch_norm(networks.load("timm:tf_efficientnet_lite0", pretrained=False).module.eval(), images[:2])
    policy = Q.BitPolicy.uniform(network, w=BITS, a=8)
    weights = sum(layer.weight.numel() for layer in Q.quant_layers(Q.quantize(network, policy, calibrate=images[:2])).values())
    *others, last = policy

    def pass_only() -> None:
        with torch.no_grad():
            for batch in images.split(10):
                network(batch)

    def calibrate(rule: str, rounding: str = "nearest") -> None:
        # The last layer has one patch per image: too few for GPTQ.
        roundings = {**dict.fromkeys(others, rounding), last: "nearest"}
        Q.quantize(network, policy, scheme=Q.Linear(rule), calibrate=images.split(10), rounding=roundings)

    forward = min(seconds_of(pass_only) for _ in range(3))
    ways = [(rule, "nearest") for rule in WEIGHT_RULES] + [("output", "gptq")]
    table = Table(title=f"calibration of 8 widths, {weights / 1e6:.2f} million weights, 30 images", box=box.SIMPLE_HEAD)
    for heading in ("rule", "rounding"):
        table.add_column(heading)
    for heading in ("s beside the forward pass", "s per million weights"):
        table.add_column(heading, justify="right")
    for rule, rounding in track(ways, "calibrating"):
        taken = seconds_of(calibrate, rule, rounding) - forward
        each = f"{taken / weights * 1e6:.2f}"
        if (rule, rounding) == ("output", "nearest"):
            each += ", bar 1"
        table.add_row(rule, rounding, f"{taken:.2f}", each)
    return table


def seconds_of(run: Callable[..., object], *arguments: object) -> float:
    """Return the processor time of a call."""
    start = time.process_time()
    run(*arguments)
    return time.process_time() - start


def contend(name: str, connection: Connection) -> None:
    """The process of one contender: says what is missing, if anything, then answers every request with its seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = networks.load("timm:mobilenetv2_100", pretrained=False).module
    images = torch.randn(32, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (32,))
    policy = Q.BitPolicy.uniform(network, w=BITS, a=BITS)
    try:
        if name in SCHEMES:
            module = Q.quantize(network, policy, calibrate=images, scheme=name)
        else:
            makers: dict[str, Callable[[nn.Module], nn.Module]] = {
                "float": copy.deepcopy,
                RIVALS[0]: torch_ao,
                RIVALS[1]: brevitas,
            }
            module = makers[name](network)
    except ImportError as error:
        return connection.send(str(error))
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    connection.send("")

    def step() -> None:
        module.zero_grad()
        F.cross_entropy(module(images), labels).backward()

    @torch.inference_mode()
    def infer() -> None:
        module(images)

    def change() -> None:
        Q.set_policy(module, policy)

    for kind in iter(connection.recv, "end"):
        run = {"step": step, "policy": change}.get(kind, infer)
        module.train(kind == "step")
        start = time.process_time()
        run()
        connection.send(time.process_time() - start)


def replaced(network: nn.Module, make: Callable[[Any], nn.Module]) -> nn.Module:
    """A copy with every convolution and linear layer made anew."""
    made = copy.deepcopy(network)
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d | nn.Linear):
                setattr(parent, name, make(child))
    return made


class ObservedOnce(nn.Module):
    """A layer whose input and weight go through torch.ao's fake quantize, with fixed scales as in ours."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        ao = importlib.import_module("torch.ao.quantization")
        self.layer = layer
        largest = 2 ** (BITS - 1) - 1
        self.of_weight = ao.FakeQuantize.with_args(
            observer=ao.MovingAveragePerChannelMinMaxObserver,
            quant_min=-largest,
            quant_max=largest,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        )()
        self.of_input = ao.FakeQuantize.with_args(
            observer=ao.MovingAverageMinMaxObserver, quant_min=0, quant_max=2**BITS - 1, dtype=torch.quint8
        )()
        self.of_weight(layer.weight)
        self.of_input(torch.rand(64))
        for quantizer in (self.of_weight, self.of_input):
            quantizer.disable_observer()

    def forward(self, x: Tensor) -> Tensor:
        weight, x = self.of_weight(self.layer.weight), self.of_input(x)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


def torch_ao(network: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will move to another package
        return replaced(network, ObservedOnce)


def brevitas(network: nn.Module) -> nn.Module:
    layers = importlib.import_module("brevitas.nn")
    quantizers = importlib.import_module("brevitas.quant")

    def make(layer: nn.Conv2d | nn.Linear) -> nn.Module:
        options = {
            "bias": layer.bias is not None,
            "weight_quant": quantizers.Int8WeightPerChannelFloat,
            "input_quant": quantizers.Int8ActPerTensorFloat,
            "weight_bit_width": BITS,
            "input_bit_width": BITS,
        }
        made: nn.Module
        if isinstance(layer, nn.Linear):
            made = layers.QuantLinear(layer.in_features, layer.out_features, **options)
        else:
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            made = layers.QuantConv2d(*sizes, groups=layer.groups, **options)
        made.load_state_dict(layer.state_dict(), strict=False)
        return made

    return replaced(network, make)


if __name__ == "__main__":
    if "--calibration" in sys.argv:
        Console(width=127).print(calibration_table())
    else:
        main()

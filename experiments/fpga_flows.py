"""Do FINN and hls4ml make of our QONNX files what the networks compute? Same answers and largest differences.

    python -m experiments.fpga_flows [--flows NAME ...] [--networks NAME ...]

The default network on 200 test images, and three small ones with random weights (plain, depthwise, residual) on 200 random
images, at 6 bits, in the scheme that the target of the flow asks for (`--hw finn`, `--hw hls4ml`). Files are written as
`haq deploy --to qonnx --for FLOW` writes them, and run by experiments/fpga_finn.py and experiments/fpga_hls4ml.py, in an
interpreter of each flow's own, since neither can be installed beside haq: HAQ_FINN_PYTHON and HAQ_HLS4ML_PYTHON in the
environment name the two. hls4ml simulates C++ that g++ compiles.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import hw_models
import quantizers as Q
from haq import data, networks
from haq.deployment import graph
from haq.deployment.qonnx import QonnxExporter
from haq.networks import Residual
from haq.problem.schemes import obeying

INTERPRETERS = {"finn": "HAQ_FINN_PYTHON", "hls4ml": "HAQ_HLS4ML_PYTHON"}
SCRIPTS = {"finn": "fpga_finn.py", "hls4ml": "fpga_hls4ml.py"}
IMAGES = 200
BITS = 6
COLUMNS = ("network", "flow", "images", "same answers", "largest difference", "largest output")


@dataclass(frozen=True)
class Compared:
    """What a flow's circuit gives beside the quantized network."""

    images: int
    same: int
    difference: float
    largest: float


def interpreter_of(flow: str) -> str | None:
    """Return the Python that a flow is installed in; None where the environment doesn't name one."""
    return os.environ.get(INTERPRETERS[flow])


def quantized_for(flow: str, network: nn.Module, images: Tensor, bits: int = BITS) -> nn.Module:
    """Quantize a network as a search for a flow's target does.

    Args:
        flow: "finn" or "hls4ml", which are targets too.
        network: The float network.
        images: To calibrate with.
        bits: Of all weights and activations.

    Returns:
        The quantized network, in evaluation mode.
    """
    policy = Q.BitPolicy.uniform(network, w=bits, a=bits)
    schemes = obeying(dict.fromkeys(policy, Q.Linear()), hw_models.load_target(flow))
    return Q.quantize(network, policy, calibrate=images, scheme=schemes).eval()


def run_flow(flow: str, network: nn.Module, images: Tensor, folder: Path) -> Compared:
    """Write a network's file, have a flow convert it, and compare the outputs.

    Args:
        flow: "finn" or "hls4ml".
        network: The quantized network.
        images: What it is run on.
        folder: An empty folder for what is written.

    Returns:
        How the outputs differ.

    Raises:
        ValueError: For a network that the flow doesn't take.
        RuntimeError: With the last lines that the flow printed, if it fails.
    """
    file, made = folder / "network.onnx", folder / flow
    captured = graph.capture(network, images[:1])
    given: dict[str, Any] = {"notes": {}, "options": {"flavour": flow}, "on_progress": lambda *told: None}
    QonnxExporter().export(network, captured, images, file, **given)
    np.savez(folder / "images.npz", images=images.numpy())
    script = Path(__file__).with_name(SCRIPTS[flow])
    # Without this folder and PYTHONPATH: hls4ml imports another `quantizers` than ours.
    command = [interpreter_of(flow), "-I", str(script), str(file), str(folder / "images.npz"), str(made)]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{flow} failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-15:]))
    found: NDArray[np.float32] = np.load(made / "outputs.npy")
    with torch.inference_mode():
        expected = network(images).numpy()
    found = found.reshape(expected.shape)
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    return Compared(len(images), same, float(np.abs(found - expected).max()), float(np.abs(expected).max()))


def _norm(channels: int) -> nn.Module:
    """Make a batch norm that has seen something."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.2)
    return norm


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), _norm(outputs)]


def small_network(kind: str) -> nn.Module:
    """Make a small network with random weights for images (2, 8, 8): "plain", "depthwise" or "residual"."""
    torch.manual_seed(0)
    parts = [*_conv(2, 4, 3), nn.ReLU()]
    if kind == "plain":
        parts += [*_conv(4, 4, 3, stride=2), nn.ReLU()]
    elif kind == "depthwise":
        parts += [*_conv(4, 4, 3, groups=4), nn.ReLU(), *_conv(4, 4, 1), nn.ReLU()]
    else:
        parts += [Residual(*_conv(4, 4, 3), nn.ReLU(), *_conv(4, 4, 3))]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()


def jobs(names: list[str]) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Return networks by name, with images to calibrate with and images to compare on."""
    jobs = {}
    for name in names:
        if name == networks.DEFAULT:
            loaded = networks.load(name)
            splits = data.load("fashion-mnist-12k")
            calibrate, test = (split.images[:IMAGES].float() / 255 for split in (splits.train, splits.test))
            jobs[name] = loaded.module.eval(), calibrate, test
        else:
            network = small_network(name)
            images = torch.randn(2 * IMAGES, 2, 8, 8, generator=torch.Generator().manual_seed(0))
            jobs[name] = network, images[:IMAGES], images[IMAGES:]
    return jobs


NAMES = (networks.DEFAULT, "plain", "depthwise", "residual")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flows", nargs="+", choices=tuple(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=list(NAMES))
    given = parser.parse_args()
    for flow in given.flows:
        if interpreter_of(flow) is None:
            parser.error(f"{INTERPRETERS[flow]} must name the Python that {flow} is installed in (docs/how_to/fpga.md)")
    table = Table(*COLUMNS, box=box.SIMPLE)
    console = Console()
    for name, (network, calibrate, test) in jobs(given.networks).items():
        for flow in given.flows:
            with tempfile.TemporaryDirectory() as place:
                found = run_flow(flow, quantized_for(flow, network, calibrate), test, Path(place))
            cells = (name, flow, f"{found.images}", f"{found.same}", f"{found.difference:.2g}", f"{found.largest:.3g}")
            console.print(" ".join(cells))
            table.add_row(*cells)
    console.print(table)


if __name__ == "__main__":
    main()

"""What policies and steps of fine-tuning cost on a GPU, against the float network.

    python -m experiments.gpu [--save FOLDER]        (or: make gpu)

A policy's widths are random, from 2 to 8 in every layer, so that every one is evaluated from the input on; it is held against
float forward passes over the same batches, in turn, and medians are told. A step is one of 32 images: forward, backward,
optimizer; that of fine-tuning has the float network as teacher and trains the scales too. Memory is the most that was
allocated. Weights and images are random: nothing is said of accuracy. ViT-B/16 is timm's: attention of torchvision's is one
operation with weights of its own, which has no price.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import haq
import quantizers as Q
from experiments.shared import number
from haq import networks, training
from haq.data import Split
from haq.networks import Network
from haq.problem.device import describe_device, find_device
from haq.training.loop import fit

NETWORKS = ("torchvision:resnet50", "torchvision:mobilenet_v2", "timm:vit_base_patch16_224")  # ViT-B/16
SIZE = 224
IMAGES = 2048
CALIBRATION = 64
BATCH = 32  # images of a step
STEPS = 8  # the first two aren't counted
ROUNDS = 5  # the first isn't counted


class Row(NamedTuple):
    """Of one network: seconds of a float pass, of a policy, and of steps; bytes."""

    name: str
    images: int
    float_s: float
    policy_s: float
    float_step_s: float
    step_s: float
    amp_step_s: float
    evaluation_bytes: int | None
    training_bytes: int | None


class Memory:
    """The most memory of a device that is allocated from now on."""

    def __init__(self, device: torch.device) -> None:
        """Begin to look."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def most(self) -> int | None:
        """Return bytes; None where nobody counts them."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device)


def finish(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Measure how long some work takes."""
    finish(device)
    began = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - began


def step_seconds(network: Network, module: torch.nn.Module, teacher: torch.nn.Module | None, images: int, amp: bool) -> float:
    """Return the median duration of a step of training."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(0, 256, (images, *network.input_shape), dtype=torch.uint8, generator=generator)
    split = Split(samples, torch.randint(networks.output_count(network), (images,), generator=generator))
    ends: list[float] = []

    def on_step(step: int, steps: int) -> None:
        finish(network.device)
        ends.append(time.perf_counter())

    config = training.TrainConfig(
        epochs=1, learning_rate=1e-4, seed=0, batch_size=images, steps=STEPS, train_scales=teacher is not None, amp=amp
    )
    fit(network, split, config, module=module, teacher=teacher, on_step=on_step)
    between = np.diff(ends)[1:]
    return float(np.median(between))


def passes(network: Network, images: int, rounds: int) -> tuple[float, float, torch.nn.Module]:
    """Measure policies against float passes.

    Args:
        network: The network, where it is to be run.
        images: How many a policy is judged on.
        rounds: Of policies and float passes; the first isn't counted.

    Returns:
        Seconds of a float pass and of a policy, and the network quantized at 4 bits.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, *network.input_shape, generator=generator).contiguous(memory_format=network.memory_format)
    problem = haq.Problem(
        network.module,
        calibrate=x[:CALIBRATION],
        search=x,
        target="edge",
        objective="agreement",
        budget=1.0,
        correction=None,
    )
    inputs = [inputs for inputs, _ in problem.evaluator.batches]

    @torch.inference_mode()
    def float_pass() -> None:
        for part in inputs:
            network.module(part)

    random = np.random.default_rng(0)
    of_float = []
    of_policies = []
    for _ in range(rounds):
        policy = problem.policy(*random.integers(2, 9, (2, len(problem.workload))))
        of_float.append(seconds(float_pass, network.device))
        of_policies.append(seconds(partial(problem.evaluate, policy), network.device))
    quantized = problem.quantized(problem.uniform(4))
    return statistics.median(of_float[1:]), statistics.median(of_policies[1:]), quantized


def measure(name: str, device: torch.device, images: int, rounds: int, batch: int) -> Row:
    """Measure one network.

    Args:
        name: Its name.
        device: Where it is run.
        images: How many a policy is judged on.
        rounds: Of policies and float passes.
        batch: Images of a step.

    Returns:
        What was measured.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = networks.load(name, pretrained=False).to(device)
    memory = Memory(device)
    float_s, policy_s, quantized = passes(network, images, rounds)
    evaluation_bytes = memory.most()
    memory = Memory(device)
    teacher = Q.copy_network(network.module).eval()
    float_step_s = step_seconds(network, Q.copy_network(network.module), None, batch, False)
    step_s = step_seconds(network, Q.copy_network(quantized), teacher, batch, False)
    amp_step_s = step_seconds(network, Q.copy_network(quantized), teacher, batch, True)
    return Row(name, images, float_s, policy_s, float_step_s, step_s, amp_step_s, evaluation_bytes, memory.most())


def gigabytes(count: int | None) -> str:
    """Write bytes in GB."""
    if count is None:
        return number(None, 1)
    return number(count / 1e9, 1)


def table(rows: list[Row]) -> list[str]:
    """Make the lines of a table in Markdown."""
    lines = [
        "| network | images | float pass, s | policy, s | policies/s | x float pass | float step, ms | fine-tuning step, ms | "
        "x float step | the same with --amp, ms | evaluation, GB | training, GB |",
        "| --- |" + " ---: |" * 11,
    ]
    for row in rows:
        cells = [
            row.name,
            f"{row.images:,}",
            number(row.float_s, 3),
            number(row.policy_s, 3),
            f"{1 / row.policy_s:.3g}",
            number(row.policy_s / row.float_s, 2),
            number(1e3 * row.float_step_s, 1),
            number(1e3 * row.step_s, 1),
            number(row.step_s / row.float_step_s, 2),
            number(1e3 * row.amp_step_s, 1),
            gigabytes(row.evaluation_bytes),
            gigabytes(row.training_bytes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the page if a folder is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where networks are run")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names as haq takes them, parted by commas")
    parser.add_argument("--images", type=int, default=IMAGES, help="that a policy is judged on")
    parser.add_argument("--batch", type=int, default=BATCH, help="images of a step")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="policies; the first isn't counted")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write gpu.md there too")
    options = parser.parse_args(arguments)
    if options.rounds < 2 or options.images < 2 or options.batch < 2:
        parser.error("--rounds, --images and --batch must be at least 2")
    device = find_device(options.device)
    lines = ["# Policies and steps of fine-tuning on a GPU", ""]
    lines += ["Made by `experiments/gpu.py`, which says what is compared and how.", ""]
    lines += [f"On {describe_device(device)}; torch {torch.__version__}, medians of {options.rounds - 1} rounds.", ""]
    sizes = (options.images, options.rounds, options.batch)
    lines += table([measure(name, device, *sizes) for name in options.networks.split(",")])
    page = "\n".join(lines) + "\n"
    print(page)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "gpu.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

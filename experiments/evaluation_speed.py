"""What one policy costs to evaluate, against the float forward pass and the straightforward way.

    OMP_NUM_THREADS=1 python -m experiments.evaluation_speed [--save FOLDER]        (or: make bench)

The straightforward way is to quantize the float network anew, calibrate it on 512 images (or as many as there are) and run it
over the search images. Medians over rounds in which every contender runs once, each with an evaluator of its own; ratios are
what counts. Policies have random widths from 2 to 8; those with a change differ from the one before in one random layer, first
and last left out. The sensitivities are those that greedy descent and the integer programme measure, as a mean over their
policies. What is to beat is the float accuracy less one point: most random policies are far below it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import haq
import quantizers as Q
from haq import networks
from haq.problem.evaluator import Evaluator
from haq.solvers import sensitivity
from haq.solvers.base import Session
from haq.store.units import counted
from haq.study.config import SearchConfig
from haq.study.task import SearchTask

FLOAT = "float forward pass, batches of 250"
BARS = {"a new random policy": ("at most", 1.3, FLOAT), "straightforward": ("at least", 5.0, "a new random policy")}
# Worded after an earlier run, of which it has its numbers.
REASONS = """Where a bar is missed: the default network's convolutions do little with every value that enters them. Quantizing
these values, 145 million in an evaluation, takes about a quarter of a float pass, in four operations over each (division,
rounding, clamping, multiplication), whose result has to be that of the integers bit for bit. What the straightforward way does
besides takes it three float passes, so even an evaluation as fast as the float network would not be five times faster.
"""


@dataclass
class Case:
    """A network with its images, how many rounds it is given, and how many policies of the sweep."""

    name: str
    network: nn.Module
    problem: haq.Problem
    rounds: int
    sweep: int


def cases() -> Iterator[Case]:
    task = SearchTask.build(SearchConfig())
    yield Case("mobilenet-mini at 28x28, the default job", task.network.module, task.problem, 15, 10_000)
    size = 64
    network = networks.load("torchvision:resnet18", classes=10, pretrained=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.rand(500, 3, size, size).contiguous(memory_format=torch.channels_last)
    problem = haq.Problem(network.module, calibrate=images[:64], search=images, target="edge", objective="agreement")
    yield Case(f"torchvision:resnet18 at {size}x{size}, random weights and images", network.module, problem, 5, 40)


def walk(problem: haq.Problem, count: int) -> Iterator[tuple[Q.BitPolicy, Q.BitPolicy]]:
    """A random policy, and one that differs from its predecessor in one layer."""
    random = np.random.default_rng(0)
    bits = np.full((2, len(problem.workload)), 8)
    for _ in range(count):
        layer = random.integers(1, len(problem.workload) - 1)
        before = bits[:, layer].copy()
        while (bits[:, layer] == before).all():
            bits[:, layer] = random.integers(2, 9, 2)
        yield problem.policy(*random.integers(2, 9, (2, len(problem.workload)))), problem.policy(*bits)


def measure(case: Case) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds by contender, and what there is to say about some of them."""
    problem, network = case.problem, case.network
    qnetwork = problem.evaluator.network
    inputs = torch.cat([inputs for inputs, _ in problem.evaluator.batches])
    labels = torch.cat([labels for _, labels in problem.evaluator.batches])
    new, changed, stopped = (Evaluator(qnetwork, inputs, labels) for _ in range(3))
    forgetful = Evaluator(qnetwork, inputs, labels, kept_bytes=0)
    beat = problem.float_accuracy - 0.01

    @torch.inference_mode()
    def forward(module: nn.Module) -> None:
        for batch in inputs.split(250):
            module(batch)

    def straightforward(policy: Q.BitPolicy) -> None:
        forward(Q.quantize(network, policy, calibrate=inputs[:512]))

    contenders: dict[str, Callable[[Q.BitPolicy, Q.BitPolicy], object]] = {
        FLOAT: lambda policy, change: forward(network),
        "float network in the evaluator": lambda policy, change: new.measure(network),
        "a new random policy": lambda policy, change: new.evaluate(policy),
        "a new random policy, nothing kept": lambda policy, change: forgetful.evaluate(policy),
        "a policy seen before": lambda policy, change: new.evaluate(policy),
        "one random layer changed": lambda policy, change: changed.evaluate(change),
        "a new random policy, with an accuracy to beat": lambda policy, change: stopped.evaluate(policy, beat),
        "straightforward": lambda policy, change: straightforward(policy),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number, pair in enumerate(track(list(walk(problem, case.rounds + 1)), case.name, console=Console(stderr=True))):
        for name, run in contenders.items():
            start = time.perf_counter()
            run(*pair)
            if number:  # the first round is not counted
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    seen = [result.images for result in stopped.cache.values()]
    held = {
        storage.data_ptr(): storage.nbytes()
        for kept in (changed.prefix.kept if changed.prefix else [])
        for state, _ in kept.states.values()
        for storage in (value.untyped_storage() for value in state if isinstance(value, Tensor))
    }
    notes = {
        "one random layer changed": f"{sum(held.values()) / 1e6:.0f} MB kept",
        "a new random policy, with an accuracy to beat": f"{statistics.mean(seen):.0f} of {len(inputs):,} images on average",
    }
    measured = copy.copy(problem)
    measured.evaluator = Evaluator(qnetwork, inputs, labels)
    session = Session(measured, case.sweep)
    start = time.perf_counter()
    sensitivity.measure(measured, session, keep=1)
    medians["sensitivities, per policy"] = (time.perf_counter() - start) / session.used
    notes["sensitivities, per policy"] = f"{session.used} policies"
    return medians, notes


def table(medians: dict[str, float], notes: dict[str, str]) -> list[str]:
    lines = [
        "| | ms | policies/s | x float pass | x faster than straightforward | |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, value in medians.items():
        ratios = f"{value / medians[FLOAT]:.3g} | {medians['straightforward'] / value:.3g}"
        lines.append(f"| {name} | {1e3 * value:.4g} | {1 / value:.3g} | {ratios} | {notes.get(name, '')} |")
    lines.append("")
    for name, (word, bar, base) in BARS.items():
        ratio = medians[name] / medians[base]
        holds = ratio >= bar
        if word == "at most":
            holds = ratio <= bar
        met = "missed"
        if holds:
            met = "met"
        lines.append(f"{name} / {base}: {ratio:.2f}, bar {word} {bar}: {met}.\n")
    return lines


def import_times() -> str:
    imports: dict[str, list[float]] = {"torch": [], "quantizers": []}
    for _ in range(7):
        for name, values in imports.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
            values.append(time.perf_counter() - start)
    torch_s, ours_s = (statistics.median(values) for values in imports.values())
    return f"`import torch` {torch_s:.2f} s, `import quantizers` {ours_s:.2f} s: {ours_s - torch_s:+.3f} s."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write evaluation_speed.md there too")
    options = parser.parse_args()
    lines = ["# What one policy costs to evaluate", ""]
    lines += ["Made by `experiments/evaluation_speed.py`, which says what is compared and how.", ""]
    lines += ["    OMP_NUM_THREADS=1 python -m experiments.evaluation_speed", ""]
    for case in cases():
        count = case.problem.evaluator.count
        threads = counted(torch.get_num_threads(), "threads")
        lines += [f"**{case.name}: {count:,} images, {threads}, medians of {case.rounds} rounds**", ""]
        lines += table(*measure(case))
    lines += [REASONS, import_times()]
    page = "\n".join(lines) + "\n"
    print(page)
    if options.save:
        (options.save / "evaluation_speed.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

"""What one policy costs to evaluate, against the float forward pass and the straightforward way.

    python -m experiments.evaluation_speed        (or: make bench)

Medians over rounds in which every contender runs once, on the default network and the search split; ratios are what counts.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import quantizers as Q
from haq.run import Settings

ROUNDS = 15


def main() -> None:
    job = Settings().build()
    problem = job.problem
    network = problem.evaluator.network
    images = torch.cat([inputs for inputs, _ in problem.evaluator.batches])
    calibration = images[:512]
    random = np.random.default_rng(0)
    policies = [problem.policy(*random.integers(2, 9, (2, len(problem.workload)))) for _ in range(ROUNDS + 1)]

    @torch.inference_mode()
    def forward(batch: int = 250) -> None:
        for inputs in images.split(batch):
            job.network.module(inputs)

    @torch.inference_mode()
    def straightforward(policy: Q.BitPolicy) -> None:
        made = Q.quantize(job.network.module, policy, calibrate=calibration)
        for inputs in images.split(250):
            made(inputs)

    contenders: dict[str, Callable[[Q.BitPolicy], object]] = {
        "float forward pass, batches of 250": lambda policy: forward(),
        "float network in the evaluator": lambda policy: problem.evaluator.measure(job.network.module),
        "evaluate a new policy": problem.evaluate,
        "evaluate a policy seen before": problem.evaluate,
        "set_policy alone": lambda policy: Q.set_policy(network, policy),
        "quantize, calibrate, evaluate anew": straightforward,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for policy in policies[:1]:  # not counted
        for run in contenders.values():
            run(policy)
    for policy in track(policies[1:], "rounds", console=Console(stderr=True)):
        for name, run in contenders.items():
            start = time.perf_counter()
            run(policy)
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["float forward pass, batches of 250"])
    table = Table(title=f"{len(images):,} images, {torch.get_num_threads()} threads, median of {ROUNDS}")
    for heading in ("", "ms", "x float forward pass"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, values in seconds.items():
        median = statistics.median(values)
        table.add_row(name, f"{1e3 * median:.3f}", f"{median / base:.3f}")
    Console().print(table)

    imports: dict[str, list[float]] = {"torch": [], "quantizers": []}
    for _ in range(7):
        for name, values in imports.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
            values.append(time.perf_counter() - start)
    torch_s, ours_s = (statistics.median(values) for values in imports.values())
    print(f"import torch {torch_s:.2f} s, import quantizers {ours_s:.2f} s: {ours_s - torch_s:+.3f} s")


if __name__ == "__main__":
    main()

"""Whole networks on a CPU, one thread, one image: ours at 8 bits, at 4, with a searched policy and with signs, and rivals.

    OMP_NUM_THREADS=1 python -m experiments.cpu_speed [--networks NAME ...] [--quick]

Networks: the default one, trained, on 28x28; MobileNetV2 at 96x96 and ResNet-18 at 64x64 with random weights, batch norms set
by a few batches of random images; and ResNet-18 as a binary network: no ReLU (behind one, every sign is +1), first and last
layer at 8 bits, signs in all others. Rivals run the same architecture in float32, or at 8 bits.

Ours at 8 bits is read with two threads, too, where there is work for them: everything else is one thread.

In every round each contender is read once, in another order, a reading being as many calls as take 2 ms. Given are medians of
the rounds, on which the bars are, and lowest tenths: other work on the machine only adds, so where the two differ by much,
the machine was not quiet. Ours is one library from `haq.deploy.to_tvm`, called as it is deployed; rivals are called through
the interface of least overhead that they have. What ours is predicted to take is the sum of its layers' measured kernels,
which `--hw cpu` makes its cost table of; the time to measure that table, from an empty cache, is a bar too.

Policies are those of `--hw cpu --budget 0.6` (or of the least budget that this machine allows), first and last layer at 8
bits, the others at 2 to 8 and, with `--bits 1:8`, at 1 to 8, by the exact integer programme. On the default network, as in
`python -m haq.search`, it knows the rise of the loss on search images, and what it found is fine-tuned; on the others the
relative squared errors that calibration measured, added up over layers.

Accuracy is on test images; with random weights there is none, and what stands there is how often the largest output is that
of the float network in torch, on random images, which means little: such outputs lie close together. Of ours is given, too,
how often it is that of the quantized network in torch, which should be always.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import quantizers as Q
from experiments import shared
from experiments.rivals import Rival, network_rivals
from haq import data, deploy, networks, training
from haq.console.errors import run_command
from haq.deployment import tvm as tvm_deployment
from haq.deployment.graph import capture
from haq.deployment.lowering import lower
from haq.problem.problem import Problem
from haq.solvers import base, ilp
from hw_models import load_target

NAME = "cpu_speed"
FOLDER = Path("docs/experiments")
ROUNDS, READING_S = 101, 0.002
CALIBRATION, TEST_IMAGES, RANDOM_IMAGES = 256, 2000, 64
EVALUATIONS, EPOCHS = 150, 12  # of the search on the default network
BUDGET = 0.6
ORT, OPENVINO = "ONNX Runtime int8", "OpenVINO int8"
INT8, FOUR, BINARY = "ours int8", "ours 4 bits", "ours binary"
THREADS, OF_THREADS = 2, "ours int8, 2 threads"
SEARCHED = {"ours searched 2:8": (2, 8), "ours searched 1:8": (1, 8)}
ENDS = "first and last layer 8 bits"
SIZES = {"mobilenet-mini": 28, "torchvision:resnet18": 64, "binary-resnet18": 64, "timm:mobilenetv2_100": 96}
RESNET, SIGNS = "torchvision:resnet18", "binary-resnet18"
COLUMNS = (
    "contender",
    "us",
    "lowest tenth",
    "x ORT int8",
    "x ours int8",
    "layers us",
    "layers/whole",
    "quality %",
    "as in torch %",
    "note",
)
IN_WORDS = ("contender", "note")  # of these columns


Say = Callable[[str], None]  # what is being done


@dataclass
class Subject:
    """A network, the images that calibrate it, and those that it is judged by, with the answers that are right."""

    name: str
    module: nn.Module
    calibration: Tensor
    images: Tensor
    labels: Tensor
    trained: tuple[networks.Network, data.Dataset] | None = None
    searched: Any = None  # images and labels that policies are judged by

    @property
    def quality(self) -> str:
        if self.trained:
            return f"accuracy on {len(self.images):,} test images"
        return "agreement with float on random images"


class Result(NamedTuple):
    """One contender on one network; seconds, and shares of the images."""

    name: str
    seconds: float
    least: float  # the lowest tenth
    quality: float
    layers: float | None = None
    faithful: float | None = None
    note: str = ""


@dataclass
class Ours:
    """A compiled network as a contender."""

    rival: Rival
    deployed: tvm_deployment.Deployed
    quantized: nn.Module
    layers: float


@dataclass
class Findings:
    network: str
    quality: str
    results: dict[str, Result] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    cold: bool = True
    began: float | None = None
    table_s: float = 0.0

    def clock(self, done: int, total: int, what: str) -> None:
        """How long the cost table takes, told of the shapes done."""
        self.began = self.began or time.perf_counter()
        if done == total:
            self.table_s = time.perf_counter() - self.began


# Networks


def subject(name: str, quick: bool) -> Subject:
    torch.manual_seed(0)
    if name == networks.DEFAULT:
        network = networks.load()
        dataset = data.load()
        tested, judged_by = TEST_IMAGES, 2000
        if quick:
            tested, judged_by = 100, 500

        def take(split: str, count: int) -> tuple[Tensor, Tensor]:
            images, labels = next(getattr(dataset, split).batches(count))
            return network.preprocess(images).contiguous(), labels

        images, labels = take("test", tested)
        searched = take("search", judged_by)
        calibration = take("train", CALIBRATION)[0]
        return Subject(name, network.module, calibration, images, labels, (network, dataset), searched)
    if name == SIGNS:
        module = networks.load(RESNET, pretrained=False).module
        without_relus(module)
    else:
        module = networks.load(name, pretrained=False).module
    size = SIZES[name]
    batches = 5
    if quick:
        batches = 3
    draws = torch.randn(CALIBRATION // 4 + RANDOM_IMAGES, 3, size, size)
    module.train()
    with torch.no_grad():
        for _ in range(batches):
            module(torch.randn(32, 3, size, size))
        images = draws[:RANDOM_IMAGES]
        module.eval()
        return Subject(name, module, draws[RANDOM_IMAGES:], images, module(images).argmax(1))


def without_relus(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.Identity())
        else:
            without_relus(child)


# Contenders


def policies(given: Subject, findings: Findings, quick: bool, say: Say) -> Iterator[tuple[str, nn.Module, str]]:
    """Our contenders on a network: name, quantized network, note."""
    module = given.module
    names = list(Q.BitPolicy.uniform(module, w=8, a=8))
    between = names[1:-1]
    if given.name == SIGNS:
        int8 = Q.BitPolicy.uniform(module, w=8, a=8)
        yield INT8, Q.quantize(module, int8, calibrate=given.calibration).eval(), ""
        policy = {**int8, **dict.fromkeys(between, (1, 1))}
        schemes: dict[str, Q.Scheme] = {name: Q.Linear() for name in names}
        schemes |= {name: Q.Binary() for name in between}
        yield BINARY, Q.quantize(module, policy, scheme=schemes, calibrate=given.calibration).eval(), ENDS
        return
    say(f"{given.name}: measuring kernels and calibrating")
    target: Any = load_target("cpu", progress=findings.clock)
    searched = given.searched or (given.images, given.labels)
    problem = Problem(module, given.calibration, searched, target, budget=1.0)

    def at(policy: Q.BitPolicy) -> nn.Module:
        made = copy.deepcopy(problem.evaluator.network)
        Q.set_policy(made, policy)
        return made

    evaluations, epochs = EVALUATIONS, EPOCHS
    if quick:
        evaluations, epochs = 20, 1
    yield INT8, at(problem.uniform(8)), ""
    yield FOUR, at(Q.BitPolicy({**problem.uniform(4), names[0]: (8, 8), names[-1]: (8, 8)})), ENDS
    for what, widths in SEARCHED.items():
        say(f"{given.name}: searching, {widths[0]} to {widths[1]} bits")
        problem = Problem(module, given.calibration, searched, target, budget=1.0, bits=widths)
        least = problem.smallest / problem.reference
        problem.limit = max(BUDGET * problem.reference, problem.smallest * (1 + 1e-6))
        if given.trained:
            found = base.solve("ilp", base.Session(problem, evaluations), 0).policy
        else:
            noise = problem.quantization_error
            found = ilp.propose(problem, noise[:, 0, :, None] + noise[:, 1, None, :])
        note = f"budget {problem.policy_cost(found) / problem.reference:.3f}"
        if least > BUDGET:
            note += f": least possible is {least:.3f}"
        tuned = at(found)
        if given.trained:
            network, dataset = given.trained
            tuned = training.finetune(network, tuned, dataset.train, epochs=epochs, seed=0)
            note += "; fine-tuned"
        yield what, tuned, f"{note}; {mean_bits(found)}"


def rounds(quick: bool) -> int:
    if quick:
        return 3
    return ROUNDS


def mean_bits(policy: Q.BitPolicy) -> str:
    w, a = (statistics.mean(bits[operand] or 32 for bits in policy.values()) for operand in (0, 1))
    return f"mean bits w{w:.1f} a{a:.1f}"


def compiled_network(name: str, quantized: nn.Module, given: Subject, folder: Path, threads: int = 1) -> Ours:
    """Deployed, and the sum of the times of the kernels in it."""
    deployed = deploy.to_tvm(quantized, given.calibration, folder, threads=threads)
    program = lower(capture(quantized, given.calibration), quantized, given.calibration)
    layers = tvm_deployment.layers(program)
    target: Any = load_target("cpu", threads=threads)
    chosen = target.fastest(layers)
    seconds = sum(chosen[layer].timing.median_s for layer in layers)
    rival = Rival(name, lambda x: np.asarray(deployed(x)), deployed.run)
    rival.run(given.images[:1].numpy())
    return Ours(rival, deployed, quantized, seconds)


def study(name: str, quick: bool, say: Say) -> Findings:
    say(f"{name}: preparing")
    given = subject(name, quick)
    findings = Findings(name, given.quality)
    ours: dict[str, Ours] = {}
    notes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for what, quantized, note in policies(given, findings, quick, say):
            say(f"{name}: compiling {what}")
            ours[what] = compiled_network(what, quantized, given, Path(folder) / what.replace(" ", "-"))
            notes[what] = note
            if what == INT8 and given.name not in (SIGNS, networks.DEFAULT):
                place = Path(folder) / "threads"
                ours[OF_THREADS] = compiled_network(OF_THREADS, quantized, given, place, THREADS)
        say(f"{name}: making rivals")
        rivals, findings.missing = network_rivals(given.module, given.images[:1], given.calibration)
        contenders = {rival.name: rival for rival in [*rivals, *(made.rival for made in ours.values())]}
        say(f"{name}: measuring")
        times = measured(contenders, rounds(quick))
        say(f"{name}: comparing answers")
        for what, rival in contenders.items():
            answers = torch.tensor([int(rival.run(image[None].numpy()).argmax()) for image in given.images])
            quality = float((answers == given.labels).float().mean())
            result = Result(what, *times[what], quality, note=notes.get(what, rival.note))
            if what in ours:
                with torch.inference_mode():
                    expected = ours[what].quantized(given.images).argmax(1)
                same = float((answers == expected).float().mean())
                result = result._replace(layers=ours[what].layers, faithful=same)
            findings.results[what] = result
    return findings


def measured(contenders: dict[str, Rival], rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds of a call: median and lowest tenth."""
    rng = np.random.default_rng(0)
    readers = {name: Reading(rival.call) for name, rival in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name in rng.permutation(list(readers)):
            seconds[name].append(readers[name]())
    return {name: (float(np.median(values)), float(np.percentile(values, 10))) for name, values in seconds.items()}


class Reading:
    """Seconds of one call, over as many as take READING_S."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call, self.count = call, 1
        # Not by the time of a single call: the first ones are slow.
        while self() * self.count < READING_S:
            self.count *= 2

    def __call__(self) -> float:
        call = self.call
        call()  # what ran before has the caches
        start = time.perf_counter()
        for _ in range(self.count):
            call()
        return (time.perf_counter() - start) / self.count


# What is printed


def rows(findings: Findings) -> list[list[str]]:
    results = findings.results

    def ratio(of: Result | None, to: Result) -> str:
        if of is None:
            return ""
        return f"{of.seconds / to.seconds:.2f}"

    made = []
    for name, found in results.items():
        layers = ["", ""]
        if found.layers:
            layers = [f"{1e6 * found.layers:.1f}", f"{found.layers / found.seconds:.2f}"]
        faithful = ""
        if found.faithful is not None:
            faithful = f"{100 * found.faithful:.1f}"
        times = [f"{1e6 * found.seconds:.1f}", f"{1e6 * found.least:.1f}"]
        ratios = [ratio(results.get(ORT), found), ratio(results.get(INT8), found)]
        made.append([name, *times, *ratios, *layers, f"{100 * found.quality:.1f}", faithful, found.note])
    made += [[name, *[""] * 8, why] for name, why in findings.missing.items()]
    return made


def title(findings: Findings) -> str:
    size = SIZES[findings.network]
    return f"{findings.network} at {size}x{size}; quality: {findings.quality}"


class Bar(NamedTuple):
    claim: str
    holds: bool
    figure: str


def bars(every: list[Findings]) -> list[Bar]:
    made: list[Bar] = []

    def faster(findings: Findings, ours: str, other: str, bar: float) -> None:
        results = findings.results
        if ours in results and other in results:
            times, least = (getattr(results[other], of) / getattr(results[ours], of) for of in ("seconds", "least"))
            claim = f"{findings.network}: {ours} at least {bar:.2f} times as fast as {other}"
            made.append(Bar(claim, times >= bar, f"{times:.2f} times; lowest tenths {least:.2f}"))

    for findings in every:
        if findings.network != SIGNS:
            faster(findings, INT8, ORT, 1.0)
            faster(findings, INT8, OPENVINO, 1 / 1.1)
            faster(findings, OF_THREADS, INT8, 1.5)
            for searched in SEARCHED:
                faster(findings, searched, INT8, 1.5)
        faster(findings, BINARY, ORT, 3.0)
    for findings, what in itertools.product(every, (INT8, FOUR, *SEARCHED, BINARY)):
        found = findings.results.get(what)
        if found and found.layers:
            share = found.layers / found.seconds
            claim = f"{findings.network}: the layers of {what} predict the whole within 15 %"
            figure = f"{share:.2f} of the whole; lowest tenth {found.layers / found.least:.2f}"
            made.append(Bar(claim, abs(share - 1) <= 0.15, figure))
    for findings in every:
        if findings.table_s and findings.cold:
            claim = f"{findings.network}: cost table measured from an empty cache in at most 180 s"
            made.append(Bar(claim, findings.table_s <= 180, f"{findings.table_s:.0f} s"))
    return made


def sentences(made: list[Bar]) -> list[str]:
    return [f"{shared.verdict(bar.holds)}: {bar.claim} ({bar.figure})" for bar in made]


def rich_table(findings: Findings) -> Table:
    table = Table(title=title(findings), box=box.SIMPLE_HEAD, pad_edge=False)
    shared.add_columns(table, COLUMNS, left=IN_WORDS)
    for row in rows(findings):
        table.add_row(*row)
    return table


def save(folder: Path, command: str, setting: str, every: list[Findings], made: list[Bar]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = "Made by `experiments/cpu_speed.py`, which says what is compared and how; every number is in `cpu_speed.csv`."
    parts = ["# Whole networks on a CPU", about, f"    {command}", setting]
    for findings in every:
        rules = ["---:"] * len(COLUMNS)
        for column in IN_WORDS:
            rules[COLUMNS.index(column)] = "---"
        lines = [COLUMNS, rules, *rows(findings)]
        parts += [f"**{title(findings)}**", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    parts.append("\n".join(f"* {line}" for line in sentences(made)))
    (folder / f"{NAME}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    with (folder / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("network", *Result._fields))
        for findings in every:
            writer.writerows((findings.network, *found) for found in findings.results.values())


@contextmanager
def empty_cache() -> Iterator[None]:
    """Of kernel timings, for as long as `with` lasts."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(SIZES), default=list(SIZES), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="only see that it runs; saves nothing unless --out is given")
    parser.add_argument("--cached", action="store_true", help="use the timings of kernels that are known, and keep new ones")
    parser.add_argument("--out", type=Path, help=f"folder for the tables (default: {FOLDER})")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    if console.width < 150:
        console = Console(width=150)
    out = shared.folder_for(options.out, options.quick, FOLDER)
    every: list[Findings] = []
    target: Any = load_target("cpu")
    setting = f"One thread, one image, medians of {rounds(options.quick)} rounds. {target.description}."
    command = " ".join([f"OMP_NUM_THREADS=1 python -m experiments.{NAME}", *sys.argv[1:]])
    with console.status("") as status:

        def say(what: str) -> None:
            status.update(what)
            if not console.is_terminal:
                console.print(f"{time.strftime('%H:%M:%S')} {what}", markup=False)

        for name in options.networks:
            if options.cached:
                every.append(replace(study(name, options.quick, say), cold=False))
            else:
                with empty_cache():
                    every.append(study(name, options.quick, say))
            console.print(rich_table(every[-1]))
            made = bars(every)
            if out is not None:
                save(out, command, setting, every, made)
    console.print(setting)
    for line in sentences(made):
        console.print(line, markup=False)
    if out is not None:
        console.print(f"written: {out / NAME}.md and .csv")
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(run_command(main))

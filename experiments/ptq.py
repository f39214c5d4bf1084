"""Post-training quantization beside that of other tools: accuracy, distance to the float network, and seconds.

    OMP_NUM_THREADS=1 python -m experiments.ptq [--networks NAME ...] [--methods NAME ...] [--tools FOLDER]
                                                [--all-test] [--residual FILE] [--quick] [--out FOLDER]

Networks, whose first and last layer have 8 bits everywhere:

    mini        the default network, on Fashion-MNIST: 512 images for calibration, 4,000 for the test (the search and the test
                split of `fashion-mnist-12k`), with --all-test the 10,000 of the whole test split, which are downloaded
    residual    the network of experiments/haq_tables.py, trained for 10 epochs on that data set; the same images. Its weights
                are kept in FILE
    lite0       EfficientNet-Lite0 with its ImageNet weights, on foolbox's 20 photographs: three crops of every other one for
                calibration, four of the rest for the test. Instead of an accuracy it has an agreement with the float network.
                With 40 crops, that's for large gaps only

Columns are the bits of weights (W) and activations (A) of the middle layers, or mixed precision: weights of so many bits on
average over the middle layers' weights, from 2 to 8 in each layer, activations of 8. Ours then are by the integer programme,
from the divergence on the calibration images with one layer at a time at fewer bits. Of the other tools only MCT is asked for
it, with the same memory as its limit. No method sees a label.

Every other tool runs in an environment of its own, in a folder of --tools. The script says how one is made, and does without
what isn't there. Tools quantize as they do by default or as their manuals advise (in detail: experiments/ptq_rivals.py):

    MCT             Sony's model compression toolkit: symmetric thresholds by squared error, bias correction
    Brevitas        AMD's: scales by squared error, bias correction; and the same with GPTQ before it
    ModelOpt        NVIDIA's: its default
    AIMET           Qualcomm's: tf_enhanced, then SeqMSE

The divergence is Kullback and Leibler's from the float network's answers to the quantized one's, in nats, mean over images.
Seconds are those of one CPU thread, for quantizing with calibration, without imports. Rows of methods that aren't asked for
stay in the table as they were, if they were tested on as many images.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import operator
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, fx, nn
from torch.nn import functional as F

import quantizers as Q
from experiments import agreement, haq_tables, ptq_rivals, shared
from experiments.ptq_rivals import WIDTHS, Column
from experiments.quantizer_accuracy import Table
from haq import data, networks
from haq.console.errors import run_command
from haq.console.progress import progress
from haq.console.tables import say
from haq.solvers import ilp
from quantizers.reconstruction import ITERATIONS

NAME = "ptq"
CHILD = Path(ptq_rivals.__file__)
UNIFORM = tuple(Column(f"W{w}A{a}", w, a, False) for w, a in ((8, 8), (6, 6), (4, 8), (4, 4), (3, 8)))
CALIBRATION = 512
BATCH = 128  # of our calibration
TEST_BATCH = 250
EPOCHS = 10  # of `residual`
CALIBRATION_CROPS, TEST_CROPS = 3, 4  # of a photograph


def mixed(*averages: int) -> tuple[Column, ...]:
    return tuple(Column(f"average {bits}", bits, 8, True) for bits in averages)


QUICK = ("W4A8", "average 4")
COLUMNS = {"mini": (*UNIFORM, *mixed(5, 4, 3)), "residual": (*UNIFORM, *mixed(4, 3)), "lite0": UNIFORM}


@dataclass
class Study:
    """A network, with batch norms folded, and its images."""

    name: str
    network: nn.Module
    calibrate: Tensor
    test: Tensor
    labels: Tensor | None  # None: the float network's answers are the right ones
    columns: tuple[Column, ...]

    def __post_init__(self) -> None:
        self.logits = answers(self.network, self.test)
        if self.labels is None:
            self.labels = self.logits.argmax(1)

    def judge(self, logits: Tensor) -> tuple[float, float]:
        """Return accuracy (or agreement with the float network) in percent, and the divergence from it in nats."""
        assert self.labels is not None
        right = (logits.argmax(1) == self.labels).double()
        return 100 * float(right.mean()), divergence(self.logits, logits)


class Row(NamedTuple):
    """One method at the bits of one column. Without figures, the note says why."""

    network: str
    images: int
    method: str
    column: str
    accuracy: float | None
    divergence: float | None
    seconds: float | None
    note: str = ""  # the bits of weights, where they are mixed


@torch.inference_mode()
def answers(network: nn.Module, images: Tensor) -> Tensor:
    network.eval()
    return torch.cat([network(batch) for batch in images.split(TEST_BATCH)])


def divergence(logits: Tensor, others: Tensor) -> float:
    """KL(p || q) in nats, mean over images, of the distributions that logits stand for, each (images, classes)."""
    p, q = (values.double().log_softmax(1) for values in (logits, others))
    return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))


# Networks and images


def mini(all_test: bool, calibration: int = CALIBRATION) -> Study:
    return _study("mini", networks.load(), data.load(data.DEFAULT), all_test, calibration)


def residual(all_test: bool, weights: Path) -> Study:
    dataset = data.load(data.DEFAULT)
    if weights.is_file():
        network = haq_tables.untrained_residual()
        networks.checkpoint.load_state(network.module, networks.read_state(weights)[0], weights)
    else:
        network = haq_tables.residual(EPOCHS, dataset)
        tensors = {name: tensor.contiguous() for name, tensor in network.module.state_dict().items()}
        networks.write_safetensors(tensors, weights, {})
    return _study("residual", network, dataset, all_test, CALIBRATION)


def _study(name: str, network: networks.Network, dataset: data.Dataset, all_test: bool, calibration: int) -> Study:
    network.module.eval()
    splits = [dataset.search, dataset.test]
    if all_test:
        splits = [data.load("fashion-mnist").test]
    images = torch.cat([split.images[torch.arange(len(split))] for split in splits])
    labels = torch.cat([split.labels for split in splits])
    calibrate = network.preprocess(dataset.train.images[dataset.fair(calibration)])
    folded = Q.fold_batch_norm(network.module, calibrate[:2])
    return Study(name, folded, calibrate, network.preprocess(images), labels, COLUMNS[name])


def lite0() -> Study:
    network = networks.load(agreement.NETWORK)
    paths, _ = agreement.labelled()
    random = np.random.default_rng(0)

    def cut(chosen: Sequence[Path], count: int) -> Tensor:
        crops = [crop for path in chosen for crop in agreement.crops(path, count, random)]
        return network.preprocess(torch.stack(crops))

    calibrate = cut(paths[0::2], CALIBRATION_CROPS)
    test = cut(paths[1::2], TEST_CROPS)
    folded = Q.fold_batch_norm(network.module.eval(), calibrate[:2])
    return Study("lite0", folded, calibrate, test, None, COLUMNS["lite0"])


# Ours

SCHEME = Q.Linear(calibration="output")
# Takes a float network, a policy and batches for calibration; returns the quantized network.
Recipe = Callable[[nn.Module, Q.BitPolicy, Sequence[Tensor]], nn.Module]


def plain(network: nn.Module, policy: Q.BitPolicy, batches: Sequence[Tensor]) -> nn.Module:
    """Scales by the squared error of weights and inputs, and nothing else."""
    return Q.quantize(network, policy, scheme=Q.Linear(calibration="mse"), calibrate=batches)


def corrected(network: nn.Module, policy: Q.BitPolicy, batches: Sequence[Tensor]) -> nn.Module:
    """Scales by the error of outputs, and biases corrected for every width: what searches evaluate."""
    return Q.quantize(network, policy, scheme=SCHEME, calibrate=batches, correction="analytic")


def by_gptq(network: nn.Module, policy: Q.BitPolicy, batches: Sequence[Tensor]) -> nn.Module:
    """The same with GPTQ, where there are images enough for it."""
    images = sum(map(len, batches))
    roundings = dict.fromkeys(policy, "gptq")
    for name in policy:
        layer = network.get_submodule(name)
        if isinstance(layer, nn.Linear) and layer.in_features > images:
            roundings[name] = "nearest"
    return Q.quantize(network, policy, scheme=SCHEME, calibrate=batches, correction="analytic", rounding=roundings)


def sequential(network: nn.Module, policy: Q.BitPolicy, batches: Sequence[Tensor]) -> nn.Module:
    """The same with biases corrected for the policy."""
    quantized = by_gptq(network, policy, batches)
    Q.correct_bias(quantized, network, batches)
    return quantized


def learned(network: nn.Module, policy: Q.BitPolicy, batches: Sequence[Tensor]) -> nn.Module:
    """The same with rounding learned layer by layer, in fewer steps where there are few images for many weights."""
    quantized = sequential(network, policy, batches)
    weights = sum(parameter.numel() for parameter in network.parameters())
    iterations = ITERATIONS
    if weights > 1000 * sum(map(len, batches)):
        iterations //= 5
    Q.reconstruct(quantized, network, batches, method="adaround", iterations=iterations)
    Q.correct_bias(quantized, network, batches)
    return quantized


def recipes() -> dict[str, tuple[Recipe, Recipe]]:
    """Return our rows: how a network is quantized, and how for measuring which layers bear fewer bits."""
    return {
        "ours: mse": (plain, plain),
        "ours: analytic": (corrected, corrected),
        "ours: GPTQ, sequential": (sequential, by_gptq),
        "ours: AdaRound": (learned, by_gptq),
    }


def our_row(study: Study, name: str, column: Column) -> Row:
    """Quantize a study's network by one of our recipes, and test it."""
    recipe, measured = recipes()[name]
    batches = study.calibrate.split(BATCH)
    note = ""
    start = time.process_time()
    if column.mixed:
        policy = allocated(study, measured, column)
        note = " ".join(str(weights) for weights, _ in policy.values())
    else:
        policy = uniform(study.network, column.weights, column.activations)
    quantized = recipe(study.network, policy, batches)
    seconds = time.process_time() - start
    judged = study.judge(answers(quantized, study.test))
    return Row(study.name, len(study.test), name, column.name, *judged, seconds, note)


def uniform(network: nn.Module, weights: int, activations: int) -> Q.BitPolicy:
    """The same bits everywhere but in the first and last layer."""
    policy = Q.BitPolicy.uniform(network, w=weights, a=activations)
    return Q.BitPolicy({**policy, **Q.ends(list(policy))})


def allocated(study: Study, recipe: Recipe, column: Column) -> Q.BitPolicy:
    """Choose the middle layers' widths of least divergence within a column's average, as if layers' divergences added up."""
    base = uniform(study.network, 8, column.activations)
    quantized = recipe(study.network, base, study.calibrate.split(BATCH)).eval()
    logits = answers(study.network, study.calibrate)
    middle = list(base)[1:-1]
    losses = np.zeros((len(middle), len(WIDTHS)))
    sizes = np.array([Q.quant_layers(quantized)[layer].weight.numel() for layer in middle])
    for row, layer in enumerate(middle):
        for place, width in enumerate(WIDTHS):
            Q.set_policy(quantized, {**base, layer: (width, column.activations)})
            losses[row, place] = divergence(logits, answers(quantized, study.calibrate))
    costs = sizes[:, None] * np.array(WIDTHS)
    chosen = ilp.allocate(losses, costs, float(column.weights * sizes.sum()))
    bits = {layer: (WIDTHS[place], column.activations) for layer, place in zip(middle, chosen, strict=True)}
    return Q.BitPolicy({**base, **bits})


# Other tools


class Tool(NamedTuple):
    environment: str  # a folder
    method: str  # as ptq_rivals.py calls it
    packages: str
    mixes: bool = False


TORCH = "torch==2.13.0"
TOOLS = {
    "MCT": Tool("mct", "mct", f"{TORCH} torchvision==0.28.0 'model-compression-toolkit==2.6.*'", mixes=True),
    "Brevitas": Tool("brevitas", "brevitas", f"{TORCH} 'brevitas==0.13.*'"),
    "Brevitas, GPTQ": Tool("brevitas", "brevitas-gptq", f"{TORCH} 'brevitas==0.13.*'"),
    "ModelOpt": Tool("modelopt", "modelopt", f"{TORCH} 'nvidia-modelopt==0.47.*' requests huggingface_hub"),
    "AIMET": Tool("aimet", "aimet", f"{TORCH} 'aimet-torch==2.42.*'"),
}


def columns_of(method: str, columns: Sequence[Column]) -> list[Column]:
    """Choose what a method is asked for: most tools have no mixed precision for a limit of memory."""
    mixes = method not in TOOLS or TOOLS[method].mixes
    return [column for column in columns if mixes or not column.mixed]


def python_of(tool: Tool, folder: Path) -> Path:
    return folder / tool.environment / "bin" / "python"


def how_to_install(tool: Tool, folder: Path) -> str:
    """Return the line that makes a tool's environment."""
    made = folder / tool.environment
    return f"python3.11 -m venv {made} && {made}/bin/pip install --no-cache-dir {tool.packages}"


def rows_of_tool(study: Study, name: str, folder: Path) -> Iterator[Row]:
    """Let a tool quantize a study's network in its environment; yields a row for every column, one by one."""
    tool = TOOLS[name]
    columns = columns_of(name, study.columns)
    row = functools.partial(Row, study.name, len(study.test), name)
    python = python_of(tool, folder)
    if not python.is_file():
        for column in columns:
            yield row(column.name, None, None, None, "not installed")
        return
    missing = [column.name for column in columns]
    with tempfile.TemporaryDirectory() as kept:
        job, errors = Path(kept) / "job.npz", Path(kept) / "errors.txt"
        write_job(job, study, columns)
        # Isolated: neither this project nor what else is in its folder can be imported there.
        command = [str(python), "-I", str(CHILD), tool.method, str(job), kept]
        with errors.open("w") as stream, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                said = json.loads(line)
                name = said["column"]
                missing.remove(name)
                if "error" in said:
                    yield row(name, None, None, None, said["error"])
                    continue
                logits = torch.from_numpy(np.load(Path(kept) / f"{name}.npy", allow_pickle=False))
                note = ""
                if name.startswith("average"):
                    note = " ".join(map(str, said["bits"].values()))
                yield row(name, *study.judge(logits), said["seconds"], note)
        last = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()][-1:]
    for name in missing:
        yield row(name, None, None, None, f"failed: {' '.join(last)}")


def write_job(path: Path, study: Study, columns: Sequence[Column]) -> None:
    """Write what a tool is asked for, to be read by `ptq_rivals.Job`."""
    steps, tensors = describe(study.network)
    tensors = {**tensors, "calibrate": study.calibrate, "test": study.test}
    arrays: dict[str, Any] = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
    np.savez(path, job=np.array(json.dumps({"steps": steps, "columns": columns})), **arrays)


ADDITIONS = (operator.add, operator.iadd, torch.add)
RELUS = (torch.relu, torch.relu_, F.relu)
# Of torch's modules, the arguments that make them again.
OPTIONS = {
    "Conv2d": ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    "Linear": ("in_features", "out_features"),
    "ReLU": (),
    "ReLU6": (),
    "AdaptiveAvgPool2d": ("output_size",),
    "Flatten": ("start_dim", "end_dim"),
}
NOTHING = (nn.Identity, nn.Dropout)  # in evaluation mode


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Take a convolution of somebody else's class, which pads in its own way, for one step."""
        return isinstance(module, (nn.Conv2d, nn.Linear)) or super().is_leaf_module(module, name)


def describe(network: nn.Module) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Describe a network in evaluation mode, without batch norms, so that `ptq_rivals.Described` makes it again.

    Args:
        network: It is left alone.

    Returns:
        Its steps (name, kind, options, and the names of the steps whose outputs are its inputs), and their weights and biases.

    Raises:
        ValueError: For what has no kind.
    """
    steps: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    made: dict[str, str] = {}  # a node of the graph -> the step whose output it is

    def add(name: str, kind: str, inputs: Sequence[str], **options: Any) -> None:
        steps.append({"name": name, "kind": kind, "options": options, "inputs": list(inputs)})
        made[name] = name

    for node in _Tracer().trace(network).nodes:
        inputs = [made[given.name] for given in node.all_input_nodes if given.name in made]
        if node.op == "placeholder":
            made[node.name] = "input"
        elif node.op == "call_module":
            module = network.get_submodule(str(node.target))
            if isinstance(module, NOTHING):
                made[node.name] = inputs[0]
            else:
                tensors.update(_add_module(add, node.name, module, inputs))
        elif node.target in ADDITIONS:
            add(node.name, "Add", inputs)
        elif node.target in RELUS:
            add(node.name, "ReLU", inputs)
        elif node.target in ("flatten", "view", torch.flatten):
            # Nothing but what a classifier gets is reshaped in these networks.
            add(node.name, "Flatten", inputs)
        elif node.op != "output" and node.target != "size":
            raise ValueError(f"{node.name}: no tool could be told what {node.target} does")
    return steps, tensors


def _add_module(add: Callable[..., None], name: str, module: nn.Module, inputs: Sequence[str]) -> dict[str, Tensor]:
    """Add the steps of a module; returns its tensors."""
    padding = getattr(module, "static_padding", None)  # EfficientNet-Lite0 pads as TensorFlow does
    if isinstance(padding, nn.ZeroPad2d):
        add(f"{name}_pad", "ZeroPad2d", inputs, padding=padding.padding)
        inputs = [f"{name}_pad"]
    kinds = [kind for kind in OPTIONS if isinstance(module, getattr(nn, kind))]
    if not kinds:
        raise ValueError(f"{name}: no tool could be told what a {type(module).__name__} is")
    options = {option: getattr(module, option) for option in OPTIONS[kinds[0]]}
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        options["bias"] = module.bias is not None
    add(name, kinds[0], inputs, **options)
    return {f"{name}.{key}": tensor.detach() for key, tensor in module.named_parameters()}


# What is printed


def table(rows: Sequence[Row], network: str, mixes: bool) -> Table:
    """The rows of a network: those of uniform bits, or of mixed ones."""
    columns = [column.name for column in COLUMNS[network] if column.mixed == mixes]
    measured = "accuracy"
    if network == "lite0":
        measured = "agreement with the float network"
    rows = [row for row in rows if row.network == network]
    kind = "same bits in all middle layers"
    if mixes:
        kind = "mixed bits of weights, activations 8"
    made = Table(
        f"{network}, {kind}: {measured} in % / KL in nats / seconds; measured on {rows[0].images:,} images",
        ("method", *columns),
    )
    for method in dict.fromkeys(row.method for row in rows):
        cells = {row.column: cell(row) for row in rows if row.method == method}
        if any(column in cells for column in columns):
            made.rows.append((method, *(cells.get(column, "–") for column in columns)))
    return made


def cell(row: Row) -> str:
    if row.divergence is None or row.accuracy is None or row.seconds is None:
        if row.note == "not installed" or not row.note:
            return row.note
        return "failed"
    return f"{row.accuracy:.2f} / {row.divergence:.4f} / {row.seconds:.1f}"


def tables(rows: Sequence[Row]) -> list[Table]:
    made = []
    for network in dict.fromkeys(row.network for row in rows):
        made += [table(rows, network, False), table(rows, network, True)]
    return [one for one in made if one.rows]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Divergence of every method by column, a panel per network."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.network for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows if row.divergence is not None))
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    FigureCanvasAgg(figure)
    handles = {}
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        places = {column.name: place for place, column in enumerate(COLUMNS[name])}
        for color, method in enumerate(methods):
            found = [row for row in rows if (row.network, row.method) == (name, method) and row.divergence]
            marker = "x"
            if method in recipes():
                marker = "o"
            if found:
                across = [places[row.column] for row in found]
                values = [row.divergence for row in found]
                handles[method] = panel.plot(across, values, marker, color=f"C{color}", markersize=5, alpha=0.8)[0]
        panel.set(title=name, yscale="log")
        panel.set_xticks(list(places.values()), list(places), rotation=45, ha="right")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", linewidth=0.3)
        panel.set(ylabel="KL to the float network, nats")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    partial = path.with_name(f"{path.name}.part")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)


def save(folder: Path, about: str, rows: Sequence[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    intro = (
        f"Made by `experiments/{NAME}.py`, which says what is compared and how; every figure, and bits where they are mixed, "
        f"are in `{NAME}.csv`.\n\n    {about}\n\n![Divergence from the float network by bits]({NAME}.png)"
    )
    parts = ["# Post-training quantization beside other tools", intro, *(made.markdown() for made in tables(rows))]
    failed = [f"* {row.method}, {row.network}, {row.column}: {row.note}" for row in rows if cell(row) == "failed"]
    if failed:
        parts.append("\n".join(["What failed:", "", *failed]))
    (folder / f"{NAME}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    with (folder / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for row in rows:
            figures = [row.accuracy, row.divergence, row.seconds]
            written = [shared.number(figure, digits, "") for figure, digits in zip(figures, (2, 6, 1), strict=True)]
            writer.writerow([*row[:4], *written, row.note])
    draw(rows, folder / f"{NAME}.png")


def load_rows(folder: Path | None) -> list[Row]:
    """Read the rows of an earlier call, none if there are none."""
    if folder is None or not (folder / f"{NAME}.csv").is_file():
        return []
    with (folder / f"{NAME}.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    made = []
    for line in lines:
        accuracy, kl, seconds = (float(line[key] or "nan") for key in ("accuracy", "divergence", "seconds"))
        row = Row(line["network"], int(line["images"]), line["method"], line["column"], accuracy, kl, seconds, line["note"])
        if not line["divergence"]:
            row = row._replace(accuracy=None, divergence=None, seconds=None)
        made.append(row)
    return made


def merged(old: Sequence[Row], new: Sequence[Row], methods: Sequence[str]) -> list[Row]:
    """Put new rows in the place of old ones; of a network that was tested on other images, old rows are dropped."""
    images = {row.network: row.images for row in new}
    redone = {(row.network, row.method) for row in new}
    kept = [row for row in old if images.get(row.network, row.images) == row.images]
    kept = [row for row in kept if (row.network, row.method) not in redone and row.method in methods]
    order = [(network, method) for network in COLUMNS for method in methods]
    return sorted([*kept, *new], key=lambda row: order.index((row.network, row.method)))


def main() -> int:
    every = [*recipes(), *TOOLS]
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=COLUMNS, help="(default: all)")
    parser.add_argument("--methods", nargs="+", choices=every, metavar="NAME", help=f"of {', '.join(every)} (default: all)")
    parser.add_argument("--tools", type=Path, default=data.cache_folder() / "ptq-tools", help="folder of the environments")
    parser.add_argument("--all-test", action="store_true", help="test on the 10,000 images of Fashion-MNIST's test split")
    parser.add_argument("--residual", type=Path, default=data.cache_folder() / "ptq-residual.safetensors", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="only see that it runs; saves nothing unless --out is given")
    parser.add_argument("--out", type=Path, help="folder for the tables (default: docs/experiments)")
    options = parser.parse_args()
    out = shared.folder_for(options.out, options.quick, Path("docs/experiments"))
    console = Console(width=160)
    torch.set_num_threads(1)
    chosen = options.networks or list(COLUMNS)
    methods = options.methods or every
    if options.quick:
        chosen = options.networks or ["mini"]
        methods = options.methods or list(recipes())
    missing = {tool.environment: tool for name, tool in TOOLS.items() if name in methods}
    for tool in missing.values():
        if not python_of(tool, options.tools).is_file():
            say(console, f"not installed: {tool.environment}; to install it: {how_to_install(tool, options.tools)}")
    makers: dict[str, Callable[[], Study]] = {
        "mini": lambda: mini(options.all_test),
        "residual": lambda: residual(options.all_test, options.residual),
        "lite0": lite0,
    }
    given = sys.argv[1:]
    about = f"OMP_NUM_THREADS=1 python -m experiments.{NAME}{''.join(f' {word}' for word in given)}"
    rows = load_rows(out)
    wanted = {name: COLUMNS[name] for name in chosen}
    if options.quick:
        wanted = {name: tuple(column for column in COLUMNS[name] if column.name in QUICK) for name in chosen}
    with progress(console) as bar:
        total = sum(len(columns_of(method, columns)) for columns in wanted.values() for method in methods)
        task = bar.add_task("cells", total=total, note="")
        for network, columns in wanted.items():
            bar.update(task, note=f"{network}: loading")
            study = makers[network]()
            study.columns = columns
            for method in methods:
                made = []
                for row in rows_of(study, method, options.tools):
                    made.append(row)
                    bar.update(task, advance=1, note=f"{network}, {method}, {row.column}: {cell(row)}")
                rows = merged(rows, made, every)
                if out is not None:
                    save(out, about, rows)  # after each method: some take long
    for each in tables(rows):
        console.print(each.rich())
    for row in rows:
        if cell(row) == "failed":
            say(console, f"{row.method}, {row.network}, {row.column}: {row.note}")
    if out is not None:
        say(console, f"written: {out / NAME}.md, .csv and .png")
    return 0


def rows_of(study: Study, method: str, tools: Path) -> Iterator[Row]:
    """Yield the row of every column, by one of our recipes or by another tool."""
    if method in TOOLS:
        yield from rows_of_tool(study, method, tools)
        return
    for column in study.columns:
        yield our_row(study, method, column)


if __name__ == "__main__":
    sys.exit(run_command(main))

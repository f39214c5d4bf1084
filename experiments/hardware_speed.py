"""How fast the hardware cost models are, beside two rivals on the same layers, in the same run and on one thread.

    OMP_NUM_THREADS=1 python -m experiments.hardware_speed

The first table prices MobileNetV2 at 1x3x224x224, every layer at all 64 pairs of widths, and then policies from that table;
the bars are what each must stay under. The second one takes the layer with the median number of products of each kind. A
rival prices one layer at one pair of widths per call, so the unit is the time per cell (a layer at one pair): ours is the
time of the whole table divided by its cells, and the ratios are to the slowest of ours. Medians over rounds in which every
contender runs once; the first round isn't counted. Takes three minutes.

The rivals are installed for this benchmark only, into an environment of its own (Python 3.11 or later, in bash):

    pip install -c <(grep -v ^numpy constraints.txt) -e ".[zoo]" zigzag-dse scalesim six "numpy<2.4"

Tried with zigzag-dse 3.9.1, which imports six without asking for it, and scalesim 3.0.0, which fails with numpy 2.4.
"""

from __future__ import annotations

import importlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

import hw_models
from haq import networks
from hw_models import Layer, Workload

ROUNDS = 5
POLICIES = 10_000
TABLE_BARS = {"cloud": 0.1, "edge": 0.1, "bismo-overlay": 0.1, "bitfusion": 1.0}  # seconds
POLICY_BAR = 2.0  # microseconds
INSTALL = 'pip install -c <(grep -v ^numpy constraints.txt) -e ".[zoo]" zigzag-dse scalesim six "numpy<2.4"'

Run = Callable[[], object]
Price = Callable[[Layer], object]
Key = tuple[str, str]  # target and "table" or "policies"; rival and layer, or "" for the rival as a whole


def main() -> None:
    torch.set_num_threads(1)
    network = networks.load("timm:mobilenetv2_100", pretrained=False)
    workload = hw_models.trace(network.module, torch.zeros(1, *network.input_shape))
    layers = typical(workload)
    policies = np.random.default_rng(0).integers(1, 9, (2, POLICIES, len(workload)))
    contenders: dict[Key, Run] = {}
    cells = 0
    for name in TABLE_BARS:
        target = hw_models.load_target(name)
        table = target.cost_table(workload)
        cells = table.storage_bytes.size
        contenders[name, "table"] = partial(target.cost_table, workload)
        contenders[name, "policies"] = partial(table.price, *policies)
    troubles: dict[Key, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rival, prepare in RIVALS.items():
            try:
                with apart(folder):
                    price = prepare(Path(folder))
                contenders |= {(rival, layer.name): partial(price, layer) for layer in layers}
            except ImportError as error:
                troubles[rival, ""] = f"not installed ({error})"
        seconds = measure(contenders, troubles, folder)

    console = Console()
    per_cell = {name: seconds[name, "table"] / cells for name in TABLE_BARS}
    console.print(ours(seconds, per_cell, f"{len(workload)} layers, {cells:,} cells"))
    console.print(theirs(seconds, troubles, layers, per_cell))
    if troubles:
        console.print("What is missing above comes with, in bash:")
        console.print(INSTALL, markup=False, highlight=False, soft_wrap=True)


def typical(workload: Workload) -> list[Layer]:
    """The layer with the median number of products of each kind."""
    kinds: dict[str, list[Layer]] = {}
    for layer in workload.layers:
        kinds.setdefault(layer.kind, []).append(layer)
    return [sorted(layers, key=lambda layer: layer.macs)[len(layers) // 2] for layers in kinds.values()]


@contextmanager
def apart(folder: str) -> Iterator[None]:
    """What is printed inside goes nowhere, and what is written to the working folder goes to `folder`."""
    here = Path.cwd()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


def measure(contenders: dict[Key, Run], troubles: dict[Key, str], folder: str) -> dict[Key, float]:
    """Median seconds of each contender; a rival that fails in the round that isn't counted goes to `troubles`."""
    seconds: dict[Key, list[float]] = {}
    for key, run in contenders.items():
        try:
            with apart(folder):
                run()
            seconds[key] = []
        except Exception as error:
            if key[0] not in RIVALS:
                raise
            troubles[key] = f"failed ({type(error).__name__}: {error})"
    for _ in track(range(ROUNDS), "rounds", console=Console(file=sys.stderr)):
        for key, values in seconds.items():
            with apart(folder):
                start = time.perf_counter()
                contenders[key]()
                values.append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in seconds.items()}


def ours(seconds: dict[Key, float], per_cell: dict[str, float], size: str) -> Table:
    table = Table(title=f"MobileNetV2, {size}, one thread, median of {ROUNDS}")
    table.add_column("target")
    for heading in ("table, s", "bar", "us per cell", f"us per policy, {POLICIES:,} at once", "bar"):
        table.add_column(heading, justify="right")
    for name, bar in TABLE_BARS.items():
        policy = 1e6 * seconds[name, "policies"] / POLICIES
        row = (f"{seconds[name, 'table']:.4f}", f"< {bar:g}", f"{1e6 * per_cell[name]:.2f}", f"{policy:.2f}")
        table.add_row(name, *row, f"< {POLICY_BAR:g}")
    return table


def theirs(seconds: dict[Key, float], troubles: dict[Key, str], layers: list[Layer], per_cell: dict[str, float]) -> Table:
    slowest = max(per_cell, key=lambda name: per_cell[name])
    table = Table(
        title=f"One layer at 8 bits, one thread, median of {ROUNDS}",
        caption="Not equal work. ZigZag, on its own example of a TPU-like accelerator, searches the temporal mappings of a "
        "layer and asks its cost model for the latency and energy of each. SCALE-Sim, on a weight-stationary array of the "
        "same size, simulates what is read and written in every cycle; its words are bytes, so widths make no difference to "
        "it. Ours are a closed form (cloud, edge), a recurrence (bismo-overlay) and a search over tilings and loop orders "
        "(bitfusion), for all widths at once.",
        caption_justify="left",
    )
    table.add_column("")
    table.add_column("layer, weights, output size")
    for heading in ("s per cell", f"x {slowest}"):
        table.add_column(heading, justify="right")
    for rival in RIVALS:
        if (rival, "") in troubles:
            table.add_row(rival, escape(troubles[rival, ""]), "-", "-")
            continue
        for layer in layers:
            weights = (*layer.kernel, layer.in_channels // layer.groups, layer.out_channels)
            text = f"{layer.kind} {'x'.join(map(str, weights))}, {'x'.join(map(str, layer.output_size))}"
            row = ("-", "-")
            if (time_s := seconds.get((rival, layer.name))) is None:
                text += f": {escape(troubles[rival, layer.name])}"
            else:
                row = (f"{time_s:.2f}", f"{time_s / per_cell[slowest]:,.0f}")
            table.add_row(f"{rival} {metadata.version(rival)}", text, *row)
    return table


def zigzag(folder: Path) -> Price:
    """ZigZag's documented call for a layer at 8 bits. It writes its results to files, which takes a few per cent."""
    api: Any = importlib.import_module("zigzag.api")
    inputs = resources.files("zigzag").joinpath("inputs")

    def price(layer: Layer) -> object:
        (oh, ow), (kh, kw), (sh, sw), (dh, dw) = layer.output_size, layer.kernel, layer.stride, layer.dilation
        loops = {
            "B": 1,
            "G": layer.groups,
            "K": layer.out_channels // layer.groups,
            "C": layer.in_channels // layer.groups,
            "OY": oh,
            "OX": ow,
            "FY": kh,
            "FX": kw,
        }
        description = {
            "id": 0,
            "name": layer.name,
            "operator_type": "Conv",
            "equation": "O[b][g][k][oy][ox]+=W[g][k][c][fy][fx]*I[b][g][c][iy][ix]",
            "dimension_relations": [f"iy={sh}*oy+{dh}*fy", f"ix={sw}*ox+{dw}*fx"],
            "loop_dims": list(loops),
            "loop_sizes": list(loops.values()),
            # Partial sums have 16 bits because the example's registers do.
            "operand_precision": {"W": 8, "I": 8, "O": 16, "O_final": 8},
            "operand_source": {"W": 0, "I": 0},
        }
        with (
            resources.as_file(inputs.joinpath("hardware/tpu_like.yaml")) as accelerator,
            resources.as_file(inputs.joinpath("mapping/tpu_like.yaml")) as mapping,
        ):
            result: object = api.get_hardware_performance_zigzag(
                [description],
                str(accelerator),
                str(mapping),
                dump_folder=str(folder / "zigzag"),
                loma_show_progress_bar=False,
            )
        return result

    return price


# The array and the memories of ZigZag's TPU-like example; bandwidth as it comes out. SCALE-Sim ships no configuration.
SCALESIM = """
[general]
run_name = scalesim
[architecture_presets]
ArrayHeight = 32
ArrayWidth = 32
IfmapSramSzkB = 1024
FilterSramSzkB = 128
OfmapSramSzkB = 1024
IfmapOffset = 0
FilterOffset = 10000000
OfmapOffset = 20000000
Dataflow = ws
ReadRequestBuffer = 64
WriteRequestBuffer = 64
[layout]
IfmapCustomLayout = False
IfmapSRAMBankBandwidth = 10
IfmapSRAMBankNum = 10
IfmapSRAMBankPort = 2
FilterCustomLayout = False
FilterSRAMBankBandwidth = 10
FilterSRAMBankNum = 10
FilterSRAMBankPort = 2
[sparsity]
SparsitySupport = false
[run_presets]
InterfaceBandwidth = CALC
UseRamulatorTrace = False
"""


def scalesim(folder: Path) -> Price:
    """SCALE-Sim's top-level class for a layer, without writing the traces. It runs a depthwise layer channel by channel."""
    simulator: Any = importlib.import_module("scalesim.scale_sim")
    config, topology, layout = folder / "scalesim.cfg", folder / "topology.csv", folder / "layout.csv"
    config.write_text(SCALESIM)
    layout.write_text("no custom layout\n")

    def price(layer: Layer) -> object:
        # SCALE-Sim knows neither padding nor dilation: the input is what the kernel passes over.
        (oh, ow), (kh, kw), (sh, sw) = layer.output_size, layer.kernel, layer.stride
        window = ((oh - 1) * sh + kh, (ow - 1) * sw + kw)
        filters = layer.out_channels // layer.groups
        name = "layer"
        if layer.kind == "depthwise":
            name = "DP"
        sizes = (name, *window, *layer.kernel, layer.in_channels, filters, sh)
        topology.write_text("one line for the headings\n" + ",".join(map(str, sizes)) + ",\n")
        run = simulator.scalesim(
            save_disk_space=True, verbose=False, config=str(config), topology=str(topology), layout=str(layout)
        )
        run.run_scale(top_path=str(folder))
        return run

    return price


RIVALS: dict[str, Callable[[Path], Price]] = {"zigzag-dse": zigzag, "scalesim": scalesim}


if __name__ == "__main__":
    main()

"""The hardware there is, and what a network costs on it, layer by layer:  python -m haq.hardware list | show NAME"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import hw_models
from haq import networks
from haq.console import cli
from haq.store.units import best_unit, describe_amount
from hw_models.machine import Machine
from hw_models.storage import BITS

WIDTH = 150  # of tables that go to a file or a pipe


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m haq.hardware", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every target that ships with the package")
    show = commands.add_parser("show", help="one target, and a network's costs on it")
    show.add_argument("name", metavar="NAME", help="a target's name, a .yaml file, lut:TABLE.csv, cpu or rpc:HOST:PORT")
    show.add_argument("--network", help="price this network, a name as in haq.networks; its weights aren't needed")
    show.add_argument("--batch", type=int, help="images per batch (default: the target's own)")
    cli.add_measuring(show)
    show.add_argument("--bits", default="8,4,2", help="widths to price, W/A or one number for both (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    if options.command == "list":
        print_list(console)
        return 0
    pairs = parse_bits(options.bits)
    measuring = {"threads": options.threads, "target": options.target, "cold": bool(options.cold)}
    with cli.follow_loading(console, "building and pricing") as follow:
        target = hw_models.load_target(options.name, **measuring, **follow)
        if options.network is not None:
            network = networks.load(options.network, pretrained=False)
            workload = hw_models.trace(network.module, torch.zeros(1, *network.input_shape))
            table = target.cost_table(workload, batch=options.batch)
    if options.network is None:
        print_target(console, target)
        return 0
    print_costs(console, network.name, target, table, pairs)
    return 0


def parse_bits(text: str) -> list[tuple[int, int]]:
    """Pairs of widths from "8,4,4/8". Raises ValueError naming the one that isn't."""
    pairs = []
    for part in text.split(","):
        numbers = part.strip().split("/")
        if len(numbers) not in (1, 2) or not all(n.isdecimal() and 1 <= int(n) <= BITS for n in numbers):
            raise ValueError(
                f"--bits has {part!r}; give widths from 1 to {BITS}, such as 8,4,2 or 4/8 for weights/activations"
            )
        pairs.append((int(numbers[0]), int(numbers[-1])))
    return pairs


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")


def print_list(console: Console) -> None:
    table = _table("hardware targets")
    for heading in ("name", "model", "batch", "metrics", "description"):
        table.add_column(heading, no_wrap=heading != "description", justify="right" if heading == "batch" else "left")
    for name in hw_models.target_names():
        target = hw_models.load_target(name)
        assert isinstance(target, Machine)
        metrics = ", ".join(_metrics(target))
        table.add_row(name, target.model, str(target.batch), metrics, target.description)
    for name, description in hw_models.MEASURED.items():
        table.add_row(name, "measured", "1", "latency, storage", description)
    console.print(table)
    console.print(
        f"Measured are {' and '.join(hw_models.MEASURED)}; all others are simulated (estimated). "
        "Your own: a .yaml file like those, or lut:TABLE.csv for measurements."
    )
    console.print("Next: [bold]python -m haq.hardware show NAME --network mobilenetv2_100[/]", soft_wrap=True)


def _metrics(target: hw_models.Target) -> tuple[str, ...]:
    one = hw_models.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1))
    return target.cost_table(one).metrics


def print_target(console: Console, target: hw_models.Target) -> None:
    console.print(f"[bold]{target.name}[/]: {target.description} ({target.provenance})", soft_wrap=True)
    if not isinstance(target, Machine):
        return
    table = _table("")
    table.add_column("key", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("meaning")
    for key, field in type(target).model_fields.items():
        if key not in ("name", "description"):
            value = getattr(target, key)
            table.add_row(key, "–" if value is None else f"{value}", field.description or "")
    console.print(table)
    console.print(f"The rules of the model, with their sources, are in the docstring of {type(target).__module__}.")


def print_costs(
    console: Console, network: str, target: hw_models.Target, costs: hw_models.CostTable, pairs: list[tuple[int, int]]
) -> None:
    """One row per layer: cost at every pair of widths, and what bounds it at the first and the last of them."""
    workload = costs.workload
    images = f"{costs.batch} image{'s' if costs.batch > 1 else ''}"
    table = _table(f"{network} on {target.name}, one batch of {images}, {costs.provenance}")
    for heading in ("layer", "shape"):
        table.add_column(heading, no_wrap=True)
    table.add_column("M\nMACs", justify="right", no_wrap=True)
    columns = []
    for metric in ("latency", "energy"):
        if metric in costs.metrics:
            values = costs.metric(metric)
            unit, size = best_unit(float(values[:, pairs[0][0] - 1, pairs[0][1] - 1].max()), metric)
            for w, a in pairs:
                columns.append(values[:, w - 1, a - 1] / size)
                table.add_column(f"{unit} at\nw{w}/a{a}", justify="right", no_wrap=True)
    shown = list(dict.fromkeys((pairs[0], pairs[-1]))) if costs.bound is not None else []
    for w, a in shown:
        table.add_column(f"bound at\nw{w}/a{a}", no_wrap=True)
    for i, layer in enumerate(workload.layers):
        bounds = [costs.bounds[costs.bound[i, w - 1, a - 1]] for w, a in shown] if costs.bound is not None else []
        cells = [f"{column[i]:.4g}" for column in columns]
        table.add_row(layer.name or "(network)", _shape(layer), f"{layer.macs / 1e6:.2f}", *cells, *bounds)
    table.add_section()
    table.add_row("total", "", f"{workload.macs / 1e6:.2f}", *(f"{column.sum():.4g}" for column in columns))
    console.print(table)
    for w, a in pairs:
        widths = np.full((2, len(workload)), [[w], [a]])
        total = costs.price(*widths)
        amounts = {"latency": total.latency_s, "energy": total.energy_j, "storage": total.storage_bytes}
        said = [f"{metric} {describe_amount(float(x), metric)}" for metric, x in amounts.items() if x is not None]
        cycles = "" if total.cycles is None else f", {int(total.cycles):,} cycles"
        peak = describe_amount(float(hw_models.peak_activation_bytes(workload, widths[1])), "storage")
        console.print(f"w{w}/a{a}: {', '.join(said)}{cycles}, activations at most {peak} per image", soft_wrap=True)
    floats = describe_amount(float(hw_models.float_bytes(workload)), "storage")
    console.print(f"Beside the layers, {floats} of norms and other parameters stay in float.")


def _shape(layer: hw_models.Layer) -> str:
    if layer.kind == "linear":
        rows = sum(call.positions for call in layer.calls)
        return f"linear {layer.in_channels}→{layer.out_channels}" + (f", {rows} rows" if rows > 1 else "")
    height, width = layer.kernel
    stride = "" if layer.stride == (1, 1) else f"/{layer.stride[0]}" + ("" if layer.stride[0] == layer.stride[1] else "...")
    size = "x".join(map(str, layer.output_size))
    calls = f", {len(layer.calls)} calls" if len(layer.calls) > 1 else ""
    return f"{layer.kind} {layer.in_channels}→{layer.out_channels} {height}x{width}{stride} to {size}{calls}"


if __name__ == "__main__":
    sys.exit(cli.run_command(main))

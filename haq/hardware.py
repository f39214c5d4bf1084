"""Show the hardware there is, and what a network costs on it.

Costs are estimated by models of the hardware, or measured where a target says so.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from haq import networks
from haq.console.commands import Group, main_of
from haq.console.errors import run_command
from haq.console.options import argument, option, options_of, output_options, trust_option
from haq.console.output import Output
from haq.console.progress import follow_loading
from haq.console.tables import Column, new_table, plain, print_columns, say, say_next
from haq.console.values import INTEGER, TEXT, TextType
from haq.study.config import MEASURED, SearchConfig, target_names

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    import hw_models

WIDTH = 150  # of tables that go to a file or a pipe
PRICES = "What is priced"
Pairs = list[tuple[int, int]]
NETWORK = TextType(networks.NETWORKS.names)
TARGET = TextType(target_names)

cli = Group(
    "hardware",
    __doc__,
    examples=("haq hardware list", "haq hardware show edge", "haq hardware show cloud --network mobilenetv2_100 --bits 8,4,2"),
)


@cli.add("list", "Show every target that ships with the package.")
@output_options(json=None)
def list_targets() -> int:
    """Print a table of targets."""
    print_list(Output.open(width=WIDTH).results)
    return 0


@cli.add(
    "show",
    "Show one target, and a network's costs on it, layer by layer.",
    examples=("haq hardware show edge", "haq hardware show mine.yaml --network mobilenet-mini --bits 8,4/6 --batch 4"),
)
@argument("name", TARGET, "a target's name, a .yaml file, lut:TABLE.csv, cpu, rpc:HOST:PORT or module:Name")
@option("--network", NETWORK, "price this network, as of haq search; its weights aren't needed", group=PRICES, metavar="NAME")
@option("--bits", TEXT, "widths to price, W/A or one number for both", group=PRICES, metavar="LIST", default="8,4,2")
@option("--batch", INTEGER, "images per batch", group=PRICES, default_words="the target's own")
@options_of(SearchConfig, only=MEASURED)
@trust_option()
@output_options(json=None)
def show_target(name: str, network: str | None, bits: str, batch: int | None, given: dict[str, Any]) -> int:
    """Print what a target is, or what a network costs on it."""
    import torch

    import hw_models
    from hw_models.target import price

    output = Output.open(width=WIDTH)
    pairs = parse_bits(bits)
    measuring = {"threads": None, "target": None, **given, "cold": bool(given.get("cold"))}
    with follow_loading(output.notes, "building and pricing") as follow:
        target = hw_models.load_target(name, **measuring, **follow)
        if network is not None:
            loaded = networks.load(network, pretrained=False)
            networks.answer_to_zeros(loaded)
            workload = hw_models.trace(loaded.module, torch.zeros(1, *loaded.input_shape))
            table = price(target, workload, batch)
    if network is None:
        print_target(output.results, target)
        return 0
    print_costs(output.results, loaded.name, target, table, pairs)
    return 0


main = main_of(cli)


def parse_bits(text: str) -> Pairs:
    """Read pairs of widths from "8,4,4/8". Raises ValueError naming the one that isn't."""
    from hw_models.storage import BITS

    pairs = []
    for part in text.split(","):
        numbers = part.strip().split("/")
        if len(numbers) not in (1, 2) or not all(n.isdecimal() and 1 <= int(n) <= BITS for n in numbers):
            raise ValueError(
                f"--bits has {part!r}; give widths from 1 to {BITS}, such as 8,4,2 or 4/8 for weights/activations"
            )
        pairs.append((int(numbers[0]), int(numbers[-1])))
    return pairs


def print_list(console: Console) -> None:
    """Print the targets that ship with the package, and those that are measured."""
    import hw_models
    from hw_models.machine import Machine
    from hw_models.registry import join_words

    rows: list[tuple[str, ...]] = []
    for name in hw_models.target_names():
        target = hw_models.load_target(name)
        assert isinstance(target, Machine)
        rows.append((name, target.model, str(target.batch), ", ".join(_metrics(target)), target.description))
    rows += [(name, "measured", "1", "latency, storage", line) for name, line in hw_models.MEASURED.items()]
    names, models, batches, metrics, descriptions = zip(*rows, strict=True)
    columns = [
        Column("name", names),
        Column("model", models),
        Column("batch", batches, "right"),
        Column("metrics", metrics),
        Column("description", descriptions, least=30),
    ]
    print_columns(console, "hardware targets", columns)
    say(
        console,
        f"Measured are {join_words(list(hw_models.MEASURED))}; all others are simulated (estimated). "
        "Your own: a .yaml file like those, or lut:TABLE.csv for measurements.",
    )
    say_next(console, "python", "-m", "haq.hardware", "show", "NAME", "--network", "mobilenetv2_100")


def _metrics(target: hw_models.Target) -> tuple[str, ...]:
    import torch

    import hw_models
    from hw_models.target import price

    one = hw_models.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1))
    return price(target, one).metrics


def print_target(console: Console, target: hw_models.Target) -> None:
    """Print what a target is, and the keys of its model."""
    from haq.store.units import NOTHING
    from hw_models.machine import Machine

    say(console, f"{target.name}: {target.description} ({target.provenance})")
    if not isinstance(target, Machine):
        return
    table = new_table()
    table.add_column("key", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("meaning")
    for key, field in type(target).model_fields.items():
        if key in ("name", "description"):
            continue
        value = getattr(target, key)
        if value is None:
            value = NOTHING
        table.add_row(key, plain(value), plain(field.description or ""))
    console.print(table)
    say(console, f"The rules of the model, with their sources, are in the docstring of {type(target).__module__}.")


def print_costs(console: Console, network: str, target: hw_models.Target, costs: hw_models.CostTable, pairs: Pairs) -> None:
    """Print a row per layer: its cost at every pair of widths, and what bounds it at the first and the last of them.

    Args:
        console: Where; its width counts.
        network: The network's name.
        target: The hardware.
        costs: What the network's layers cost on it.
        pairs: Widths of weights and activations.
    """
    workload = costs.workload
    images = "1 image"
    if costs.batch > 1:
        images = f"{costs.batch} images"
    names = [layer.name or "(network)" for layer in workload.layers]
    macs = [f"{layer.macs / 1e6:.2f}" for layer in workload.layers]
    columns = [
        Column("layer", [*names, "total"]),
        Column("shape", [*(_shape(layer) for layer in workload.layers), ""]),
        Column("M\nMACs", [*macs, f"{workload.macs / 1e6:.2f}"], "right"),
        *_cost_columns(costs, pairs),
        *_bound_columns(costs, pairs),
    ]
    title = f"{network} on {target.name}, one batch of {images}, {costs.provenance}"
    print_columns(console, title, columns, totals=1)
    for w, a in pairs:
        say(console, _total(costs, w, a))
    say(console, _left_in_float(costs))
    if workload.unpriced:
        say(console, f"Not priced: {workload.unpriced_words}.")


def _cost_columns(costs: hw_models.CostTable, pairs: Pairs) -> list[Column]:
    import numpy as np

    from haq.store.units import NOTHING, best_unit

    columns = []
    for metric in ("latency", "energy"):
        if metric not in costs.metrics:
            continue
        values: np.ndarray[Any, Any] = costs.metric(metric)
        # Where the target can't do the first pair in any layer, by all that it can do.
        first = values[:, pairs[0][0] - 1, pairs[0][1] - 1]
        if np.isnan(first).all():
            first = values
        unit, size = best_unit(float(np.nanmax(first)), metric)
        for w, a in pairs:
            scaled = values[:, w - 1, a - 1] / size
            cells = [f"{cost:.4g}".replace("nan", NOTHING) for cost in (*scaled, scaled.sum())]
            columns.append(Column(f"{unit} at\nw{w}/a{a}", cells, "right"))
    return columns


def _bound_columns(costs: hw_models.CostTable, pairs: Pairs) -> list[Column]:
    import numpy as np

    if costs.bound is None:
        return []
    columns = []
    for w, a in dict.fromkeys((pairs[0], pairs[-1])):
        bounds = [""] * len(costs.workload)
        for layer in np.flatnonzero(costs.supported[:, w - 1, a - 1]):
            bounds[layer] = costs.bounds[costs.bound[layer, w - 1, a - 1]]
        columns.append(Column(f"bound at\nw{w}/a{a}", [*bounds, ""]))
    return columns


def _total(costs: hw_models.CostTable, w: int, a: int) -> str:
    """What the whole network costs at a pair of widths, in a sentence."""
    import numpy as np

    import hw_models
    from haq.store.units import describe_amount

    supported = costs.supported[:, w - 1, a - 1]
    if not supported.all():
        layer = costs.workload.names[int(np.argmin(supported))]
        unable = int((~supported).sum())
        return f"w{w}/a{a}: {costs.target} can't do {unable} of {len(supported)} layers, {layer!r} is the first"
    widths = np.full((2, len(costs.workload)), [[w], [a]])
    total = costs.price(*widths)
    amounts = {"latency": total.latency_s, "energy": total.energy_j, "storage": total.storage_bytes}
    words = [f"{metric} {describe_amount(float(x), metric)}" for metric, x in amounts.items() if x is not None]
    if total.cycles is not None:
        words.append(f"{int(total.cycles):,} cycles")
    peak = hw_models.peak_activation_bytes(costs.workload, widths[1])
    words.append(f"activations at most {describe_amount(float(peak), 'storage')} per image")
    return f"w{w}/a{a}: {', '.join(words)}"


def _left_in_float(costs: hw_models.CostTable) -> str:
    import hw_models
    from haq.store.units import describe_amount

    floats = describe_amount(float(hw_models.float_bytes(costs.workload)), "storage")
    return f"Beside the layers, {floats} of norms and other parameters stay in float."


def _shape(layer: hw_models.Layer) -> str:
    """The shape of a layer, in a few words: depthwise 32→32 3x3/2 to 56x56."""
    words = f"{layer.kind} {layer.in_channels}→{layer.out_channels}"
    if layer.kind == "linear":
        rows = sum(call.positions for call in layer.calls)
        if rows > 1:
            words += f", {rows} rows"
        return words
    height, width = layer.kernel
    words += f" {height}x{width}"
    if layer.stride != (1, 1):
        words += f"/{layer.stride[0]}"
    if layer.stride[0] != layer.stride[1]:
        words += "..."
    words += f" to {'x'.join(map(str, layer.output_size))}"
    if len(layer.calls) > 1:
        words += f", {len(layer.calls)} calls"
    return words


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Show the hardware there is, and what a network costs on it.

Costs are estimated by models of the hardware, or measured where a target says so.
"""

from __future__ import annotations

import sys
from dataclasses import replace
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
    from hw_models.capabilities import Capabilities, Rule
    from hw_models.guidelines import Excess, Guidelines

WIDTH = 150  # of tables that go to a file or a pipe
PRICES = "What is priced"
Pairs = list[tuple[int, int]]
USUAL: Pairs = [(8, 8), (4, 4), (2, 2)]  # priced unless others are asked for
MOST_LISTED = 12  # pairs of widths that are written one by one
MOST_PAIRS = 5  # priced where the usual ones can't be done, and nothing is asked for
NAMED = 3  # layers that a guideline names
COUNTED = ("bit operations", "average weight bits", "memory traffic", "peak memory")
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
    examples=(
        "haq hardware show edge",
        "haq hardware show mine.yaml --network mobilenet-mini --bits 8/16,4/8,float --batch 4",
    ),
)
@argument("name", TARGET, "a target's name, a .yaml file, lut:TABLE.csv, cpu, rpc:HOST:PORT or module:Name")
@option("--network", NETWORK, "price this network, as of haq search; its weights aren't needed", group=PRICES, metavar="NAME")
@option(
    "--bits",
    TEXT,
    "widths to price, W/A or one for both: 8, 4/8, 8/16, float",
    group=PRICES,
    metavar="LIST",
    default_words="8,4,2, or what the target can do",
)
@option("--batch", INTEGER, "images per batch", group=PRICES, default_words="the target's own")
@options_of(SearchConfig, only=MEASURED)
@trust_option()
@output_options(json=None)
def show_target(name: str, network: str | None, bits: str | None, batch: int | None, given: dict[str, Any]) -> int:
    """Print what a target is, or what a network costs on it."""
    import torch

    import hw_models
    from hw_models.target import price

    output = Output.open(width=WIDTH)
    pairs: Pairs = []
    if bits is not None:
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
    print_costs(output.results, loaded.name, target, table, pairs or usual_pairs(table))
    return 0


main = main_of(cli)


def parse_bits(text: str) -> Pairs:
    """Read pairs of widths from "8,4,4/8,float", float being 32. Raises ValueError naming the one that isn't."""
    from hw_models.widths import ACCEPTED, read_pair, width_of

    pairs = []
    for part in text.split(","):
        word = part.strip()
        try:
            if word.isdecimal():
                pairs.append((width_of(word), width_of(word)))
            else:
                pairs.append(read_pair(word))
        except ValueError:
            raise ValueError(
                f"--bits has {part!r}; give widths from {ACCEPTED}, such as 8,4,2 or 4/8 for weights/activations"
            ) from None
    return pairs


def usual_pairs(costs: hw_models.CostTable) -> Pairs:
    """Choose what to price where nothing is asked for: 8, 4 and 2 bits, or what the target can do, the widest first."""
    able = {pair for layer in range(len(costs.workload)) for pair in costs.pairs_of(layer)}
    if able.issuperset(USUAL):
        return USUAL
    # 8 bits, by which targets are compared, stand first; then what has the fewest bits.
    found = sorted(able, key=lambda pair: (pair != USUAL[0], sum(pair), pair))
    return found[:MOST_PAIRS]


def print_list(console: Console) -> None:
    """Print the targets that ship with the package, and those that are measured."""
    import hw_models
    from haq.store.units import NOTHING
    from hw_models.machine import Chip
    from hw_models.registry import join_words

    rows: list[tuple[str, ...]] = []
    for name in hw_models.target_names():
        target = hw_models.load_target(name)
        assert isinstance(target, Chip)
        table = _probe(target)
        widths = describe_widths(table.pairs_of(0))
        rows.append((name, target.model, str(target.batch), ", ".join(table.metrics), widths, target.description))
    rows += [(name, "measured", "1", "latency, storage", NOTHING, line) for name, line in hw_models.MEASURED.items()]
    names, models, batches, metrics, pairs, descriptions = zip(*rows, strict=True)
    columns = [
        Column("name", names),
        Column("model", models),
        Column("batch", batches, "right"),
        Column("metrics", metrics),
        Column("weights/activations", pairs, least=22),
        Column("description", descriptions, least=30),
    ]
    print_columns(console, "hardware targets", columns)
    say(
        console,
        f"Measured are {join_words(list(hw_models.MEASURED))}; all others are simulated (estimated). "
        "Your own: a .yaml file like those, or lut:TABLE.csv for measurements.",
    )
    say_next(console, "python", "-m", "haq.hardware", "show", "NAME", "--network", "mobilenetv2_100")


def _probe(target: hw_models.Target) -> hw_models.CostTable:
    """Price one small layer of every kind, the linear one first: what a target can do, as far as no layer's name matters."""
    import torch
    from torch import nn

    import hw_models
    from hw_models.capabilities import capabilities_of
    from hw_models.machine import Chip

    network = nn.ModuleList(
        [
            nn.Linear(32, 32),
            nn.Conv2d(32, 32, 3),
            nn.Conv2d(32, 32, 1),
            nn.Conv2d(32, 32, 3, groups=32),
            nn.Conv2d(32, 32, 3, groups=2),
        ]
    )
    layers: list[hw_models.Layer] = []
    for module, shape in zip(network, [(1, 32), *[(1, 32, 8, 8)] * 4], strict=True):
        layers += hw_models.trace(nn.Sequential(module), torch.zeros(shape)).layers
    workload = hw_models.Workload(tuple(replace(layer, name=layer.kind) for layer in layers))
    able = capabilities_of(target)
    if able is None:
        return target.cost_table(workload)
    # Rules of named layers are told in words, and so are accumulators, which depend on how many products are summed.
    general = able.model_copy(update={"layers": {}, "accumulator_bits": None})
    # Our own targets keep to the rules of named layers, which these aren't.
    if isinstance(target, Chip):
        target = target.model_copy(update={"capabilities": general})
    elif isinstance(target, hw_models.FunctionTarget):
        function = target.function
        target = hw_models.FunctionTarget(lambda layer, w, a: function(layer, w, a), target.name)
    return general.apply(target.cost_table(workload))


def describe_widths(pairs: Pairs) -> str:
    """List pairs of widths, weights/activations; many of them by what either operand has."""
    from hw_models.cost import describe_pairs
    from hw_models.storage import BITS
    from hw_models.widths import pair_words, width_words

    if len(pairs) <= MOST_LISTED:
        return ", ".join(pair_words(w, a) for w, a in sorted(pairs, reverse=True))
    operands = [sorted({pair[side] for pair in pairs}) for side in (0, 1)]
    if len(pairs) == len(operands[0]) * len(operands[1]) and operands[0] == operands[1]:
        few = [width for width in operands[0] if width <= BITS]
        more = [width_words(width) for width in operands[0] if width > BITS]
        return ", ".join([f"{few[0]} to {few[-1]} bits", *more])
    return describe_pairs(pairs)


def print_target(console: Console, target: hw_models.Target) -> None:
    """Print what a target is, what it can do, and the keys of its model."""
    from hw_models.capabilities import capabilities_of
    from hw_models.machine import Chip

    say(console, f"{target.name}: {target.description} ({target.provenance})")
    if isinstance(target, Chip):
        table = new_table()
        table.add_column("key", no_wrap=True)
        table.add_column("value", overflow="fold")
        table.add_column("meaning")
        for key, field in type(target).model_fields.items():
            if key in ("name", "description", "capabilities"):
                continue
            table.add_row(key, plain(_value(getattr(target, key))), plain(field.description or ""))
        console.print(table)
        print_pairs(console, _probe(target))
    able = capabilities_of(target)
    if able is not None:
        for sentence in describe_capabilities(able):
            say(console, sentence)
    if isinstance(target, Chip):
        say(console, f"The rules of the model, with their sources, are in the docstring of {type(target).__module__}.")


def _value(value: object) -> str:
    """Write the value of a key as its file has it; a dash for one that isn't given."""
    from haq.store.units import NOTHING

    if value is None or value == {}:
        return NOTHING
    if isinstance(value, dict):
        return ", ".join(f"{key}: {number:g}" for key, number in value.items())
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.12g}"
    return str(value)


def print_pairs(console: Console, probe: hw_models.CostTable) -> None:
    """Print which pairs of widths each kind of layer has, in one line where all have the same."""
    widths = {layer.kind: describe_widths(probe.pairs_of(index)) for index, layer in enumerate(probe.workload.layers)}
    kinds: dict[str, list[str]] = {}
    for kind, words in widths.items():
        kinds.setdefault(words, []).append(kind)
    if len(kinds) == 1:
        say(console, f"Pairs of weights/activations, for layers of all kinds: {next(iter(kinds))}.")
        return
    say(console, "Pairs of weights/activations by kind of layer:")
    for words, of_kinds in kinds.items():
        say(console, f"  {', '.join(of_kinds)}: {words}")


def describe_capabilities(able: Capabilities) -> list[str]:
    """Say in sentences what hardware can do beside pairs of widths by kind of layer, and for which layers it is otherwise."""
    sentences = []
    for name, rule in able.layers.items():
        sentences.append(f"Layer {name!r}: {_rule_words(rule)}.")
    scales = "one scale per layer"
    if able.per_channel_weights:
        scales = "a scale for every output channel"
    if able.power_of_two_scales:
        scales += ", a power of two"
    signs = {"auto": "signed or unsigned", "signed": "signed", "unsigned": "unsigned"}[able.activation_sign]
    points = ""
    if able.zero_points is not None:
        points = {True: ", with zero points", False: ", without zero points"}[able.zero_points]
    sentences.append(f"Weights have {scales}; activations are {signs} integers{points}.")
    if able.accumulator_bits is not None:
        outcome = "a pair of widths whose sums can overflow is refused"
        if able.overflow_cost is not None:
            outcome = f"sums that can overflow go to a wider unit, at {able.overflow_cost:g} times the cost"
        sentences.append(f"Accumulators have {able.accumulator_bits} bits; {outcome}.")
    return sentences


def _rule_words(rule: Rule) -> str:
    """Write a rule: "8/8, 4/8", or "weights 8, activations 8, 16"."""
    from hw_models.widths import pair_words, width_words

    if rule.pairs is not None:
        return ", ".join(pair_words(w, a) for w, a in rule.pairs)
    parts = []
    for operand in ("weights", "activations"):
        widths = getattr(rule, operand)
        if widths is not None:
            parts.append(f"{operand} {', '.join(map(width_words, widths))}")
    return "; ".join(parts)


def print_costs(console: Console, network: str, target: hw_models.Target, costs: hw_models.CostTable, pairs: Pairs) -> None:
    """Print a row per layer: its cost at every pair of widths, and what bounds it at the first and the last of them.

    Args:
        console: Where; its width counts.
        network: The network's name.
        target: The hardware.
        costs: What the network's layers cost on it.
        pairs: Widths of weights and activations.
    """
    from haq.store.units import counted
    from hw_models.guidelines import check

    workload = costs.workload
    images = counted(costs.batch, "images")
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
    if costs.bound is not None:
        words = [_bound_words(costs, costs.bound, w, a) for w, a in pairs]
        say(console, f"Layers by what bounds them: {'; '.join(words)}.")
    say(console, _left_in_float(costs))
    if workload.unpriced:
        say(console, f"Not priced: {workload.unpriced_words}.")
    print_counted(console, costs, pairs)
    print_guidelines(console, check(workload))


def pair_name(w: int, a: int) -> str:
    """Name a pair of widths as the tables of this command do: w8/a16, and float where both are."""
    from hw_models.widths import FLOAT, width_words

    if w == a == FLOAT:
        return width_words(FLOAT)
    return f"w{width_words(w)}/a{width_words(a)}"


def _at(array: np.ndarray[Any, Any], w: int, a: int) -> np.ndarray[Any, Any]:
    """Return the entries of all layers at a pair of widths."""
    from hw_models.widths import place_of

    return array[:, place_of(w), place_of(a)]


def _cost_columns(costs: hw_models.CostTable, pairs: Pairs) -> list[Column]:
    import numpy as np

    from haq.store.units import NOTHING, best_unit

    columns = []
    for metric in ("latency", "energy"):
        if metric not in costs.metrics:
            continue
        values = costs.metric(metric)
        # Where the target can't do the first pair in any layer, by all that it can do.
        first = _at(values, *pairs[0])
        if np.isnan(first).all():
            first = values
        unit, size = best_unit(float(np.nanmax(first)), metric)
        for w, a in pairs:
            scaled = _at(values, w, a) / size
            cells = [f"{cost:.4g}".replace("nan", NOTHING) for cost in (*scaled, scaled.sum())]
            columns.append(Column(f"{unit} at\n{pair_name(w, a)}", cells, "right"))
    return columns


def _bound_columns(costs: hw_models.CostTable, pairs: Pairs) -> list[Column]:
    import numpy as np

    if costs.bound is None:
        return []
    columns = []
    for w, a in dict.fromkeys((pairs[0], pairs[-1])):
        bounds = [""] * len(costs.workload)
        at = _at(costs.bound, w, a)
        for layer in np.flatnonzero(_at(costs.supported, w, a)):
            bounds[layer] = costs.bounds[at[layer]]
        columns.append(Column(f"bound at\n{pair_name(w, a)}", [*bounds, ""]))
    return columns


def _bound_words(costs: hw_models.CostTable, bound: np.ndarray[Any, Any], w: int, a: int) -> str:
    """Say how many layers each bound limits at a pair of widths."""
    limiting = _at(bound, w, a)[_at(costs.supported, w, a)]
    counts = [(int((limiting == place).sum()), bound) for place, bound in enumerate(costs.bounds)]
    words = [f"{count} {bound}" for count, bound in counts if count]
    return f"{pair_name(w, a)} {', '.join(words) or 'none'}"


def _total(costs: hw_models.CostTable, w: int, a: int) -> str:
    """What the whole network costs at a pair of widths, in a sentence."""
    import numpy as np

    import hw_models
    from haq.store.units import describe_amount

    name = pair_name(w, a)
    supported = _at(costs.supported, w, a)
    if not supported.all():
        layer = costs.workload.names[int(np.argmin(supported))]
        unable = int((~supported).sum())
        return f"{name}: {costs.target} can't do {unable} of {len(supported)} layers, {layer!r} is the first"
    widths = np.full((2, len(costs.workload)), [[w], [a]])
    total = costs.price(*widths)
    amounts = {"latency": total.latency_s, "energy": total.energy_j, "storage": total.storage_bytes}
    words = [f"{metric} {describe_amount(float(x), metric)}" for metric, x in amounts.items() if x is not None]
    if total.cycles is not None:
        words.append(f"{int(total.cycles):,} cycles")
    peak = hw_models.peak_activation_bytes(costs.workload, widths[1])
    words.append(f"activations at most {describe_amount(float(peak), 'storage')} per image")
    return f"{name}: {', '.join(words)}"


def print_counted(console: Console, costs: hw_models.CostTable, pairs: Pairs) -> None:
    """Print what is counted of the network itself at every pair of widths, whether or not the target can do it.

    Args:
        console: Where.
        costs: The table, for its workload and batch.
        pairs: Widths of weights and activations.
    """
    import numpy as np

    import hw_models
    from haq.store.units import describe_amount
    from hw_models import metrics

    workload = costs.workload
    rows: dict[str, list[str]] = {name: [] for name in COUNTED}
    for w, a in pairs:
        rows["bit operations"].append(f"{_at(metrics.bops(workload), w, a).sum() / 1e9:,.4g} G")
        rows["average weight bits"].append(f"{_at(metrics.average_weight_bits(workload), w, a).sum():.4g}")
        traffic = float(_at(metrics.memory_traffic(workload), w, a).sum())
        rows["memory traffic"].append(describe_amount(traffic, "storage"))
        peak = hw_models.peak_activation_bytes(workload, np.full(len(workload), a), batch=costs.batch)
        rows["peak memory"].append(describe_amount(float(peak), "storage"))
    columns = [Column("metric", list(rows))]
    for place, (w, a) in enumerate(pairs):
        columns.append(Column(pair_name(w, a), [cells[place] for cells in rows.values()], "right"))
    title = "counted of the network, whatever the hardware, for one image"
    if costs.batch > 1:
        title += f" (peak memory: for {costs.batch})"
    print_columns(console, title, columns)


def print_guidelines(console: Console, found: Guidelines) -> None:
    """Print which of ShuffleNetV2's guidelines a network breaks, by which layers, and what its depthwise layers save."""
    table = new_table("guidelines of ShuffleNetV2 for efficient networks, in elements moved per image (bytes at 8 bits)")
    table.add_column("guideline", no_wrap=True)
    table.add_column("broken", no_wrap=True)
    table.add_column("by", overflow="fold")
    rows = {
        "G1": ("equal channels", _excess_words(found, found.channels, "unequal channels", "evened out")),
        "G2": ("few groups", _excess_words(found, found.groups, "groups", "without them, at as many multiplications")),
        "G3": ("few branches", _branch_words(found)),
        "G4": ("few element-wise operations", _element_wise_words(found)),
    }
    for name, (title, words) in rows.items():
        answer = "no"
        if name in found.broken:
            answer = "yes"
        table.add_row(f"{name} {title}", answer, plain(words))
    console.print(table)
    words = separable_words(found)
    if words:
        say(console, words)


def _excess_words(found: Guidelines, excesses: tuple[Excess, ...], what: str, remedy: str) -> str:
    """Say which layers move more than they must, for G1 and G2."""
    if not excesses:
        return f"no layer has {what}"
    layers = "1 layer has"
    if len(excesses) > 1:
        layers = f"{len(excesses)} layers have"
    worst = ", ".join(f"{excess.layer} ({excess.shape}) {excess.ratio:.2f}" for excess in excesses[:NAMED])
    return (
        f"{layers} {what}, which move as many times the least: {worst}{_more(len(excesses))}; {remedy}, all layers would move "
        f"{100 * found.saved(excesses):.1f} % less"
    )


def _branch_words(found: Guidelines) -> str:
    """Say which layers stand side by side, for G3."""
    if not found.branches:
        return "no two layers read one activation"
    most = found.branches[0]
    places = "1 activation is"
    if len(found.branches) > 1:
        places = f"{len(found.branches)} activations are"
    return (
        f"{places} read by several layers, which then stand side by side; by {len(most)} at most: "
        f"{', '.join(most[:NAMED])}{_more(len(most))}"
    )


def _element_wise_words(found: Guidelines) -> str:
    """Say what is moved between layers, for G4."""
    if not found.combined + found.functions:
        return "nothing is computed between layers"
    share = f"{100 * found.element_wise_share:.1f} % of all that is moved"
    if not found.combined:
        return f"{share}, all of it by activation functions, which most engines compute within the layers"
    named = ", ".join(name or "the network" for name in found.combining[:NAMED])
    return (
        f"{share}; {100 * found.combined_share:.1f} % where activation functions are computed within the layers, as most "
        f"engines do: the additions and products in {named}{_more(len(found.combining))}"
    )


def separable_words(found: Guidelines) -> str:
    """Say what depthwise separable layers cost, by 1 / C_out + 1 / K^2; nothing for a network without depthwise layers."""
    if not found.depthwise_macs:
        return ""
    share = 100 * found.depthwise_macs / found.macs
    words = f"Depthwise layers do {found.depthwise_macs:,} of {found.macs:,} multiply-accumulates ({share:.1f} %), "
    words += f"pointwise ones {100 * found.pointwise_macs / found.macs:.1f} %."
    if not found.separable:
        return words
    least = min(found.separable, key=lambda pair: pair.ratio)
    most = max(found.separable, key=lambda pair: pair.ratio)
    total = sum(pair.macs for pair in found.separable) / sum(pair.full_macs for pair in found.separable)
    words += (
        f" A depthwise layer and the pointwise one behind it do 1/C_out + 1/K^2 of a full convolution: from {least.ratio:.3f} "
        f"({least.depthwise}) to {most.ratio:.3f} ({most.depthwise}), {total:.3f} over all {len(found.separable)} of them."
    )
    return words


def _more(count: int) -> str:
    """Say how many are not named."""
    if count <= NAMED:
        return ""
    return f" and {count - NAMED} more"


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

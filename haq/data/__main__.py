"""Fetch a data set and show its splits.

`haq data list` shows what there is. What is there already isn't fetched again.
"""

from __future__ import annotations

import sys

from haq.console.commands import command, main_of
from haq.console.errors import run_command
from haq.console.options import argument, flag, option, output_options
from haq.console.output import Output
from haq.console.tables import new_table, plain, say
from haq.console.values import TextType
from haq.data import DATASETS

CACHE = "cache"
NAME = TextType(lambda: ("list", CACHE, *DATASETS.names()))


def _network_names() -> tuple[str, ...]:
    """List the networks that have a name."""
    from haq import networks

    return networks.NETWORKS.names()


NETWORK = TextType(_network_names)


@command(
    "data",
    __doc__,
    examples=(
        "haq data list",
        "haq data cifar10",
        "haq data imagefolder:cats --network timm:resnet18",
        "haq data cache --clear",
    ),
)
@argument("name", NAME, "a data set as `haq data list` shows them, module:Name, list, or cache: decoded images that are kept")
@option(
    "--network",
    NETWORK,
    "a network: images are brought to the size of its input, and must suit it",
    group="Images",
    metavar="NAME",
)
@flag("--clear", "with cache: delete the decoded images", group="Images")
@output_options(json=None)
def cli(name: str, network: str | None, clear: bool) -> int:
    """Show one data set, or all of them."""
    output = Output.open()
    if clear and name != CACHE:
        raise ValueError(f"--clear goes with `haq data {CACHE}`, which shows the decoded images that are kept")
    if name == CACHE:
        _show_cache(output, clear)
        return 0
    if name == "list":
        table = new_table()
        for heading in ("name", "from", "what it is"):
            table.add_column(heading)
        for row in DATASETS.rows():
            table.add_row(*(plain(cell) for cell in row))
        output.results.print(table)
        return 0
    import torch

    from haq import networks
    from haq.data import fetch, load
    from quantizers.calling import leaves

    with output.notes.status("fetching"):
        fetch(name)
        if network is None:
            dataset = load(name)
        else:
            loaded = networks.load(network)
            dataset = load(name, image_size=loaded.image_size)
            networks.check_fits(loaded, dataset)
        first, _ = dataset.train.take(torch.arange(1))
    say(output.results, dataset.describe())
    called = dataset.train.samples_are
    for leaf in leaves(first):
        shape = " x ".join(map(str, leaf.shape[1:])) or "a number each"
        say(output.results, f"{called}: {shape}, {str(leaf.dtype).removeprefix('torch.')}")
    return 0


def _show_cache(output: Output, clear: bool) -> None:
    """Say how much decoded images take in the cache folder; delete them if asked to."""
    from haq.data import decoded
    from haq.data.download import cache_folder
    from haq.data.memory import show_bytes

    files = decoded.kept_files()
    folder = cache_folder() / decoded.FOLDER
    if clear:
        say(output.results, f"{show_bytes(decoded.clear())} freed in {folder}")
        return
    noun = "files" if len(files) != 1 else "file"
    say(output.results, f"{len(files)} {noun} of decoded images, {show_bytes(sum(size for _, size in files))}, in {folder}")


main = main_of(cli)

if __name__ == "__main__":
    sys.exit(run_command(main))

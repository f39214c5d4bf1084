"""Fetch a data set and show its splits.

`haq data list` shows what there is. What is there already isn't fetched again.
"""

from __future__ import annotations

import sys

from haq.console.commands import command, main_of
from haq.console.errors import run_command
from haq.console.options import argument, option, output_options
from haq.console.output import Output
from haq.console.tables import new_table, plain, say
from haq.console.values import TEXT, TextType
from haq.data import DATASETS

NAME = TextType(lambda: ("list", *DATASETS.names()))


@command(
    "data",
    __doc__,
    examples=("haq data list", "haq data cifar10", "haq data imagefolder:cats --network timm:resnet18"),
)
@argument("name", NAME, "a data set as `haq data list` shows them, module:Name, or list")
@option("--network", TEXT, "a network: images are brought to the size of its input, and must suit it", group="Images")
@output_options(json=None)
def cli(name: str, network: str | None) -> int:
    """Show one data set, or all of them."""
    output = Output.open()
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

    with output.notes.status("fetching"):
        fetch(name)
        if network is None:
            dataset = load(name)
        else:
            loaded = networks.load(network)
            dataset = load(name, image_size=loaded.image_size)
            networks.check_fits(loaded, dataset)
        image = dataset.train.images[torch.arange(1)]
    say(output.results, dataset.describe())
    say(output.results, f"images: {' x '.join(map(str, image.shape[1:]))}, {str(image.dtype).removeprefix('torch.')}")
    return 0


main = main_of(cli)

if __name__ == "__main__":
    sys.exit(run_command(main))

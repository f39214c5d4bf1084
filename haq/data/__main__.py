"""Fetch a data set and show its splits.

`haq data list` shows what there is. What is there already isn't fetched again.
"""

from __future__ import annotations

import sys

from haq.console.commands import command, main_of
from haq.console.errors import run_command
from haq.console.options import argument, output_options
from haq.console.output import Output
from haq.console.tables import new_table, plain, say
from haq.console.values import TextType
from haq.data import DATASETS

NAME = TextType(lambda: ("list", *DATASETS.names()))


@command("data", __doc__, examples=("haq data list", "haq data cifar10", "haq data imagefolder:photographs"))
@argument("name", NAME, "a data set as `haq data list` shows them, module:Name, or list")
@output_options(json=None)
def cli(name: str) -> int:
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
    from haq.data import fetch, load

    with output.notes.status("fetching"):
        fetch(name)
        described = load(name).describe()
    say(output.results, described)
    return 0


main = main_of(cli)

if __name__ == "__main__":
    sys.exit(run_command(main))

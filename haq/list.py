"""Show what can be given by name: networks, data, solvers, schemes, targets and more.

Our own, those of installed packages, and other forms of a name are shown with where they come from and a line each. Besides,
module:Name takes what is in a file of the current folder.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from rich.columns import Columns
from rich.console import Console

from haq.console.commands import command, main_of
from haq.console.errors import run_command
from haq.console.options import argument, option, output_options
from haq.console.output import Output
from haq.console.tables import new_table, plain, say
from haq.console.values import TEXT, ChoiceType
from haq.store.units import counted
from hw_models.registry import Row


class Kind(NamedTuple):
    """A kind of things that have names."""

    place: str  # "module:attribute" of its registry
    used: str  # where a name of it can be given


KINDS = {
    "networks": Kind("haq.networks:NETWORKS", "--network"),
    "data": Kind("haq.data:DATASETS", "--data"),
    "targets": Kind("hw_models:TARGETS", "--hw"),
    "hardware-models": Kind("hw_models:HARDWARE_MODELS", "model: in a .yaml file of --hw"),
    "solvers": Kind("haq.solvers:SOLVERS", "--solver"),
    "objectives": Kind("haq.problem:OBJECTIVES", "--objective"),
    "schemes": Kind("quantizers:scheme_rows", "--scheme"),
    "criteria": Kind("quantizers.pruning:criterion_rows", "--criterion, of channels that are kept with --prune"),
    "attacks": Kind("haq.attacks:ATTACKS", "haq robustness --attacks"),
    "exporters": Kind("haq.deployment:EXPORTERS", "haq deploy --to"),
    "methods": Kind("haq.training.methods:METHODS", "haq train --method"),
}
LIKE = "a part of a name; with it, networks of timm, torchvision and pytorchcv are listed too, which are hundreds"


@command(
    "list",
    __doc__,
    examples=("haq list", "haq list solvers", "haq networks --like mobilenet", "haq schemes --json"),
)
@argument("kind", ChoiceType(tuple(KINDS)), f"what to show: {', '.join(KINDS)}; all of them if left out", required=False)
@option("--like", TEXT, f"only names that contain this: {LIKE}", group="What is shown", metavar="TEXT")
@output_options(json="print names, origins and lines as JSON", quiet=False)
def cli(kind: str | None, like: str | None, as_json: bool) -> int:
    """Show one kind, or all of them."""
    output = Output.open()
    kinds = tuple(KINDS)
    if kind is not None:
        kinds = (kind,)
    found = {name: rows_of(name, like) for name in kinds}
    libraries: dict[str, list[str]] = {}
    if like is not None and "networks" in kinds:
        libraries = networks_of_libraries(like)
    if as_json:
        listed: dict[str, Any] = {name: [row._asdict() for row in rows] for name, rows in found.items()}
        if libraries:
            listed["libraries"] = libraries
        print(json.dumps(listed, indent=2))
        return 0
    if not any(found.values()) and not any(libraries.values()):
        raise ValueError(f"no name contains {like!r}; see all of them with haq list {kind or ''}".rstrip())
    for name, rows in found.items():
        if rows:
            print_rows(output.results, name, rows)
    for library, names in libraries.items():
        print_names(output.results, library, names)
    if "networks" in kinds and like is None:
        say(output.results, "Networks of the libraries by their names: haq networks --like mobilenet")
    return 0


main = main_of(cli)


def rows_of(kind: str, like: str | None = None) -> list[Row]:
    """List what there is of a kind; nothing of it is imported.

    Args:
        kind: One of KINDS.
        like: Only names that contain this, in upper or lower case.

    Returns:
        Name, origin and a line of each.
    """
    module, _, attribute = KINDS[kind].place.partition(":")
    found: Any = getattr(importlib.import_module(module), attribute)
    rows = found() if callable(found) else found.rows()
    return [Row(*row) for row in rows if like is None or like.lower() in row.name.lower()]


def networks_of_libraries(like: str) -> dict[str, list[str]]:
    """List the networks of each library whose names contain some text; the libraries are imported, which takes seconds."""
    from haq import networks

    return {library: networks.names_of(library, like) for library in networks.LIBRARIES}


def print_rows(console: Console, kind: str, rows: Iterable[Row]) -> None:
    """Print what there is of a kind, a line each.

    Args:
        console: Where to print.
        kind: One of `KINDS`.
        rows: What there is.
    """
    table = new_table(f"{kind}, for {KINDS[kind].used}")
    table.title_justify = "left"
    table.add_column("name", overflow="fold", max_width=max(10, 2 * console.width // 5))
    table.add_column("from", overflow="fold", max_width=max(10, console.width // 4))
    table.add_column("what it is")
    for row in rows:
        table.add_row(plain(row.name), plain(row.origin), plain(row.line))
    console.print(table)


def print_names(console: Console, library: str, names: list[str]) -> None:
    """Print the networks of a library, side by side.

    Args:
        console: Where to print.
        library: Its name.
        names: Those of its networks.
    """
    if not names:
        return
    console.print(plain(f"{library}, {counted(len(names), 'networks')}"), style="italic")
    console.print(Columns([plain(name) for name in names], padding=(0, 2)))


if __name__ == "__main__":
    sys.exit(run_command(main))

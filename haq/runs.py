"""The runs there are: what became of them, what they asked for, how they differ:  python -m haq.runs list | show RUN | ..."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from haq.console import cli
from haq.store import cleanup
from haq.store.files import size
from haq.store.inventory import DAMAGED, FINISHED, INTERRUPTED, RUNNING, Entry, find, look, sizes

WIDTH = 150  # of tables that go to a file or a pipe
HOME = Path("runs")
# What accuracies must agree in to be compared; eps is of the attack of one of the objectives.
TERMS = ("network", "data", "objective", "eps")
PREFIXES = {"": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
COLORS = {FINISHED: "green", INTERRUPTED: "yellow", RUNNING: "cyan", DAMAGED: "red"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m haq.runs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, what: str) -> Callable[..., argparse.Action]:
        return commands.add_parser(name, help=what).add_argument

    add = command("list", "every run and sweep in some folders, or of a sweep")
    add("folders", nargs="*", type=Path, metavar="FOLDER", default=[HOME], help=f"(default: {HOME}/)")
    add("--json", action="store_true", help="print JSON")
    add = command("show", "what a run was asked for, what it found, and the commands that go with it")
    add("run", type=Path, metavar="RUN")
    add("--json", action="store_true", help="print JSON")
    add = command("compare", "runs side by side: first what was asked differently, then what came out")
    add("runs", nargs="+", type=Path, metavar="RUN")
    add("--json", action="store_true", help="print JSON")
    add = command("prune", "delete what of runs isn't needed any more; without --yes only say what")
    add("folder", nargs="?", type=Path, metavar="FOLDER", default=HOME, help=f"of runs, or one run (default: {HOME}/)")
    add("--unfinished", action="store_true", help="runs and sweeps that were interrupted, all of them")
    add(
        "--checkpoints",
        action="store_true",
        help="of finished runs, networks, agents and attacks: what was tried and found stays",
    )
    add("--older-than", type=float, metavar="DAYS", help="only what was last written so long ago")
    add("--yes", action="store_true", help="delete it")
    options = parser.parse_args(arguments)
    if options.command == "prune":
        if not options.unfinished and not options.checkpoints:
            raise ValueError("say what is to be deleted: --unfinished, --checkpoints, or both")
        if options.older_than is not None and not options.older_than >= 0:
            raise ValueError(f"--older-than is {options.older_than}; it must be a number of days from 0")
    if options.command == "compare" and len(options.runs) < 2:
        raise ValueError(f"compare takes at least two runs, not {options.runs[0]} alone")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    if options.command == "list":
        missing = options.folders == [HOME] and not HOME.exists()
        entries = [] if missing else [entry for folder in options.folders for entry in find(folder)]
        if options.json:
            print(json.dumps([entry.summary() for entry in entries], indent=2))
        else:
            print_list(console, entries, options.folders)
    elif options.command == "show":
        content = shown(_whole(look(options.run)))
        print(json.dumps(content, indent=2)) if options.json else print_run(console, content)
    elif options.command == "compare":
        content = compared([_comparable(folder) for folder in options.runs])
        print(json.dumps(content, indent=2)) if options.json else print_comparison(console, content)
    else:
        prune(console, options)
    return 0


def print_list(console: Console, entries: Sequence[Entry], folders: Sequence[Path]) -> None:
    """A line for each run, and the reasons of those that are damaged."""
    if not entries:
        console.print(f"no runs in {', '.join(map(str, folders))}; python -m haq.search --hw edge makes one")
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("folder", "network", "target", "budget", "solver"):
        table.add_column(heading, overflow="fold")
    for heading in ("done", "search\naccuracy", "test\naccuracy"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for entry in entries:
        told, searches = entry.settings, " searches" if entry.kind == "sweep" else ""
        table.add_row(
            _plain(entry.folder),
            _plain(told.get("network", "–")),
            _plain(told.get("hw", "–")),
            _plain(f"{told['metric']} {told['budget']}" if told else "–"),
            _plain(told.get("solver", "–")),
            "–" if entry.asked is None else f"{entry.done}/{entry.asked}{searches}",
            _share(entry.search, told),
            _share(entry.test, told),
            f"[{COLORS[entry.state]}]{entry.state}[/]",
        )
    console.print(table)
    for entry in entries:
        if entry.reason:
            console.print(f"{entry.folder}: {entry.reason}", soft_wrap=True, markup=False, highlight=False)
    if any(entry.search is not None for entry in entries):
        sentence = (
            "Accuracies are measured: on the search split, of what was found, or is the best within the budget so far; on"
        )
        console.print(f"{sentence} the test split, of what was found, fine-tuned if it was.", soft_wrap=True, highlight=False)


def shown(entry: Entry) -> dict[str, Any]:
    """Everything there is to say of a run or a sweep, as plain data: what `show --json` prints."""
    config = entry.config
    return {
        **entry.summary(),
        "settings": config.get("asked") or config.get("settings", {}),
        "signature": config.get("signature", {}),
        "versions": config.get("versions", {}),
        "result": entry.result,
        "files": {str(path): count for path, count in sizes(entry.folder)},
        "commands": commands(entry),
    }


def commands(entry: Entry) -> dict[str, str]:
    """What to type to do the same again, and to go on."""
    found = {}
    name = "sweep" if entry.kind == "sweep" else "search"
    if entry.config:
        # A run's settings know their command; only here is torch imported.
        from haq.study.config import SearchConfig

        asked = entry.config.get("asked")
        if asked is None:
            found["again"] = SearchConfig.read(entry.config["settings"]).command()
        else:
            # Of a sweep, these vary; and it never fine-tunes.
            fixed = {option: value for option, value in asked["settings"].items() if option != "finetune_epochs"}
            lists = (f"--{option} {shlex.quote(','.join(asked[option]))}" for option in ("hw", "budgets", "solvers"))
            begin = f"python -m haq.sweep {' '.join(lists)} --seeds {asked['seeds']}"
            found["again"] = SearchConfig.read(fixed).command().replace("python -m haq.search", begin)
    if entry.state == INTERRUPTED and entry.config:
        found["go on"] = f"python -m haq.{name} --resume {entry.folder}"
    elif entry.state == FINISHED and entry.kind == "search":
        tuned = entry.result is not None and entry.result["finetuned"] is not None
        found["go on"] = f"python -m haq.{'evaluate' if tuned else 'finetune'} {entry.folder}"
    elif entry.state == FINISHED:
        found["go on"] = f"python -m haq.runs list {entry.folder}"
    return found


def print_run(console: Console, content: dict[str, Any]) -> None:
    result, grid = content["result"], Table.grid(padding=(0, 2))

    def add(name: str, value: Any) -> None:
        grid.add_row(f"[bold]{name}[/]", _plain(value))

    reason = f", {content['reason']}" if content["reason"] else ""
    add(content["kind"], f"{content['folder']}: {content['state']}{reason}")
    if content["settings"]:
        add("asked", _pairs(content["settings"]))
        add("signature", _pairs(content["signature"]))
        add("versions", _pairs(content["versions"]))
        add("done", f"{content['done']} of {content['asked']} {'searches' if content['kind'] == 'sweep' else 'evaluations'}")
    if result:
        budget, key = result["budget"], result["objective"]
        holds = "holds" if budget["holds"] else "EXCEEDED"
        used = f"{_amount(budget['used'], budget['unit'])} of {_amount(budget['limit'], budget['unit'])}"
        add("budget", f"{budget['metric']}, {used}, {budget['used_fraction']:.3f} of uniform 8 bits: {holds}")
        for name in ("float", "uniform8", "found", "finetuned"):
            if row := result[name]:
                add(name, f"{_percent(row[f'search_{key}'])} search, {_percent(row[f'test_{key}'])} test {key} (measured)")
    elif content["search_accuracy"] is not None:
        add("best so far", f"{_percent(content['search_accuracy'])} on the search split (measured)")
    parts: dict[str, list[int]] = {}
    for name, count in content["files"].items():
        parts.setdefault(f"{name.partition('/')[0]}/" if "/" in name else name, []).append(count)
    add("files", f"{size(content['bytes'])}: " + ", ".join(f"{name} {size(sum(counts))}" for name, counts in parts.items()))
    console.print(grid)
    for name, command in content["commands"].items():
        console.print(f"[bold]{name}[/]  {_plain(command)}", soft_wrap=True, highlight=False)  # unbroken, to be copied


def _whole(entry: Entry) -> Entry:
    """The entry itself. Raises ValueError with the reason if it is damaged."""
    if entry.state == DAMAGED:
        raise ValueError(entry.reason)
    return entry


def _comparable(folder: Path) -> Entry:
    entry = _whole(look(folder))
    if entry.kind == "sweep":
        raise ValueError(f"{folder} is a sweep: compare runs of it, which python -m haq.runs list {folder} names")
    if not entry.config:
        raise ValueError(f"{folder} can't be compared: {entry.reason}")
    return entry


def compared(entries: Sequence[Entry]) -> dict[str, Any]:
    """Differences of what was asked, and what came out, by run, as plain data. Accuracies are left out, and the reason is
    given, if they aren't of the same network, data and objective."""
    asked = [{**entry.settings, **_named("signature", entry), **_named("version", entry)} for entry in entries]
    names = dict.fromkeys(name for one in asked for name in one)
    differing = [name for name in names if len({repr(one.get(name)) for one in asked}) > 1]
    terms = [name for name in differing if name in (*TERMS, "signature of network", "signature of data")]
    folders = [str(entry.folder) for entry in entries]
    rows: dict[str, list[Any]] = {"state": [entry.state for entry in entries]}
    if not terms:
        objective = entries[0].settings.get("objective", "accuracy")
        rows[f"search {objective}, best within the budget"] = [entry.search for entry in entries]
        rows[f"test {objective}, found"] = [_of(entry, "found") for entry in entries]
        rows[f"test {objective}, fine-tuned"] = [_of(entry, "finetuned") for entry in entries]
    budgets = [entry.result["budget"] if entry.result else {} for entry in entries]
    if "hw" not in differing and "metric" not in differing:
        rows["cost"] = [_amount(budget["used"], budget["unit"]) if budget else None for budget in budgets]
    rows["cost, of uniform 8 bits"] = [budget.get("used_fraction") for budget in budgets]
    rows["evaluations"] = [entry.done for entry in entries]
    return {
        "runs": folders,
        "differences": {name: [one.get(name) for one in asked] for name in differing},
        "comparable": not terms,
        "reason": f"they are of another {', '.join(terms)}" if terms else "",
        "results": rows,
    }


def _named(part: str, entry: Entry) -> dict[str, Any]:
    return {f"{part} of {name}": value for name, value in entry.config[{"version": "versions"}.get(part, part)].items()}


def _of(entry: Entry, name: str) -> float | None:
    row = entry.result[name] if entry.result else None
    return row[f"test_{entry.result['objective']}"] if entry.result and row else None


def print_comparison(console: Console, content: dict[str, Any]) -> None:
    for title, rows in (("what was asked differently", content["differences"]), ("what came out", content["results"])):
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("")
        for name in content["runs"]:
            table.add_column(_plain(name), overflow="fold", justify="right")
        for name, cells in rows.items():
            table.add_row(name, *(_cell(name, cell) for cell in cells))
        console.print(table if rows else f"{title}: nothing")
    if not content["comparable"]:
        console.print(f"Their accuracies can't be compared: {content['reason']}.", soft_wrap=True, highlight=False)


def prune(console: Console, options: argparse.Namespace) -> None:
    """Delete what was asked for, or say what that would be."""
    victims = cleanup.choose(
        options.folder,
        unfinished=options.unfinished,
        checkpoints=options.checkpoints,
        older_than_days=options.older_than,
    )
    count = 0
    for victim in victims:
        folder, held = victim.entry.folder, victim.bytes
        if victim.spared:
            console.print(f"left alone: {folder}, {victim.spared}", soft_wrap=True, markup=False, highlight=False)
            continue
        if options.yes and not cleanup.delete(victim):
            console.print(f"left alone: {folder}, it is in use", soft_wrap=True, markup=False, highlight=False)
            continue
        count += held
        does = "deleted" if options.yes else "would delete"
        files = f"{len(victim.paths)} files, {size(held)}"
        console.print(f"{does}: {folder}, {victim.what}, {files}", soft_wrap=True, markup=False, highlight=False)
    if options.yes or not count:
        console.print(f"{size(count)} deleted" if count else f"nothing to delete in {options.folder}", highlight=False)
    else:
        console.print(f"{size(count)} in all; nothing was deleted: add --yes to do it", highlight=False)


def _pairs(content: dict[str, Any]) -> str:
    texts = {name: json.dumps(value) if isinstance(value, (dict, list)) else value for name, value in content.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        return _percent(value) if name.startswith(("search ", "test ")) else f"{value:.4g}"
    return "–" if value is None else _plain(value)


def _share(share: float | None, settings: dict[str, Any]) -> str:
    objective = settings.get("objective", "accuracy")
    return _percent(share) if share is None or objective == "accuracy" else f"{_percent(share)} {_plain(objective)}"


def _amount(value: float, unit: str) -> str:
    """A cost in the unit it reads best in: 8.9 us."""
    if unit == "B":
        return size(round(value))
    prefix, scale = next(((name, scale) for name, scale in PREFIXES.items() if abs(value) >= scale), ("n", 1e-9))
    return f"{value / scale:.4g} {prefix}{_plain(unit)}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def _plain(value: Any) -> str:
    """Text of a file in a table: neither markup nor what moves a terminal's cursor."""
    text = str(value).replace("[", r"\[")
    return "".join(char if char.isprintable() else "?" for char in text)


if __name__ == "__main__":
    sys.exit(cli.run_command(main))

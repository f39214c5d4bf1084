"""The runs there are: what became of them, what they asked for, how they differ.

A folder may hold runs or sweeps, or be one of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.console import Group as RenderGroup
from rich.padding import Padding
from rich.text import Text

from haq.console.commands import Group, main_of
from haq.console.errors import run_command
from haq.console.options import argument, flag, option, output_options
from haq.console.output import Output
from haq.console.tables import Column, command_line, key_table, new_table, plain, print_columns, say
from haq.console.values import FOLDER, NUMBER
from haq.store import cleanup
from haq.store.files import CONFIG, SWEEP
from haq.store.inventory import DAMAGED, FINISHED, INTERRUPTED, RUNNING, RunSummary, file_sizes, find_runs, summarize
from haq.store.records import UNIFORM_8, BudgetRecord, Measurement, short_reference
from haq.store.units import NOTHING, counted, describe_amount, describe_bytes, finite, metric_words, show
from hw_models.registry import printable

if TYPE_CHECKING:
    from haq.store.records import ResultRecord
    from haq.study.config import SearchConfig, SweepConfig

HOME = Path("runs")
# What values must agree in to be compared; eps is of the attack of one of the objectives.
TERMS = ("network", "data", "objective", "unit", "direction", "eps", "signature of network", "signature of data")
COLORS = {FINISHED: "green", INTERRUPTED: "yellow", RUNNING: "cyan", DAMAGED: "red"}
VALUES_ARE = (
    " are measured: on the search split, of what was found, or is the best within the budget so far; on the test "
    "split, of what was found, fine-tuned if it was."
)
# Settings that a sweep asks for several of, and fine-tuning, which it never does.
VARIED = ("hw", "budget", "solver", "seed", "finetune_epochs")
WHAT_DELETES = "What is deleted"

cli = Group("runs", __doc__, examples=("haq runs list", "haq runs show runs/edge-latency-0.5-ddpg-seed0"))


@cli.add("list", "Show every run and sweep in some folders, or of a sweep.")
@argument("folders", FOLDER, f"of runs, or one run or sweep (default: {HOME}/)", several=True, required=False)
@output_options(json="print JSON", quiet=False)
def list_runs(folders: tuple[Path, ...], as_json: bool) -> int:
    """Print a line for each run, or JSON."""
    runs: list[RunSummary] = []
    if folders or HOME.exists():
        runs = [run for folder in folders or (HOME,) for run in find_runs(folder)]
    if as_json:
        print(json.dumps([run.to_dict() for run in runs], indent=2))
    else:
        print_list(Output.open().results, runs, folders or (HOME,))
    return 0


@cli.add("show", "Show what a run was asked for, what it found, and the commands that go with it.")
@argument("run", FOLDER, "the folder of a run or a sweep")
@output_options(json="print JSON", quiet=False)
def show_run(run: Path, as_json: bool) -> int:
    """Print everything there is to say of a run, or JSON."""
    summary = _undamaged(summarize(run))
    if as_json:
        print(json.dumps(describe(summary), indent=2))
    else:
        print_run(Output.open().results, summary)
    return 0


@cli.add("compare", "Show runs side by side: first what was asked differently, then what came out.")
@argument("runs", FOLDER, "folders of runs, at least two", several=True)
@output_options(json="print JSON", quiet=False)
def compare_runs(runs: tuple[Path, ...], as_json: bool) -> int:
    """Print how runs differ, or JSON."""
    if len(runs) < 2:
        raise ValueError(f"compare takes at least two runs, not {runs[0]} alone")
    content = compare([_comparable(folder) for folder in runs])
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        print_comparison(Output.open().results, content)
    return 0


@cli.add("prune", "Delete what of runs isn't needed any more; without --yes only say what.")
@argument("folder", FOLDER, f"of runs, or one run (default: {HOME}/)", required=False)
@flag("--unfinished", "runs and sweeps that were interrupted, all of them", group=WHAT_DELETES)
@flag(
    "--checkpoints",
    "of finished runs, networks, agents and attacks: what was tried and found stays",
    group=WHAT_DELETES,
)
@option("--older-than", NUMBER, "only what was last written so long ago", group=WHAT_DELETES, metavar="DAYS")
@flag("--yes", "delete it", group=WHAT_DELETES)
def prune(folder: Path | None, unfinished: bool, checkpoints: bool, older_than: float | None, yes: bool) -> int:
    """Delete what was asked for, or say what that would be."""
    if not unfinished and not checkpoints:
        raise ValueError("say what is to be deleted: --unfinished, --checkpoints, or both")
    if older_than is not None and not older_than >= 0:
        raise ValueError(f"--older-than is {older_than}; it must be a number of days from 0")
    folder = folder or HOME
    console = Output.open().results
    removals = cleanup.plan_removals(folder, unfinished=unfinished, checkpoints=checkpoints, older_than_days=older_than)
    total = 0
    for removal in removals:
        size = removal.bytes
        reason = removal.kept_because
        if not reason and yes and not cleanup.remove(removal):
            reason = "it is in use"
        if reason:
            say(console, f"left alone: {removal.run.folder}, {reason}", wrap=False)
            continue
        total += size
        does = "would delete"
        if yes:
            does = "deleted"
        files = f"{counted(len(removal.paths), 'files')}, {describe_bytes(size)}"
        say(console, f"{does}: {removal.run.folder}, {removal.what}, {files}", wrap=False)
    if not total:
        say(console, f"nothing to delete in {folder}")
    elif yes:
        say(console, f"{describe_bytes(total)} deleted")
    else:
        say(console, f"{describe_bytes(total)} in all; nothing was deleted: add --yes to do it")
    return 0


def print_list(console: Console, runs: Sequence[RunSummary], folders: Sequence[Path]) -> None:
    """Print a table of runs, and the reasons of those that are damaged.

    Args:
        console: Where to; its width counts.
        runs: The runs and sweeps.
        folders: Where they were looked for.
    """
    if not runs:
        say(console, f"no runs in {', '.join(map(str, folders))}; python -m haq.search --hw edge makes one")
        return
    table = new_table()
    table.add_column("run", overflow="fold")
    for heading in ("done", "search", "test"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for run in runs:
        state = Text(run.state, COLORS[run.state])
        table.add_row(_name_and_question(run), _progress(run), run.show(run.search), run.show(run.test), state)
    console.print(table)
    for run in runs:
        if run.reason:
            say(console, f"{run.folder}: {run.reason}")
    if any(run.search is not None for run in runs):
        say(console, f"{_values_of(runs)}{VALUES_ARE}")


def describe(run: RunSummary) -> dict[str, Any]:
    """Return everything there is to say of a run or a sweep, as plain data: what `show --json` prints."""
    result = None
    if run.result is not None:
        result = run.result.to_dict()
    return {
        **run.to_dict(),
        "settings": _asked(run),
        "signature": run.signature,
        "versions": run.versions,
        "result": result,
        "files": {str(path): size for path, size in file_sizes(run.folder)},
        "commands": commands(run),
    }


def commands(run: RunSummary) -> dict[str, str]:
    """Return what to type to do the same again, and to go on, quoted for a shell."""
    found = {}
    asked = _config(run)
    if asked is not None:
        found["again"] = asked.command()
    following = _next_words(run)
    if following:
        # Listing the runs of a sweep needs no code.
        if asked is not None and following[0] != "haq.runs":
            following += asked.trust_words()
        found["go on"] = command_line("python", "-m", *following)
    return found


def print_run(console: Console, run: RunSummary) -> None:
    """Print what was asked, what was found, what lies in the folder, and the commands that go with it."""
    console.print(key_table(_facts(run)))
    for name, command in commands(run).items():
        # Unbroken, to be copied.
        console.print(Text.assemble((name, "bold"), "  ", command), soft_wrap=True, highlight=False)


def compare(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """Find what was asked differently and what came out, by run.

    Values are left out, and the reason is given, if they aren't of the same network, data and objective.

    Args:
        runs: At least two.

    Returns:
        Plain data: what `compare --json` prints. Its `order` has the runs by what they found on the test split, the best one
        first.
    """
    asked = [_terms(run) for run in runs]
    names = dict.fromkeys(name for one in asked for name in one)
    differing = [name for name in names if len({repr(one.get(name)) for one in asked}) > 1]
    terms = [name for name in differing if name in TERMS]
    reason = ""
    if terms:
        reason = f"they are of another {', '.join(terms)}"
    return {
        "runs": [str(run.folder) for run in runs],
        "differences": {name: [one.get(name) for one in asked] for name in differing},
        "comparable": not terms,
        "reason": reason,
        **_judging(runs, not terms),
        "results": _outcomes(runs, not terms, "hw" not in differing and "metric" not in differing),
    }


def print_comparison(console: Console, content: Mapping[str, Any]) -> None:
    """Print what `compare` found, a column for each run."""
    for title, rows in (("what was asked differently", content["differences"]), ("what came out", content["results"])):
        if not rows:
            say(console, f"{title}: nothing")
            continue
        columns = [Column("", list(rows))]
        for index, name in enumerate(content["runs"]):
            cells = [_cell(label, values[index], content["objective_unit"]) for label, values in rows.items()]
            columns.append(Column(name, cells))
        print_columns(console, title, columns)
    if not content["comparable"]:
        say(console, f"Their {content['values']} can't be compared: {content['reason']}.")
    if len(content["order"]) > 1:
        say(console, f"By test {content['objective_title']}, the best one first: {', '.join(content['order'])}", wrap=False)
    if content["below_best"]:
        parts = [f"{name} is {words}" for name, words in content["below_best"].items()]
        say(console, f"On the same test samples, ± one paired standard error: {'; '.join(parts)}.")


def _name_and_question(run: RunSummary) -> RenderableType:
    """Write the first cell of a run's row: its folder, and below it what was asked."""
    settings = run.settings
    if not settings:
        return plain(run.folder)
    words = [settings.get("network"), settings.get("hw"), _limits_asked(settings)]
    words.append(settings.get("solver"))
    if run.objective != "accuracy":
        words.append(run.objective)
    question = ", ".join(map(str, words))
    if run.kind == "sweep":
        question = f"sweep: {question}"
    return RenderGroup(plain(run.folder), Padding(plain(question), (0, 0, 0, 2)))


def _limits_asked(settings: Mapping[str, Any]) -> str:
    """Write what a run was asked to keep within, and what it looks for if that isn't the best policy."""
    words = f"{settings.get('metric')} {settings.get('budget')}"
    if "=" in str(settings.get("budget")):
        words = str(settings["budget"]).replace(",", " ")
    for name in ("max_drop", "at_least", "tradeoff", "prune", "criterion"):
        if settings.get(name) is not None:
            words += f" {name.replace('_', '-')} {settings[name]}"
    return words


def _progress(run: RunSummary) -> str:
    if run.asked is None:
        return NOTHING
    return f"{run.done}/{run.asked}"


def _asked(run: RunSummary) -> dict[str, Any]:
    """Return what was asked for, as it stands in the file of the run or sweep."""
    if run.sweep is not None:
        return run.sweep.asked.to_dict()
    if run.config is not None:
        return run.config.settings
    return {}


def _next_words(run: RunSummary) -> list[Any]:
    """Return what goes on with a run or sweep, word by word; nothing if that isn't known."""
    folder = run.folder
    if run.state == INTERRUPTED and run.sweep is not None:
        return ["haq.sweep", "--resume", folder]
    if run.state == INTERRUPTED and run.config is not None:
        return ["haq.search", "--resume", folder]
    if run.state == FINISHED and run.kind == "sweep":
        return ["haq.runs", "list", folder]
    if run.state == FINISHED and run.result is not None and run.result.finetuned is None:
        return ["haq.finetune", folder]
    if run.state == FINISHED:
        return ["haq.evaluate", folder]
    return []


def _config(run: RunSummary) -> SearchConfig | SweepConfig | None:
    """Return what a run or sweep was asked for, checked; None if that isn't known. Raises ValueError naming the file."""
    from haq.study.config import SearchConfig, SweepConfig

    name = CONFIG
    try:
        if run.sweep is not None:
            name = SWEEP
            return SweepConfig.read(run.sweep.asked.to_dict())
        if run.config is not None:
            return SearchConfig.read(run.config.settings)
    except ValueError as error:
        raise ValueError(f"{run.folder / name}: {error}") from error
    return None


def _facts(run: RunSummary) -> Iterator[tuple[str, str]]:
    """Yield what is to be said of a run or sweep: names and values."""
    reason = ""
    if run.reason:
        reason = f", {run.reason}"
    yield run.kind, printable(f"{run.folder}: {run.state}{reason}")
    asked = _asked(run)
    if run.sweep is not None:
        shared = {name: value for name, value in run.sweep.asked.settings.items() if name not in VARIED}
        asked = {**shared, **{name: value for name, value in asked.items() if name != "settings"}}
    if asked:
        unit = "evaluations"
        if run.kind == "sweep":
            unit = "searches"
        yield "asked", _pairs(asked)
        yield from _code(run)
        yield "signature", _pairs(run.signature)
        yield "versions", _pairs(run.versions)
        yield "done", f"{run.done} of {run.asked} {unit}"
    if run.result is not None:
        yield from _results(run)
    elif run.search is not None:
        yield "best so far", f"{run.show(run.search)} on the search split (measured)"
    yield "files", _sizes(run)


def _code(run: RunSummary) -> Iterator[tuple[str, str]]:
    """Yield the code that a run or sweep names, and what lets a command import it."""
    config = _config(run)
    if config is not None and config.code():
        names = dict.fromkeys(name for _, name in config.code())
        yield "code", printable(f"{', '.join(names)}: if you trust it, give --trust with each name to commands that use it")


def _results(run: RunSummary) -> Iterator[tuple[str, str]]:
    """Yield what a finished search found."""
    result = run.result
    assert result is not None
    if result.goal is not None:
        yield "goal", result.goal.words
    for budget in result.all_budgets:
        yield "budget", _budget_words(budget, short_reference(result.reference))
    if result.reached is not None:
        yield "reached", result.reached_words
    if result.channels is not None:
        yield "channels", result.channels.words
    if result.choice is not None:
        yield "choice", result.choice.words
    name_of_reference = "uniform8"
    if result.reference != UNIFORM_8:
        name_of_reference = "reference"
        yield name_of_reference, result.reference
    measured: dict[str, Measurement | None] = {
        "float": result.of_float,
        name_of_reference: result.uniform8,
        "found": result.found,
        "finetuned": result.finetuned,
    }
    for name, row in measured.items():
        if row is not None:
            search, test = (result.show(result.value(row, split)) for split in ("search", "test"))
            yield name, f"{search} search, {test} test {result.objective_title} (measured){_against_float(result, row)}"


def _against_float(result: ResultRecord, row: Measurement) -> str:
    """Say how far a row is from float on the test split, where the standard error of that is known."""
    error = row.paired_error("test", result.objective, "float")
    if error is None:
        return ""
    value, of_float = (result.value(one, "test") for one in (row, result.of_float))
    return f"; test {result.difference(value, of_float, error, 'float')}"


def _budget_words(budget: BudgetRecord, reference: str) -> str:
    """Say what is used of a budget.

    Args:
        budget: The budget.
        reference: What fractions are of, in words.

    Returns:
        Words such as "latency, 838.9 us of 839 us, 0.500 of uniform 8 bits: holds".
    """
    used = f"{metric_words(budget.metric)}, {describe_amount(budget.used, budget.metric)}"
    fraction = f"{budget.used_fraction:.3f} of {reference}"
    if budget.limit is None:
        return f"{used}, {fraction}: no budget limits it"
    verdict = "EXCEEDED"
    if budget.holds:
        verdict = "holds"
    return f"{used} of {describe_amount(budget.limit, budget.metric)}, {fraction}: {verdict}"


def _sizes(run: RunSummary) -> str:
    """Say what lies in a folder, folders in it as one, with their bytes."""
    sizes: dict[str, int] = {}
    for path, size in file_sizes(run.folder):
        name = path.parts[0]
        if len(path.parts) > 1:
            name = f"{name}/"
        sizes[name] = sizes.get(name, 0) + size
    parts = ", ".join(f"{name} {describe_bytes(size)}" for name, size in sizes.items())
    return f"{describe_bytes(sum(sizes.values()))}: {parts}"


def _undamaged(run: RunSummary) -> RunSummary:
    """Return the run itself; ValueError with the reason if it is damaged."""
    if run.state == DAMAGED:
        raise ValueError(run.reason)
    return run


def _comparable(folder: Path) -> RunSummary:
    run = _undamaged(summarize(folder))
    if run.kind == "sweep":
        runs = command_line("python", "-m", "haq.runs", "list", folder)
        raise ValueError(f"{folder} is a sweep: compare runs of it, which {runs} names")
    if run.config is None:
        raise ValueError(f"{folder} can't be compared: {run.reason}")
    return run


def _terms(run: RunSummary) -> dict[str, Any]:
    """Return what a run was asked for, and what it began with, by name."""
    signature = {f"signature of {name}": value for name, value in run.signature.items()}
    versions = {f"version of {name}": value for name, value in run.versions.items()}
    judged = {"unit": run.objective_unit, "direction": "lower is better"}
    if run.higher_is_better:
        judged["direction"] = "higher is better"
    return {**run.settings, **judged, **signature, **versions}


def _judging(runs: Sequence[RunSummary], comparable: bool) -> dict[str, Any]:
    """Tell what the values of runs are of, and which is better.

    Args:
        runs: The runs.
        comparable: Their values can be put side by side.

    Returns:
        Title and unit of the objective, what its values are called, and the runs in their order; nothing of values that
        aren't of one objective.
    """
    if not comparable:
        values = _values_of(runs).lower()
        return {"objective_title": "", "objective_unit": "", "values": values, "order": [], "below_best": {}}
    first = runs[0]
    tested = [run for run in runs if run.test is not None]
    tested.sort(key=lambda run: run.test or 0.0, reverse=first.higher_is_better)
    return {
        "objective_title": first.objective_title,
        "objective_unit": first.objective_unit,
        "values": _values_of(runs).lower(),
        "order": [str(run.folder) for run in tested],
        "below_best": _below_best(tested),
    }


def _below_best(runs: Sequence[RunSummary]) -> dict[str, str]:
    """Say how far runs are from the best of them on the test split, where it is known which samples they answer rightly.

    Args:
        runs: All with a value on the test split, the best one first.

    Returns:
        Words by folder, for all but the best.
    """
    found: dict[str, str] = {}
    for run in runs[1:]:
        first, other = runs[0].result, run.result
        if first is None or other is None or first.answers is None or other.answers is None:
            continue
        error = first.answers.paired_error(other.answers)
        value, best = (result.value(result.last, "test") for result in (other, first))
        found[str(run.folder)] = first.difference(value, best, error, str(runs[0].folder))
    return found


def _values_of(runs: Sequence[RunSummary]) -> str:
    """Name the values of runs, at the beginning of a sentence."""
    if all(run.objective_title == "accuracy" for run in runs):
        return "Accuracies"
    return "Values"


def _outcomes(runs: Sequence[RunSummary], comparable: bool, same_unit: bool) -> dict[str, list[Any]]:
    """Return what came out, by name, a value for each run.

    Args:
        runs: The runs.
        comparable: Their values can be put side by side.
        same_unit: Their costs are of one metric and target.
    """
    rows: dict[str, list[Any]] = {"state": [run.state for run in runs]}
    if comparable:
        objective = runs[0].objective_title
        rows[f"search {objective}, best within the budget"] = [finite(run.search) for run in runs]
        rows[f"test {objective}, found"] = [finite(_tested(run, finetuned=False)) for run in runs]
        rows[f"test {objective}, fine-tuned"] = [finite(_tested(run, finetuned=True)) for run in runs]
    if same_unit:
        rows["cost"] = [_cost(run) for run in runs]
    references = {run.result.reference for run in runs if run.result is not None}
    of_what = "the reference"
    if len(references) == 1:
        of_what = short_reference(next(iter(references)))
    elif not references:
        of_what = UNIFORM_8
    rows[f"cost, of {of_what}"] = [_fraction(run) for run in runs]
    for metric in _further_metrics(runs):
        rows[metric_words(metric)] = [_cost(run, metric) for run in runs]
    if any(_channels(run) is not None for run in runs):
        rows["channels kept"] = [_channels(run) for run in runs]
    rows["evaluations"] = [run.done for run in runs]
    return rows


def _channels(run: RunSummary) -> str | None:
    """Write how many channels are kept of those that were searched; None where none were, or the run isn't finished."""
    if run.result is None or run.result.channels is None:
        return None
    return run.result.channels.short


def _further_metrics(runs: Sequence[RunSummary]) -> list[str]:
    """List the metrics, beside the main ones, that a budget of some run is of."""
    budgets = [budget for run in runs if run.result is not None for budget in run.result.budgets[1:]]
    return list(dict.fromkeys(budget.metric for budget in budgets))


def _cost(run: RunSummary, metric: str | None = None) -> str | None:
    """Write what was found costs by a metric, or by the run's own; None where that isn't known."""
    if run.result is None:
        return None
    if metric is None:
        return describe_amount(run.result.budget.used, run.result.budget.metric)
    cost = run.result.found.cost(metric)
    if cost is None:
        return None
    return describe_amount(cost, metric)


def _fraction(run: RunSummary) -> float | None:
    """Return what was found costs as a fraction of the run's reference."""
    if run.result is None:
        return None
    return run.result.budget.used_fraction


def _tested(run: RunSummary, *, finetuned: bool) -> float | None:
    if run.result is None:
        return None
    row: Measurement | None = run.result.found
    if finetuned:
        row = run.result.finetuned
    if row is None:
        return None
    return run.result.value(row, "test")


def _cell(name: str, value: Any, unit: str) -> str:
    """Write a cell of a comparison: the row's name, its value, and the unit of the objective."""
    if value is None:
        return NOTHING
    if not isinstance(value, float):
        return str(value)
    if name.startswith(("search ", "test ")):
        return show(value, unit)
    return f"{value:.4g}"


def _pairs(content: Mapping[str, Any]) -> str:
    texts = []
    for name, value in content.items():
        if value is None:
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value))
        texts.append(f"{name} {value}")
    return ", ".join(texts)


main = main_of(cli)

if __name__ == "__main__":
    sys.exit(run_command(lambda: main(None)))

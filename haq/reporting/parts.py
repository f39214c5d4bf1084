"""What a report says of a run or a sweep, section by section: facts, sentences, tables and charts, still without HTML."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from haq.amounts import percent
from haq.folder import RunFolder, SweepFolder
from haq.records import Attacked, Entry, Result, Robustness, Searched, Specialisation, SweepBegun, SweepDone
from haq.reporting import charts, comparisons
from haq.reporting.drawing import Picture, amount, called, kind_of_cost

COSTS = {"latency": "latency_s", "energy": "energy_j", "storage": "storage_bytes"}


@dataclass(frozen=True)
class Fact:
    """A figure that is shown large, with what it is."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows. A cell of `links` leads to a part of the page."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    links: Mapping[str, str] = field(default_factory=dict)
    words: bool = False  # rather than numbers


@dataclass(frozen=True)
class Section:
    title: str
    stamp: str = ""  # what must not be overlooked
    sentences: Sequence[str] = ()
    points: Sequence[str] = ()  # a list below the sentences
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    command: str = ""


@dataclass(frozen=True)
class Part:
    """A run or a sweep."""

    anchor: str
    title: str
    folder: str
    finished: bool
    sentences: Sequence[str]
    facts: Sequence[Fact]
    sections: Sequence[Section]
    command: str = ""  # what goes on with it, if it isn't finished


def names(folders: Sequence[Path]) -> list[str]:
    """What folders are called on the page: as little of their paths as tells them apart, and nobody's home."""
    paths = [folder.resolve() for folder in folders]
    if len(paths) == 1:
        return [paths[0].name]
    shared = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(shared).as_posix() for path in paths]


def of(source: RunFolder | SweepFolder, name: str, anchor: str) -> Part:
    if isinstance(source, RunFolder):
        return _of_run(source, name, anchor)
    if isinstance(source.content, SweepDone):
        return _of_sweep(source.content, name, anchor)
    return _begun(source, name, anchor)


def overview(sources: Sequence[RunFolder | SweepFolder], told: Sequence[Part]) -> Section:
    """All of them in one table, and searches of the same problem in one chart."""
    rows = [_line(source, part.folder) for source, part in zip(sources, told, strict=True)]
    runs = [(part.folder, source) for source, part in zip(sources, told, strict=True) if isinstance(source, RunFolder)]
    links = {part.folder: part.anchor for part in told}
    return Section("Overview", pictures=_joint(runs), tables=[_list("Runs and sweeps", rows, links)])


def _list(caption: str, rows: list[list[str]], links: Mapping[str, str]) -> Table:
    head = ["folder", "state", "network", "target", "metric", "solver", "used of budget", "float", "found", "fine-tuned"]
    note = (
        "Float, found and fine-tuned: measured on the test split; of a run that isn't finished, on the search split, by which "
        "policies are chosen. What is estimated and what is measured of the costs is told in each section."
    )
    return Table(caption, head, rows, note, links)


def _line(source: RunFolder | SweepFolder, name: str) -> list[str]:
    if isinstance(source, SweepFolder):
        content = source.content
        state = "finished sweep" if content.finished else "unfinished sweep"
        asked, settings = content.asked, content.asked.settings
        told = [str(settings.get("network", "")), ", ".join(asked.hw), str(settings.get("metric", ""))]
        return [name, state, *told, ", ".join(asked.solvers), f"{len(asked.budgets)} budgets", "–", "–", "–"]
    problem, result = source.problem, source.result
    told = [problem.network, problem.target.name, problem.metric, source.solver]
    limit = amount(problem.limit, problem.metric)
    if result is None:
        used = f"{amount(source.best.cost, problem.metric)} of {limit}" if source.best else f"– of {limit}"
        found = f"{percent(source.best.accuracy)} (search)" if source.best else "–"
        return [name, "unfinished", *told, used, f"{percent(problem.float_accuracy)} (search)", found, "–"]
    key = f"test_{result.reward}"
    shares = [percent(entry.get(key)) if entry else "–" for entry in (result.of_float, result.found, result.finetuned)]
    return [name, "finished", *told, f"{amount(result.budget.used, problem.metric)} of {limit}", *shares]


def _joint(runs: Sequence[tuple[str, RunFolder]]) -> list[Picture]:
    def problem(run: tuple[str, RunFolder]) -> tuple[str, ...]:
        one = run[1].problem
        return one.network, one.data, one.target.name, one.metric, one.reward

    groups = [list(group) for _, group in itertools.groupby(sorted(runs, key=problem), key=problem)]
    return [comparisons.together(group) for group in groups if len(group) > 1 and any(run.history for _, run in group)]


def _of_run(run: RunFolder, name: str, anchor: str) -> Part:
    problem, result = run.problem, run.result
    sections = []
    if result is not None:
        sections.append(Section("Result", tables=[_results(run, result)]))
    if run.policy is not None:
        sections.append(Section("Bits per layer", pictures=[charts.bits(run)]))
    if run.history:
        sections.append(Section("Search", pictures=[charts.tried(run), charts.convergence(run)]))
    if run.robustness is not None:
        sections.append(_attacked(run.robustness))
    if result is not None and result.verified is not None:
        sections.append(_verified(result.verified))
    sections += [_provenance(run), _configuration(run)]
    return Part(
        anchor,
        f"{problem.network} on {problem.target.name}",
        name,
        run.finished,
        [_verdict(run, result) if result else _so_far(run)],
        _facts(run, result) if result else _facts_so_far(run),
        sections,
        "" if run.finished else f"python -m haq.search --resume {run.folder}",
    )


def _verdict(run: RunFolder, result: Result) -> str:
    metric, reward, key = run.problem.metric, called(result.reward), f"test_{result.reward}"
    found, of_float = result.found[key] or 0.0, result.of_float[key] or 0.0
    budget, kind = result.budget, kind_of_cost(run)
    tuned = f"; fine-tuned, {percent(result.finetuned[key])}" if result.finetuned else ""
    return (
        f"The policy found by {result.solver} has {percent(found)} {reward} on the test split, {_points(found - of_float)} "
        f"float{tuned} (measured). It takes {amount(budget.used, metric)} of {metric} ({kind}), {budget.used_fraction:.3f} of "
        f"uniform 8 bits. The budget of {amount(budget.limit, metric)} {'holds' if budget.holds else 'is EXCEEDED'}."
    )


def _so_far(run: RunFolder) -> str:
    done = sum(one.solver == run.solver for one in run.history)
    asked = run.config.settings.get("evaluations", "?")
    words = f"This run is not finished: {done} of at most {asked} evaluations by {run.solver} are there."
    if run.best is None:
        return f"{words} None of them is within the budget yet."
    metric = run.problem.metric
    return (
        f"{words} The best within the budget so far has {percent(run.best.accuracy)} on the search split (measured), float "
        f"has {percent(run.problem.float_accuracy)}; it takes {amount(run.best.cost, metric)} of at most "
        f"{amount(run.problem.limit, metric)} {metric} ({kind_of_cost(run)})."
    )


def _facts(run: RunFolder, result: Result) -> list[Fact]:
    metric, kind, budget = run.problem.metric, kind_of_cost(run), result.budget
    reward, key = called(result.reward), f"test_{result.reward}"
    of_float = result.of_float[key] or 0.0

    def judged(label: str, entry: Entry) -> Fact:
        share = entry[key] or 0.0
        return Fact(label, percent(share), f"test {reward}, measured; {_points(share - of_float)} float")

    facts = [Fact("Float", percent(of_float), f"test {reward}, measured"), judged(f"Found by {result.solver}", result.found)]
    if result.finetuned:
        facts.append(judged("Fine-tuned", result.finetuned))
    share = f"{100 * budget.used / budget.limit:.1f} %" if budget.limit else "–"
    facts.append(
        Fact(
            metric.capitalize(), amount(budget.used, metric), f"{kind}; {share} of the budget, {amount(budget.limit, metric)}"
        )
    )
    of_uniform = f"of uniform 8 bits, {amount(run.problem.uniform8, metric)}; {kind}"
    facts.append(Fact("Against 8 bits", f"{100 * budget.used_fraction:.1f} %", of_uniform))
    facts.append(Fact("Budget", "✓ holds" if budget.holds else "✗ EXCEEDED", f"{budget.fraction:.3g} of uniform 8 bits"))
    return facts


def _facts_so_far(run: RunFolder) -> list[Fact]:
    metric, reward = run.problem.metric, called(run.problem.reward)
    facts = [Fact("Float", percent(run.problem.float_accuracy), f"search {reward}, measured")]
    if run.best is not None:
        facts.append(Fact("Best so far", percent(run.best.accuracy), f"search {reward}, measured, by {run.solver}"))
        facts.append(Fact(metric.capitalize(), amount(run.best.cost, metric), f"{kind_of_cost(run)}; within the budget"))
    facts.append(Fact("Budget", amount(run.problem.limit, metric), f"{metric}, at most"))
    return facts


def _points(difference: float) -> str:
    """A difference of two shares, as a distance from the second: "0.70 points below"."""
    words = f"{100 * abs(difference):.2f} points"
    return "as good as" if words == "0.00 points" else f"{words} {'below' if difference < 0 else 'above'}"


def _results(run: RunFolder, result: Result) -> Table:
    """The table that the search prints."""
    robust = result.reward == "accuracy+robust"
    shares = [(f"{split} {called(result.reward)} (measured)", f"{split}_{result.reward}") for split in ("test", "search")]
    if robust:
        shares.insert(0, ("test accuracy (measured)", "test_accuracy"))
    kind = run.problem.target.provenance.split(" ")[0]
    metrics = [name for name, key in COSTS.items() if result.uniform8.get(key) is not None]
    head = ["policy", *(name for name, _ in shares)]
    head += [f"{name} ({'counted' if name == 'storage' else kind})" for name in metrics] + ["evaluations"]
    entries: list[tuple[str, Entry | None, str]] = [
        ("float", result.of_float, ""),
        ("uniform 8 bits", result.uniform8, ""),
        (f"found by {result.solver}", result.found, _count(result, result.solver)),
        ("fine-tuned", result.finetuned, ""),
        *((f"found by {name}", entry, _count(result, name)) for name, entry in result.rivals.items()),
    ]
    rows = [
        [
            label,
            *(percent(entry.get(key)) for _, key in shares),
            *(_cost(entry.get(COSTS[name]), name) for name in metrics),
            evaluations,
        ]
        for label, entry, evaluations in entries
        if entry is not None
    ]
    note = f"{run.problem.data}. {called(result.reward).capitalize()} {result.accuracy_is}; cost {result.cost_is}."
    if robust:
        note += f" Worst case: {run.problem.reward_is}, right both times; a cheap attack, no evaluation of robustness."
    return Table(f"{result.network} on {result.data}, {result.target}", head, rows, note)


def _count(result: Result, solver: str) -> str:
    return str(result.evaluations.get(solver, ""))


def _cost(value: float | None, metric: str) -> str:
    return "–" if value is None else amount(value, metric)


def _attacked(found: Robustness) -> Section:
    """What the robustness command prints, in its words."""
    networks = found.networks
    names = list(networks)
    attacks = list(dict.fromkeys(attack for one in networks.values() for attack in one.attacks))
    rows = [["none", *(_tenth(one.clean) for one in networks.values())]]
    rows += [[attack, *(_tenth(one.attacks.get(attack)) for one in networks.values())] for attack in attacks]
    rows.append(
        ["worst case, image by image", *(f"{'<= ' if one.masked else ''}{_tenth(one.worst)}" for one in networks.values())]
    )
    checks = list(dict.fromkeys(check.name for one in networks.values() for check in one.checks))
    held = [{check.name: check.passed for check in one.checks} for one in networks.values()]
    words = {True: "PASS", False: "FAIL", None: "–"}
    masked = [name for name, one in networks.items() if one.masked]
    given = "rounded to 8 bits" if found.requantized_input else "as the attacker made them"
    sentence = (
        f"The attacker may change any of {found.images:,} test images of {found.data} within {found.threat}, and knows "
        f"weights, bits and quantizers; gradients by {found.backward}. Attacks: {found.attacks}, seed {found.seed}. Networks "
        f"get images {given}. The number that counts is the worst case over all attacks, image by image."
    )
    points = []
    for name, one in networks.items():
        points += [f"{name}: FAIL: {check.name}: {check.figures}." for check in one.checks if not check.passed]
        points.append(f"{name}: {_tenth(one.worst)}, {one.verdict}.")
        points += [f"{name}, as an integer network: {_deployed(one)}"] if one.deployed else []
    return Section(
        "Under attack",
        f"Masked gradients: of {' and '.join(masked)} the worst case is an upper bound, no assurance." if masked else "",
        [sentence],
        points,
        [comparisons.attacked(found)],
        [
            Table(f"Accuracy under attack, measured, {found.threat}", ["attack", *names], rows),
            Table(
                "Signs of masked gradients",
                ["what should hold", *names],
                [[check, *(words[one.get(check)] for one in held)] for check in checks],
            ),
            Table("Networks", ["network", "what it is"], [[name, one.what] for name, one in networks.items()], words=True),
        ],
    )


def _deployed(one: Attacked) -> str:
    assert one.deployed is not None
    if one.deployed.reason:
        return one.deployed.reason
    right = _tenth(one.deployed.right / one.deployed.images) if one.deployed.images else "–"
    return (
        f"{right} right on its worst images, another answer than in PyTorch on {one.deployed.different} of "
        f"{one.deployed.images:,}."
    )


def _verified(one: Attacked) -> Section:
    failed = "; ".join(f"{check.name}: {check.figures}" for check in one.checks if not check.passed)
    return Section(
        "Verified under attack by the search",
        "Masked gradients: the worst case is an upper bound, no assurance." if one.masked else "",
        [
            f"By the full suite on {one.images:,} test images: {percent(one.worst)} right in the worst case, "
            f"{one.verdict}{f' ({failed})' if failed else ''}."
        ],
    )


def _tenth(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


_ESTIMATED = "Estimated means computed by a model of the hardware: nothing of it was run there."
_MEASURED = "Measured means timed layer by layer; the whole network may take more or less than their sum."


def _provenance(run: RunFolder) -> Section:
    problem, result = run.problem, run.result
    target = problem.target
    reward = called(problem.reward)
    where = result.accuracy_is if result else "measured where the search runs"
    sentences = [
        f"{reward.capitalize()}: {where}, with PyTorch and fake-quantized networks. The search split "
        f"({problem.images:,} images) is what policies are chosen by; no search and no training sees the test split.",
        f"Latency and energy: {target.provenance}, {target.description}, batch {target.batch}. "
        + (_MEASURED if target.provenance.startswith("measured") else _ESTIMATED),
        "Storage: counted from the bits, with all that comes with the weights.",
    ]
    if problem.reward != "accuracy":
        sentences.insert(1, f"Policies are judged by: {problem.reward_is}.")
    return Section("What is estimated, what is measured", sentences=sentences)


def _configuration(run: RunFolder) -> Section:
    problem = run.problem
    low, high = problem.bits
    fixed = [layer.name for layer in problem.layers if layer.fixed]
    told = [
        ["network", f"{problem.network} ({problem.origin}), {len(problem.layers)} quantizable layers"],
        ["data", problem.data],
        ["target", f"{problem.target.name}: {problem.target.description}"],
        [
            "budget",
            f"{amount(problem.limit, problem.metric)} {problem.metric}, {problem.limit / problem.uniform8:.3g} of uniform "
            f"8 bits ({amount(problem.uniform8, problem.metric)}); at least {amount(problem.smallest, problem.metric)} is "
            "possible",
        ],
        ["bits", f"{low} to {high}" + (f"; fixed: {', '.join(fixed)}" if fixed else "")],
    ]
    return _asked(told, run.config.settings, run.config.versions, run.config.command)


def _asked(told: list[list[str]], settings: Mapping[str, Any], versions: Mapping[str, str], command: str | None) -> Section:
    rows = [[f"--{name.replace('_', '-')}", str(value)] for name, value in settings.items() if value is not None]
    tables = [Table("Problem", ["what", "value"], told, words=True)] if told else []
    return Section(
        "Configuration",
        sentences=["This command repeats it; the same seed on the same machine gives the same files." if command else ""],
        tables=[
            *tables,
            Table("Settings", ["option", "value"], rows, words=True),
            Table("Versions", ["package", "version"], [list(one) for one in versions.items()], words=True),
        ],
        command=command or "",
    )


def _of_sweep(content: SweepDone, name: str, anchor: str) -> Part:
    reward, key = called(content.reward), f"test_{content.reward}"
    asked = content.asked
    sizes = " and ".join(f"{count:,} {split}" for split, count in content.images.items())
    facts = [Fact("Float", percent(content.of_float.get(key)), f"test {reward}, measured")]
    for target in content.targets.values():
        if target.found:
            best = min(target.found, key=lambda row: (-row.share(key), row.fraction))
            what = f"test {reward}, measured, by {best.solver} at {best.fraction:.3f} of uniform 8 bits ({target.kind})"
            facts.append(Fact(f"Best on {target.name}", percent(best.share(key)), what))
    sections = []
    for target in content.targets.values():
        missed = [f"Budgets {target.left_out}."] if target.left_out else []
        pictures = [comparisons.sweep(content, target)] if target.found else []
        sections.append(Section(f"Pareto front on {target.name}", sentences=missed, pictures=pictures))
    if content.specialisation is not None:
        sections.append(Section("Specialisation", tables=[_specialised(content, content.specialisation)]))
    kinds = [f"On {target.name}, {content.metric} is {target.cost_is}." for target in content.targets.values()]
    what = "" if content.reward_is == reward else f" ({content.reward_is})"
    measured = f"{reward.capitalize()}{what} is {content.accuracy_is}, on {sizes} images."
    estimated = [_ESTIMATED] if any(target.kind == "estimated" for target in content.targets.values()) else []
    sections.append(Section("What is estimated, what is measured", sentences=[measured, *kinds, *estimated]))
    searches: list[Searched] = [row for target in content.targets.values() for row in target.found]
    sections.append(_asked(_asked_of(content), _shared(asked.settings), content.versions, content.command))
    return Part(
        anchor,
        f"Sweep of {content.network} on {', '.join(target.name for target in content.targets.values())}",
        name,
        True,
        [
            f"{sum(len(row.runs) for row in searches)} searches of {content.network} on {content.data}, for "
            f"{content.metric}, by {', '.join(asked.solvers)}. Accuracies are of policies as they were found, without "
            "fine-tuning."
        ],
        facts,
        sections,
    )


def _specialised(content: SweepDone, special: Specialisation) -> Table:
    reward, names = called(content.reward), list(special.policies)
    head = ["found for", "by", f"test {reward} (measured)"]
    head += [f"{content.metric} on {name}{_kind(content, name)}" for name in names]
    rows = []
    for name, row in special.policies.items():
        shares = [f"{row.fractions[other]:.3f}{' *' if other == name else ''}" for other in names if other in row.fractions]
        rows.append([name, row.solver, percent(row.share(f"test_{content.reward}")), *shares])
    note = (
        f"{content.metric.capitalize()} as a fraction of uniform 8 bits on that target; budget {special.budget}. *: the "
        "target's own policy, the best on the search split of those found for it."
    )
    return Table("What a policy found for one target costs on another", head, rows, note)


def _kind(content: SweepDone, name: str) -> str:
    return f" ({content.targets[name].kind})" if name in content.targets else ""


def _asked_of(content: SweepBegun) -> list[list[str]]:
    asked = content.asked
    return [
        ["targets", ", ".join(asked.hw)],
        ["budgets", ", ".join(asked.budgets)],
        ["solvers", ", ".join(asked.solvers)],
        ["seeds", str(asked.seeds)],
    ]


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that don't vary from search to search; a sweep never fine-tunes."""
    return {key: value for key, value in settings.items() if key not in ("hw", "budget", "solver", "seed", "finetune_epochs")}


def _begun(source: SweepFolder, name: str, anchor: str) -> Part:
    content, runs = source.content, source.runs
    done = sum(run.finished for run in runs)
    rows = [_line(run, run.folder.name) for run in runs]
    named = [(run.folder.name, run) for run in runs]
    sections = [Section("Searches so far", pictures=_joint(named), tables=[_list("Searches", rows, {})])] if runs else []
    sections.append(_asked(_asked_of(content), _shared(content.asked.settings), content.versions, content.command))
    return Part(
        anchor,
        f"Sweep of {content.asked.settings.get('network', '')} on {', '.join(content.asked.hw)}",
        name,
        False,
        [f"This sweep is not finished: {len(runs)} searches are begun, {done} of them finished."],
        [],
        sections,
        f"python -m haq.sweep --resume {source.folder}",
    )

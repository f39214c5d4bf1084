"""What a report says of one run, finished or not."""

from __future__ import annotations

from haq.reporting import attacks, charts
from haq.reporting.drawing import amount
from haq.reporting.reading import RunFolder
from haq.reporting.sections import ESTIMATED, Fact, Part, Section, Table, configuration
from haq.store.records import COST_KEYS, Measurement, ResultRecord, objective_title
from haq.store.units import NOTHING, percent

ACCURACY = "accuracy"
MEASURED = "Measured means timed layer by layer; the whole network may take more or less than their sum."


def of_run(run: RunFolder, name: str, anchor: str) -> Part:
    problem, result = run.problem, run.result
    sections = []
    if result is not None:
        sections.append(Section("Result", tables=[_results(run, result)]))
    if run.policy is not None:
        sections.append(Section("Bits per layer", pictures=[charts.bits(run)]))
    if run.history:
        sections.append(Section("Search", pictures=[charts.tried(run), charts.convergence(run)]))
    if run.robustness is not None:
        sections.append(attacks.attacked(run.robustness))
    if result is not None and result.verified is not None:
        sections.append(attacks.verified(result.verified))
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


def _verdict(run: RunFolder, result: ResultRecord) -> str:
    metric, objective = run.problem.metric, result.objective_title
    found, of_float = (row.share("test", result.objective) for row in (result.found, result.of_float))
    budget, kind = result.budget, run.problem.cost_kind
    tuned = ""
    if result.finetuned:
        tuned = f"; fine-tuned, {percent(result.finetuned.share('test', result.objective))}"
    return (
        f"The policy found by {result.solver} has {percent(found)} {objective} on the test split, {_points(found - of_float)} "
        f"float{tuned} (measured). It takes {amount(budget.used, metric)} of {metric} ({kind}), {budget.used_fraction:.3f} of "
        f"uniform 8 bits. The budget of {amount(budget.limit, metric)} {'holds' if budget.holds else 'is EXCEEDED'}."
    )


def _so_far(run: RunFolder) -> str:
    done = sum(one.solver == run.solver for one in run.history)
    asked = run.config.evaluations
    words = f"This run is not finished: {done} of at most {asked} evaluations by {run.solver} are there."
    if run.best is None:
        return f"{words} None of them is within the budget yet."
    metric = run.problem.metric
    return (
        f"{words} The best within the budget so far has {percent(run.best.accuracy)} on the search split (measured), float "
        f"has {percent(run.problem.float_share)}; it takes {amount(run.best.cost, metric)} of at most "
        f"{amount(run.problem.limit, metric)} {metric} ({run.problem.cost_kind})."
    )


def _facts(run: RunFolder, result: ResultRecord) -> list[Fact]:
    metric, kind, budget = run.problem.metric, run.problem.cost_kind, result.budget
    objective = result.objective_title
    of_float = result.of_float.share("test", result.objective)

    def judged(label: str, measured: Measurement) -> Fact:
        share = measured.share("test", result.objective)
        return Fact(label, percent(share), f"test {objective}, measured; {_points(share - of_float)} float")

    facts = [
        Fact("Float", percent(of_float), f"test {objective}, measured"),
        judged(f"Found by {result.solver}", result.found),
    ]
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
    metric, objective = run.problem.metric, run.problem.objective_title
    facts = [Fact("Float", percent(run.problem.float_share), f"search {objective}, measured")]
    if run.best is not None:
        facts.append(Fact("Best so far", percent(run.best.accuracy), f"search {objective}, measured, by {run.solver}"))
        facts.append(Fact(metric.capitalize(), amount(run.best.cost, metric), f"{run.problem.cost_kind}; within the budget"))
    facts.append(Fact("Budget", amount(run.problem.limit, metric), f"{metric}, at most"))
    return facts


def _points(difference: float) -> str:
    """A difference of two shares, as a distance from the second: "0.70 points below"."""
    words = f"{100 * abs(difference):.2f} points"
    return "as good as" if words == "0.00 points" else f"{words} {'below' if difference < 0 else 'above'}"


def _results(run: RunFolder, result: ResultRecord) -> Table:
    """The table that the search prints."""
    # Plain accuracy beside what policies were judged by, where it was measured too.
    both = result.objective != ACCURACY and result.found.has("test", ACCURACY)
    columns = [("test", result.objective), ("search", result.objective)]
    if both:
        columns.insert(0, ("test", ACCURACY))
    kind = run.problem.target.provenance.split(" ")[0]
    metrics = [name for name in COST_KEYS if result.uniform8.cost(name) is not None]
    head = ["policy", *(f"{split} {objective_title(objective)} (measured)" for split, objective in columns)]
    head += [f"{name} ({'counted' if name == 'storage' else kind})" for name in metrics] + ["evaluations"]
    entries: list[tuple[str, Measurement | None, str]] = [
        ("float", result.of_float, ""),
        ("uniform 8 bits", result.uniform8, ""),
        (f"found by {result.solver}", result.found, _count(result, result.solver)),
        ("fine-tuned", result.finetuned, ""),
        *((f"found by {name}", row, _count(result, name)) for name, row in result.rivals.items()),
    ]
    rows = [
        [
            label,
            *(percent(row.share(split, objective)) for split, objective in columns),
            *(_cost(row.cost(name), name) for name in metrics),
            evaluations,
        ]
        for label, row, evaluations in entries
        if row is not None
    ]
    note = f"{run.problem.data}. {result.objective_title.capitalize()} {result.accuracy_is}; cost {result.cost_is}."
    if both:
        note += f" Worst case: {run.problem.objective_is}, right both times; a cheap attack, no evaluation of robustness."
    return Table(f"{result.network} on {result.data}, {result.target}", head, rows, note)


def _count(result: ResultRecord, solver: str) -> str:
    return str(result.evaluations.get(solver, ""))


def _cost(value: float | None, metric: str) -> str:
    if value is None:
        return NOTHING
    return amount(value, metric)


def _provenance(run: RunFolder) -> Section:
    problem, result = run.problem, run.result
    target = problem.target
    objective = problem.objective_title
    where = result.accuracy_is if result else "measured where the search runs"
    sentences = [
        f"{objective.capitalize()}: {where}, with PyTorch and fake-quantized networks. The search split "
        f"({problem.images:,} images) is what policies are chosen by; no search and no training sees the test split.",
        f"Latency and energy: {target.provenance}, {target.description}, batch {target.batch}. "
        + (MEASURED if target.provenance.startswith("measured") else ESTIMATED),
        "Storage: counted from the bits, with all that comes with the weights.",
    ]
    if problem.objective != "accuracy":
        sentences.insert(1, f"Policies are judged by: {problem.objective_is}.")
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
    return configuration(told, run.config.settings, run.config.versions, run.config.command)

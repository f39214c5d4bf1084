"""What a report says of one run, finished or not."""

from __future__ import annotations

from haq.reporting import attacks, charts
from haq.reporting.drawing import amount
from haq.reporting.reading import RunFolder
from haq.reporting.sections import ESTIMATED, Fact, Part, Section, Table, configuration, resume_command
from haq.store.records import COST_KEYS, FINETUNED, ROBUST, JudgingRecord, Measurement, ResultRecord
from haq.store.units import NOTHING, begin, percent

MEASURED = "Measured means timed layer by layer; the whole network may take more or less than their sum."


def of_run(run: RunFolder, name: str, anchor: str) -> Part:
    """Tell all there is to tell of a run.

    Args:
        run: The run.
        name: What its folder is called on the page.
        anchor: Where on the page it stands.

    Returns:
        Its part of the page.
    """
    sections = []
    if run.result is not None:
        sections.append(Section("Result", tables=[_results(run, run.result)]))
    if run.policy is not None:
        sections.append(Section("Bits per layer", pictures=[charts.bits(run)]))
    if run.history:
        sections.append(Section("Search", pictures=[charts.tried(run), charts.convergence(run)]))
    if run.robustness is not None:
        sections.append(attacks.attacked(run.robustness))
    if run.result is not None and run.result.verified is not None:
        sections.append(attacks.verified(run.result.verified))
    sections += [_provenance(run), _configuration(run)]
    if run.result is not None:
        first, facts, command = _verdict(run, run.result), _facts(run, run.result), ""
    else:
        first, facts, command = _so_far(run), _facts_so_far(run), resume_command("haq.search", run.folder)
    title = f"{run.problem.network} on {run.problem.target.name}"
    return Part(anchor, title, name, run.finished, [first], facts, sections, command)


def _verdict(run: RunFolder, result: ResultRecord) -> str:
    metric, objective = run.problem.metric, result.objective_title
    found, of_float = (result.value(row, "test") for row in (result.found, result.of_float))
    budget, kind = result.budget, run.problem.cost_kind
    tuned = ""
    if result.finetuned:
        tuned = f"; fine-tuned, {result.show(result.value(result.finetuned, 'test'))}"
    verdict = "is EXCEEDED"
    if budget.holds:
        verdict = "holds"
    return (
        f"The policy found by {result.solver} has {result.show(found)} {objective} on the test split, "
        f"{result.held_against(found, of_float)} float{tuned} (measured). It takes {amount(budget.used, metric)} of {metric} "
        f"({kind}), {budget.used_fraction:.3f} of uniform 8 bits. The budget of {amount(budget.limit, metric)} {verdict}."
    )


def _so_far(run: RunFolder) -> str:
    done = sum(one.solver == run.solver for one in run.history)
    asked = run.config.evaluations
    words = f"This run is not finished: {done} of at most {asked} evaluations by {run.solver} are there."
    if run.best is None:
        return f"{words} None of them is within the budget yet."
    problem, metric = run.problem, run.problem.metric
    return (
        f"{words} The best within the budget so far has {problem.show(run.best.accuracy)} on the search split (measured), "
        f"float has {problem.show(problem.float_value)}; it takes {amount(run.best.cost, metric)} of at most "
        f"{amount(problem.limit, metric)} {metric} ({problem.cost_kind})."
    )


def _facts(run: RunFolder, result: ResultRecord) -> list[Fact]:
    metric, kind, budget = run.problem.metric, run.problem.cost_kind, result.budget
    objective = result.objective_title
    of_float = result.value(result.of_float, "test")

    def judged(label: str, measured: Measurement) -> Fact:
        value = result.value(measured, "test")
        return Fact(label, result.show(value), f"test {objective}, measured; {result.held_against(value, of_float)} float")

    facts = [
        Fact("Float", result.show(of_float), f"test {objective}, measured"),
        judged(f"Found by {result.solver}", result.found),
    ]
    if result.finetuned:
        label = FINETUNED[result.finetuned_by].capitalize()
        if result.finetuned_scheme:
            label = f"Fine-tuned with {result.finetuned_scheme}"
        facts.append(judged(label, result.finetuned))
    share = NOTHING
    if budget.limit:
        share = percent(budget.used / budget.limit, 1)
    of_budget = f"{kind}; {share} of the budget, {amount(budget.limit, metric)}"
    facts.append(Fact(metric.capitalize(), amount(budget.used, metric), of_budget))
    of_uniform = f"of uniform 8 bits, {amount(run.problem.uniform8, metric)}; {kind}"
    facts.append(Fact("Against 8 bits", percent(budget.used_fraction, 1), of_uniform))
    verdict = "✗ EXCEEDED"
    if budget.holds:
        verdict = "✓ holds"
    facts.append(Fact("Budget", verdict, f"{budget.fraction:.3g} of uniform 8 bits"))
    return facts


def _facts_so_far(run: RunFolder) -> list[Fact]:
    problem, metric, objective = run.problem, run.problem.metric, run.problem.objective_title
    facts = [Fact("Float", problem.show(problem.float_value), f"search {objective}, measured")]
    if run.best is not None:
        facts.append(Fact("Best so far", problem.show(run.best.accuracy), f"search {objective}, measured, by {run.solver}"))
        facts.append(Fact(metric.capitalize(), amount(run.best.cost, metric), f"{run.problem.cost_kind}; within the budget"))
    facts.append(Fact("Budget", amount(run.problem.limit, metric), f"{metric}, at most"))
    return facts


def _results(run: RunFolder, result: ResultRecord) -> Table:
    """Make the table that the search prints."""
    columns: list[tuple[str, JudgingRecord]] = [("test", result), ("search", result)]
    if result.objective.endswith(ROBUST) and result.found.has("test", result.plain.objective):
        # Without attacks, beside the worst case.
        columns.insert(0, ("test", result.plain))
    metrics = [name for name in COST_KEYS if result.uniform8.cost(name) is not None]
    kinds = dict.fromkeys(metrics, run.problem.target.provenance.split(" ")[0])
    if "storage" in kinds:
        kinds["storage"] = "counted"
    head = [
        "policy",
        *(f"{split} {judging.objective_title} (measured)" for split, judging in columns),
        *(f"{name} ({kind})" for name, kind in kinds.items()),
        "evaluations",
    ]
    measured: list[tuple[str, Measurement | None, str]] = [
        ("float", result.of_float, ""),
        ("uniform 8 bits", result.uniform8, ""),
        (f"found by {result.solver}", result.found, _count(result, result.solver)),
        (FINETUNED[result.finetuned_by], result.finetuned, ""),
    ]
    measured += [(f"found by {name}", row, _count(result, name)) for name, row in result.rivals.items()]
    rows = []
    for label, row, evaluations in measured:
        if row is not None:
            values = [judging.show(judging.value(row, split)) for split, judging in columns]
            rows.append([label, *values, *(_cost(row, name) for name in metrics), evaluations])
    note = f"{run.problem.data}. {begin(result.objective_title)} {result.accuracy_is}; cost {result.cost_is}."
    if result.objective.endswith(ROBUST):
        both = ""
        if result.counts_samples:
            both = ", right both times"
        note += f" Worst case: {run.problem.objective_is}{both}; a cheap attack, no evaluation of robustness."
    return Table(f"{result.network} on {result.data}, {result.target}", head, rows, note)


def _count(result: ResultRecord, solver: str) -> str:
    return str(result.evaluations.get(solver, ""))


def _cost(row: Measurement, metric: str) -> str:
    cost = row.cost(metric)
    if cost is None:
        return NOTHING
    return amount(cost, metric)


def _provenance(run: RunFolder) -> Section:
    problem, target = run.problem, run.problem.target
    where = "measured where the search runs"
    if run.result is not None:
        where = run.result.accuracy_is
    meaning = ESTIMATED
    if target.provenance.startswith("measured"):
        meaning = MEASURED
    size = ""
    if problem.images:
        size = f" ({problem.samples_words})"
    sentences = [
        f"{begin(problem.objective_title)}: {where}, with PyTorch and fake-quantized networks. The search split{size} is what "
        "policies are chosen by; no search and no training sees the test split.",
        f"Latency and energy: {target.provenance}, {target.description}, batch {target.batch}. {meaning}",
        "Storage: counted from the bits, with all that comes with the weights.",
    ]
    if problem.objective_is != problem.objective_title:
        sentences.insert(1, f"Policies are judged by: {problem.objective_is}.")
    return Section("What is estimated, what is measured", sentences=sentences)


def _configuration(run: RunFolder) -> Section:
    problem = run.problem
    limit, uniform8, smallest = (
        amount(value, problem.metric) for value in (problem.limit, problem.uniform8, problem.smallest)
    )
    low, high = problem.bits
    bits = f"{low} to {high}"
    fixed = [layer.name for layer in problem.layers if layer.fixed]
    if fixed:
        bits += f"; fixed: {', '.join(fixed)}"
    rows = [
        ["network", f"{problem.network} ({problem.origin}), {len(problem.layers)} quantizable layers"],
        ["data", problem.data],
        ["target", f"{problem.target.name}: {problem.target.description}"],
        [
            "budget",
            f"{limit} {problem.metric}, {problem.limit / problem.uniform8:.3g} of uniform 8 bits ({uniform8}); at least "
            f"{smallest} is possible",
        ],
        ["bits", bits],
    ]
    return configuration(rows, run.config.settings, run.config.versions, run.config.command)

"""What a report says of one run, finished or not."""

from __future__ import annotations

from haq.reporting import attacks, charts
from haq.reporting.drawing import amount
from haq.reporting.reading import RunFolder
from haq.reporting.sections import ESTIMATED, Fact, Part, Section, Table, configuration, resume_command
from haq.store.records import (
    COST_KEYS,
    FINETUNED,
    ROBUST,
    UNIFORM_8,
    BudgetRecord,
    ChannelsRecord,
    JudgingRecord,
    Measurement,
    ProblemRecord,
    ResultRecord,
    short_reference,
)
from haq.store.units import NOTHING, begin, counted, kind_of_cost, metric_words, percent
from hw_models.registry import join_words

WITHIN_YET = {False: "within the budget", True: "good enough"}  # by whether the cheapest policy is looked for
COUNTED_IS = {
    "bops": "multiply-accumulates x weight bits x activation bits, of one image",
    "average_weight_bits": "the mean width of the weights, float counting 32 bits",
    "memory_traffic": "bytes that move for one image if every layer reads its input and weights and writes its output once",
    "peak_memory": "the bytes of activations that are alive at one time",
}
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
        title = "Bits per layer"
        if run.problem.pruning is not None:
            title = "Channels and bits per layer"
        sections.append(Section(title, pictures=[charts.bits(run)]))
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
    objective = result.objective_title
    found = result.value(result.found, "test")
    tuned = ""
    if result.finetuned:
        tuned = f"; fine-tuned, {result.show(result.value(result.finetuned, 'test'))}"
    takes = []
    for budget in result.all_budgets:
        words = f"{amount(budget.used, budget.metric)} of {metric_words(budget.metric)} ({_kind(run, budget.metric)})"
        takes.append(f"{words}, {budget.used_fraction:.3f} of {short_reference(result.reference)}")
    sentences = [
        f"The policy found by {result.solver} has {result.show(found)} {objective} on the test split, "
        f"{_against_float(result, result.found)}{tuned} (measured). It takes {'; '.join(takes)}."
    ]
    for budget in result.all_budgets:
        if budget.limit is None:
            continue
        verdict = "is EXCEEDED"
        if budget.holds:
            verdict = "holds"
        of_what = ""
        if len(result.all_budgets) > 1:
            of_what = f" of {metric_words(budget.metric)}"
        sentences.append(f"The budget of {amount(budget.limit, budget.metric)}{of_what} {verdict}.")
    if result.residuals is not None:
        sentences.append(f"Additions and average pools take {result.residuals} bits, in all that was evaluated.")
    if result.channels is not None:
        sentences.append(f"Channels are searched too: {result.channels.words}.")
    sentences += _goal_sentences(result)
    if result.shared is not None:
        sentences.append(f"By {result.shared.words}.")
    if result.racing is not None:
        sentences.append(f"{result.racing.words}.")
    if result.contribution is not None:
        sentences.append(f"{begin(result.contribution.words)}.")
    if result.choice is not None:
        sentences.append(f"{begin(result.choice.words)}.")
    return " ".join(sentences)


def _against_float(result: ResultRecord, row: Measurement) -> str:
    """Say how far a network is from float on the test split, with the paired standard error where it is known."""
    value, of_float = (result.value(one, "test") for one in (row, result.of_float))
    return result.difference(value, of_float, row.paired_error("test", result.objective, "float"), "float")


def _kind(run: RunFolder, metric: str) -> str:
    """Say whether amounts of a metric are estimated, measured or counted."""
    return kind_of_cost(metric, run.problem.target.provenance)


def _goal_sentences(result: ResultRecord) -> list[str]:
    """Say what was looked for, where that isn't the best policy, and whether the test split agrees."""
    if result.goal is None:
        return []
    sentences = [f"Looked for was {result.goal.words}."]
    reached = result.reached
    if reached is None:
        return sentences
    held = {True: "is good enough", False: "is NOT good enough"}
    sentence = f"What was found {held[reached.search_holds]} on the search split"
    if reached.search_holds == reached.test_holds:
        return [*sentences, f"{sentence}, and so it is on the test split."]
    return [*sentences, f"{sentence}, and {held[reached.test_holds]} on the test split, which disagrees."]


def _so_far(run: RunFolder) -> str:
    done = sum(one.solver == run.solver for one in run.history)
    asked = run.config.evaluations
    words = f"This run is not finished: {done} of at most {counted(asked, 'evaluations')} by {run.solver} are there."
    if run.best is None:
        return f"{words} None of them is {WITHIN_YET[run.problem.is_cheapest]} yet."
    problem, metric = run.problem, run.problem.metric
    name = "best within the budget"
    if problem.is_cheapest:
        name = "cheapest that is good enough"
    at_most = ""
    if problem.limit is not None:
        at_most = f" of at most {amount(problem.limit, metric)}"
    takes = [f"{amount(run.best.cost, metric)}{at_most} {metric_words(metric)} ({problem.cost_kind})"]
    for limit, cost in zip(problem.further, run.best.others, strict=True):
        takes.append(
            f"{amount(cost, limit.metric)} of at most {amount(limit.amount, limit.metric)} {metric_words(limit.metric)}"
        )
    return (
        f"{words} The {name} so far has {problem.show(run.best.accuracy)} on the search split (measured), "
        f"float has {problem.show(problem.float_value)}; it takes {join_words(takes)}."
    )


def _facts(run: RunFolder, result: ResultRecord) -> list[Fact]:
    objective = result.objective_title
    of_float = result.value(result.of_float, "test")

    def judged(label: str, measured: Measurement) -> Fact:
        value = result.value(measured, "test")
        return Fact(label, result.show(value), f"test {objective}, measured; {_against_float(result, measured)}")

    facts = [
        Fact("Float", result.show(of_float), f"test {objective}, measured"),
        judged(f"Found by {result.solver}", result.found),
    ]
    if result.finetuned:
        label = FINETUNED[result.finetuned_by].capitalize()
        if result.finetuned_scheme:
            label = f"Fine-tuned with {result.finetuned_scheme}"
        facts.append(judged(label, result.finetuned))
    if result.channels is not None:
        facts.append(_of_channels(result.channels))
    facts += [_used(run, budget) for budget in result.all_budgets]
    budget = result.budget
    whole = f"{amount(run.problem.uniform8, budget.metric)}; {run.problem.cost_kind}"
    against = "Against the reference"
    if result.reference == UNIFORM_8:
        against = "Against 8 bits"
    facts.append(Fact(against, percent(budget.used_fraction, 1), f"of {result.reference}, {whole}"))
    given = [one for one in result.all_budgets if one.limit is not None]
    if given:
        verdict = "✓ holds"
        if len(given) > 1:
            verdict = "✓ all hold"
        if not all(one.holds for one in given):
            verdict = "✗ EXCEEDED"
        facts.append(Fact("Budget", verdict, _fractions(given, short_reference(result.reference))))
    if result.goal is not None and result.reached is not None:
        verdict = "✗ MISSED"
        if result.reached.search_holds and result.reached.test_holds:
            verdict = "✓ reached"
        elif result.reached.search_holds:
            verdict = "✗ not on test"
        facts.append(Fact("Goal", verdict, f"{result.goal.words}; {result.reached_words}"))
    return facts


def _of_channels(channels: ChannelsRecord) -> Fact:
    """Tell how many channels are kept, and what the smaller network takes."""
    words = (
        f"channels, chosen by {channels.criterion}; {channels.macs / 1e6:.4g} of {channels.of_macs / 1e6:.4g} M MACs, "
        f"{channels.parameters:,} of {channels.of_parameters:,} parameters"
    )
    return Fact("Channels kept", channels.short, words)


def _used(run: RunFolder, budget: BudgetRecord) -> Fact:
    """Tell what is used of a metric, and of its budget."""
    metric, kind = budget.metric, _kind(run, budget.metric)
    title = begin(metric_words(metric))
    if budget.limit is None:
        return Fact(title, amount(budget.used, metric), f"{kind}; no budget limits it")
    share = NOTHING
    if budget.limit:
        share = percent(budget.used / budget.limit, 1)
    return Fact(title, amount(budget.used, metric), f"{kind}; {share} of the budget, {amount(budget.limit, metric)}")


def _fractions(budgets: list[BudgetRecord], reference: str) -> str:
    """Write budgets as fractions of the reference."""
    if len(budgets) == 1:
        return f"{budgets[0].fraction:.3g} of {reference}"
    parts = [f"{metric_words(one.metric)} {one.fraction:.3g}" for one in budgets]
    return f"{', '.join(parts)} of {reference}"


def _facts_so_far(run: RunFolder) -> list[Fact]:
    problem, metric, objective = run.problem, run.problem.metric, run.problem.objective_title
    facts = [Fact("Float", problem.show(problem.float_value), f"search {objective}, measured")]
    if run.best is not None:
        facts.append(Fact("Best so far", problem.show(run.best.accuracy), f"search {objective}, measured, by {run.solver}"))
        words = f"{problem.cost_kind}; {WITHIN_YET[problem.is_cheapest]}"
        facts.append(Fact(begin(metric_words(metric)), amount(run.best.cost, metric), words))
    if problem.limit is not None:
        facts.append(Fact("Budget", amount(problem.limit, metric), f"{metric_words(metric)}, at most"))
    for further in problem.further:
        words = f"{metric_words(further.metric)}, at most"
        facts.append(Fact("Budget", amount(further.amount, further.metric), words))
    if problem.goal is not None:
        facts.append(Fact("Goal", problem.goal.kind, problem.goal.words))
    return facts


def _results(run: RunFolder, result: ResultRecord) -> Table:
    """Make the table that the search prints."""
    columns: list[tuple[str, JudgingRecord]] = [("test", result), ("search", result)]
    if result.objective.endswith(ROBUST) and result.found.has("test", result.plain.objective):
        # Without attacks, beside the worst case.
        columns.insert(0, ("test", result.plain))
    costed = (result.uniform8, result.found)
    metrics = [name for name in COST_KEYS if any(row.cost(name) is not None for row in costed)]
    head = [
        "policy",
        *(f"{split} {judging.objective_title} (measured)" for split, judging in columns),
        *(f"{metric_words(name)} ({_kind(run, name)})" for name in metrics),
        "evaluations",
    ]
    measured: list[tuple[str, Measurement | None, str]] = [
        ("float", result.of_float, ""),
        (short_reference(result.reference), result.uniform8, ""),
        (f"found by {result.solver}", result.found, _count(result, result.solver)),
        (FINETUNED[result.finetuned_by], result.finetuned, ""),
    ]
    measured += [(result.found_by(name), row, _count(result, name)) for name, row in result.rivals.items()]
    rows = []
    for label, row, evaluations in measured:
        if row is not None:
            values = [judging.show(judging.value(row, split)) for split, judging in columns]
            rows.append([label, *values, *(_cost(row, name) for name in metrics), evaluations])
    note = f"{run.problem.data}. {begin(result.objective_title)} {result.accuracy_is}; cost {result.cost_is}."
    if short_reference(result.reference) != result.reference:
        note += f" The reference: {result.reference}."
    if result.objective.endswith(ROBUST):
        both = ""
        if result.counts_samples:
            both = ", right both times"
        note += f" Worst case: {run.problem.objective_is}{both}; a cheap attack, no evaluation of robustness."
    if rivals := _rivals_note(result):
        note += f" {rivals}"
    return Table(f"{result.network} on {result.data}, {result.target}", head, rows, note)


def _rivals_note(result: ResultRecord) -> str:
    """Say how far what was found is from what it is held against, on the test split; nothing where no error is known."""
    value = result.value(result.found, "test")
    rows = {short_reference(result.reference): result.uniform8}
    rows |= {f"{name}'s": row for name, row in result.rivals.items()}
    parts = []
    for name, row in rows.items():
        error = row.paired_error("test", result.objective, "found")
        if error is not None:
            parts.append(result.difference(value, result.value(row, "test"), error, name))
    if not parts:
        return ""
    return f"On the test split what was found is {', '.join(parts)}; ± is the paired standard error."


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
    metrics = [limit.metric for limit in problem.further if limit.metric in COUNTED_IS]
    if problem.metric in COUNTED_IS:
        metrics.insert(0, problem.metric)
    sentences += [f"{begin(metric_words(metric))}: counted; {COUNTED_IS[metric]}." for metric in dict.fromkeys(metrics)]
    if problem.objective_is != problem.objective_title:
        sentences.insert(1, f"Policies are judged by: {problem.objective_is}.")
    return Section("What is estimated, what is measured", sentences=sentences)


def _configuration(run: RunFolder) -> Section:
    problem = run.problem
    bits = problem.choice_words
    fixed = [layer.name for layer in problem.layers if layer.fixed]
    if fixed:
        bits += f"; fixed: {', '.join(fixed)}"
    rows = [
        ["network", f"{problem.network} ({problem.origin}), {len(problem.layers)} quantizable layers"],
        ["data", problem.data],
        ["target", f"{problem.target.name}: {problem.target.description}"],
        *_budget_rows(problem),
        ["bits", bits],
    ]
    if problem.pruning is not None:
        rows.append(["channels", problem.pruning.words])
        rows += [["fixed channels", f"{name}: {reason}"] for name, reason in problem.pruning.fixed.items()]
    if problem.goal is not None:
        rows.append(["goal", problem.goal.words])
    return configuration(rows, run.config.settings, run.config.versions, run.config.command)


def _budget_rows(problem: ProblemRecord) -> list[list[str]]:
    """Tell what limits every metric, and what there can be of it."""
    limits = [(problem.metric, problem.limit, problem.uniform8, problem.smallest)]
    limits += [(limit.metric, limit.amount, limit.reference, limit.smallest) for limit in problem.further]
    rows = []
    for metric, limit, whole, smallest in limits:
        words = f"no limit of {metric_words(metric)}; {problem.reference} take {amount(whole, metric)}"
        if limit is not None:
            words = (
                f"{amount(limit, metric)} {metric_words(metric)}, {limit / whole:.3g} of {problem.reference} "
                f"({amount(whole, metric)})"
            )
        rows.append(["budget", f"{words}; at least {amount(smallest, metric)} is possible"])
    return rows

"""What a user is shown of a run: one table of layers, one of results, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import quantizers as Q
from haq import training
from haq.problem.problem import Problem
from haq.reporting.pictures import draw_policy
from haq.store.files import RESULT_SCHEMA, write
from haq.store.records import PolicyRecord, PricedProblem
from haq.store.units import best_unit, describe_amount, percent
from haq.study.search_run import SearchRun
from haq.study.task import SearchTask, adversary_of, priced, threads


def entry(task: SearchTask, policy: Q.BitPolicy | None, module: nn.Module | None = None) -> dict[str, float | None]:
    """Accuracy on the search and the test split (or agreement with the float network, if that is the objective; beside plain
    accuracy, what it is under attack, if that is) and what its policy costs; of the float network without one.

    `module` is a fine-tuned network; without it the policy is applied to the float network's weights, and they are fine-tuned
    as far as every policy of the search was.
    """
    problem = task.problem
    costs: dict[str, float | None] = {"latency_s": None, "energy_j": None}
    if policy is None:
        # 32 bits for each weight and bias; no simulated target computes in float.
        costs["storage_bytes"] = float(sum(4 * layer.parameters for layer in problem.workload.layers))
    else:
        w, a = problem.bit_arrays(policy)
        costs |= {k: None if v is None else float(v) for k, v in problem.table.price(w, a)._asdict().items()}
        del costs["cycles"]
    if module is not None:
        return _judge(task, module) | costs
    if policy not in task.judged:
        task.judged[policy] = _judge(task, task.network.module if policy is None else problem.evaluator.prepared(policy))
    return task.judged[policy] | costs


def _judge(task: SearchTask, module: nn.Module) -> dict[str, float]:
    problem = task.problem
    splits = {"search": task.dataset.search, "test": task.dataset.test}
    objective = problem.objective
    if objective.compares_with_float:
        return {f"{name}_agreement": training.agreement(task.network, split, module) for name, split in splits.items()}
    judged = {f"{name}_accuracy": training.accuracy(task.network, split, module) for name, split in splits.items()}
    if objective.name != "accuracy":
        # On the search images exactly what policies were judged by.
        judged[f"search_{objective.name}"] = problem.evaluator.measure(module).accuracy
        judged[f"test_{objective.name}"] = objective.share(task.network, task.dataset.test, module)
    return judged


def uniform_policies(problem: Problem) -> dict[int, Q.BitPolicy]:
    """What found policies are held against: every width that may be chosen, the fixed layers at their own."""
    low, high = problem.bits
    return {bits: problem.uniform(bits, keep_pinned=True) for bits in range(low, high + 1)}


def collect(
    task: SearchTask,
    policy: Q.BitPolicy,
    finetuned: nn.Module | None,
    rivals: dict[str, Q.BitPolicy],
    evaluations: dict[str, int],
    saturated: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Everything the summary shows, measured now, as plain data (what `--json` prints and result.json holds)."""
    problem = task.problem
    cost, key = problem.policy_cost(policy), f"search_{problem.objective.name}"
    return {
        "schema": RESULT_SCHEMA,
        "network": task.network.name,
        "data": task.dataset.name,
        "target": problem.target.name,
        "solver": task.config.solver,
        "evaluations": evaluations,
        "saturated_actions": saturated or {},
        "seed": task.config.seed,
        "objective": problem.objective.name,
        "objective_is": problem.objective.words,
        "finetune_steps": task.config.finetune_steps,
        "sensitivity_kind": task.config.sensitivity_kind,
        "accuracy_is": f"measured on {threads()}",
        "cost_is": f"{problem.table.provenance}, {problem.target.description}, batch {problem.table.batch}",
        "budget": {
            "metric": problem.metric,
            "unit": problem.unit,
            "limit": problem.limit,
            "used": cost,
            "fraction": problem.budget,
            "used_fraction": cost / problem.reference,
            "holds": problem.within_budget(cost),
        },
        "float": entry(task, None),
        "uniform8": entry(task, problem.uniform(8)),
        "uniform": [
            {
                "bits": bits,
                "cost": problem.policy_cost(same),
                key: task.judged[same][key] if same in task.judged else problem.evaluate(same).accuracy,
            }
            for bits, same in uniform_policies(problem).items()
        ],
        "found": entry(task, policy),
        "finetuned": None if finetuned is None else entry(task, policy, finetuned),
        "rivals": {name: entry(task, rival) for name, rival in rivals.items()},
        "rival_policies": {name: rival.to_dict() for name, rival in rivals.items()},
    }


def print_plan(console: Console, task: SearchTask, folder: Path | None, rivals: tuple[str, ...], workers: str) -> None:
    """What a search will do; `workers`: who evaluates policies, in words."""
    problem, settings = task.problem, task.config
    pinned = ", ".join(f"{name} {w}/{a}" for name, (w, a) in problem.pinned.items())
    low, high = problem.bits
    of_float = f"accuracy ({problem.objective.words})" if problem.objective.attacked else "accuracy"
    float_accuracy = f", float {of_float} {percent(problem.float_accuracy)} on the search split"
    free = sum(len(decision.layers) for decision in problem.decisions if len(decision.pairs) > 1)
    rows = {
        "network": f"{task.network.name} ({task.network.origin}): {len(problem.workload)} quantizable layers, "
        f"{problem.workload.macs / 1e6:.2f} M MACs{'' if problem.objective.compares_with_float else float_accuracy}",
        "data": task.dataset.describe(),
        "target": f"{problem.target.name}: {problem.target.description}; batch {problem.table.batch}; costs are "
        f"{problem.table.provenance}",
        "metric": problem.metric,
        "budget": f"{describe_amount(problem.limit, problem.metric)}, {problem.budget:.3g} of uniform 8 bits "
        f"({describe_amount(problem.reference, problem.metric)})",
        "bits": f"{low} to {high} for weights and activations of {free} layers; fixed (weights/activations): {pinned}",
        "solver": f"{settings.solver}; for comparison {' and '.join(rivals)}, as many evaluations each",
        "sensitivities": f"{settings.sensitivity_kind}, "
        + (
            f"from {settings.sensitivity}"
            if settings.sensitivity
            else "computed, without evaluations"
            if settings.sensitivity_kind == "hessian"
            else "measured by each solver that needs them"
        ),
        "objective": problem.objective.words,
        "evaluations": f"{settings.evaluations}, each on {len(task.dataset.search):,} search images"
        + (f" after {settings.finetune_steps} steps of fine-tuning" if settings.finetune_steps else "")
        + f", {workers}",
        "fine-tuning": f"{settings.finetune_epochs} epochs on {len(task.dataset.train):,} train images"
        + (f", against R+FGSM at eps {settings.eps}" if adversary_of(settings) else "")
        if settings.finetune_epochs
        else "none",
        "seed": str(settings.seed),
        "results in": str(folder) if folder else "nothing is written (--dry-run)",
    }
    table = Table.grid(padding=(0, 2))
    for key, value in rows.items():
        table.add_row(f"[bold]{key}[/]", value)
    console.print(table)


def layer_table(problem: Problem, policy: Q.BitPolicy) -> Table:
    """Bits, cost before and after, and what bounds it, per layer."""
    w, a = problem.bit_arrays(policy)
    layers = np.arange(len(w))
    before, after = problem.cost[:, 7, 7], problem.cost[layers, w - 1, a - 1]
    bound = problem.table.bound if problem.metric == "latency" else None
    unit, size = best_unit(float(before.max()), problem.metric)
    title = f"Bits per layer on {problem.target.name}; {problem.metric} in {unit}, {problem.table.provenance}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    table.add_column("layer", no_wrap=True)
    for heading in ("weight\nbits", "activ.\nbits", "before,\n8/8", "after", "share\nbefore"):
        table.add_column(heading, justify="right", no_wrap=True)
    if bound is not None:
        table.add_column("bound by", no_wrap=True)
    for i, layer in enumerate(problem.workload.layers):
        pinned = "*" if layer.name in problem.pinned else ""
        cells = [f"{w[i]}{pinned}", f"{a[i]}{pinned}", f"{before[i] / size:.4g}", f"{after[i] / size:.4g}"]
        share = f"{100 * before[i] / before.sum():.1f} %"
        limits = [] if bound is None else [problem.table.bounds[bound[i, w[i] - 1, a[i] - 1]]]
        table.add_row(layer.name, *cells, share, *limits)
    table.add_section()
    totals = [f"{x.sum() / size:.4g}" for x in (before, after)]
    table.add_row("total, mean", f"{w.mean():.1f}", f"{a.mean():.1f}", *totals, "")
    table.caption = "* fixed" if problem.pinned else None
    return table


def print_result(console: Console, task: SearchTask, policy: Q.BitPolicy, result: dict[str, Any]) -> None:
    """The two tables and one sentence each on the budget and on the rivals."""
    problem, budget, objective = task.problem, result["budget"], task.problem.objective.name
    console.print(layer_table(problem, policy))
    title = f"{result['network']} on {result['data']}, {result['target']}"
    attacked = problem.objective.attacked
    padding = (0, 0 if attacked else 1, 0, 0)  # one column more, within the same 80 characters
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=padding, pad_edge=False, caption_justify="left")
    table.add_column("policy", no_wrap=True)
    columns = [("test", objective), ("search", objective)]
    headings = [f"{split}\n{objective}\n(measured)" for split, _ in columns]
    if attacked:
        # Plain accuracy beside what policies were judged by. That these are measured stands below the table.
        columns.insert(0, ("test", "accuracy"))
        headings = ["\ntest\naccuracy", "test\nworst\ncase", "search\nworst\ncase"]
    for heading in headings:
        table.add_column(heading, justify="right")
    metrics = [name for name in ("latency", "energy", "storage") if name in problem.table.metrics]
    for name in metrics:
        # Bytes are counted from the bits on every target. What was measured, and where, stands below the table.
        kind = "counted" if name == "storage" else cost_kind(problem)
        table.add_column(f"\n{name}\n({kind})", justify="right")
    rows: list[tuple[str, dict[str, float | None] | None]] = [
        ("float", result["float"]),
        ("uniform 8 bits", result["uniform8"]),
        (f"found by {result['solver']}", result["found"]),
        ("  fine-tuned", result["finetuned"]),
        *((f"found by {name}", row) for name, row in result["rivals"].items()),
    ]
    for label, row in rows:
        if row is None:
            continue
        keys = {"latency": "latency_s", "energy": "energy_j", "storage": "storage_bytes"}
        costs = [row[keys[name]] for name in metrics]
        cells = ["–" if c is None else describe_amount(c, name) for c, name in zip(costs, metrics, strict=True)]
        shares = [percent(row[f"{split}_{kind}"]) for split, kind in columns]
        table.add_row(label, *shares, *cells)
    sizes = f"{len(task.dataset.test):,} test and {len(task.dataset.search):,} search images"
    steps = task.config.finetune_steps
    tuned = f"; every policy fine-tuned for {steps} steps" if steps else ""
    worst = f"; worst case: {problem.objective.words}, right both times, a cheap attack and no evaluation" if attacked else ""
    table.caption = (
        f"{sizes}{tuned}{worst}; {'accuracy' if attacked else objective} {result['accuracy_is']}; cost {result['cost_is']}"
    )
    console.print(table)
    used = describe_amount(budget["used"], budget["metric"])
    limit = describe_amount(budget["limit"], budget["metric"])
    console.print(
        f"Budget: {used} of {limit} {budget['metric']} used ({100 * budget['used'] / budget['limit']:.1f} %, "
        f"{budget['used_fraction']:.3f} of uniform 8 bits): {'holds' if budget['holds'] else 'EXCEEDED'}."
    )
    for name, share in result.get("saturated_actions", {}).items():
        console.print(f"Actions of {name} at a bound: {100 * share:.1f} %.")
    if result["rivals"]:
        name, rival = max(result["rivals"].items(), key=lambda item: item[1][f"search_{objective}"])
        difference = 100 * (result["found"][f"search_{objective}"] - rival[f"search_{objective}"])
        than = f"{abs(difference):.2f} points {'below' if difference > 0 else 'above'}" if difference else "as good as"
        measured = f" ({problem.objective.words})" if attacked else ""
        console.print(
            f"Rivals at the same budget ({', '.join(result['rivals'])}): the best is {name} with "
            f"{percent(rival[f'search_{objective}'])} on the search split{measured}, {than} {result['solver']}."
        )


def cost_kind(problem: Problem) -> str:
    """ "estimated" or "measured", without where."""
    return problem.table.provenance.split()[0]


def draw(problem: Problem, policy: Q.BitPolicy, path: Path) -> None:
    """Draw bits per layer over each layer's share of the cost (`haq.reporting.pictures.draw_policy`)."""
    write(path, draw_policy(PricedProblem.from_dict(priced(problem)), PolicyRecord.of(policy)))


def print_next(console: Console, run: SearchRun, commands: tuple[str, ...]) -> None:
    """What was written, and what to type next."""
    console.print(f"Written: {run.folder} (policy.json, policy.png, history.csv, result.json)")
    for command in commands:
        console.print(f"Next: [bold]python -m haq.{command}[/]", soft_wrap=True)

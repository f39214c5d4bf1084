"""What a run found, measured and as plain data: what result.json holds and `--json` prints."""

from __future__ import annotations

from typing import Any

from torch import nn

import quantizers as Q
from haq.problem.problem import Problem
from haq.problem.tally import measure as measure_on
from haq.problem.tally import measure_with_error
from haq.store.files import RESULT_SCHEMA
from haq.store.records import COST_KEYS, ObjectiveRecord, error_key, share_key
from haq.store.units import finite
from haq.study.task import SearchTask, objective_of, threads
from haq.training.config import Judgement, Outcome
from haq.training.reconstruction import Reconstructed
from hw_models.widths import places


def entry(task: SearchTask, policy: Q.BitPolicy | None, module: nn.Module | None = None) -> dict[str, float | None]:
    """Measure a policy on the search and the test split, and price it.

    Args:
        task: The search.
        policy: The policy; None for the float network.
        module: A fine-tuned network at that policy; without it the policy is applied to the float network's weights, and they
            are fine-tuned as far as every policy of the search was.

    Returns:
        Values of the objective (and of what is measured beside it) by split, and costs: seconds, joules, bytes; None where
        the target has no such metric, and for values that are infinite.
    """
    if module is not None:
        return measure(task, module) | costs(task.problem, policy)
    if policy not in task.measured:
        module = task.network.module
        if policy is not None:
            module = task.problem.evaluator.prepared(policy)
        task.measured[policy] = measure(task, module)
    return task.measured[policy] | costs(task.problem, policy)


def measure(task: SearchTask, module: nn.Module) -> dict[str, float | None]:
    """Measure a network on the search split, exactly as policies were judged, and on the test split."""
    objective = task.problem.objective
    values: dict[str, float | None] = {}
    for other in objective.also:
        for name, split in (("search", task.dataset.search), ("test", task.dataset.test)):
            values[share_key(name, other.name)] = finite(measure_on(other, task.network, split, module, called=name))
    key = share_key("search", objective.name)
    judged = task.problem.evaluator.measure(module.eval())
    values[key] = finite(judged.accuracy)
    if judged.error is not None:
        values[error_key(key)] = finite(judged.error)
    tested, error = measure_with_error(objective, task.network, task.dataset.test, module)
    key = share_key("test", objective.name)
    values[key] = finite(tested)
    if error is not None:
        values[error_key(key)] = finite(error)
    return values


def costs(problem: Problem, policy: Q.BitPolicy | None) -> dict[str, float | None]:
    """Price a policy in every metric (seconds, joules, bytes); None where the target has no such metric."""
    if policy is None:
        # 32 bits for each weight and bias; no simulated target computes in float.
        in_float = float(sum(4 * layer.own_parameters for layer in problem.workload.layers))
        return {"latency_s": None, "energy_j": None, "storage_bytes": in_float}
    w, a = problem.bit_arrays(policy)
    if not problem.table.supported[range(len(w)), places(w), places(a)].all():
        return dict.fromkeys(COST_KEYS.values())  # such as uniform 8 bits, where the target can't do them
    prices = problem.table.price(w, a)._asdict()
    found: dict[str, float | None] = {}
    for metric, key in COST_KEYS.items():
        found[key] = None
        if metric in problem.metrics:
            found[key] = float(prices[key])
    return found


def uniform_policies(problem: Problem) -> dict[int, Q.BitPolicy]:
    """Make what found policies are held against: every width that may be chosen, the fixed layers at their own."""
    low, high = problem.bits
    policies = {bits: problem.uniform(bits, keep_pinned=True) for bits in range(low, high + 1)}
    return {bits: policy for bits, policy in policies.items() if problem.means_something(policy)}


def cost_kind(problem: Problem) -> str:
    """Say "estimated" or "measured", without where."""
    return problem.table.provenance.split()[0]


def collect(
    task: SearchTask,
    policy: Q.BitPolicy,
    finetuned: nn.Module | None,
    rivals: dict[str, Q.BitPolicy],
    evaluations: dict[str, int],
    saturated: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Measure now everything that a summary shows.

    Args:
        task: The search.
        policy: What was found.
        finetuned: The same after fine-tuning, if it was fine-tuned.
        rivals: What other solvers found, by name.
        evaluations: How many evaluations were used, by solver.
        saturated: The share of actions at a bound, by agent.

    Returns:
        Plain data: what result.json holds (`haq.store.records.ResultRecord`).
    """
    problem = task.problem
    tuned = None
    if finetuned is not None:
        tuned = entry(task, policy, finetuned)
    return {
        "schema": RESULT_SCHEMA,
        **objective_of(problem).differences(),
        "network": task.network.name,
        "data": task.dataset.name,
        "target": problem.target.name,
        "solver": task.config.solver,
        "evaluations": evaluations,
        "saturated_actions": saturated or {},
        "seed": task.config.seed,
        "scheme": task.config.scheme,
        "objective": problem.objective.name,
        "objective_is": problem.objective.words,
        "finetune_steps": task.config.finetune_steps,
        "sensitivity_kind": task.config.sensitivity_kind,
        "accuracy_is": f"measured on {threads(task.network.device)}",
        "cost_is": f"{problem.table.provenance}, {problem.target.description}, batch {problem.table.batch}",
        "budget": budget_used(problem, policy),
        "float": entry(task, None),
        "uniform8": entry(task, problem.uniform(8)),
        "uniform": [_uniform(task, bits, same) for bits, same in uniform_policies(problem).items()],
        "policy": policy.to_dict(),
        "found": entry(task, policy),
        "finetuned": tuned,
        "rivals": {name: entry(task, rival) for name, rival in rivals.items()},
        "rival_policies": {name: rival.to_dict() for name, rival in rivals.items()},
    }


def tuning_entry(outcome: Outcome, epochs: int) -> dict[str, Any]:
    """Tell as plain data how a fine-tuning was judged on the samples that it held out (`haq.store.records.TuningRecord`)."""
    assert outcome.before is not None
    return {
        "images": outcome.images,
        "epochs": epochs,
        "kept": outcome.kept,
        "diverged": outcome.diverged,
        **_judgements(before=outcome.before, best=outcome.best),
    }


def reconstruction_entry(found: Reconstructed, seed: int) -> dict[str, Any]:
    """Tell as plain data how a reconstruction was judged (`haq.store.records.ReconstructionRecord`)."""
    return {
        "images": found.before.images,
        "calibration_images": found.calibration_images,
        "seed": seed,
        "seconds": found.seconds,
        "kept": found.kept,
        **_judgements(before=found.before, after=found.after),
        "divergence_before": found.before.loss,
        "divergence_after": found.after.loss,
    }


def _judgements(**judgements: Judgement) -> dict[str, Any]:
    """Tell values by name, with their standard errors where they don't follow from shares."""
    found = {name: finite(judgement.value) for name, judgement in judgements.items()}
    errors = {error_key(name): judgement.error for name, judgement in judgements.items() if judgement.error}
    return found | errors


def judged_by(problem: Problem, judgement: Judgement) -> dict[str, Any]:
    """Tell what networks are judged by while they are trained, as plain data beside a `tuning_entry` or another.

    Args:
        problem: What the networks are of.
        judgement: Of one of them.

    Returns:
        The fields of `haq.store.records.JudgingRecord` that aren't as they are for class scores, which are judged by the share
        of answers that are the float network's.
    """
    objective = problem.objective
    if objective.takes_scores:
        found = objective_of(problem).differences()
        return {key: value for key, value in found.items() if key == "samples_are"}
    unit = "nats"
    if objective.distribution is not None:
        unit = objective.distribution.unit
    record = objective_of(problem)
    if judgement.higher_is_better != record.higher_is_better:
        # Without targets there is no value but the loss, the distance from the float network's outputs.
        record = ObjectiveRecord(
            objective="divergence",
            objective_unit=unit,
            higher_is_better=judgement.higher_is_better,
            counts_samples=False,
            samples_are=record.samples_are,
        )
    return {"objective": record.objective, **record.differences(), "divergence_unit": unit}


def budget_used(problem: Problem, policy: Q.BitPolicy) -> dict[str, Any]:
    """Tell as plain data how much of the budget a policy uses."""
    cost = problem.policy_cost(policy)
    return {
        "metric": problem.metric,
        "unit": problem.unit,
        "limit": problem.limit,
        "used": cost,
        "fraction": problem.budget,
        "used_fraction": cost / problem.reference,
        "holds": problem.within_budget(cost),
    }


def _uniform(task: SearchTask, bits: int, policy: Q.BitPolicy) -> dict[str, Any]:
    """Tell what a uniform policy costs and gives on the search split."""
    key = share_key("search", task.problem.objective.name)
    if policy in task.measured:
        value = task.measured[policy][key]
    else:
        value = finite(task.problem.evaluate(policy).accuracy)
    return {"bits": bits, "cost": task.problem.policy_cost(policy), key: value}

"""What a run found, measured and as plain data: what result.json holds and `--json` prints."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import quantizers as Q
from haq.problem.chance import standard_error
from haq.problem.evaluator import Evaluation, Evaluator
from haq.problem.paired import error_of_difference
from haq.problem.problem import Problem
from haq.problem.tally import measure as measure_on
from haq.problem.tally import measure_by_sample
from haq.solvers.base import Choice, Trial
from haq.store.files import RESULT_SCHEMA
from haq.store.records import (
    COST_KEYS,
    OF_TARGETS,
    SPLITS,
    UNIFORM_8,
    ObjectiveRecord,
    error_key,
    paired_key,
    share_key,
)
from haq.store.units import finite, kind_of_cost
from haq.study.channels import channels_of, smaller
from haq.study.task import SearchTask, goal_of, objective_of, threads
from haq.training.config import Judgement, Outcome
from haq.training.reconstruction import Reconstructed
from hw_models.widths import FLOAT, FLOAT_WORD, pair_words, places

MOST_PAIRS = 10  # that all layers can have; of more, uniform policies are only those of one width


BySample = dict[str, Tensor | None]  # by split the value of every sample; None where values aren't means over samples


def entry(
    task: SearchTask, policy: Q.BitPolicy | None, module: nn.Module | None = None, found: BySample | None = None
) -> dict[str, float | None]:
    """Measure a policy on the search and the test split, and price it.

    Args:
        task: The search.
        policy: The policy; None for the float network.
        module: A fine-tuned network at that policy; without it the policy is applied to the float network's weights, and they
            are fine-tuned as far as every policy of the search was.
        found: Of what was found, if this is held against it.

    Returns:
        Values of the objective (and of what is measured beside it) by split, with the paired standard errors of their
        differences from the float network's and from those of what was found, as far as they are known; and costs: seconds,
        joules, bytes; None where the target has no such metric, and for values that are infinite.
    """
    return entry_by_sample(task, policy, module, found)[0]


def entry_by_sample(
    task: SearchTask, policy: Q.BitPolicy | None, module: nn.Module | None = None, found: BySample | None = None
) -> tuple[dict[str, float | None], BySample]:
    """Measure and price a policy, as `entry` does.

    Args:
        task: As `entry` takes it.
        policy: Likewise.
        module: Likewise.
        found: Likewise.

    Returns:
        What `entry` returns, and the value of every sample.
    """
    if module is not None:
        row, by_sample = measure(task, module)
    else:
        row, by_sample = _measured(task, policy)
    errors: dict[str, float | None] = {}
    if policy is not None:
        errors = _paired_errors(task, by_sample, _measured(task, None)[1], "float")
    if found is not None:
        errors |= _paired_errors(task, by_sample, found, "found")
    return row | errors | costs(task.problem, policy), by_sample


def answers_entry(found: BySample, finetuned: BySample | None) -> dict[str, Any] | None:
    """Tell as plain data which test samples are answered rightly (`haq.store.records.AnswersRecord`).

    Args:
        found: Of what was found.
        finetuned: Of the same after fine-tuning; None if it wasn't fine-tuned.

    Returns:
        The fields of the record; None for values that are no shares.
    """
    right = found["test"]
    if right is None or right.dtype != torch.bool:
        return None
    told: dict[str, Any] = {"count": len(right), "found": _packed(right)}
    if finetuned is not None and finetuned["test"] is not None:
        told["finetuned"] = _packed(finetuned["test"])
    return told


def _packed(right: Tensor) -> str:
    """Write booleans as bits in base64."""
    return base64.b64encode(np.packbits(right.numpy()).tobytes()).decode()


def _measured(task: SearchTask, policy: Q.BitPolicy | None) -> tuple[dict[str, float | None], BySample]:
    """Measure a policy (None: the float network) once; see `measure`."""
    if policy not in task.measured or policy not in task.by_sample:
        evaluator = task.problem.evaluator
        if policy is None:
            task.measured[policy], task.by_sample[policy] = measure(task, task.network.module)
        else:
            judged = None
            if _is_known(evaluator, policy):
                judged = evaluator.evaluate(policy), evaluator.by_sample(policy)
            task.measured[policy], task.by_sample[policy] = measure(task, evaluator.prepared(policy), judged)
    return task.measured[policy], task.by_sample[policy]


def _is_known(evaluator: Evaluator, policy: Q.BitPolicy) -> bool:
    """Say whether this process has evaluated a policy on all samples, as its network is without being tuned."""
    known = evaluator.cache.get(policy)
    alike = evaluator.tune is None and evaluator.pool is None
    return alike and known is not None and known.images >= evaluator.count


def _paired_errors(task: SearchTask, by_sample: BySample, others: BySample, name: str) -> dict[str, float | None]:
    """Tell the paired standard errors of differences, as far as they are known.

    Args:
        task: The search.
        by_sample: Of a network.
        others: Of another.
        name: What the other is called in the keys of files.

    Returns:
        The errors by the keys of files.
    """
    found: dict[str, float | None] = {}
    for split in SPLITS:
        error = error_of_difference(by_sample.get(split), others.get(split))
        if error is not None:
            found[paired_key(share_key(split, task.problem.objective.name), name)] = error
    return found


def measure(
    task: SearchTask, module: nn.Module, known: tuple[Evaluation, Tensor | None] | None = None
) -> tuple[dict[str, float | None], BySample]:
    """Measure a network on the search split, exactly as policies were judged, and on the test split.

    Args:
        task: The search.
        module: The network.
        known: What it was measured to give on the search split, if that is known, and its value on every sample there.

    Returns:
        Values by the keys of files; and by split the value of every sample, None where values aren't means over samples.
    """
    objective = task.problem.objective
    values: dict[str, float | None] = {}
    for other in objective.also:
        for name, split in (("search", task.dataset.search), ("test", task.dataset.test)):
            values[share_key(name, other.name)] = finite(measure_on(other, task.network, split, module, called=name))
    key = share_key("search", objective.name)
    judged, by_sample = known or task.problem.evaluator.measure_by_sample(module.eval())
    values[key] = finite(judged.accuracy)
    if judged.error is not None:
        values[error_key(key)] = finite(judged.error)
    tested = measure_by_sample(objective, task.network, task.dataset.test, module)
    key = share_key("test", objective.name)
    values[key] = finite(tested.value)
    if tested.error is not None:
        values[error_key(key)] = finite(tested.error)
    return values, {"search": by_sample, "test": tested.by_sample}


def costs(problem: Problem, policy: Q.BitPolicy | None) -> dict[str, float | None]:
    """Price a policy (None: the float network) in every metric of a target, and in those that are limited besides.

    Args:
        problem: What the policy is of.
        policy: Its widths.

    Returns:
        Seconds, joules, bytes, bit operations, bits by the keys of files; None where the target has no such metric, or can't
        do the policy.
    """
    counted = [limit.metric for limit in problem.limits if limit.metric not in OF_TARGETS]
    shown = [*OF_TARGETS, *counted]
    of_float = policy is None
    if policy is None:
        policy = problem.uniform(FLOAT)
    w, a = problem.bit_arrays(policy)
    table = smaller(problem, policy).table
    found: dict[str, float | None] = dict.fromkeys(COST_KEYS[metric] for metric in shown)
    if table.supported[range(len(w)), places(w), places(a)].all():
        for metric in shown:
            if metric in (*problem.metrics, *counted):
                found[COST_KEYS[metric]] = float(table.total(metric, w, a))
    elif of_float:
        # 32 bits for each weight and bias, whatever computes with them.
        found["storage_bytes"] = float(sum(4 * layer.own_parameters for layer in problem.workload.layers))
    return found


def uniform_policies(problem: Problem) -> dict[int | str, Q.BitPolicy]:
    """Make what found policies are held against: the same widths everywhere, fixed layers at their own.

    Returns:
        Policies that the target can do, by their widths: one for both operands, and where there are few pairs that all layers
        can have, those too, such as "4/8". Float is "float".
    """
    weights, activations = problem.widths
    pairs = [(w, a) for w in weights for a in activations]
    policies = {}
    for w, a in pairs:
        policy = problem.policy([w] * len(problem.workload), [a] * len(problem.workload))
        policy = Q.BitPolicy({**policy, **problem.pinned})
        if problem.means_something(policy):
            policies[w, a] = policy
    if len(policies) > MOST_PAIRS:
        policies = {(w, a): policy for (w, a), policy in policies.items() if w == a}
    return {_called(w, a): policy for (w, a), policy in policies.items()}


def _called(w: int, a: int) -> int | str:
    """Return what files call a uniform policy: its width, or both."""
    if w != a:
        return pair_words(w, a)
    if w == FLOAT:
        return FLOAT_WORD
    return w


def cost_kind(problem: Problem) -> str:
    """Say "estimated" or "measured" of latency and energy, without where."""
    return kind_of_cost("latency", problem.table.provenance)


def collect(
    task: SearchTask,
    policy: Q.BitPolicy,
    finetuned: nn.Module | None,
    rivals: dict[str, Q.BitPolicy],
    evaluations: dict[str, int],
    saturated: dict[str, float] | None = None,
    choice: Choice | None = None,
    trials: Sequence[Trial] = (),
) -> dict[str, Any]:
    """Measure now everything that a summary shows.

    Args:
        task: The search.
        policy: What was found.
        finetuned: The same after fine-tuning, if it was fine-tuned.
        rivals: What other solvers found, by name.
        evaluations: How many evaluations were used, by solver.
        saturated: The share of actions at a bound, by agent.
        choice: Why this policy was returned, where it is known.
        trials: What the run's own solver tried.

    Returns:
        Plain data: what result.json holds (`haq.store.records.ResultRecord`).
    """
    problem = task.problem
    tuned: dict[str, float | None] | None = None
    by_sample: BySample | None = None
    row, of_found = entry_by_sample(task, policy)
    if finetuned is not None:
        tuned, by_sample = entry_by_sample(task, policy, finetuned, found=of_found)
    entries = goal_entries(task, policy)
    if choice is not None:
        entries["choice"] = choice_entry(problem, choice)
    if problem.residuals is not None:
        entries["residuals"] = problem.residuals
    answers = answers_entry(of_found, by_sample)
    if answers is not None:
        entries["answers"] = answers
    channels = channels_of(problem, policy)
    if channels is not None:
        entries["channels"] = channels.to_dict()
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
        **budgets_used(problem, policy),
        "float": entry(task, None),
        "uniform8": entry(task, problem.reference_policy, found=of_found),
        "uniform": [_uniform(task, bits, same) for bits, same in uniform_policies(problem).items()],
        "policy": policy.to_dict(),
        "found": row,
        "finetuned": tuned,
        "rivals": {name: entry(task, rival, found=of_found) for name, rival in rivals.items()},
        "rival_policies": {name: rival.to_dict() for name, rival in rivals.items()},
        **entries,
        **racing_entries(problem, trials),
    }


def racing_entries(problem: Problem, trials: Sequence[Trial]) -> dict[str, Any]:
    """Tell how many evaluations ended early, and what that saved (`haq.store.records.RacingRecord`); nothing if none did.

    Args:
        problem: What was searched.
        trials: What was tried.

    Returns:
        The entry `racing`, or none.
    """
    cut = sum(not trial.whole for trial in trials)
    if not cut:
        return {}
    seen = sum(trial.evaluation.images for trial in trials)
    return {
        "racing": {
            "evaluations": len(trials),
            "cut": cut,
            "images": seen,
            "of_images": len(trials) * problem.evaluator.count,
        }
    }


def tuning_entry(outcome: Outcome, epochs: int) -> dict[str, Any]:
    """Tell as plain data how a fine-tuning was judged on the samples that it held out (`haq.store.records.TuningRecord`)."""
    assert outcome.before is not None
    return {
        "images": outcome.images,
        "epochs": epochs,
        "kept": outcome.kept,
        "diverged": outcome.diverged,
        "stopped": stopped_after(outcome),
        **_judgements(before=outcome.before, best=outcome.best),
    }


def stopped_after(outcome: Outcome) -> int | None:
    """Return the number of the epoch after which a training ended early, since epochs were no better; None if it didn't."""
    if not outcome.stopped:
        return None
    return len(outcome.epochs)


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


def budgets_used(problem: Problem, policy: Q.BitPolicy) -> dict[str, Any]:
    """Tell as plain data how much of its budgets a policy uses: `budget`, and `budgets`, all of them, if there are others."""
    costs = problem.costs(policy)
    found = []
    for limit in problem.limits:
        cost = costs[limit.metric]
        amount, fraction = None, None
        if limit.is_given:
            amount, fraction = limit.amount, limit.fraction
        found.append(
            {
                "metric": limit.metric,
                "unit": limit.unit,
                "limit": amount,
                "used": cost,
                "fraction": fraction,
                "used_fraction": cost / limit.reference,
                "holds": not limit.is_given or limit.holds(cost),
            }
        )
    entries: dict[str, Any] = {"budget": found[0]}
    if len(found) > 1:
        entries["budgets"] = found
    if problem.reference_words != UNIFORM_8:
        entries["reference"] = problem.reference_words
    return entries


def choice_entry(problem: Problem, choice: Choice) -> dict[str, Any]:
    """Tell as plain data which policy a search returned, and why (`haq.store.records.ChoiceRecord`).

    Args:
        problem: What was searched.
        choice: What `haq.solvers.choice` chose.

    Returns:
        The fields of the record.
    """
    best, chosen = choice.best, choice.trial
    unit = "nats"
    if problem.objective.distribution is not None:
        unit = problem.objective.distribution.unit
    found: dict[str, Any] = {
        **objective_of(problem).to_dict(),
        "best_policy": best.policy.to_dict(),
        "best": finite(best.value),
        "chosen": finite(chosen.value),
        "is_best": chosen.policy == best.policy,
        "below": finite(choice.below),
        "error": choice.error,
        "best_divergence": _divergence(best.evaluation, choice.confirmed_best),
        "chosen_divergence": _divergence(chosen.evaluation, choice.confirmed_trial),
        "divergence_unit": unit,
        "compared": choice.compared,
    }
    if choice.confirmed_best is not None and choice.confirmed_trial is not None:
        found |= {
            "finalists": choice.finalists,
            "confirmed": choice.confirmed,
            "confirmed_best": finite(choice.confirmed_best.value),
            "confirmed_chosen": finite(choice.confirmed_trial.value),
        }
    return found


def _divergence(evaluation: Evaluation, again: Evaluation | None) -> float | None:
    """Return how far a policy is from float on all samples that it was judged by."""
    if again is not None:
        evaluation = evaluation.together(again)
    return finite(evaluation.divergence)


def goal_entries(task: SearchTask, policy: Q.BitPolicy) -> dict[str, Any]:
    """Tell as plain data what was looked for, where that isn't the best policy, and whether a policy is that.

    Args:
        task: The search.
        policy: What was found.

    Returns:
        `goal`, and of the cheapest policy `reached` (`haq.store.records.ReachedRecord`); nothing for the best policy.
    """
    goal = goal_of(task.problem)
    if goal is None:
        return {}
    if goal["kind"] != "cheapest":
        return {"goal": goal}
    return {"goal": goal, "reached": _reached(task, policy)}


def _reached(task: SearchTask, policy: Q.BitPolicy) -> dict[str, Any]:
    """Tell how the value of what was found stands to what was asked for, on both splits.

    Args:
        task: The search.
        policy: What was found.

    Returns:
        The fields of `haq.store.records.ReachedRecord`.
    """
    problem, judging = task.problem, objective_of(task.problem)
    objective, goal = problem.objective, problem.goal
    found, of_float = entry(task, policy), entry(task, None)
    told: dict[str, Any] = {}
    for split in SPLITS:
        key = share_key(split, objective.name)
        value = judging.checked(found[key], key)
        float_value = judging.checked(of_float[key], key)
        least = goal.threshold(objective, float_value)
        count = len(getattr(task.dataset, split))
        errors = [_error(judging, row, key, count) for row in (found, of_float)]
        if goal.max_drop is None:
            errors = errors[:1]
        error = None
        if None not in errors:
            error = math.hypot(*(one for one in errors if one is not None))
        if goal.max_drop is not None:
            paired = found.get(paired_key(key, "float"))
            told["paired"] = paired is not None
            if paired is not None:
                error = paired
        told |= {split: finite(value), f"{split}_least": finite(least), f"{split}_error": error}
        told[f"{split}_holds"] = goal.is_met(objective, value, float_value)
    least = told.pop("search_least")
    return {**judging.to_dict(), "least": least, "max_drop": goal.max_drop, **told}


def _error(judging: ObjectiveRecord, row: dict[str, float | None], key: str, count: int) -> float | None:
    """Return the standard error of a value, where it is known.

    Args:
        judging: What the value is of.
        row: What was measured.
        key: The key of the value.
        count: On how many samples.

    Returns:
        The error; of a share of samples it follows from the share.
    """
    value = row[key]
    if judging.counts_samples and value is not None and count:
        return standard_error(value, count)
    return row.get(error_key(key))


def _uniform(task: SearchTask, bits: int | str, policy: Q.BitPolicy) -> dict[str, Any]:
    """Tell what a uniform policy costs and gives on the search split."""
    key = share_key("search", task.problem.objective.name)
    if policy in task.measured:
        value = task.measured[policy][key]
    else:
        value = finite(task.problem.evaluate(policy).accuracy)
    return {"bits": bits, "cost": task.problem.policy_cost(policy), key: value}

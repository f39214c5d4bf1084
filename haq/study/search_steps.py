"""What a search does, step by step: its solver and the rivals, fine-tuning, the result, and whether an attack breaks it."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import nn

import quantizers as Q
from haq import training
from haq.attacks.threat_model import parse_eps
from haq.console.progress import Live, follow_steps, follow_training
from haq.problem.budget import OutOfReach
from haq.problem.objective import Objective
from haq.problem.problem import Problem
from haq.problem.sensitivity import Sensitivities
from haq.solvers.base import Choice, Session, Trial
from haq.solvers.contribution import Contribution, contribution
from haq.solvers.sensitivity import COMPUTED, computed, evaluations_for_all
from haq.store.files import ROBUSTNESS
from haq.store.records import ResultRecord
from haq.store.units import PERCENT, counted, show
from haq.study import result as summary
from haq.study import tables
from haq.study.channels import bits_only, is_joint
from haq.study.config import ADAROUND
from haq.study.picture import save_picture
from haq.study.search_run import SearchRun
from haq.study.task import SearchTask, adversary_of
from haq.training.config import GIVE_UP_AFTER
from haq.training.reconstruction import Reconstructed

logger = logging.getLogger("haq")
RIVALS = ("greedy", "ilp")
CHEAP = "gradient"  # the kind of sensitivities of rivals, where a search measures none: it costs no evaluation
VERIFIED = 200  # images


@dataclass(frozen=True)
class Rivals:
    """The solvers that a search is compared with, which work with sensitivities, and where they have these from."""

    names: tuple[str, ...]
    kind: str | None = None  # of sensitivities that are computed for them; None: those of the search
    words: str = ""  # what these cost, or why there are no rivals
    problem: Problem | None = None  # what they search, if that are widths alone, beside a search of channels too


def rivals_of(task: SearchTask) -> Rivals:
    """Choose the rivals of a search: never does what they need take longer than the search itself.

    Where channels are searched too, rivals search widths alone, within the same budgets: what they find tells what channels
    are good for.

    Args:
        task: The search.

    Returns:
        The rivals.
    """
    found = _rivals_of(task)
    if not is_joint(task.problem) or not found.names:
        return found
    try:
        alone = bits_only(task.problem)
    except OutOfReach as error:
        return Rivals((), words=f"none: {error}")
    return replace(found, words=f"bits only, with all channels; {found.words}", problem=alone)


def _rivals_of(task: SearchTask) -> Rivals:
    """Choose the rivals of a search by what their sensitivities cost; see `rivals_of`."""
    config, problem = task.config, task.problem
    names = tuple(name for name in RIVALS if name != config.solver)
    if config.sensitivity is not None or config.sensitivity_kind in COMPUTED:
        return Rivals(names, words="they know the same sensitivities")
    if config.solver in RIVALS and not config.iterate:
        return Rivals(names, words="what one measures the other need not evaluate again")
    together = " and ".join(names)
    if problem.has_gradients and problem.calibration:
        return Rivals(names, CHEAP, f"{together} know sensitivities of kind {CHEAP}, which cost no evaluation")
    needed = evaluations_for_all(problem)
    if needed < task.evaluations:
        beside = f"{counted(needed, 'evaluations')} beside the search's own {task.evaluations}"
        return Rivals(names, words=f"{together} measure sensitivities together: {beside}")
    too_long = f"to measure sensitivities for {together} would take {counted(needed, 'evaluations')}, longer than the search"
    return Rivals((), words=f"none: {too_long}; choose more --evaluations, or a --sensitivity that is there")


def can_be_verified(objective: Objective) -> bool:
    """Say whether the full suite of attacks, which is on classification, can verify what was found under a cheap one."""
    return objective.attacked and objective.takes_scores


@dataclass
class _Found:
    """What the solvers of a search found."""

    policies: dict[str, Q.BitPolicy] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)  # evaluations
    trials: dict[str, list[Trial]] = field(default_factory=dict)
    saturated: dict[str, float] = field(default_factory=dict)  # the share of an agent's actions at a bound
    choices: dict[str, Choice] = field(default_factory=dict)
    contribution: Contribution | None = None  # of the agent, if the search's own solver is one


def search(console: Console, task: SearchTask, run: SearchRun) -> tuple[dict[str, Any], Q.BitPolicy]:
    """Search, fine-tune and measure what was found; everything is written into the run's folder.

    Args:
        console: Where a table follows the search.
        task: What is searched.
        run: The run, just begun or to be gone on with.

    Returns:
        What result.json holds, and the policy.
    """
    config = task.config
    rivals = rivals_of(task)
    names = (config.solver, *rivals.names)
    with Live(console, task.problem.objective.title) as bar:
        found = _solve_all(bar, task, run, names, rivals)
        policy = found.policies[config.solver]
        tuned = None
        reconstructed: Reconstructed | None = None
        outcomes: list[training.Outcome] = []
        network = task.problem.quantized(policy)
        if config.rounding == ADAROUND:
            reconstructed = task.reconstruct(policy, config.seed, follow_steps(bar, "rounding"))
            network = tuned = reconstructed.network
        if config.finetune_epochs:
            tuned = _finetune(bar, task, run, network, outcomes.append)
        if tuned is not None:
            run.save_checkpoint(tuned, task)
        policies = {name: found.policies[name] for name in rivals.names if name in found.policies}
        result = summary.collect(
            task,
            policy,
            tuned,
            policies,
            found.used,
            found.saturated,
            found.choices[config.solver],
            found.trials[config.solver],
        )
        if rivals.problem is not None:
            result["bits_only"] = list(policies)
        if found.contribution is not None:
            result["contribution"] = found.contribution._asdict()
        if reconstructed is not None:
            entry = summary.reconstruction_entry(reconstructed, config.seed)
            result["reconstruction"] = summary.judged_by(task.problem, reconstructed.before) | entry
            result["finetuned_by"] = "ptq"
        for outcome in outcomes:
            entry = summary.tuning_entry(outcome, config.finetune_epochs)
            result["tuning"] = summary.judged_by(task.problem, outcome.best) | entry
            if outcome.kept:
                result["finetuned_by"] = "train"
        if can_be_verified(task.problem.objective):
            network = tuned or task.problem.evaluator.prepared(policy)
            result["verified"] = _verify(bar, task, network, run.folder / ROBUSTNESS)
    save_picture(task.problem, policy, run.folder / "policy.png", task.outline())
    run.save_result(ResultRecord.from_dict(result))
    run.drop_checkpoint("finetuning")
    return result, policy


def _solve_all(bar: Progress, task: SearchTask, run: SearchRun, solvers: Sequence[str], rivals: Rivals) -> _Found:
    """Run solvers, the search's own first.

    Args:
        bar: Where progress is shown.
        task: What is searched.
        run: The run.
        solvers: Their names.
        rivals: The others among them, and the sensitivities that are computed for these.
    """
    kind = rivals.kind
    sensitivities = run.sensitivities(task)
    predicted: Sensitivities | None = None
    found = _Found()
    for name in solvers:
        if name != task.config.solver and kind is not None:
            try:
                sensitivities = sensitivities or predicted or computed(task.problem, kind)
            except (RuntimeError, ValueError) as error:
                # A network need not be one that gradients go through; what was found is there all the same.
                logger.warning(f"no rivals: their sensitivities can't be computed ({' '.join(str(error).split())[:200]})")
                break
        problem = task.problem
        if name != task.config.solver:
            problem = rivals.problem or problem
        session = _solve(bar, task, run, name, sensitivities, problem)
        if session.chosen is not None:
            found.policies[name] = session.chosen.policy
        if session.choice is not None:
            found.choices[name] = session.choice
        found.used[name] = session.used
        found.trials[name] = session.trials
        if name == task.config.solver:
            found.contribution = contribution(session)
            if kind == CHEAP:
                predicted = session.predicted
        if session.saturated:
            found.saturated[name] = statistics.mean(session.saturated)
    return found


def _solve(
    bar: Progress, task: SearchTask, run: SearchRun, name: str, sensitivities: Sensitivities | None, problem: Problem
) -> Session:
    """Run one solver on a problem, that of the task or a part of it, and show where it is."""
    evaluations, unit = task.evaluations, task.problem.objective.unit
    line = bar.add_task(name, total=evaluations)

    def on_evaluation(count: int, trial: Trial, best: Trial | None) -> None:
        share, best_so_far = tables.share_words(task.problem, trial), tables.best_words(task.problem, best)
        value = show(trial.value, unit)
        bar.update(line, completed=count, accuracy=value, cost=share, best=best_so_far)
        logger.info(f"{name} {count}/{evaluations}: {value} at {share} of the budget; best so far: {best_so_far}")

    session = run.search(task, name, sensitivities, on_evaluation, problem)
    bar.update(line, completed=session.used, total=session.used)
    return session


def _finetune(
    bar: Progress, task: SearchTask, run: SearchRun, network: nn.Module, on_outcome: training.OnOutcome
) -> nn.Module:
    config = task.config
    return training.finetune(
        task.network,
        network,
        task.to_train_on,
        epochs=config.finetune_epochs,
        seed=config.seed,
        learning_rate=config.learning_rate,
        give_up_after=GIVE_UP_AFTER,
        amp=config.amp,
        adversary=adversary_of(config),
        objective=task.problem.objective,
        state=run.checkpoint("finetuning", task, epochs=config.finetune_epochs, policy=Q.get_policy(network)),
        on_outcome=on_outcome,
        **follow_training(bar, _unit_of(task)),
    )


def _unit_of(task: SearchTask) -> str:
    """Return the unit of what fine-tuning judges networks by: of class scores the share of answers that agree."""
    if task.problem.objective.takes_scores:
        return PERCENT
    return task.problem.objective.unit


def _verify(bar: Progress, task: SearchTask, network: nn.Module, folder: Path) -> dict[str, Any]:
    """Attack what was found for its accuracy under a cheap attack with the full suite."""
    from haq.attacks.assessment import assess
    from haq.study.comparison import ComparedNetworks

    line = bar.add_task("verifying", total=None)

    def on_progress(done: float, total: float, note: str) -> None:
        bar.update(line, completed=int(done), total=int(total) or 1, note=note)

    gathered = ComparedNetworks(task.network, task.dataset, {"found": network}, {})
    found = assess(
        gathered.classifier(network),
        *gathered.images(VERIFIED),
        eps=parse_eps(task.config.eps),
        attacks="full",
        sources=gathered.sources("found"),
        seed=task.config.seed,
        folder=folder,
        on_progress=on_progress,
    )
    return found.summary()

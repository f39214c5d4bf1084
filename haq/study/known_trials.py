"""Trials of earlier searches that another is given: what a policy is worth depends on neither hardware nor budget.

They are read from the folder of a run or of a sweep, from what `haq.solve` returned, or from what that saved; whatever they
were searched for. Network, data, quantization and objective must be the same. What was measured elsewhere may differ in its
last bits from what would be here, so that no policy is returned for it that wasn't evaluated here.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import quantizers as Q
from haq.problem import ROBUST
from haq.problem.evaluator import Evaluation
from haq.problem.problem import Problem
from haq.solvers.base import Solver, find_solver
from haq.solvers.joint_space import space_of
from haq.solvers.space import Space
from haq.store import history
from haq.store.files import CONFIG, HISTORY, PROBLEM
from haq.store.history import HistoryRow
from haq.store.inventory import is_run, is_sweep
from haq.store.records import ConfigRecord, ProblemRecord
from haq.store.units import show
from haq.study.channels import allows_keep, is_joint, keep_of
from haq.study.config import SearchConfig
from haq.study.task import SearchTask

OF_HARDWARE = ("target", "machine", "reference")  # parts of a run's signature that say nothing of what policies are worth
REMEDY = "leave it out of the trials that are given"
SAME = 0.01  # the relative difference of two losses that may be the same policy's on two machines
SAME_LOSS = 1e-4  # and the absolute one, nats


class KnownTrial(NamedTuple):
    """A policy that was evaluated earlier, by which solver, and what it was measured to give."""

    solver: str
    policy: Q.BitPolicy
    evaluation: Evaluation


@dataclass(frozen=True)
class KnownTrials:
    """What a search is given of earlier ones.

    Attributes:
        trials: Each policy once.
        counts: How many of them are of which folder.
        left_out: How many more there were, with widths that mean nothing here.
    """

    trials: tuple[KnownTrial, ...] = ()
    counts: Mapping[str, int] | None = None
    left_out: int = 0

    @property
    def pairs(self) -> list[tuple[Q.BitPolicy, Evaluation]]:
        """Return them as `Session.known` has them."""
        return [(trial.policy, trial.evaluation) for trial in self.trials]

    def words(self, problem: Problem) -> str:
        """Say in a sentence how many there are, how many may be chosen here, and how many were left out.

        Args:
            problem: What is searched with them.

        Returns:
            The sentence, without a full stop.
        """
        fitting = sum(problem.holds(policy) for policy, _ in self.pairs)
        found = f"{len(self.trials)} known from earlier searches, {fitting} of them within the budgets"
        channels = ""
        if is_joint(problem):
            channels = " or channels"
        if self.left_out:
            found += f"; {self.left_out} left out, with widths{channels} that mean nothing here"
        return found


def check_uses_trials(solver: str | type[Solver] | Solver) -> None:
    """Raise ValueError for a solver that would learn nothing from trials that it is given."""
    found = find_solver(solver)
    if not getattr(found, "uses_trials", False):
        name = getattr(found, "name", "") or type(found).__name__
        raise ValueError(
            f"solver {name!r} learns nothing from trials of earlier searches: give none, or choose one whose class says "
            "`uses_trials`, such as surrogate"
        )


def read(sources: Iterable[str | os.PathLike[str]], task: SearchTask) -> KnownTrials:
    """Read the trials of runs and sweeps.

    Args:
        sources: Their folders.
        task: What is searched with them.

    Returns:
        The trials.

    Raises:
        FileNotFoundError: For a folder that is neither a run's nor a sweep's.
        ValueError: Naming the first difference, for trials of another network, other data, another quantization or another
            objective; and for files that are damaged.
    """
    gathered = _Gathered(task.problem)
    for source in sources:
        for folder in _folders(Path(source)):
            if is_run(folder):
                _check_run(folder, task)
                gathered.add_folder(str(source), folder)
            else:
                gathered.add_folder(str(source), folder, again=True)
    return gathered.found()


def gather(given: Any, problem: Problem) -> KnownTrials:
    """Take the trials that somebody gives in Python.

    Args:
        given: What `haq.solve` returned, the folder of a run or a sweep, one that `Result.save` wrote, or a list of these.
        problem: What is searched with them.

    Returns:
        The trials.

    Raises:
        TypeError: For anything else.
        FileNotFoundError, ValueError: As `read` does. Where a network has no signature, as in Python, the best policy of each
            is evaluated again, and must come out the same.
    """
    if isinstance(given, (str, os.PathLike)) or hasattr(given, "session"):
        given = [given]
    if not isinstance(given, Iterable):
        raise TypeError(f"trials is a {type(given).__name__}; it must be a result, the folder of a run, or a list of these")
    gathered = _Gathered(problem)
    for number, one in enumerate(given):
        if hasattr(one, "session"):
            gathered.add_result(f"result {number + 1}", one)
        elif isinstance(one, (str, os.PathLike)):
            for place, folder in enumerate(_folders(Path(one))):
                # The runs of a sweep are of one network.
                gathered.add_folder(str(one), folder, again=place == 0)
        else:
            raise TypeError(f"trials has a {type(one).__name__}; each must be a result, or the folder of a run")
    return gathered.found()


def of_rows(
    found: Iterable[HistoryRow], names: Sequence[str], problem: Problem, groups: Sequence[str] = ()
) -> list[KnownTrial]:
    """Read trials from the rows of a history.

    Args:
        found: The rows.
        names: The layers, in the order of the rows' widths.
        problem: What is searched with them.
        groups: The groups of channels, in the order of what the rows keep of them.

    Returns:
        As many trials.
    """
    order = [names.index(name) for name in problem.workload.names]
    made = []
    for row in found:
        widths = [[bits[place] for place in order] for bits in (row.weight_bits, row.activation_bits)]
        policy = problem.policy(*widths)
        if row.keep:
            policy = policy.with_keep(keep_of(groups, row.keep))
        made.append(KnownTrial(row.solver, policy, evaluation_of(row, problem)))
    return made


def evaluation_of(row: HistoryRow, problem: Problem) -> Evaluation:
    """Return what a row of a history says that a policy of a problem was measured to give.

    Raises:
        ValueError: For an evaluation that ended early after as many samples as there are.
    """
    higher, count = problem.objective.higher_is_better, problem.evaluator.count
    if row.images is not None:
        if row.images >= count:
            raise ValueError(
                f"evaluation {row.evaluation} of {row.solver} is said to have been cut short after {row.images:,} "
                f"{problem.samples_are}, and there are {count:,}: put the history back as it was, or start a new run"
            )
        count = row.images
    return Evaluation(row.accuracy, row.loss, count, row.divergence, higher)


def is_known_whole(evaluation: Evaluation, problem: Problem) -> bool:
    """Say whether an evaluation is of all samples that policies of a problem are judged on."""
    return evaluation.images == problem.evaluator.count


class _Gathered:
    """Trials of several searches, each policy once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._trials: dict[Q.BitPolicy, KnownTrial] = {}
        self._counts: Counter[str] = Counter()
        self._left_out: set[Q.BitPolicy] = set()

    @cached_property
    def _space(self) -> Space:
        """Return what the problem lets one choose, which most searches, without trials of others, needn't ask here."""
        return space_of(self.problem)

    def found(self) -> KnownTrials:
        return KnownTrials(tuple(self._trials.values()), dict(self._counts), len(self._left_out))

    def add_folder(self, source: str, folder: Path, again: bool = False) -> None:
        """Take the trials of a folder with a history.

        Args:
            source: What it is counted as.
            folder: The folder.
            again: Whether one of its policies is evaluated again, to see that they are of the same network and data.
        """
        if not os.path.lexists(folder / HISTORY):
            return
        outline = ProblemRecord.read(folder / PROBLEM)
        _check_outline(folder, outline, self.problem)
        names = [layer.name for layer in outline.layers]
        groups: list[str] = []
        if outline.pruning is not None:
            groups = [group.name for group in outline.pruning.groups]
        rows = history.read(folder / HISTORY, len(names), history.Limits.of(outline), groups=len(groups))
        found = of_rows(rows, names, self.problem, groups)
        if again:
            self._check_again(str(folder), found)
        self._add(source, found)

    def add_result(self, source: str, result: Any) -> None:
        """Take the trials of a `haq.study.solving.Result`."""
        other = result.problem
        _check_layers(source, other.workload.names, self.problem)
        found = []
        for trial in result.session.trials:
            policy = self.problem.policy(*self.problem.bit_arrays(trial.policy)).with_keep(trial.policy.keep)
            found.append(KnownTrial(result.solver, policy, trial.evaluation))
        if other.evaluator is not self.problem.evaluator:
            _check_judging(source, (other.objective.name, other.evaluator.count), self.problem)
            self._check_again(source, found)
        self._add(source, found)

    def _add(self, source: str, found: Iterable[KnownTrial]) -> None:
        for trial in found:
            before = self._trials.get(trial.policy)
            if before is not None and before.evaluation.images >= trial.evaluation.images:
                continue
            if not allows_keep(trial.policy, self.problem) or not self._space.describes(trial.policy):
                self._left_out.add(trial.policy)
                continue
            if before is None:
                self._counts[source] += 1
            self._trials[trial.policy] = trial

    def _check_again(self, source: str, found: Sequence[KnownTrial]) -> None:
        """Evaluate the best policy again. Raises ValueError unless it comes out as it is known."""
        problem = self.problem
        sound = [
            trial
            for trial in found
            if is_known_whole(trial.evaluation, problem)
            and math.isfinite(trial.evaluation.loss)
            and allows_keep(trial.policy, problem)
        ]
        if not sound:
            return
        best = max(sound, key=lambda trial: trial.evaluation.score)
        here, there = problem.evaluate(best.policy), best.evaluation
        if math.isclose(here.loss, there.loss, rel_tol=SAME, abs_tol=SAME_LOSS):
            return
        unit = problem.objective.unit
        raise ValueError(
            f"the trials of {source} are of another network, other data or another quantization: their best policy had "
            f"{show(there.value, unit)} and a loss of {there.loss:.4g}, and has {show(here.value, unit)} and {here.loss:.4g} "
            f"here; {REMEDY}"
        )


def _folders(source: Path) -> list[Path]:
    """List the folders with a history that a folder stands for: itself, or those of a sweep's runs."""
    if is_sweep(source):
        return [path for path in sorted(source.iterdir()) if path.is_dir() and is_run(path)]
    if is_run(source) or os.path.lexists(source / HISTORY):
        return [source]
    raise FileNotFoundError(
        f"{source} has no trials: it must be the folder of a run or of a sweep, or one that a result was saved into"
    )


def _check_run(folder: Path, task: SearchTask) -> None:
    """Raise ValueError, naming the first difference, unless policies of a run are worth the same in another search."""
    record = ConfigRecord.read(folder / CONFIG)
    before = {name: value for name, value in record.signature.items() if name not in OF_HARDWARE}
    now = task.network_signature()
    if "criterion" in before and task.config.prune is not None:
        # Of a run that pruned nothing every policy means the same here.
        now["criterion"] = task.config.criterion_name
    # What is more than another setting is named first.
    others = (set(before) | set(now)) - {"data", "network"}
    for name in ("data", "network", *sorted(others)):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{folder} has trials of another {name}: its signature is {before.get(name)}, here it is {now.get(name)}; "
                f"{REMEDY}"
            )
    try:
        settings = SearchConfig.read(record.settings)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not the configuration of a run: {error}") from error
    was, here = _judging(settings), _judging(task.config)
    for name in dict.fromkeys((*was, *here)):
        if was.get(name) != here.get(name):
            raise ValueError(f"{folder} has trials judged with {name} {was.get(name)}, here it is {here.get(name)}; {REMEDY}")


def _judging(settings: SearchConfig) -> dict[str, Any]:
    """Return the settings, beside those of a signature, that what a policy is worth depends on."""
    found: dict[str, Any] = {"objective": settings.objective}
    if settings.objective.endswith(ROBUST):
        found["eps"] = settings.eps
    found["finetune_steps"] = settings.finetune_steps
    if settings.finetune_steps:
        found |= {"seed": settings.seed, "learning_rate": settings.learning_rate}
    return found


def _check_outline(folder: Path, outline: ProblemRecord, problem: Problem) -> None:
    """Raise ValueError, naming the first difference, unless problem.json is of the layers and the objective of a problem."""
    _check_layers(str(folder), [layer.name for layer in outline.layers], problem)
    macs = {layer.name: layer.macs for layer in outline.layers}
    for layer in problem.workload.layers:
        if macs[layer.name] != layer.macs:
            raise ValueError(
                f"{folder} has trials of another network: layer {layer.name[:60]!r} has {macs[layer.name]} MACs there and "
                f"{layer.macs} here; {REMEDY}"
            )
    _check_judging(str(folder), (outline.objective, outline.images), problem)


def _check_layers(source: str, names: Sequence[str], problem: Problem) -> None:
    """Raise ValueError unless trials are of the layers of a problem, in whatever order."""
    differing = sorted(set(names) ^ set(problem.workload.names))
    if differing:
        raise ValueError(
            f"{source} has trials of another network: layer {differing[0][:60]!r} is in one of the two only; {REMEDY}"
        )


def _check_judging(source: str, judged: tuple[str, int], problem: Problem) -> None:
    """Raise ValueError unless policies were judged by the objective of a problem, on as many samples.

    Args:
        source: Where the trials are from, for messages.
        judged: The name of their objective, and the number of samples.
        problem: The problem.
    """
    objective, images = judged
    if objective != problem.objective.name:
        raise ValueError(f"{source} has trials judged by {objective[:60]}, here it is {problem.objective.name}; {REMEDY}")
    if images != problem.evaluator.count:
        raise ValueError(
            f"{source} has trials on {images} {problem.samples_are}, here they are {problem.evaluator.count}; {REMEDY}"
        )

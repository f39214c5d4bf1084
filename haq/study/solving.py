"""A search in Python: `haq.solve` and the result that it returns.

problem = haq.Problem(net, calibrate=train_loader, search=held_out_loader, target="edge", budget=0.5)
result = haq.solve(problem, "ddpg", evaluations=200)
result.finetune(train_loader, epochs=5)
result.save("found")
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from rich.console import Console
from torch import nn

import quantizers as Q
from haq.console.notebook import NotebookLive
from haq.console.progress import Live
from haq.networks.checkpoint import load_quantized, save_quantized
from haq.problem.batches import Batches
from haq.problem.chance import doubts
from haq.problem.evaluator import Evaluation, Evaluator
from haq.problem.goal import CHEAPEST
from haq.problem.problem import Problem
from haq.problem.samples import Samples
from haq.problem.sensitivity import Sensitivities, check_kind
from haq.solvers import base
from haq.solvers.agent_file import AgentFile
from haq.solvers.base import Choice, Session, Solver, Trial
from haq.solvers.contribution import Contribution, contribution
from haq.solvers.spending import proposed, spending, time_words, words_of
from haq.store import history
from haq.store.files import CHECKPOINT, HISTORY, POLICY, PROBLEM, write
from haq.store.history import HistoryRow
from haq.store.records import PolicyRecord, ProblemRecord
from haq.store.units import counted, describe_amount, finite, metric_words, show
from haq.study.channels import channels_of, is_joint
from haq.study.known_trials import check_uses_trials, gather
from haq.study.picture import draw_policy, save_picture
from haq.study.result import budgets_used, choice_entry, costs, racing_entries
from haq.study.search_run import check_network, history_row, other_metrics, policy_of
from haq.study.tables import PolicyTable, best_words, share_words
from haq.study.task import goal_of, objective_of, outline, versions
from haq.study.workers.processes import working
from haq.training import finetune
from haq.training.config import Outcome
from haq.training.given import given_to_tune
from hw_models.notebook import html_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("haq")
MOST_SEEDS = 2**32  # what every generator takes
TOP_RATE = 10.0  # a learning rate is below it
TUNED = "fine-tuned"
TUNED_BEFORE = "fine-tuned earlier"
CALIBRATED = "calibrated only"

SOLUTION = "solution.json"
SOLUTION_SCHEMA = "haq-solution-1"
QUANTIZED = "quantized.safetensors"
PICTURE = "policy.png"


Given = Union["Result", str, "os.PathLike[str]"]  # what holds the trials of an earlier search


class Trials(list[Trial]):
    """Every trial of a search, in order."""

    def __repr__(self) -> str:
        """Say on one line how many there are."""
        feasible = sum(trial.feasible for trial in self)
        words = "within the budget"
        if self and self[0].goal == CHEAPEST:
            words = "good enough"
        return f"Trials({len(self)} policies evaluated, {feasible} {words})"

    def _repr_html_(self) -> str:
        """Make a table of them for a notebook."""
        rows = []
        for number, trial in enumerate(self, 1):
            verdict = "over the budget"
            if trial.feasible:
                verdict = "within it"
            elif trial.within:
                verdict = "not good enough"
            rows.append((number, show(trial.value, trial.unit), f"{trial.loss:.4g}", f"{trial.cost:.4g}", verdict))
        title = "accuracy"
        if self:
            title = self[0].title
        return html_table("Trials", ("evaluation", title, "loss", "cost", "budget"), rows)

    def to_pandas(self) -> Any:
        """Make a table of pandas, a row per trial. Raises ImportError, with what to install, where pandas isn't."""
        try:
            import pandas  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        columns = ("policy", "accuracy", "loss", "cost", "feasible")
        return pandas.DataFrame({name: [getattr(trial, name) for trial in self] for name in columns})


class Result:
    """What a solver found for a problem.

    Attributes:
        problem: What was searched.
        solver: The solver's name.
        seed: What everything random came from.
        session: The allowance that it had, with what was tried.
        trial: The trial that was chosen: the best within the budget, or one that can't be told from it on the search images
            and is more likely to be as good on others.
        best: The best trial on the search images.
        choice: Why `trial` was chosen.
        finetuned: What the last `finetune` returned, better on the search images or not; None before.
        kept: Which network `quantized` is, in words: "fine-tuned", "fine-tuned earlier" or "calibrated only".
    """

    def __init__(self, problem: Problem, solver: str, seed: int, session: Session) -> None:
        """Take what was found.

        Args:
            problem: What was searched.
            solver: The solver's name.
            seed: What everything random came from.
            session: The session, once the solver is done.
        """
        assert session.choice is not None
        self.problem = problem
        self.solver = solver
        self.seed = seed
        self.session = session
        self.choice: Choice = session.choice
        self.trial: Trial = self.choice.trial
        self.best: Trial = self.choice.best
        self.finetuned: nn.Module | None = None
        self.kept = CALIBRATED
        self._quantized: nn.Module | None = None
        self._finetuned_result: Evaluation | None = None
        self._kept_result: Evaluation | None = None

    def __repr__(self) -> str:
        """Say on one line what was found."""
        cost = describe_amount(self.trial.cost, self.problem.metric)
        share = self.trial.cost / self.problem.reference
        costs = self.problem.costs(self.policy)
        further = [f", {metric_words(name)} {describe_amount(costs[name], name)}" for name in other_metrics(self.problem)]
        tuned = ""
        if self._finetuned_result is not None:
            tuned = f"; fine-tuned {self._show(self._finetuned_result)}, kept: {self.kept}"
        channels = channels_of(self.problem, self.policy)
        kept = ""
        if channels is not None:
            kept = f", {channels.short} channels"
        used = counted(self.session.used, "evaluations")
        return (
            f"Result({self.solver}: {self.problem.objective.title} {self._show(self.trial.evaluation)} at {cost} "
            f"({share:.3f} of {self.problem.reference_words}){''.join(further)}{kept}, {used}; "
            f"float {self._show(self.problem.float_result)}{tuned})"
        )

    def _show(self, evaluation: Evaluation) -> str:
        return show(evaluation.value, self.problem.objective.unit)

    def _repr_html_(self) -> str:
        """Make tables of what was found for a notebook."""
        problem = self.problem
        amounts = [describe_amount(cost, metric) for metric, cost in problem.costs(self.policy).items()]
        rows = [
            ("float", self._show(problem.float_result), *("" for _ in amounts)),
            (f"found by {self.solver}", self._show(self.trial.evaluation), *amounts),
        ]
        if self._finetuned_result is not None:
            rows.append((f"fine-tuned (kept: {self.kept})", self._show(self._finetuned_result), *amounts))
        caption = (
            f"{problem.objective.words}{problem.count_words(' on ', 'search ')}, {counted(self.session.used, 'evaluations')}"
        )
        metrics = [metric_words(metric) for metric in problem.costs(self.policy)]
        found = html_table(caption, ("policy", problem.objective.short, *metrics), rows)
        return found + self.table()._repr_html_()

    @property
    def policy(self) -> Q.BitPolicy:
        """Return the bits of every layer, and what is kept of channels where they were searched."""
        return self.trial.policy

    @property
    def trials(self) -> Trials:
        """Return every trial, in order."""
        return Trials(self.session.trials)

    @property
    def history(self) -> Trials:
        """Return every trial, in order; the same as `trials`."""
        return self.trials

    @property
    def contribution(self) -> Contribution | None:
        """Return how much came from an agent's actor; None if no agent searched, or in HAQ's own environment."""
        return contribution(self.session)

    @property
    def sensitivities(self) -> Sensitivities | None:
        """Return what the solver knew of single layers; another search of this network can be given them."""
        return self.session.sensitivities

    @property
    def quantized(self) -> nn.Module:
        """Return the quantized network at the policy, the best that there is on the search images.

        That is the one `finetune` made, or the one that is calibrated only where it is better; `kept` says which.
        """
        if self._quantized is None:
            self._quantized = self.problem.quantized(self.policy)
        return self._quantized

    def evaluate(self, network: nn.Module) -> Evaluation:
        """Tell what any network gives on the search images, judged as policies were.

        Args:
            network: Any network with the same inputs and outputs.

        Returns:
            Its value and loss on the search images.
        """
        return self.problem.evaluator.measure(network.eval())

    def table(self) -> PolicyTable:
        """Make a table of bits and costs per layer, and of channels, for a terminal (`print`) or a notebook.

        Returns:
            The table, which says what the costs are: estimated, or measured on which device.
        """
        return PolicyTable(self.problem, self.policy)

    def plot(self) -> Figure:
        """Draw bits per layer over each layer's share of the cost; a notebook shows the figure.

        Returns:
            A figure of Matplotlib.
        """
        return draw_policy(self.problem, self.policy)

    def finetune(self, loader: Batches, *, epochs: int = 12, seed: int | None = None, **options: Any) -> nn.Module:
        """Train the quantized network at its bits, with the float network as teacher.

        A part of the samples is held out. After every epoch the network is judged on them: images of classes by how often it
        answers as the float network does, everything else by the objective of the problem, and by how far its outputs are from
        the float network's. The best is returned; where none is better than the network before, that one, with a warning.

        Args:
            loader: Samples to train with, as the problem takes them: a DataLoader, a Dataset, tensors, batches (inputs,
                targets). Targets play a part in a `loss` and in the value that an objective tells. Images of classes are
                kept in memory; of other samples what doesn't fit into a quarter of it is read whenever it is needed.
            epochs: How often each sample is seen.
            seed: What everything random comes from; the search's, if nothing is given.
            options: Further ones of `haq.training.finetune`, such as learning_rate, loss, optimizer and patience.

        Returns:
            The tuned network, which is also kept as `finetuned`; and as `quantized`, which is saved, if it is better on the
            search samples than what that was before: of a better value, or of the same with less loss.

        Raises:
            ValueError: For numbers out of range; for inputs that aren't images where the problem is of such; for an objective
                without a distance between outputs and no loss; where policies were judged under attack, unless an
                `adversary` is given.
        """
        if seed is None:
            seed = self.seed
        check_count("epochs", epochs)
        check_seed(seed)
        if "learning_rate" in options:
            check_rate(options["learning_rate"])
        if self.problem.objective.attacked and "adversary" not in options:
            raise ValueError(
                "policies were judged under attack, which plain fine-tuning would train away: give the `adversary` to train "
                "against (haq.training.Adversary)"
            )
        warn = functools.partial(_warn_if_vain, samples_are=self.problem.samples_are)
        on_outcome = options.pop("on_outcome", warn)
        network, split, objective = given_to_tune(self.problem, loader, options.get("loss"))
        with _shown() as bar:
            line = bar.add_task("fine-tuning", total=None)
            tuned = finetune(
                network,
                self.problem.quantized(self.policy),
                split,
                epochs=epochs,
                seed=seed,
                objective=objective,
                on_step=lambda step, steps: bar.update(line, completed=step, total=steps),
                on_outcome=on_outcome,
                **options,
            )
        self._keep(tuned)
        return tuned

    def _keep(self, tuned: nn.Module) -> None:
        """Take a fine-tuned network, as `quantized` too if it is better than what that is now."""
        if self._kept_result is None:
            # What a trial gave may be of another network: `tune` trains it first.
            self._kept_result = self.evaluate(self.quantized)
        self.finetuned = tuned
        self._finetuned_result = self.evaluate(tuned)
        # As trials are ranked; the cost is the same.
        before = (-self._kept_result.score, self._kept_result.loss)
        after = (-self._finetuned_result.score, self._finetuned_result.loss)
        if after < before:
            self._quantized = tuned
            self._kept_result = self._finetuned_result
            self.kept = TUNED
        elif self.kept == TUNED:
            self.kept = TUNED_BEFORE

    def save(self, folder: str | Path) -> Path:
        """Write what was found into a new folder.

        policy.json, history.csv, problem.json and policy.png are as in the folder of a run; solution.json has what was
        measured; quantized.safetensors is the quantized network, which `haq.load(folder, network)` reads.

        Args:
            folder: Where; made if need be.

        Returns:
            The folder.

        Raises:
            ValueError: If there is anything in it, touching nothing.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is in use and is not overwritten: name another folder")
        # Before anything is written: a problem that is a table has none.
        quantized = self.quantized
        folder.mkdir(parents=True, exist_ok=True)
        PolicyRecord.of(self.policy).write(folder / POLICY)
        history.write(folder / HISTORY, self._rows(), other_metrics(self.problem), tells_keep=is_joint(self.problem))
        ProblemRecord.from_dict(outline(self.problem)).write(folder / PROBLEM)
        write(folder / SOLUTION, json.dumps(self.to_dict(), indent=2) + "\n")
        save_quantized(folder / QUANTIZED, quantized)
        save_picture(self.problem, self.policy, folder / PICTURE)
        return folder

    def to_dict(self) -> dict[str, Any]:
        """Return what was found as plain data.

        Returns:
            What `save` writes to solution.json: text, numbers and containers of them.
        """
        problem = self.problem
        further: dict[str, Any] = {"choice": choice_entry(problem, self.choice)}
        from_actor = self.contribution
        if from_actor is not None:
            further["contribution"] = from_actor._asdict()
        goal = goal_of(problem)
        if goal is not None:
            further["goal"] = goal
        channels = channels_of(problem, self.policy)
        if channels is not None:
            further["channels"] = channels.to_dict()
        tuned = None
        if self._finetuned_result is not None:
            tuned = _entry(self._finetuned_result)
        return {
            "schema": SOLUTION_SCHEMA,
            **objective_of(problem).differences(),
            "solver": self.solver,
            "seed": self.seed,
            "evaluations": self.session.used,
            "objective": problem.objective.name,
            "objective_is": problem.objective.words,
            "float": _entry(problem.float_result),
            "found": {**_entry(self.trial.evaluation), **costs(problem, self.policy)},
            "finetuned": tuned,
            "quantized_is": self.kept,
            **budgets_used(problem, self.policy),
            **further,
            **racing_entries(problem, self.session.trials),
            "versions": versions(problem.evaluator.device),
        }

    def _rows(self) -> Iterator[HistoryRow]:
        for number, trial in enumerate(self.session.trials, 1):
            yield history_row(self.solver, number, trial, self.problem)


def solve(
    problem: Problem,
    solver: str | type[Solver] | Solver = "ddpg",
    *,
    evaluations: int | None = None,
    seed: int = 0,
    on_trial: Callable[[Trial], None] | None = None,
    ahead: int = 1,
    sensitivities: Sensitivities | str = "loss",
    trials: Given | Iterable[Given] | None = None,
    env: str = "plan",
    iterate: bool = False,
    race: bool = True,
    agent: str | Path | AgentFile | None = None,
    workers: int | None = None,
    confirm: Batches | Samples | None = None,
) -> Result:
    """Look for the best policy of a problem. Progress is shown in a terminal and in a notebook.

    Args:
        problem: What is to be solved.
        solver: A name (`haq.solvers.SOLVERS`), `module:Name`, a class or an instance.
        evaluations: How many policies the solver may evaluate; None: what is proposed for the size of the problem
            (`haq.solvers.spending.proposed`), 200 for 12 layers of 2 to 8 bits.
        seed: What everything random comes from: the same seed gives the same result.
        on_trial: Is told every trial, as soon as it is there.
        ahead: How many policies agents and evolution choose before they learn what the first of them is worth, so that workers
            have something to do; the result depends on it.
        sensitivities: What is known of single layers, such as an earlier result's `sensitivities`; or the kind that is to be
            measured: "loss" or "kl", or "hessian" or "gradient", which cost no evaluation.
        trials: What earlier searches of this network and data tried, whatever they were of: results, folders of runs and
            sweeps, folders that results were saved into, or one of these. They cost nothing; a solver must learn from them
            (`Solver.uses_trials`).
        env: The environment of agents: "plan", or "haq" for that of HAQ's paper.
        iterate: Whether `ilp` goes on after its first solution, with what adds up fitted to all trials, until nothing
            improves.
        race: Whether solvers that know how to go on with it end an evaluation as soon as a part of the samples tells that the
            policy can't be among the best. Only where values are shares of samples.
        agent: What the solver, an agent of that kind, starts from: the file that `haq pretrain` wrote, or its content.
        workers: Processes that evaluate policies; None for this one. The result doesn't depend on their number.
        confirm: Further held-out samples, as `search` of the problem, which neither search nor calibration has seen: the best
            few policies are judged again on them, and the one that is returned is chosen by both together. Don't fine-tune on
            them before.

    Returns:
        What was found.

    Raises:
        TypeError: For a problem that is none, for an `on_trial` that can't be called, and for trials that are none.
        FileNotFoundError: For a folder that holds no trials.
        ValueError: For something that is no solver, for numbers out of range, for trials of another problem, for `confirm` if
            it can't be read, for whatever the solver refuses, and if it fails or evaluated no policy within the budget.

    Examples:
        >>> import haq, torch
        >>> network = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)], torch.nn.Linear(8, 3))
        >>> samples = [(torch.rand(32, 8), torch.arange(32) % 3)]
        >>> problem = haq.Problem(network, calibrate=samples, search=samples, target="edge", budget=0.9)
        >>> result = haq.solve(problem, "greedy", evaluations=20)
        >>> problem.holds(result.policy)
        True
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem is a {type(problem).__name__}; it must be a haq.Problem, made of the network")
    if on_trial is not None and not callable(on_trial):
        raise TypeError(f"on_trial is {on_trial!r}; it must be a function that takes a trial")
    if evaluations is None:
        evaluations = proposed(problem)
    check_count("evaluations", evaluations)
    check_count("ahead", ahead)
    if workers is not None:
        check_count("workers", workers)
    check_seed(seed)
    found = base.find_solver(solver, iterate)
    given, kind = None, "loss"
    if isinstance(sensitivities, Sensitivities):
        given = sensitivities
        given.check(problem, given.signature, Path("sensitivities"))
    else:
        kind = check_kind(sensitivities)
    confirming: Evaluator | None = None
    if confirm is not None:
        confirming = problem.judging(confirm)
    starting = _starting(agent)
    name = getattr(found, "name", "") or type(found).__name__
    known: list[tuple[Q.BitPolicy, Evaluation]] = []
    if trials is not None:
        check_uses_trials(found)
        known = gather(trials, problem).pairs
    for sentence in doubts(problem):
        logger.warning(sentence)
    parts = spending(found, problem, evaluations, kind, given is not None, env)
    said = [*words_of(parts, evaluations), time_words(problem, evaluations)]
    logger.info(f"{name}, {counted(evaluations, 'evaluations')}: {'; '.join(filter(None, said))}")
    with _shown(problem.objective.title) as bar:
        line = bar.add_task(name, total=evaluations)

        def follow(trial: Trial) -> None:
            share, best = share_words(problem, trial), best_words(problem, session.best)
            bar.update(line, completed=session.used, accuracy=show(trial.value, trial.unit), cost=share, best=best)
            if on_trial is not None:
                on_trial(trial)

        session = Session(
            problem,
            evaluations,
            follow,
            given,
            kind,
            known=known,
            env=base.check_env(env),
            ahead=ahead,
            agent=starting,
            race=race,
            confirm=confirming,
        )
        with working(problem.evaluator, workers, device=problem.evaluator.device.type):
            base.solve(found, session, seed)
    return Result(problem, name, seed, session)


def _starting(agent: Any) -> AgentFile | None:
    """Read what an agent is to start from. Raises TypeError for what is neither a file nor its content."""
    if agent is None or isinstance(agent, AgentFile):
        return agent
    if isinstance(agent, str | Path):
        return AgentFile.read(Path(agent))
    raise TypeError(f"agent is a {type(agent).__name__}; it must be the path of a file that haq pretrain wrote")


def load(path: str | Path, network: nn.Module | None = None) -> nn.Module:
    """Load a quantized network from a file, or from a folder that `Result.save` or a run wrote.

    Args:
        path: The file, or the folder.
        network: The float network that it is of; not needed where the file names one that is built in.

    Returns:
        The quantized network, in evaluation mode.

    Raises:
        FileNotFoundError: If there is none.
        TypeError: For a path or a network that is none.
        ValueError: With the reason, if the file is anything else, or has other bits than the folder's policy.json.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path is {path!r}; it must be the path of a file or a folder")
    if network is not None and not isinstance(network, nn.Module):
        raise TypeError(f"network is {network!r}; it must be the float network, a torch.nn.Module")
    path = Path(path)
    if path.is_dir():
        places = [path / QUANTIZED, path / CHECKPOINT]
        there = [place for place in places if place.is_file()]
        if not there:
            raise FileNotFoundError(f"{path} holds no quantized network: neither {QUANTIZED} nor {CHECKPOINT}")
        made = load_quantized(there[0], network)
        if (path / POLICY).exists():
            kept = policy_of(PolicyRecord.read(path / POLICY))
            check_network(path / POLICY, kept, there[0], made, "name the network's file")
        return made
    return load_quantized(path, network)


def check_count(name: str, number: Any) -> None:
    """Raise ValueError unless a number is an integer of at least 1.

    Args:
        name: What it is called.
        number: The number.
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} is {number!r}; it must be an integer of at least 1")


def check_seed(seed: Any) -> None:
    """Raise ValueError unless a seed is an integer that every generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < MOST_SEEDS:
        raise ValueError(f"seed is {seed!r}; it must be an integer from 0 to {MOST_SEEDS - 1}")


def check_rate(rate: Any) -> None:
    """Raise ValueError unless a learning rate is a number that training can do something with."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < TOP_RATE:
        raise ValueError(f"learning_rate is {rate!r}; it must be a number above 0 and below {TOP_RATE:g}")


def _warn_if_vain(outcome: Outcome, samples_are: str) -> None:
    """Say it if fine-tuning didn't help."""
    if not outcome.kept:
        logger.warning(
            f"fine-tuning did not help: on {outcome.images} {samples_are} that were held out no epoch was better than the "
            f"network before, which was kept; try a lower learning_rate, or more {samples_are}"
        )


def _entry(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as plain data, null for what is infinite."""
    entry = evaluation._asdict()
    for name in ("accuracy", "loss", "divergence", "error"):
        entry[name] = finite(entry[name])
    return entry


@contextmanager
def _shown(title: str = "accuracy") -> Iterator[Live]:
    """Show progress where somebody sees it: in a terminal, and in a notebook; `title` is what the objective is called."""
    bar = Live(Console(stderr=True), title)
    if Console().is_jupyter:
        bar = NotebookLive(title)
    with bar:
        yield bar

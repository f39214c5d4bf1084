"""What all solvers share: the class they are made of, their allowance of evaluations, and the record of a policy tried.

A solver of your own is one class:

    class Halves(haq.Solver):
        summary = "uniform policies, from the widest to the first that fits"

        def solve(self, problem, session, seed):
            for bits in (8, 7, 6, 5, 4, 3, 2):
                session.evaluate(problem.uniform(bits, keep_pinned=True))

    haq.solve(problem, Halves)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import quantizers as Q
from haq import solvers
from haq.problem import racing
from haq.problem.evaluator import Evaluation, Evaluator
from haq.problem.goal import BEST, CHEAPEST, TRADEOFF
from haq.problem.problem import NotAllowed, Problem
from haq.problem.sensitivity import Sensitivities
from haq.solvers import ENVS, PLAN, SOLVERS, lacking
from haq.store.checkpoint import Checkpoint
from haq.store.units import PERCENT, describe_amount, show, show_difference
from hw_models.registry import printable

if TYPE_CHECKING:
    from haq.solvers.agent_file import AgentFile


class NothingGoodEnough(ValueError):
    """A search for the cheapest policy that is good enough evaluated none that is."""


class NothingFound(ValueError):
    """A search evaluated no policy within the budget whose outputs are finite."""


@dataclass(frozen=True)
class Trial:
    """A policy with what it was measured to give and what it costs.

    Attributes:
        policy: The bits of every layer.
        evaluation: What it was measured to give on the search samples.
        cost: What it costs, in the unit of the problem's metric.
        feasible: Whether it may be chosen: it is within all budgets, and good enough where the cheapest is looked for.
        title: What the objective is called.
        unit: The objective's.
        goal: What is looked for: "best", "cheapest" or "tradeoff" (`haq.problem.goal`).
        within: Whether it is within all budgets; None: that is what `feasible` says.
        worth: The value of a trade-off.
        whole: Whether all search samples were looked at. A trial that was cut short was told early that it can't be among the
            best: its value and loss are means over the samples that were seen, and it is never chosen.
    """

    policy: Q.BitPolicy
    evaluation: Evaluation
    cost: float
    feasible: bool
    title: str = "accuracy"
    unit: str = PERCENT
    goal: str = BEST.kind
    within: bool | None = None
    worth: float = 0.0
    whole: bool = True

    @classmethod
    def of(cls, problem: Problem, policy: Q.BitPolicy, evaluation: Evaluation) -> Trial:
        """Make the record of a policy that was evaluated.

        Args:
            problem: What it is of.
            policy: The policy.
            evaluation: What it was measured to give.

        Returns:
            The record, which is feasible and ranked by the problem's goal.
        """
        objective, goal = problem.objective, problem.goal
        cost = problem.policy_cost(policy)
        within = problem.holds(policy)
        worth = 0.0
        if goal.kind == TRADEOFF:
            worth = goal.worth(evaluation.value, cost, problem.tradeoff_target)
        feasible = within and problem.meets(evaluation)
        whole = evaluation.images >= problem.evaluator.count
        return cls(policy, evaluation, cost, feasible, objective.title, objective.unit, goal.kind, within, worth, whole)

    @property
    def accuracy(self) -> float:
        """Return the objective's value; of classification the accuracy, 0 to 1."""
        return self.evaluation.accuracy

    @property
    def value(self) -> float:
        """Return the objective's value."""
        return self.evaluation.accuracy

    @property
    def loss(self) -> float:
        """Return the loss (nats)."""
        return self.evaluation.loss

    @property
    def score(self) -> float:
        """Return a number that is larger for a better value, of a trade-off for a better trade."""
        if self.goal == TRADEOFF:
            return self.worth
        return self.evaluation.score

    @property
    def rank(self) -> tuple[float, float, float]:
        """Sort better policies first: the objective's value, then loss, then cost.

        Where the cheapest is looked for, the cost comes first; of a trade-off its value.
        """
        if self.goal == CHEAPEST:
            return self.cost, -self.evaluation.score, self.loss
        if self.goal == TRADEOFF:
            return -self.worth, self.loss, self.cost
        return -self.evaluation.score, self.loss, self.cost

    def __repr__(self) -> str:
        """Say on one line how good it is, and whether it may be chosen."""
        words = "within the budget"
        if self.within is False or (self.within is None and not self.feasible):
            words = "over the budget"
        elif not self.feasible:
            words = "not good enough"
        elif self.goal == CHEAPEST:
            words = "good enough"
        if not self.whole:
            words += f", cut short after {self.evaluation.images:,} samples"
        return f"Trial({self.title} {show(self.value, self.unit)}, loss {self.loss:.4g}, cost {self.cost:.4g}, {words})"


@dataclass(frozen=True)
class Choice:
    """What a search returns, and why (`haq.solvers.choice`).

    Attributes:
        trial: What is returned.
        best: The best on the search samples, by the goal.
        below: How much worse `trial` is than `best`, by `Trial.score` on all samples that were looked at; negative if it is
            better on all of them.
        error: The paired standard error of that; 0 of the same policy.
        compared: How many policies were within one standard error of the best, which is one of them.
        finalists: How many were judged again on further held-out samples; 0 where there were none.
        confirmed: How many samples these were.
        confirmed_trial: What `trial` gave on these.
        confirmed_best: What `best` gave on these.
    """

    trial: Trial
    best: Trial
    below: float = 0.0
    error: float = 0.0
    compared: int = 1
    finalists: int = 0
    confirmed: int = 0
    confirmed_trial: Evaluation | None = None
    confirmed_best: Evaluation | None = None


@dataclass(repr=False)
class Session:
    """One solver's allowance of evaluations on a problem. A policy asked for twice counts once.

    Attributes:
        problem: What is to be solved.
        evaluations: How many policies may be evaluated.
        on_trial: Is told every trial, once it is among `trials`.
        sensitivities: What a solver that works with them need not measure; None lets it measure those of
            `sensitivity_kind`, which it leaves here and tells `on_sensitivities`.
        predicted: What gradients predict of the loss, if the solver computed that: others need not compute it again.
        known: Trials of other searches of the same network and samples, whatever they were searched for. They aren't counted
            and aren't among `trials`; a solver may learn from them.
        env: The environment of agents: "plan" or "haq".
        ahead: How many policies a solver may choose before it learns what the first of them is worth; it says by `expect`
            what it will ask for, so that others can evaluate it meanwhile.
        checkpoint: Where an agent keeps its state.
        agent: What an agent starts from, which `haq pretrain` made; None for one that knows nothing yet.
        trials: Every trial, in order.
        best: The best feasible trial so far, by the problem's goal; none whose network's outputs aren't finite, and none that
            was cut short.
        race: Whether evaluations may end early (`racing_beat`).
        recorded: What an interrupted search of the same solver was told, which it is told again.
        choice: What the search returns, once it is over: not always the best, whose value is lucky in part.
        confirm: Judges the last few policies again, on further held-out samples; None for nothing of that kind.
        saturated: The share of an agent's actions at a bound, by episode.
        origins: Where every choice came from, in order, if the solver tells it (`haq.solvers.surrogate.Search`).
        proposers: The names of those who proposed candidates beside the solver itself, as they are in `origins`.
        failure: What went wrong in an evaluation, which is no solver's fault.
    """

    problem: Problem
    evaluations: int
    on_trial: Callable[[Trial], None] = lambda trial: None
    sensitivities: Sensitivities | None = None
    sensitivity_kind: str = "loss"
    on_sensitivities: Callable[[Sensitivities], None] = lambda measured: None
    known: Sequence[tuple[Q.BitPolicy, Evaluation]] = ()
    env: str = "plan"
    ahead: int = 1
    checkpoint: Checkpoint | None = None
    agent: AgentFile | None = None
    trials: list[Trial] = field(default_factory=list)
    best: Trial | None = None
    saturated: list[float] = field(default_factory=list)
    predicted: Sensitivities | None = None
    origins: list[str] = field(default_factory=list)
    proposers: list[str] = field(default_factory=list)
    failure: Exception | None = None
    race: bool = True
    recorded: Mapping[Q.BitPolicy, Evaluation] = field(default_factory=dict)
    choice: Choice | None = None
    confirm: Evaluator | None = None
    _seen: dict[Q.BitPolicy, Evaluation] = field(default_factory=dict)
    _adopted: set[Q.BitPolicy] = field(default_factory=set)
    _beats: dict[Q.BitPolicy, float | None] = field(default_factory=dict)
    _whole: set[Q.BitPolicy] = field(default_factory=set)
    _indexed: int = 0  # of the known trials

    def __repr__(self) -> str:
        """Say on one line how far it is and what was found."""
        found = "nothing within the budget yet"
        if self.problem.goal.kind == CHEAPEST:
            found = "nothing good enough yet"
        if self.best is not None:
            cost = describe_amount(self.best.cost, self.problem.metric)
            found = f"best {show(self.best.value, self.best.unit)} at {cost}"
        return f"Session({self.used} of {self.evaluations} evaluations used, {found})"

    @property
    def chosen(self) -> Trial | None:
        """Return the trial that the search returns; before it is over the best so far."""
        if self.choice is None:
            return self.best
        return self.choice.trial

    @property
    def used(self) -> int:
        """Count the policies evaluated."""
        return len(self._seen) - len(self._adopted)

    @property
    def left(self) -> int:
        """Count the evaluations that are left."""
        return self.evaluations - self.used

    @property
    def own(self) -> list[Trial]:
        """Return the trials that count: all but those that were adopted."""
        return [trial for trial in self.trials if trial.policy not in self._adopted]

    @property
    def everything(self) -> Sequence[Trial]:
        """Return what a solver can learn from: every trial of the whole search, of which this may be a part."""
        return self.trials

    def seen(self, policy: Q.BitPolicy) -> bool:
        """Say whether a policy was asked for before.

        Args:
            policy: The policy.

        Returns:
            Whether `evaluate` has its evaluation already.
        """
        return policy in self._seen

    @property
    def races(self) -> bool:
        """Say whether evaluations may end early: values are shares, no trade-off is looked for, and it is wanted."""
        problem = self.problem
        return self.race and problem.evaluator.races and problem.goal.kind != TRADEOFF

    def racing_beat(self) -> float | None:
        """Tell which value a policy must reach to be worth a whole evaluation; None if every policy is evaluated whole.

        It follows from the trials so far. Give it to `expect` with the policies that are chosen now. Where the best policy is
        looked for, it is so far below the best that what doesn't reach it is never chosen (`racing.beat`); where the cheapest
        is, the value that is good enough. Of a trade-off, the value that is needed depends on the cost: nothing ends early.

        Returns:
            A value of the objective, or None.
        """
        problem = self.problem
        if not self.races:
            return None
        if problem.goal.kind == CHEAPEST:
            return problem.goal.threshold(problem.objective, problem.float_accuracy)
        if self.best is None:
            return None
        return racing.beat(problem.objective, self.best.value, problem.evaluator.count)

    def expect(self, policies: Iterable[Q.BitPolicy], beat: float | None = None) -> None:
        """Say that these policies will be asked for, probably in this order.

        Without `beat` it changes no result: they count, and come, in the order in which they are asked for.

        Args:
            policies: What is chosen.
            beat: A value of the objective. The evaluation of a policy that is expected for the first time ends as soon as a
                part of the samples tells that it is worse (`Evaluator.evaluate`); None: all samples are looked at, as they
                are of what another search evaluated whole. What is known when a policy is chosen decides, so that neither
                workers nor an interruption change anything.
        """
        policies = list(policies)
        new = [policy for policy in policies if policy not in self._beats and policy not in self._seen]
        known = self._known_whole()
        for policy in new:
            self._beats[policy] = beat
            if policy in known:
                self._beats[policy] = None
        for value in dict.fromkeys(self._beats[policy] for policy in new):
            group = [policy for policy in new if self._beats[policy] == value and policy not in self.recorded]
            if value is None:
                self.problem.expect(group)
            else:
                self.problem.expect(group, value)

    def _known_whole(self) -> set[Q.BitPolicy]:
        """Return the policies that another search evaluated whole: of these nothing is saved by less."""
        count = self.problem.evaluator.count
        for policy, evaluation in self.known[self._indexed :]:
            if evaluation.images >= count:
                self._whole.add(policy)
        self._indexed = len(self.known)
        return self._whole

    def evaluate(self, policy: Q.BitPolicy) -> Evaluation:
        """Evaluate a policy; one that is new is counted and becomes a trial.

        It may exceed the budget, and is then no candidate for `best`.

        Args:
            policy: The policy.

        Returns:
            Its value and loss on the search samples; of a policy that was asked for before, the same again.

        Raises:
            ValueError: For a policy that isn't one of the problem's (`Problem.check_policy`); it isn't counted.
            RuntimeError: Beyond the allowance.
        """
        self.problem.check_policy(policy)
        if policy in self._seen:
            return self._seen[policy]
        if not self.left:
            raise RuntimeError(f"all {self.evaluations} evaluations are used")
        try:
            return self._evaluate(policy)
        except Exception as error:
            self.failure = error
            raise

    def _evaluate(self, policy: Q.BitPolicy) -> Evaluation:
        """Evaluate a policy that is new, and make a trial of it."""
        beat = self._beats.get(policy)
        if policy in self.recorded:
            evaluation = self.recorded[policy]
        elif beat is None:
            evaluation = self.problem.evaluate(policy)
        else:
            evaluation = self.problem.evaluate(policy, beat)
        self.on_trial(self._take(policy, evaluation))
        return evaluation

    def adopt(self, policy: Q.BitPolicy, evaluation: Evaluation) -> Trial:
        """Take a policy that another search with this session's evaluator evaluated: a trial that doesn't count.

        Args:
            policy: One that this session has no trial of.
            evaluation: What it gave.

        Returns:
            The trial, of which `on_trial` isn't told.
        """
        self._adopted.add(policy)
        return self._take(policy, evaluation)

    def _take(self, policy: Q.BitPolicy, evaluation: Evaluation) -> Trial:
        trial = Trial.of(self.problem, policy, evaluation)
        self._seen[policy] = evaluation
        self.trials.append(trial)
        # A network whose outputs aren't finite (an infinite loss) is worth nothing, whatever it costs.
        sound = trial.feasible and trial.whole and math.isfinite(trial.loss)
        if sound and (self.best is None or trial.rank < self.best.rank):
            self.best = trial
        return trial


@dataclass(frozen=True)
class Spending:
    """What a part of a solver's evaluations goes into."""

    words: str  # such as "the first policies, the plan's optima under random weights"
    count: int  # evaluations
    wanted: int | None = None  # how many it would take to do this whole; None: it takes what there is


class Solver(ABC):
    """Looks for the best policy of a problem within a number of evaluations.

    Attributes:
        name: What it is called in messages.
        summary: One line about it.
        uses_sensitivities: Whether it works with the session's sensitivities, and measures them if there are none.
        uses_trials: Whether it learns from the session's `known`, trials of other searches.
        shares: Whether searches of a sweep learn from each other's trials as they come, and share their evaluations: it has
            `begin(problem, session, seed)`, which returns a `haq.solvers.surrogate.Search`.
        draws: Whether anything is random, so that another seed is another search.
        chooses_ahead: Whether what it does depends on `Session.ahead`.
        iterates: Whether it can be made with `iterate=True`, to go on after its first solution.
        takes_agent: Whether it can start from `Session.agent`.
        goals: What it can look for by itself, of "best", "cheapest" and "tradeoff".
        most_measured: The share of its evaluations that sensitivities take at most.
        races: Whether it lets evaluations end early that can't be among the best (`Session.racing_beat`).
        searches_channels: Whether it can work on a problem of which channels are chosen too (`haq.problem.channels`).
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    uses_sensitivities: ClassVar[bool] = False
    uses_trials: ClassVar[bool] = False
    shares: ClassVar[bool] = False
    most_measured: float = 1.0
    draws: ClassVar[bool] = True
    chooses_ahead: ClassVar[bool] = False
    iterates: ClassVar[bool] = False
    takes_agent: ClassVar[bool] = False
    goals: ClassVar[tuple[str, ...]] = (BEST.kind,)
    races: ClassVar[bool] = False
    searches_channels: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        """Call a class that gives itself no name after itself."""
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def check_agent(self, agent: AgentFile) -> None:
        """Check an agent that the solver is to start from; asked only if it `takes_agent`.

        Args:
            agent: What `haq pretrain` wrote.

        Raises:
            ValueError: In one sentence, for an agent that the solver can't start from.
        """
        agent.check_kind(self.name)

    @abstractmethod
    def solve(self, problem: Problem, session: Session, seed: int) -> None:
        """Evaluate policies through the session, which counts them and keeps the best.

        Args:
            problem: What is to be solved: `decisions` (layers that decide together, with the pairs of bits worth choosing and
                their prices), `limit`, `policy`, `uniform`, `decide`, `within_budget`.
            session: Evaluates policies, as many as are `left`.
            seed: What everything random comes from. Global generators are left as they are.
        """

    def spending(self, problem: Problem, evaluations: int) -> list[Spending]:
        """Tell, before anything is evaluated, what evaluations will go into, in their order.

        Args:
            problem: What is to be solved: the best policy within its budgets.
            evaluations: How many there are, without those that sensitivities take.

        Returns:
            What they go into. Less in sum than there are means that the others are not used; a `wanted` above its `count`
            that something is left out, as there are too few.
        """
        return [Spending("policies that it chooses one after the other", evaluations)]


def check_searches_channels(solver: str | type[Solver] | Solver) -> None:
    """Raise ValueError for a solver that can't choose channels."""
    found = find_solver(solver)
    if not getattr(found, "searches_channels", True):
        name = getattr(found, "name", "") or type(found).__name__
        raise ValueError(
            f"solver {name!r} decides widths alone and can't choose channels: leave prune out, or choose another solver, such "
            "as ilp or surrogate"
        )


def find_solver(solver: str | type[Solver] | Solver, iterate: bool = False) -> Solver:
    """Return a solver that is given as a name, as `module:Name`, as a class or as itself.

    Args:
        solver: What is given.
        iterate: Whether it is to go on after its first solution, which `ilp` can.

    Returns:
        The solver.

    Raises:
        ValueError: For an unknown name, naming the close ones; for a thing that is no solver, naming what it lacks; for a
            class that can't be made, with the reason; and for one that is to iterate and can't.
        ImportError: For a solver of somebody else's that can't be imported.
    """
    found: Any = solver
    options = {}
    if isinstance(solver, str):
        found = SOLVERS.get(solver)
    if iterate:
        if not getattr(found, "iterates", False):
            raise ValueError(f"solver {solver!r} has no first solution to go on from: only ilp iterates")
        if not isinstance(found, type):
            found = type(found)
        options["iterate"] = True
    if isinstance(found, type):
        try:
            found = found(**options)
        except Exception as error:
            raise ValueError(
                f"solver {solver!r} can't be made ({_reason(error)}): give an instance, or a class without arguments"
            ) from error
    if missing := lacking(found):
        raise ValueError(f"solver {solver!r} can't be used: it lacks {missing}")
    return found  # type: ignore[return-value]


def solve(solver: str | type[Solver] | Solver, session: Session, seed: int) -> Trial:
    """Run a solver and return what it found, by the goal of the session's problem.

    That is the best trial on the search samples (`session.best`), or one that can't be told from it and is more likely to be
    as good on others (`haq.solvers.choice`).

    Solvers look for the best policy within a budget. Towards another goal one is led from budget to budget
    (`haq.solvers.cheapest`), unless it says that it knows the goal itself.

    Args:
        solver: A name, `module:Name`, a class or an instance.
        session: Its allowance.
        seed: What everything random comes from.

    Returns:
        The trial that was chosen; `session.choice` says why.

    Raises:
        NothingGoodEnough: A ValueError, naming the solver and the best that it saw.
        ValueError: For something that is no solver, and whatever the solver refuses; naming the solver, if it fails, or
            evaluated no policy within the budget.
    """
    found = find_solver(solver)
    if session.agent is not None:
        check_takes_agent(found, session.agent, session.env)
    try:
        if session.problem.goal.kind in getattr(found, "goals", (BEST.kind,)):
            found.solve(session.problem, session, seed)
        else:
            # Found by its name, as solvers are: it stands on this file.
            solvers.cheapest.search(found, session, seed)
    except NotAllowed as error:
        raise ValueError(f"solver {_called(found)!r} chose a policy that is not allowed: {error}") from error
    except Exception as error:
        # What went wrong in an evaluation is no solver's fault, and what goes wrong in ours is for us to see.
        if error is session.failure or _is_ours(found):
            raise
        raise ValueError(f"solver {_called(found)!r} failed: {_reason(error)}") from error
    return conclude(found, session)


def conclude(found: Solver, session: Session) -> Trial:
    """Choose what a search returns, once its solver is done.

    Args:
        found: The solver.
        session: Its allowance, with what was tried.

    Returns:
        The trial that was chosen; `session.choice` says why.

    Raises:
        NothingGoodEnough: A ValueError, naming the solver and the best that it saw.
        NothingFound: A ValueError, naming the solver, if it evaluated no policy within the budget.
    """
    if session.best is None and session.problem.goal.kind == CHEAPEST:
        raise NothingGoodEnough(f"solver {_called(found)!r} found no policy that is good enough: {_closest(session)}")
    if session.best is None and any(trial.feasible for trial in session.trials):
        raise NothingFound(
            f"solver {_called(found)!r} evaluated no policy within the budget whose outputs are finite, {session.used} in "
            "all: choose more bits or a larger budget"
        )
    if session.best is None:
        raise NothingFound(f"solver {_called(found)!r} evaluated no policy within the budget, {session.used} in all")
    session.choice = solvers.choice.choose(session)
    return session.choice.trial


def _closest(session: Session) -> str:
    """Say how good the best policy is that was evaluated within the budgets, if there is one."""
    problem = session.problem
    asked = problem.goal.words(problem.objective)
    within = [trial for trial in session.trials if trial.within and math.isfinite(trial.loss)]
    # What was cut short is far from good enough; if nothing else is there, what it had on a part of the samples must do.
    within = [trial for trial in within if trial.whole] or within
    if not within:
        return f"of {session.used} evaluated none is within the budgets with outputs that are finite; asked was {asked}"
    best = min(within, key=lambda trial: (-trial.evaluation.score, trial.loss))
    drop = problem.goal.drop(problem.objective, best.value, problem.float_accuracy)
    lost = show_difference(-drop, best.unit, problem.objective.higher_is_better)
    return (
        f"of {session.used} evaluated the best within the budgets has {show(best.value, best.unit)}, {lost} the float "
        f"network's {show(problem.float_accuracy, best.unit)}, and asked was {asked}: allow more of a drop, wider bits or a "
        "larger budget"
    )


def _called(solver: Solver) -> str:
    return solver.name or type(solver).__name__


def _is_ours(solver: Solver) -> bool:
    return type(solver).__module__.partition(".")[0] == __name__.partition(".")[0]


def _reason(error: Exception) -> str:
    """Write what somebody's code raised on one line."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))


def check_takes_agent(solver: Solver, agent: AgentFile, env: str = PLAN) -> None:
    """Check that a solver can start from a pretrained agent.

    Args:
        solver: The solver.
        agent: The agent.
        env: The environment of agents.

    Raises:
        ValueError: In one sentence, for a solver that is no agent, or one of another kind, for another environment than that
            which the agent was trained in, and for an agent that this version can't go on with.
    """
    what = agent.source or "a pretrained agent"
    if not getattr(solver, "takes_agent", False):
        raise ValueError(
            f"solver {_called(solver)!r} is no agent that could start from {what}: leave the agent out, or choose "
            f"{agent.record.kind}, which it is"
        )
    if env != PLAN:
        raise ValueError(
            f"{what} knows what the environment {PLAN!r} shows, and {env!r} shows something else: leave one of the two out"
        )
    solver.check_agent(agent)


def check_env(name: str) -> str:
    """Return the name of an environment itself. Raises ValueError, naming those that are known, for another."""
    if name not in ENVS:
        raise ValueError(f"unknown environment {name!r}; known: {', '.join(ENVS)}")
    return name

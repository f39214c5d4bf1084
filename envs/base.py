"""What both environments share: the problem they are about, and how an episode begins and ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.plan import Programme
from hw_models import Workload
from hw_models.widths import places
from quantizers import BitPolicy

Array = NDArray[np.float64]
Observation = NDArray[np.float32]
Step = tuple[Observation, float, bool, bool, dict[str, Any]]
Judge = Callable[[BitPolicy], Any]  # what it returns has accuracy (the objective's value) and loss

REWARD_SCALE = 10  # per unit of accuracy (HAQ's equation 3)
SHOWN = 60  # characters of a wrong action in a message
SATURATED = 0.99  # an action beyond it lies at a bound


class SearchProblem(Protocol):
    """What the environments need of a problem; `haq.Problem` has it. Widths have their places of `hw_models.widths`.

    A problem with several budgets has `limits`, each with its metric, and tells in `several` what fits all of them
    (`envs.plan.Programme`).
    """

    @property
    def workload(self) -> Workload:
        """The layers."""
        ...

    @property
    def cost(self) -> Array:
        """Shape (layers, 10, 10), indexed [layer, place of the weights' width, place of the activations' width]."""
        ...

    @property
    def limit(self) -> float:
        """What a policy may cost."""
        ...

    @property
    def quantization_error(self) -> Array:
        """Of weights and activations by width, shape (decisions, 2, 10)."""
        ...

    @property
    def decisions(self) -> Sequence[Any]:
        """What there is to decide, each with layers, pairs (options, 2), prices (options,) and of(table (10, 10))."""
        ...

    @property
    def float_accuracy(self) -> float:
        """The accuracy of the float network."""
        ...

    def decide(self, pairs: Any) -> BitPolicy:
        """Make a policy of a pair of widths for every decision, float being 32.

        Args:
            pairs: For each decision the widths of weights and inputs.

        Returns:
            The policy.
        """
        ...

    def evaluate(self, policy: BitPolicy) -> Any:
        """Judge a policy: what is returned has accuracy and loss.

        Args:
            policy: The policy.

        Returns:
            Something with `accuracy` (a share) and `loss` (nats).
        """
        ...


class Choices:
    """What there is to decide in a problem, and what its widths are numbered by.

    Attributes:
        problem: What is to be searched.
        free: The indices of the problem's decisions that have more than one option.
        decisions: These decisions.
        rungs: The widths of their options in their order, each of shape (options, 2): 16 bits is one step above 8, and float
            is the next.
        low: The smallest of all of them.
        high: The largest.
        programme: What fits several budgets; None where there is one, of a sum.
    """

    def __init__(self, problem: SearchProblem) -> None:
        """Find out what there is to decide.

        Args:
            problem: The problem.

        Raises:
            ValueError: If every decision has a single option.
        """
        self.problem = problem
        self.free = [index for index, decision in enumerate(problem.decisions) if len(decision.pairs) > 1]
        if not self.free:
            raise ValueError("every layer has a single allowed pair of bits: there is nothing to decide")
        self.decisions = [problem.decisions[index] for index in self.free]
        self.rungs = [rungs(decision.pairs) for decision in self.decisions]
        every = np.concatenate(self.rungs)
        self.low = int(every.min())
        self.high = int(every.max())
        self.programme: Programme | None = getattr(problem, "several", None)


class PolicyEnv(gymnasium.Env[Observation, Observation]):
    """An environment in which one episode decides one policy. Its subclasses say how."""

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, problem: SearchProblem, judge: Judge | None) -> None:
        """Find out what there is to decide.

        Args:
            problem: What is to be searched.
            judge: Evaluates the policy of a finished episode; None is `problem.evaluate`.

        Raises:
            ValueError: If every decision has a single option.
        """
        self.problem = problem
        self.judge: Judge = judge or problem.evaluate
        choices = Choices(problem)
        self.free, self.decisions = choices.free, choices.decisions
        self._rungs, self._low, self._high = choices.rungs, choices.low, choices.high
        self._programme = choices.programme

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode. Nothing is random, and there are no options."""
        super().reset(seed=seed)
        self._start()
        return self._observe(), {}

    def _start(self) -> None:
        """Forget what was decided."""
        raise NotImplementedError

    def _observe(self) -> Observation:
        """Describe where the episode is."""
        raise NotImplementedError

    def _finish(self, pairs: Any, cost: float, saturated: float) -> Step:
        """Have the policy judged that the pairs of bits of all decisions make, and end the episode."""
        return self._judged(self.problem.decide(pairs), cost, saturated)

    def _judged(self, policy: BitPolicy, cost: float, saturated: float) -> Step:
        """Have a policy judged, and end the episode."""
        result = self.judge(policy)
        reward = reward_of(self.problem, result)
        info = {
            "policy": policy,
            "accuracy": result.accuracy,
            "loss": result.loss,
            "cost": cost,
            "saturated": saturated,
        }
        return self._observe(), reward, True, False, info


def reward_of(problem: SearchProblem, result: Any) -> float:
    """Return what an agent gets for a policy.

    For a share, such as an accuracy, it is 10 times the difference from the float network's (HAQ, equation 3). Other values
    may be of any size: there it is 10 x / (1 + |x|), x being the difference for the better as a part of the float network's
    value.

    Args:
        problem: Its objective tells the unit and whether larger values are better; without one values are shares.
        result: What the policy was judged: it has the value, as accuracy.

    Returns:
        The reward; 0 for a policy as good as the float network.
    """
    objective = getattr(problem, "objective", None)
    if objective is None or (objective.unit == "%" and objective.higher_is_better):
        return REWARD_SCALE * (result.accuracy - problem.float_accuracy)
    if not math.isfinite(result.accuracy):
        return -float(REWARD_SCALE)
    better = float(objective.signed(result.accuracy) - objective.signed(problem.float_accuracy))
    x = better / (abs(problem.float_accuracy) or 1.0)
    return REWARD_SCALE * x / (1 + abs(x))


def rungs(widths: Any) -> NDArray[np.intp]:
    """Number widths in their order: 1 to 8 as they are, then 9 for 16 bits and 10 for float (32)."""
    return places(widths) + 1


def checked_action(action: Any, size: int, step: int) -> Array:
    """Return an action as floats within the box -1..1; entries beyond it are put onto its bounds.

    Args:
        action: What an agent gives.
        size: How many entries it must have.
        step: Of the episode, from 0, for messages.

    Returns:
        Shape (size,).

    Raises:
        ValueError: Naming the action, for anything but so many finite numbers.
    """
    try:
        given = np.asarray(action)
        fits = given.shape == (size,) and given.dtype.kind in "fiu" and bool(np.isfinite(given).all())
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        shown = " ".join(repr(action).split())
        if len(shown) > SHOWN:
            shown = f"{shown[:SHOWN]}..."
        raise ValueError(
            f"the action of step {step} is {shown}; it must be {size} finite numbers from -1 to 1, shape ({size},)"
        )
    return np.clip(given.astype(float), -1, 1)


def unit_box(size: int) -> spaces.Space[Observation]:
    """Return the space of float32 vectors of a size with entries in -1..1."""
    return spaces.Box(-1.0, 1.0, (size,), np.float32)


def scale_columns(columns: Array) -> Array:
    """Scale every column to -1..1 over the rows; one that is the same in all rows becomes -1."""
    span = np.ptp(columns, axis=0)
    scaled: Array = 2 * (columns - columns.min(0)) / np.where(span > 0, span, 1) - 1
    return scaled

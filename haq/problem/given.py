"""What somebody may give for an objective that is no objective yet: a metric, a function, or what measures a network itself.

    haq.objective(score, higher_is_better=True, unit="dB")              # score(outputs, targets) -> a value for every sample
    haq.objective(torchmetrics.F1Score("multiclass", num_classes=10))   # it says itself which values are better
    haq.objective(evaluate, higher_is_better=False)                     # evaluate(network) -> a number

A function may say all of it in attributes of the same names, `score.higher_is_better = True`. Then it can be given by itself,
and on the command line as `module:score`.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from haq.problem import lacking
from haq.problem.guarding import check_said, check_word
from haq.problem.objective import (
    AnyObjective,
    BlackBox,
    MetricObjective,
    Objective,
    RobustAccuracy,
    ValueObjective,
    attacked_by,
    described,
    find_objective,
    single_number,
)
from hw_models.registry import printable

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torchmetrics import Metric

    from haq.attacks.proxy import ProxyAttack
    from haq.problem.distribution import Distribution

REPEATED = 1e-7  # of a value: what a metric may tell otherwise of the same samples
SAID = ("name", "unit", "title", "higher_is_better", "loss", "distribution")  # what a function may say in attributes


class _Given(Objective):
    """What all that somebody gives has in common.

    What the outputs say of answers is seen when the float network is first run, if nobody has said it.
    """

    def __init__(self, given: Any, said: dict[str, Any]) -> None:
        """Take what is given.

        Args:
            given: A function, or a metric.
            said: What is known of it; see `objective`.
        """
        self.given = given
        self.name = said["name"]
        self.words = f"{self.name}, as its owner defines it"
        self.title = said.get("title") or self.name
        self.short = self.title
        self.unit = said.get("unit") or ""
        self.higher_is_better = said["higher_is_better"]
        self.own_loss = said.get("loss")
        self.said: Distribution | None = said.get("distribution")
        self.seen: Distribution | None = None
        self.was_seen = False

    @property
    def distribution(self) -> Distribution | None:
        """Return what outputs say of answers; numbers, until they were looked at."""
        from haq.problem.distribution import Gaussian

        if self.said is not None:
            return self.said
        if not self.was_seen:
            return Gaussian()
        return self.seen

    def look_at(self, outputs: Any, targets: Any) -> None:
        """See what the float network's outputs say of answers."""
        self.seen = seen_distribution(outputs, targets)
        self.was_seen = True

    def needing(self, needs_targets: bool) -> None:
        """Say whether it needs targets; without them the float network's outputs are in their place."""
        self.needs_labels = needs_targets
        self.compares_with_float = not needs_targets


class FromFunction(_Given, ValueObjective):
    """A function of (outputs, targets) that returns a value for every sample."""

    def values(self, outputs: Any, targets: Any) -> Tensor:
        """Ask the function."""
        return self.given(outputs, targets)

    def losses(self, outputs: Any, targets: Any) -> Tensor | None:
        """Ask the loss, if there is one; otherwise see `ValueObjective.losses`."""
        if self.own_loss is None:
            return super().losses(outputs, targets)
        return _lost(self, outputs, targets)


class FromMetric(_Given, MetricObjective):
    """A metric of torchmetrics; every network is given an empty copy of it."""

    def read(self, outputs: Any) -> Any:
        """Return outputs as they are; of outputs by name the tensor that stands for the answer."""
        from haq.problem.distribution import main_output

        if hasattr(outputs, "keys"):
            return main_output(outputs)
        return outputs

    def metric(self) -> Metric:
        """Copy the metric."""
        made = copy.deepcopy(self.given)
        made.reset()
        return made

    def look_at(self, outputs: Any, targets: Any) -> None:
        """See what the outputs say of answers, and whether the metric is of such targets, and can be emptied."""
        super().look_at(outputs, targets)
        import torch

        of_classes = type(self.given).__module__.startswith("torchmetrics.classification")
        if of_classes and isinstance(targets, torch.Tensor) and targets.is_floating_point():
            raise ValueError(
                f"the metric of objective {self.name!r} takes targets that are integers, not {described(targets)}"
            )
        if getattr(self.given, "_update_count", 0):
            self._check_emptied(outputs, targets)

    def _check_emptied(self, outputs: Any, targets: Any) -> None:
        """Raise ValueError if a metric that was in use before keeps something of that."""
        metric = self.metric()
        found: list[float] = []
        for _ in range(2):
            try:
                self.update(metric, outputs, targets)
                found.append(single_number(self, "metric", self.compute(metric)))
            except ValueError:
                return  # it is told on all samples why
            metric.reset()
        first, again = found
        if not math.isclose(first, again, rel_tol=REPEATED) and not math.isnan(first):
            raise ValueError(
                f"the metric of objective {self.name!r} was in use, and its reset() leaves what it counted (states are what "
                "`add_state` made): give a new one"
            )

    def losses(self, outputs: Any, targets: Any) -> Tensor | None:
        """Ask the loss, if there is one."""
        if self.own_loss is None:
            return None
        return _lost(self, outputs, targets)


class FromNetwork(_Given, BlackBox):
    """A function of a network that returns a number."""

    def __init__(self, given: Any, said: dict[str, Any]) -> None:
        """Take the function; see `_Given`."""
        super().__init__(given, said)
        self.takes_split = "split" in inspect.signature(given).parameters

    def evaluate(self, network: nn.Module, **options: Any) -> float:
        """Ask the function."""
        return self.given(network, **options)

    def training_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Compute the mean of the loss, if there is one; see `BlackBox.training_loss`."""
        if self.own_loss is None:
            return super().training_loss(outputs, targets)
        return self.own_loss(outputs, targets).mean()


def objective(
    given: Any,
    *,
    name: str | None = None,
    unit: str | None = None,
    title: str | None = None,
    higher_is_better: bool | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    needs_targets: bool = True,
    distribution: Distribution | None = None,
) -> Objective:
    """Make an objective of a function or of a metric.

    What isn't said here is taken from attributes of the function of the same names; a metric of torchmetrics says itself
    whether larger values are better.

    Args:
        given: A function of (outputs, targets) that returns a value for every sample, a tensor of shape (samples,), of which
            the mean counts. Or a function of a network, in evaluation mode, that returns one number; it may take `split` too,
            "search" by default and "test" for what is reported. Or a metric of torchmetrics.
        name: What it is called; the function's own name, if nothing else is said.
        unit: What is shown behind a value, such as "dB"; "%" for shares from 0 to 1, which are shown in percent.
        title: What it is called in sentences and on the axes of plots.
        higher_is_better: Whether larger values are better.
        loss: A function of (outputs, targets) that returns a loss for every sample of which a gradient can be taken, smaller
            being better. Policies of the same value are told apart by it, attacks raise it, and training lowers it.
        needs_targets: Whether samples must have targets. Otherwise `targets` are the float network's outputs.
        distribution: What outputs say of answers (`haq.problem.distribution`), by which their distance from the float
            network's is told. None: scores of classes, where targets are class numbers that fit, and otherwise numbers.

    Returns:
        The objective.

    Raises:
        ValueError: For what is none of the three, and where nobody says whether larger values are better.
    """
    kind = _kind(given)
    said = {
        "name": name,
        "unit": unit,
        "title": title,
        "higher_is_better": higher_is_better,
        "loss": loss,
        "distribution": distribution,
    }
    for attribute in SAID:
        if said[attribute] is None:
            said[attribute] = _said_by(given, attribute)
    called = _called(given)
    said["name"] = said["name"] or called
    for word in ("name", "unit", "title"):
        if said[word] is not None:
            check_word(word, said[word], called)
    better = said["higher_is_better"]
    if better is None:
        own = f", or set {called}.higher_is_better = True"
        if kind is FromMetric:
            own = ""
        raise ValueError(
            f"objective {said['name']!r} doesn't say whether larger values are better: give haq.objective({called}, "
            f"higher_is_better=True) or False{own}"
        )
    if type(better).__name__ in ("bool_", "bool"):  # NumPy's too
        said["higher_is_better"] = bool(better)
    if said["loss"] is not None and not callable(said["loss"]):
        raise ValueError(f"the loss of objective {said['name']!r} must be a function of (outputs, targets), not {loss!r}")
    if said["distribution"] is not None and not _is_distribution(said["distribution"]):
        raise ValueError(
            f"the distribution of objective {said['name']!r} must be one of haq.problem.distribution, such as Gaussian(), not "
            f"{said['distribution']!r}"
        )
    made = kind(given, said)
    check_said(made)
    if kind is not FromNetwork:
        made.needing(needs_targets)
    return made


def read_objective(thing: Any) -> Any:
    """Return the objective that a thing stands for: a metric or a function becomes one, and everything else stays.

    Args:
        thing: Whatever was given, or found by name.

    Returns:
        The objective; the thing itself, if it is one, or a class of one, or nothing of the kind.

    Raises:
        ValueError: As `objective` does.
    """
    if not lacking(thing):
        return thing
    if isinstance(thing, type):
        if not issubclass(thing, Objective) and _can_be_asked(thing):
            return read_objective(_made(thing))
        return thing
    if callable(thing) or _is_of_torchmetrics(thing, "MetricCollection"):
        return objective(thing)
    return thing


def robust(given: AnyObjective, proxy: ProxyAttack | None = None) -> Objective:
    """Make of any objective the one of the worst of inputs as they are and attacked.

    Args:
        given: The objective, in any form; see `haq.problem.objective.find_objective`.
        proxy: The attack, such as `haq.attacks.proxy.ProxyAttack.of(network, "8/255")` for a `haq.networks.Network`. Without
            it the objective only says what it is.

    Returns:
        The objective, called NAME+robust.

    Raises:
        ValueError: As `find_objective` does, and where an attack has nothing that it could raise.
    """
    found = find_objective(given)
    if found.name == "accuracy" and proxy is not None:
        return RobustAccuracy(proxy)
    return attacked_by(found, proxy)


def seen_distribution(outputs: Any, targets: Any) -> Distribution | None:
    """Tell what outputs say of answers.

    Args:
        outputs: Of a batch.
        targets: Of the batch; None if there are none.

    Returns:
        Scores of classes, where targets are class numbers of the shape of outputs without one dimension; otherwise numbers;
        None for outputs in a list, one for each sample, and for those without numbers.
    """
    from torch import Tensor

    from haq.problem.distribution import Categorical, Gaussian, main_output

    if isinstance(outputs, list):
        return None
    try:
        scores = main_output(outputs)
        Gaussian().differentiated(outputs)
    except ValueError:
        return _numbers_in(outputs)
    if isinstance(targets, Tensor) and not targets.is_floating_point() and scores.dim() > 1:
        for dim in (1, -1):
            without = [size for place, size in enumerate(scores.shape) if place != dim % scores.dim()]
            if list(targets.shape) == without and scores.shape[dim] > 1:
                return Categorical(dim)
    return Gaussian()


def _numbers_in(outputs: Any) -> Distribution | None:
    """Return the distribution of several tensors of numbers; None if there are none."""
    from haq.problem.distribution import Gaussian

    try:
        Gaussian().differentiated(outputs)
    except ValueError:
        return None
    return Gaussian()


def _kind(given: Any) -> type[Any]:
    """Tell what is given by how it is called. Raises ValueError for what is none of the three."""
    if _is_of_torchmetrics(given, "MetricCollection"):
        names = ", ".join(map(str, given.keys()))
        raise ValueError(f"a MetricCollection has several metrics ({names}), and policies are ranked by one: give one of them")
    if isinstance(given, Objective):
        raise ValueError(f"{given!r} is an objective already")
    if _is_of_torchmetrics(given, "Metric"):
        return FromMetric
    if isinstance(given, type) or not callable(given):
        raise ValueError(
            f"{_called(given)} is no objective: give a name, a metric of torchmetrics, a function of (outputs, targets) that "
            "returns a value for every sample, or a function of a network that returns a number"
        )
    count = _needed(given)
    if count == 2:
        return FromFunction
    if count == 1:
        return FromNetwork
    raise ValueError(
        f"function {_called(given)} must take (outputs, targets), or a network, and it needs {count or 'no'} arguments"
    )


def _needed(given: Any) -> int:
    """Count the arguments that a function needs. Raises ValueError if it needs some by name, and if nobody can tell."""
    called = given
    if not inspect.isroutine(given) and hasattr(given, "forward"):
        called = given.forward
    try:
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(
            f"it can't be told which arguments function {_called(given)} takes: give a function of (outputs, targets), or of "
            "a network"
        ) from None
    count = 0
    for parameter in parameters:
        if parameter.default is not parameter.empty:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            raise ValueError(
                f"function {_called(given)} needs {parameter.name!r} by name: give it a default, or a function of (outputs, "
                "targets), or of a network"
            )
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            count += 1
    return count


def _is_distribution(thing: object) -> bool:
    """Say whether a thing has what a distribution has."""
    has_all = all(callable(getattr(thing, method, None)) for method in ("divergence", "cotangents", "differentiated"))
    return has_all and not isinstance(thing, type)


def _lost(objective: _Given, outputs: Any, targets: Any) -> Tensor:
    """Ask an objective's own loss. Raises ValueError if it returns nothing."""
    assert objective.own_loss is not None
    found = objective.own_loss(outputs, targets)
    if found is None:
        raise ValueError(f"the loss of objective {objective.name!r} must return a tensor, a loss for each sample, not None")
    return found


def _said_by(given: Any, attribute: str) -> Any:
    """Return what a function or a metric says of itself; None if it says nothing that can be meant."""
    found = getattr(given, attribute, None)
    if attribute in ("name", "unit", "title") and not isinstance(found, str):
        return None
    if attribute in ("loss", "distribution") and _is_of_torchmetrics(given, "Metric"):
        return None
    return found


def _called(given: Any) -> str:
    """Return the name of what is given, for messages."""
    found = getattr(given, "func", given)  # of functools.partial
    name = getattr(found, "__name__", None) or type(found).__name__
    return printable(str(name))


def _is_of_torchmetrics(given: Any, kind: str) -> bool:
    """Say whether a thing is of a class of torchmetrics, which is imported then."""
    module = sys.modules.get("torchmetrics")
    found = getattr(module, kind, None)
    return isinstance(found, type) and isinstance(given, found)


def _can_be_asked(kind: type) -> bool:
    """Say whether things of a class can be called."""
    return any("__call__" in base.__dict__ for base in kind.__mro__)


def _made(kind: type) -> Any:
    """Make a thing of a class. Raises ValueError, with the reason, if that takes arguments."""
    try:
        return kind()
    except Exception as error:
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))
        raise ValueError(
            f"objective {kind.__name__!r} can't be made ({reason}): give an instance, or a class without arguments"
        ) from error

"""Whatever somebody's objective does or says, a policy's value is right, or one sentence says why there is none."""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import haq
from haq.problem.metrics import import_torchmetrics
from haq.problem.objective import BlackBox, MetricObjective, ValueObjective
from haq.problem.problem import Problem

INPUTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(40) % 3


class Net(nn.Module):
    """Three layers."""

    def __init__(self, outputs: int = 3) -> None:
        """Make it."""
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Run it."""
        return self.last(torch.relu(self.norm(self.first(inputs))))


def problem_of(objective: Any, network: nn.Module | None = None, search: Any = (INPUTS, TARGETS), **options: Any) -> Problem:
    """Make a small problem."""
    return Problem(network or Net(), INPUTS, search, "edge", budget=0.9, pinned={}, objective=objective, **options)


def errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Tell every sample's squared error."""
    return (outputs - targets).square().mean(1)


def values_of(problem: Problem) -> list[float]:
    """Evaluate a few policies, one of them a second time."""
    found = [problem.float_result.value]
    for bits in (3, 4, 3):
        problem.evaluator.cache.clear()
        found.append(problem.evaluator.evaluate(problem.uniform(bits)).value)
    return found


no_loss: Any = lambda outputs, targets: None  # noqa: E731


def mean_error(network: nn.Module) -> float:
    """Tell the mean squared error of a network."""
    with torch.no_grad():
        return float((network(INPUTS) - TARGETS).square().mean())


def change_weights(network: nn.Module) -> float:
    """Halve all weights afterwards."""
    value = mean_error(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)
    return value


def leave_a_hook(network: Any) -> float:
    """Leave a hook behind that changes outputs."""
    value = mean_error(network)
    network.last.register_forward_hook(lambda module, inputs, output: output * 0)
    return value


def put_into_training(network: nn.Module) -> float:
    """Leave the network training, with other statistics of its batches."""
    value = mean_error(network)
    network.train()
    network(INPUTS + 3)
    return value


def replace_a_layer(network: Any) -> float:
    """Take a layer away."""
    value = mean_error(network)
    network.last = nn.Identity()
    return value


@pytest.mark.parametrize("evaluate", [change_weights, leave_a_hook, put_into_training, replace_a_layer])
@pytest.mark.parametrize("search", [None, (INPUTS, TARGETS)], ids=["alone", "with samples"])
def test_a_black_box_may_do_with_its_network_what_it_likes(evaluate: Any, search: Any) -> None:
    network = Net()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    expected = problem_of(haq.objective(mean_error, higher_is_better=False), search=search)
    problem = problem_of(haq.objective(evaluate, higher_is_better=False), network, search)
    assert values_of(problem) == values_of(expected)
    assert network.training
    assert not network.last._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_black_box_leaves_nothing_else_changed_and_draws_the_same_each_time() -> None:
    def evaluate(network: nn.Module) -> float:
        torch.set_grad_enabled(False)
        torch.set_num_threads(2)
        drawn = network(torch.randn(4, 6)).sum()
        return float(drawn) + random.random() + float(np.random.rand())

    threads = torch.get_num_threads()
    problem = problem_of(haq.objective(evaluate, higher_is_better=False), search=None)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = values_of(problem)
    assert found[1] == found[3]
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_values_may_be_computed_in_place() -> None:
    def changing(outputs: Tensor, targets: Tensor) -> Tensor:
        found = errors(outputs, targets)
        outputs.zero_()
        targets.zero_()
        return found

    class Changing(haq.Objective):
        def correct(self, outputs: Any, labels: Tensor) -> Tensor:
            found = outputs[0].argmax(1) == labels
            outputs[0].zero_()
            labels.zero_()
            return found

    assert values_of(problem_of(haq.objective(changing, higher_is_better=False))) == values_of(problem_of("mse"))
    own, accuracy = (problem_of(one, search=(INPUTS, LABELS)) for one in (Changing, "accuracy"))
    assert values_of(own) == values_of(accuracy)
    assert own.float_result.loss == accuracy.float_result.loss


def test_the_same_metric_returned_again_begins_empty() -> None:
    kept = import_torchmetrics().MeanSquaredError()

    class Kept(MetricObjective):
        higher_is_better = False

        def metric(self) -> Any:
            return kept

    assert values_of(problem_of(Kept)) == pytest.approx(values_of(problem_of("mse")), rel=1e-5)


def test_a_metric_that_was_in_use_and_cannot_be_emptied() -> None:
    metrics = import_torchmetrics()

    class Counting(metrics.Metric):  # type: ignore[misc, name-defined]
        higher_is_better = False

        def __init__(self) -> None:
            super().__init__()
            self.total = 0.0

        def update(self, outputs: Tensor, targets: Tensor) -> None:
            self.total += float((outputs - targets).square().mean())

        def compute(self) -> float:
            return self.total

    used = Counting()
    used.update(100 * TARGETS, TARGETS)
    with pytest.raises(ValueError, match=r"metric of objective 'Counting' was in use, and its reset\(\) leaves"):
        problem_of(used)
    assert values_of(problem_of(Counting())) == pytest.approx(values_of(problem_of("mse")), rel=1e-5)


def test_outputs_and_targets_that_are_spread_over_each_other() -> None:
    objective = haq.objective(errors, higher_is_better=False)
    with pytest.raises(ValueError, match=r"outputs of shape \(40, 1\) and targets of \(40,\) are spread over each other"):
        problem_of(objective, Net(1), (INPUTS, TARGETS[:, 0]))
    problem_of(objective, Net(1), (INPUTS, TARGETS[:, :1]))


def test_values_that_hang_on_others_or_on_chance_are_said_to() -> None:
    mean = haq.objective(lambda outputs, targets: errors(outputs, targets).mean().expand(len(outputs)), higher_is_better=False)
    with pytest.warns(UserWarning, match="another value when other samples are beside it"):
        problem_of(mean)
    chance = haq.objective(lambda outputs, targets: torch.rand(len(outputs)), higher_is_better=False)
    with pytest.warns(UserWarning, match="other values of the same outputs from call to call"):
        problem_of(chance)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem_of(haq.objective(errors, higher_is_better=False))


def test_arrays_are_as_good_as_tensors() -> None:
    objective = haq.objective(lambda outputs, targets: errors(outputs, targets).numpy(), higher_is_better=False)
    assert values_of(problem_of(objective)) == values_of(problem_of("mse"))
    objective = haq.objective(lambda network: np.array([mean_error(network)]), higher_is_better=np.bool_(False))
    assert values_of(problem_of(objective, search=None)) == pytest.approx(values_of(problem_of("mse")), rel=1e-5)


class NoDirection(ValueObjective):
    """Of errors."""

    def values(self, outputs: Any, targets: Any) -> Tensor:
        """Tell them."""
        return errors(outputs, targets)


class NoDirectionEither(BlackBox):
    """Of errors."""


class Words(NoDirection):
    """Says its direction in words."""

    higher_is_better: Any = "False"


class NoUnit(NoDirection):
    """Says no unit."""

    higher_is_better = False
    unit: Any = None


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: NoDirection, "objective 'NoDirection' doesn't say whether larger values are better: set higher_is_better"),
        (lambda: NoDirectionEither, "objective 'NoDirectionEither' doesn't say whether larger"),
        (lambda: Words, "higher_is_better of objective 'Words' is 'False': say True"),
        (lambda: NoUnit, "unit of objective 'NoUnit' is None: it must be a text on one line"),
        (lambda: haq.objective(errors, higher_is_better=0), "higher_is_better of objective 'errors' is 0: say True"),
        (lambda: haq.objective(errors, higher_is_better=False, unit=3), "unit of objective 'errors' is 3"),
        (lambda: haq.objective(errors, higher_is_better=False, name="a\nb"), "name of objective 'errors' is 'a.*b'"),
        (
            lambda: haq.objective(errors, higher_is_better=False, distribution="normal"),
            "distribution of objective 'errors' must",
        ),
        (
            lambda: haq.objective(errors, higher_is_better=False, loss=no_loss),
            "loss of objective 'errors' must return a tensor, a loss for each sample, not None",
        ),
        (
            lambda: haq.objective(lambda outputs, targets: outputs.view(7, -1) and float("x"), higher_is_better=False),
            "`values` of objective '<lambda>' failed: RuntimeError",
        ),
        (
            lambda: haq.objective(lambda outputs, targets: torch.tensor([float("x")]), higher_is_better=False),
            "`values` of objective '<lambda>' failed: ValueError: could not convert",
        ),
        (
            lambda: haq.objective(lambda outputs, targets: exec("raise SystemExit(3)"), higher_is_better=False),
            "`values` of objective '<lambda>' failed: SystemExit: 3",
        ),
        (
            lambda: import_torchmetrics().F1Score("multiclass", num_classes=3),
            "metric of objective 'MulticlassF1Score' takes targets that are integers, not float32",
        ),
    ],
)
def test_what_is_no_objective_is_one_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        problem_of(make())
    assert "\n" not in str(caught.value)


def test_targets_that_nothing_can_be_told_by() -> None:
    with pytest.raises(ValueError, match="'r2' takes targets that differ from sample to sample, and all 40 are the same"):
        problem_of("r2", search=(INPUTS, torch.full((40, 3), 0.1)))
    with pytest.raises(ValueError, match="'f1' takes targets some of which are 1, and all are 0"):
        problem_of("f1", search=(INPUTS, torch.zeros(40, 3)))


def test_r2_of_numbers_far_from_zero() -> None:
    network = Net()
    with torch.no_grad():
        network.last.bias.add_(30000)
        wanted = network.eval()(INPUTS)
    wanted = wanted + TARGETS / 2
    found = problem_of("r2", network, (INPUTS, wanted)).float_result.value
    with torch.no_grad():
        given = network(INPUTS).double()
    apart = (given - wanted).square().sum(0) / (wanted.double() - wanted.double().mean(0)).square().sum(0)
    assert found == pytest.approx(float(1 - apart.mean()), abs=1e-6)


@dataclass
class Pair:
    """Inputs of one."""

    first: Tensor


class OfPairs(nn.Module):
    """Takes a dataclass."""

    def __init__(self) -> None:
        """Make it."""
        super().__init__()
        self.network = Net()

    def forward(self, pair: Pair) -> Tensor:
        """Run it."""
        return self.network(pair.first)


def test_structures_that_scales_are_set_by() -> None:
    options = {"budget": 0.9, "pinned": {}, "objective": "mse"}
    problem = Problem(OfPairs(), [Pair(INPUTS)], [(Pair(INPUTS), TARGETS)], "edge", **options)  # type: ignore[arg-type]
    assert problem.float_result.value == problem_of("mse").float_result.value


class Loader:
    """Ends with an empty batch, as some loaders do."""

    def __iter__(self) -> Any:
        """Yield three batches."""
        return iter(
            [(INPUTS[:0], TARGETS[:0]), (INPUTS[:25], TARGETS[:25]), (INPUTS[25:], TARGETS[25:]), (INPUTS[:0], TARGETS[:0])]
        )


@pytest.mark.parametrize("memory", [None, 100])
def test_empty_batches_are_no_samples(memory: int | None) -> None:
    found = problem_of("mse", search=Loader(), memory=memory)
    assert found.evaluator.count == 40
    assert found.float_result.value == pytest.approx(problem_of("mse").float_result.value)
    with pytest.raises(ValueError, match="`search` gave no samples"):
        problem_of("mse", search=(INPUTS[:0], TARGETS[:0]))


@pytest.mark.parametrize("memory", [0, -1, True, 1.5, math.nan, "abc", "-1GB", "", "0GB"])
def test_no_amount_of_memory(memory: Any) -> None:
    with pytest.raises(ValueError, match="`memory` .* is not understood: give an amount such as 4GB"):
        problem_of("mse", memory=memory)


@pytest.mark.parametrize(
    ("forward", "kind", "sentence"),
    [
        ("abc", TypeError, "forward is 'abc'; it must be a function of"),
        (lambda network: network(INPUTS), ValueError, "`forward` failed on what `search` gives, a tuple of 2.*TypeError"),
        (lambda network, batch: (batch[0] + batch[1], network(batch[0]))[1], ValueError, "`forward` failed on what `search`"),
        (
            lambda network, batch: network(batch[0] if len(batch) == 2 else batch[5, 7, 9]),
            ValueError,
            "what `calibrate` gives",
        ),
    ],
)
def test_a_forward_that_cannot_be_run(forward: Any, kind: Any, sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        problem_of("mse", forward=forward)


def test_outputs_that_are_not_one_for_each_sample() -> None:
    def forward(network: Any, batch: Any) -> Tensor:
        if len(batch) == 2:
            return network(batch[0])[: max(1, len(batch[0]) - 1)]
        return network(batch)

    with pytest.raises(ValueError, match=r"outputs have shape \(39, 3\) for 40 samples: there must be a row of class scores"):
        problem_of("accuracy", search=(INPUTS, LABELS), forward=forward)


def test_an_input_by_name_that_is_not_taken() -> None:
    class Named(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs)

    batch = {"inputs": INPUTS, "id": torch.arange(40), "labels": TARGETS}
    with pytest.raises(ValueError, match="`search` gives 'id', which the network's `forward` doesn't take: leave it out"):
        Problem(Named(), [{"inputs": INPUTS}], [batch], "edge", budget=0.9, pinned={}, objective="mse")

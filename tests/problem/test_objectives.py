"""Objectives of any task: their values are those of torchmetrics, solvers look for them, and what doesn't fit is refused."""

from __future__ import annotations

import json
import logging
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import haq
from haq import search
from haq.attacks.proxy import AttackedNetwork, ProxyAttack
from haq.attacks.threat_model import PerturbationBall
from haq.console.errors import EXIT_BAD_INPUT, run_command
from haq.data import Split
from haq.networks import Network
from haq.networks.zoo import import_declared
from haq.problem import KINDS, OBJECTIVES
from haq.problem.chance import doubts
from haq.problem.distribution import Categorical, Gaussian
from haq.problem.given import robust
from haq.problem.metrics import F1, MeanAP, MeanIoU, Perplexity, Psnr, import_torchmetrics
from haq.problem.objective import ValueObjective, find_objective
from haq.problem.tally import measure
from haq.solvers import SOLVERS
from haq.study.search_run import SearchRun
from haq.study.task import SearchTask
from tests.conftest import brightest, enter, fitted_network, images

COUNT = 24


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network whose weights are large enough for answers to differ from sample to sample."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make()
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data *= 1.5
    return network.eval()


def pixels(channels: int) -> nn.Module:
    """For every pixel of an image so many numbers."""

    def make() -> nn.Module:
        first = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*first, nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, channels, 1))

    return seeded(make)


def rows(numbers: int) -> nn.Module:
    """For every image so many numbers."""

    def make() -> nn.Module:
        first = [nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()]
        return nn.Sequential(*first, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, numbers))

    return seeded(make)


class Detector(nn.Module):
    """Finds one to three boxes in every image."""

    def __init__(self) -> None:
        super().__init__()
        self.network = rows(6)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        found = []
        for row in self.network(x):
            count = 1 + int(row[0] > 0) + int(row[1] > 0)
            corners = torch.tensor([[0.0, 0.0], [1.0, 3.0], [4.0, 2.0]])[:count]
            boxes = torch.cat([corners, corners + 2 + row[2].sigmoid()], 1)
            scores = row[3:].sigmoid()[:count]
            found.append({"boxes": boxes, "scores": scores, "labels": torch.tensor([0, 1, 0])[:count]})
        return found


class Two(nn.Module):
    """Takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = rows(8)
        self.right = rows(8)
        self.head = nn.Linear(16, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(left), self.right(right)], 1))


class Tokens(nn.Module):
    """Says of every place which token it is."""

    def __init__(self, tokens: int = 11) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, 16)
        layers = [nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Linear(16, tokens))

    def forward(self, ids: Tensor) -> Tensor:
        return self.network(self.embedding(ids))


def ids(seed: int = 0, tokens: int = 11) -> Tensor:
    return torch.randint(tokens, (COUNT, 6), generator=torch.Generator().manual_seed(seed))


def noisy(outputs: Tensor, seed: int = 0) -> Tensor:
    return outputs + 0.3 * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed))


class Task(NamedTuple):
    """A network, what it is judged on, and its value by hand: a metric of torchmetrics, given all outputs at once."""

    objective: Any
    network: nn.Module
    inputs: Any
    targets: Any
    value: Callable[[Any, Any], Tensor]


def task(name: str) -> Task:
    metrics = import_torchmetrics()
    import_torchmetrics("torchmetrics.detection")
    x = images(COUNT)
    functional = metrics.functional
    if name in ("mse", "mae", "r2"):
        network = rows(2)
        values = {"mse": functional.mean_squared_error, "mae": functional.mean_absolute_error, "r2": functional.r2_score}
        return Task(name, network, x, noisy(network(x)).detach(), values[name])
    if name in ("psnr", "ssim"):
        network = nn.Sequential(nn.Upsample(scale_factor=2), pixels(1), nn.Sigmoid())
        values = {
            "psnr": lambda given, wanted: functional.image.peak_signal_noise_ratio(given, wanted, data_range=1.0),
            "ssim": lambda given, wanted: functional.image.structural_similarity_index_measure(given, wanted, data_range=1.0),
        }
        return Task(name, network, x, noisy(network(x)).clamp(0, 1).detach(), values[name])
    if name == "miou":
        network = pixels(3)
        network[-1].bias.data -= network(x).mean((0, 2, 3)).detach()  # all classes are answered
        targets = noisy(network(x)).argmax(1)
        targets[:, 0] = -100

        def jaccard(outputs: Tensor, wanted: Tensor) -> Tensor:
            return metrics.JaccardIndex("multiclass", num_classes=3, ignore_index=-100)(outputs, wanted)

        return Task(name, network, x, targets, jaccard)
    if name == "f1":
        network = rows(5)
        targets = (noisy(network(x)) > 0).long()
        return Task(name, network, x, targets, metrics.classification.MultilabelF1Score(5))
    if name == "top5":
        network = rows(9)
        return Task(
            name,
            network,
            x,
            noisy(network(x), 3).argsort(1)[:, -4],
            metrics.Accuracy("multiclass", num_classes=9, top_k=5, average="micro"),
        )
    if name == "two inputs":
        network = seeded(Two)
        left, right = images(COUNT), images(COUNT, 1)
        targets = noisy(network(left, right)).argmax(1)
        return Task("accuracy", network, (left, right), targets, metrics.Accuracy("multiclass", num_classes=3))
    if name == "tokens":
        network = seeded(Tokens)
        tokens = ids()
        targets = noisy(network(tokens)).argmax(2)
        targets[:, 0] = -100
        return Task("perplexity", network, tokens, targets, metrics.text.Perplexity(ignore_index=-100))
    assert name == "map"
    detector = Detector().eval()
    targets = [{key: value for key, value in one.items() if key != "scores"} for one in detector(x)]
    targets[0]["labels"] = 1 - targets[0]["labels"]

    def precision(outputs: Any, wanted: Any) -> Tensor:
        metric = metrics.detection.MeanAveragePrecision()
        metric.update(outputs, wanted)
        return metric.compute()["map"]

    return Task("map", detector, x, targets, precision)


TASKS = ("mse", "mae", "r2", "psnr", "ssim", "miou", "f1", "top5", "tokens", "two inputs", "map")
STRUCTURED = ("two inputs", "map")


def problem_of(given: Task, **options: Any) -> haq.Problem:
    inputs = given.inputs
    calibrate: Any = inputs
    search: Any = (given.inputs, given.targets)
    if not isinstance(inputs, Tensor) or not isinstance(given.targets, Tensor):
        search = [search]
        if not isinstance(inputs, Tensor):
            calibrate = [inputs]
    arguments = {"budget": 0.9, "objective": given.objective, "pinned": {}} | options
    return haq.Problem(given.network, calibrate, search, "edge", **arguments)


def outputs_of(network: nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        if isinstance(inputs, tuple):
            return network(*inputs)
        return network(inputs)


@pytest.mark.parametrize("name", TASKS)
def test_values_are_those_of_torchmetrics_on_the_quantized_network(name: str) -> None:
    given = task(name)
    problem = problem_of(given)
    by_hand = given.value(outputs_of(given.network, given.inputs), given.targets)
    assert problem.float_result.value == pytest.approx(float(by_hand), rel=1e-5, abs=1e-6)
    differing = 0
    for bits in (2, 3, 8):
        policy = problem.uniform(bits)
        by_hand = given.value(outputs_of(problem.quantized(policy), given.inputs), given.targets)
        found = problem.evaluate(policy)
        assert found.value == pytest.approx(float(by_hand), rel=1e-5, abs=1e-6)
        assert found.images == COUNT
        differing += found.value != problem.float_result.value
    assert differing
    result = haq.solve(problem, "greedy", evaluations=5)
    within = [trial for trial in result.session.trials if problem.within_budget(trial.cost)]
    best = max(within, key=lambda trial: trial.evaluation.score)
    assert result.trial.evaluation.score == best.evaluation.score


def test_of_lower_is_better_the_best_trial_has_the_least_value() -> None:
    problem = problem_of(task("mse"))
    result = haq.solve(problem, "random", evaluations=8)
    values = [trial.evaluation.value for trial in result.session.trials if problem.within_budget(trial.cost)]
    assert len(set(values)) > 2
    assert result.trial.evaluation.value == min(values)


def test_the_error_of_a_mean_is_its_standard_error() -> None:
    given = task("mse")
    problem = problem_of(given)
    by_sample = (outputs_of(given.network, given.inputs) - given.targets).square().mean(1)
    assert problem.float_result.error == pytest.approx(float(by_sample.std() / COUNT**0.5), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("mse", lambda outputs, targets: (outputs - targets).square().mean(1)),
        ("r2", lambda outputs, targets: (outputs - targets).square().mean(1)),
        ("psnr", lambda outputs, targets: (outputs - targets).square().mean((1, 2, 3))),
        (
            "f1",
            lambda outputs, targets: F.binary_cross_entropy_with_logits(outputs, targets.float(), reduction="none").mean(1),
        ),
    ],
)
def test_losses_are_told_by_sample_and_can_be_trained(name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    given = task(name)
    objective = find_objective(name)
    assert isinstance(objective, ValueObjective)
    outputs = given.network(given.inputs)
    found = objective.losses(outputs, given.targets)
    assert found is not None
    assert torch.allclose(found, loss(outputs, given.targets))
    trained = objective.training_loss(outputs, given.targets)
    assert trained.item() == pytest.approx(float(found.mean().detach()))
    trained.backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in given.network.parameters())


def test_what_is_ignored_has_no_loss() -> None:
    scores = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(2, 4, 4, dtype=torch.long)
    targets[0, 1:] = -100
    targets[1] = -100
    losses = MeanIoU().losses(scores, targets)
    assert losses is not None
    assert losses[1] == 0
    assert losses[0] == pytest.approx(float(F.cross_entropy(scores[:1, :, 0], targets[:1, 0])))


def test_perplexity_is_of_the_token_behind_where_targets_are_the_inputs_own() -> None:
    given = task("tokens")
    padded = given.inputs.clone()
    padded[:, 4:] = -100
    by_hand = import_torchmetrics("torchmetrics.text").Perplexity(ignore_index=-100)
    by_hand.update(outputs_of(given.network, given.inputs)[:, :-1], padded[:, 1:])
    problem = problem_of(given._replace(targets=padded))
    assert problem.float_result.value == pytest.approx(float(by_hand.compute()), rel=1e-5)
    assert Perplexity().aligned(given.inputs, given.targets) is given.targets


def test_embeddings_are_held_against_those_of_the_float_network() -> None:
    network, x = rows(6), images(COUNT)
    problem = haq.Problem(network, x, x, "edge", budget=0.9, objective="cosine")
    assert problem.float_result.value == pytest.approx(1.0)
    policy = problem.uniform(2, keep_pinned=True)
    with torch.no_grad():
        given, wanted = problem.quantized(policy)(x), network(x)
    by_hand = import_torchmetrics("torchmetrics.regression").CosineSimilarity("mean")(given, wanted)
    found = problem.evaluate(policy)
    assert found.value == pytest.approx(float(by_hand), rel=1e-5)
    assert found.loss == pytest.approx(1 - float(by_hand), rel=1e-4)
    assert found.value < 1


def hugging_face() -> Any:
    """transformers, which needs torchvision's operators to be declared as torchmetrics does."""
    import_declared("torchvision")
    return pytest.importorskip("transformers")


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_outputs_of_hugging_face_that_are_classes() -> None:
    transformers = hugging_face()
    config = transformers.BertConfig(vocab_size=11, max_position_embeddings=8, num_labels=3, **SMALL)
    network: Any = seeded(lambda: transformers.BertForSequenceClassification(config))
    inputs = {"input_ids": ids(), "attention_mask": (ids(1) > 2).long()}
    with torch.no_grad():
        labels = noisy(network(**inputs).logits).argmax(1)
    problem = haq.Problem(network, [inputs], [inputs | {"labels": labels}], "edge", budget=0.9, pinned={})
    policy = problem.uniform(2)
    with torch.no_grad():
        answers = problem.quantized(policy)(**inputs).logits.argmax(1)
    by_hand = import_torchmetrics().Accuracy("multiclass", num_classes=3)(answers, labels)
    assert problem.evaluate(policy).value == pytest.approx(float(by_hand))
    embeddings = haq.Problem(network.bert, [inputs], [inputs], "edge", budget=0.9, pinned={}, objective="cosine")
    policy = embeddings.uniform(2)
    with torch.no_grad():
        both = [one(**inputs).pooler_output for one in (embeddings.quantized(policy), network.bert)]
    assert embeddings.evaluate(policy).value == pytest.approx(float(F.cosine_similarity(*both).mean()), rel=1e-5)


def test_the_perplexity_of_a_causal_model_of_hugging_face_is_that_of_its_own_loss() -> None:
    transformers = hugging_face()
    config = transformers.LlamaConfig(vocab_size=11, max_position_embeddings=8, **SMALL)
    network = seeded(lambda: transformers.LlamaForCausalLM(config))
    inputs = {"input_ids": ids()}
    labels = ids().masked_fill(ids(1) < 2, -100)
    problem = haq.Problem(network, [inputs], [inputs | {"labels": labels}], "edge", budget=0.9, objective="perplexity")
    for policy in (problem.uniform(3, keep_pinned=True), problem.uniform(8)):
        with torch.no_grad():
            loss = problem.quantized(policy)(**inputs, labels=labels).loss
        assert problem.evaluate(policy).value == pytest.approx(math.exp(float(loss)), rel=1e-4)
    result = haq.solve(problem, "random", evaluations=4)
    within = [trial.evaluation.value for trial in result.session.trials if problem.within_budget(trial.cost)]
    assert result.trial.evaluation.value == min(within)


# What a user gives.


def worst_difference(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().amax(1)


worst_difference.higher_is_better = False  # type: ignore[attr-defined]
worst_difference.unit = "V"  # type: ignore[attr-defined]


def least_weight(network: nn.Module) -> float:
    """Knows its own data."""
    with torch.no_grad():
        return float(network(images(9)).square().mean())


def test_a_function_of_outputs_and_targets() -> None:
    given = task("mse")
    problem = problem_of(given, objective=worst_difference)
    objective = problem.objective
    assert (objective.name, objective.unit, objective.higher_is_better) == ("worst_difference", "V", False)
    policy = problem.uniform(3)
    by_hand = worst_difference(outputs_of(problem.quantized(policy), given.inputs), given.targets).mean()
    assert problem.evaluate(policy).value == pytest.approx(float(by_hand), rel=1e-5)
    assert isinstance(objective.distribution, Gaussian)
    told = haq.objective(worst_difference, name="worst", unit="dB", title="Worst of All", higher_is_better=True)
    assert (told.name, told.unit, told.title, told.higher_is_better) == ("worst", "dB", "Worst of All", True)
    assert isinstance(told, ValueObjective)
    assert told.losses(given.targets, given.targets) is None
    with_loss = haq.objective(worst_difference, loss=lambda outputs, targets: (outputs - targets).square().mean(1))
    outputs = given.network(given.inputs)
    assert with_loss.training_loss(outputs, given.targets).item() == pytest.approx(F.mse_loss(outputs, given.targets).item())


def test_without_targets_a_function_is_given_the_float_networks_outputs() -> None:
    network, x = rows(6), images(COUNT)
    objective = haq.objective(worst_difference, needs_targets=False)
    problem = haq.Problem(network, x, x, "edge", budget=0.9, objective=objective)
    assert problem.float_result.value == 0
    policy = problem.uniform(3, keep_pinned=True)
    by_hand = worst_difference(outputs_of(problem.quantized(policy), x), outputs_of(network, x)).mean()
    assert problem.evaluate(policy).value == pytest.approx(float(by_hand), rel=1e-5)


def test_a_metric_of_torchmetrics() -> None:
    metrics = import_torchmetrics()
    given = task("f1")
    metric = metrics.classification.MultilabelAUROC(5)
    metric.update(torch.rand(3, 5), torch.tensor([[0, 1, 0, 1, 0]] * 3))  # what was in it doesn't count
    problem = problem_of(given, objective=metric)
    policy = problem.uniform(2)
    by_hand = metrics.classification.MultilabelAUROC(5)(outputs_of(problem.quantized(policy), given.inputs), given.targets)
    assert problem.evaluate(policy).value == pytest.approx(float(by_hand), rel=1e-5)
    assert (problem.objective.name, problem.objective.higher_is_better) == ("MultilabelAUROC", True)
    assert not find_objective(metrics.MeanSquaredError).higher_is_better
    classes = metrics.classification.MulticlassAccuracy(4, average="micro")
    x = images(COUNT)
    problem = haq.Problem(fitted_network(), x, (x, brightest(x)), "edge", budget=0.9, objective=classes)
    assert isinstance(problem.objective.distribution, Categorical)
    assert problem.float_result.divergence == 0
    plain = haq.Problem(fitted_network(), x, (x, brightest(x)), "edge", budget=0.9)
    assert problem.evaluate(problem.uniform(2)).value == pytest.approx(plain.evaluate(plain.uniform(2)).value)


def test_a_black_box_is_given_the_network(caplog: pytest.LogCaptureFixture) -> None:
    network, x = rows(2), images(COUNT)
    black = haq.objective(least_weight, higher_is_better=False)
    alone = haq.Problem(network, x, None, "edge", budget=0.9, objective=black)
    policy = alone.uniform(3, keep_pinned=True)
    assert alone.evaluate(policy).value == pytest.approx(least_weight(alone.quantized(policy)))
    assert alone.evaluate(policy).divergence is None
    (sentence,) = doubts(alone)
    assert "'least_weight' is given the network itself" in sentence
    assert "no evaluation ends early" in sentence
    with caplog.at_level(logging.WARNING, "haq"):
        haq.solve(alone, "random", evaluations=2)
    assert [record.getMessage() for record in caplog.records].count(sentence) == 1
    beside = haq.Problem(network, x, x, "edge", budget=0.9, objective=black)
    found = beside.evaluate(policy)
    assert found.value == alone.evaluate(policy).value
    assert found.loss == found.divergence
    assert found.loss > 0


def by_split(network: nn.Module, split: str = "search") -> float:
    return least_weight(network) + 1000 * (split == "test")


def test_a_black_box_may_look_at_other_samples_for_the_test() -> None:
    network, x = rows(2), images(COUNT)
    black = haq.objective(by_split, higher_is_better=False)
    problem = haq.Problem(network, x, None, "edge", budget=0.9, objective=black)
    policy = problem.uniform(3, keep_pinned=True)
    quantized = problem.quantized(policy)
    split = Split(x, torch.zeros(COUNT, dtype=torch.long))
    tested = measure(black, Network("rows", network, (1, 8, 8)), split, quantized)
    assert tested == pytest.approx(1000 + problem.evaluate(policy).value)
    assert "test split" not in doubts(problem)[0]
    silent = haq.Problem(network, x, None, "edge", budget=0.9, objective=haq.objective(least_weight, higher_is_better=False))
    assert "what is said of the test split is of what policies are chosen by" in doubts(silent)[0]


def lacks_direction(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs[:, 0]


def test_what_cannot_be_an_objective_is_refused_in_a_sentence() -> None:
    metrics = import_torchmetrics()
    for given, message in (
        (
            lacks_direction,
            "'lacks_direction' doesn't say whether larger values are better: give haq.objective\\(lacks_direction",
        ),
        (lambda network: 1.0, "doesn't say whether larger values are better"),
        (lambda: 1.0, "must take \\(outputs, targets\\), or a network, and it needs no arguments"),
        (lambda a, b, c: a, "it needs 3 arguments"),
        (lambda a, *, batch: a, "needs 'batch' by name"),
        (metrics.CatMetric(), "'CatMetric' doesn't say whether .* give haq.objective\\(CatMetric, higher_is_better=True\\)"),
        (metrics.MetricCollection([metrics.MeanSquaredError()]), "a MetricCollection has several metrics .MeanSquaredError."),
        (object(), "it lacks words"),
        ("mse+robust", "objective='mse\\+robust' needs the attack .* give haq.problem.given.robust\\('mse'"),
        ("msr", "did you mean mse"),
        ("msr+robust", "unknown objective 'msr'"),
    ):
        with pytest.raises(ValueError, match=message):
            find_objective(given)
    with pytest.raises(ValueError, match="is an objective already"):
        haq.objective(Psnr())
    with pytest.raises(ValueError, match="the loss of objective 'lacks_direction' must be a function"):
        haq.objective(lacks_direction, higher_is_better=True, loss=3)  # type: ignore[arg-type]


def with_targets(name: str, targets: Any, network: nn.Module | None = None) -> Callable[[], object]:
    given = task(name)
    return lambda: problem_of(given._replace(targets=targets, network=network or given.network))


def judged_by(function: Any, **said: Any) -> Callable[[], object]:
    return lambda: problem_of(task("mse"), objective=haq.objective(function, **({"higher_is_better": True} | said)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            with_targets("mse", torch.zeros(COUNT, 3)),
            "'mse' takes targets of the shape of outputs: \\(1, 3\\) doesn't fit|24, 3",
        ),
        (
            with_targets("miou", torch.full((COUNT, 8, 8), 7)),
            "'miou': targets such as 7 don't fit .*MeanIoU\\(ignore_index=7\\)",
        ),
        (with_targets("miou", torch.zeros(COUNT, 4, 4).long()), "'miou' takes a class number for every pixel"),
        (with_targets("miou", torch.rand(COUNT, 8, 8)), "'miou' takes targets that are a tensor of integers"),
        (
            with_targets("psnr", 255 * torch.rand(COUNT, 1, 16, 16)),
            "'psnr' takes targets from 0 to 1.*Psnr\\(data_range=...\\)",
        ),
        (with_targets("ssim", 0.5 - torch.rand(COUNT, 1, 16, 16)), "'ssim' takes targets from 0 to 1"),
        (
            with_targets("ssim", torch.rand(COUNT, 1, 8, 8), nn.Sequential(pixels(1))),
            "'ssim' takes pictures .* 11 pixels or more",
        ),
        (with_targets("f1", torch.zeros(COUNT).long()), "'f1' is of labels of which several may be right"),
        (with_targets("f1", torch.full((COUNT, 5), 2)), "'f1' takes targets of 0 and 1, not 2"),
        (with_targets("f1", torch.ones(COUNT, 5), nn.Sequential(rows(5), nn.Sigmoid())), "F1\\(probabilities=True\\)"),
        (with_targets("tokens", ids(tokens=11) + 5), "'perplexity': targets such as 1. don't fit"),
        (with_targets("tokens", ids()[:, 1:]), "'perplexity' takes a token for every place"),
        (with_targets("top5", torch.zeros(COUNT).long(), rows(4)), "'top5' needs a network with 6 outputs or more, not 4"),
        (with_targets("map", [{"boxes": torch.zeros(1, 4)}] * COUNT), "'map' takes targets .* has no tensor 'labels'"),
        (judged_by(lambda outputs, targets: outputs[:, 0] * math.nan), "no finite number for the float network .* value nan"),
        (judged_by(lambda outputs, targets: outputs.sum()), "`values` of objective '<lambda>' must return a tensor of shape"),
        (judged_by(lambda outputs, targets: outputs[1:, 0]), "must return a tensor of shape \\(24,\\)"),
        (judged_by(lambda outputs, targets: "good", name="mine"), "`values` of objective 'mine' must .* not str 'good'"),
        (judged_by(lambda outputs, targets: None, name="mine"), "`values` of objective 'mine' must .* not None"),
        (judged_by(lambda network: math.nan, name="mine"), "'mine' gives no finite number .* value nan"),
        (
            judged_by(lambda network: "good", name="mine"),
            "`evaluate` of objective 'mine' must return one number, not str 'good'",
        ),
        (judged_by(lambda network: network.nothing, name="mine"), "`evaluate` of objective 'mine' failed: AttributeError"),
    ],
)
def test_what_does_not_fit_is_named_before_the_search_starts(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_what_is_said_otherwise_fits() -> None:
    given = task("psnr")
    scaled = nn.Sequential(given.network, Scaled())
    problem = problem_of(given._replace(network=scaled, targets=255 * given.targets), objective=Psnr(data_range=255))
    assert problem.float_result.value == pytest.approx(problem_of(given).float_result.value, rel=1e-4)
    given = task("f1")
    with_sigmoid = nn.Sequential(given.network, nn.Sigmoid())
    problem = problem_of(given._replace(network=with_sigmoid), objective=F1(probabilities=True))
    assert problem.float_result.value == problem_of(given).float_result.value
    given = task("miou")
    other = given.targets.masked_fill(given.targets == -100, 255)
    problem = problem_of(given._replace(targets=other), objective=MeanIoU(ignore_index=255))
    assert problem.float_result.value == problem_of(given).float_result.value


class Scaled(nn.Module):
    """Shows pictures from 0 to 255."""

    def forward(self, x: Tensor) -> Tensor:
        return 255 * x


def test_numbers_that_do_not_depend_on_the_network_are_fine() -> None:
    problem = problem_of(task("mse"), objective=haq.objective(lambda network: 1.0, higher_is_better=True))
    assert haq.solve(problem, "random", evaluations=3).trial.evaluation.value == 1.0


def test_a_policy_that_gives_nan_is_the_worst() -> None:
    given = task("mse")
    seen: list[float] = []

    def sometimes(network: nn.Module) -> float:
        seen.append(1.0)
        if len(seen) == 2:
            return math.nan
        return 1.0

    problem = problem_of(given, objective=haq.objective(sometimes, higher_is_better=False))
    found = problem.evaluate(problem.uniform(4))
    assert (found.value, found.loss) == (math.inf, math.inf)
    assert problem.evaluate(problem.uniform(5)).value == 1.0


# Attacks.


def attack(eps: float = 0.1) -> ProxyAttack:
    """On images in [0, 1], taken as they are."""
    one = torch.ones(1, 1, 1)
    return ProxyAttack(PerturbationBall(eps, eps * one, 0 * one, one))


@pytest.mark.parametrize("name", ["mse", "r2", "psnr", "miou", "f1", "top5"])
def test_the_worst_of_clean_and_attacked(name: str) -> None:
    given = task(name)
    plain = problem_of(given)
    problem = problem_of(given, objective=robust(name, attack()))
    objective = problem.objective
    assert (objective.name, objective.unit) == (f"{name}+robust", plain.objective.unit)
    assert problem.float_result.score < plain.float_result.score
    policy = problem.uniform(4)
    found, clean = problem.evaluate(policy), plain.evaluate(policy)
    assert found.score <= clean.score
    assert found.loss > clean.loss
    network = problem.quantized(policy)
    assert isinstance(problem.evaluator.samples, object)
    ((inputs, targets),) = problem.evaluator.batches
    attacked = attack().raise_loss(network, objective.attacked_loss(network, inputs, targets), inputs, 0)
    assert bool((attacked - inputs).abs().max() <= 0.1 + 1e-6)
    versions = [outputs_of(network, one) for one in (inputs, attacked)]
    if name == "mse":
        errors = torch.stack([(one - targets).square().mean(1) for one in versions])
        assert found.value == pytest.approx(float(errors.amax(0).mean()), rel=1e-4)
    elif name in ("r2", "psnr"):
        by_hand = min(float(given.value(one, targets)) for one in versions)
        assert found.value == pytest.approx(by_hand, rel=1e-4)


def test_without_a_loss_the_outputs_are_moved_from_what_they_were() -> None:
    given = task("f1")
    metric = import_torchmetrics().classification.MultilabelAUROC(5)
    plain, problem = problem_of(given, objective=metric), problem_of(given, objective=robust(metric, attack()))
    policy = problem.uniform(4)
    assert problem.evaluate(policy).value < plain.evaluate(policy).value


def test_a_black_box_is_given_a_network_that_attacks_its_inputs() -> None:
    given = task("mse")
    seen: list[nn.Module] = []

    def evaluate(network: nn.Module) -> float:
        seen.append(network)
        with torch.inference_mode():
            return float((network(given.inputs) - given.targets).square().mean())

    plain = problem_of(given, objective=haq.objective(evaluate, higher_is_better=False))
    policy = plain.uniform(4)
    clean = plain.evaluate(policy).value
    seen.clear()
    problem = problem_of(given, objective=robust(haq.objective(evaluate, higher_is_better=False), attack()))
    found = problem.evaluate(policy).value
    assert [isinstance(network, AttackedNetwork) for network in seen[-2:]] == [False, True]
    assert found > clean
    problem.evaluator.cache.clear()
    assert problem.evaluate(policy).value == found


def test_what_cannot_be_attacked_is_refused() -> None:
    with pytest.raises(ValueError, match="'map' can't be attacked: it has no loss, and no distance"):
        robust(MeanAP(), attack())
    with pytest.raises(ValueError, match="an attack is of images|attacks images, one tensor of floats"):
        problem_of(task("tokens"), objective=robust("perplexity", attack()))
    given = task("mse")
    with pytest.raises(ValueError, match="leave the range of images that the attack is of, 0 to 1"):
        problem_of(given._replace(inputs=3 * given.inputs), objective=robust("mse", attack()))
    with pytest.raises(ValueError, match="'mse\\+robust' is of attacked inputs already"):
        robust(robust("mse", attack()), attack())


# The command line.

JOB = """
import torch
from tests.problem.test_objectives import images, noisy, rows

def network():
    return rows(2)

def splits(x, answers):
    pairs = [(one, noisy(rows(2)(answer)).detach()) for one, answer in zip(x.split(24), answers.split(24))]
    return dict(zip(("train", "search", "test"), pairs))

def data():
    return splits(images(72), images(72))

def bytes():
    x = (255 * images(72)).to(torch.uint8)
    return splits(x, x / 255)

def unlabelled():
    return dict(zip(("train", "search", "test"), images(72).split(24)))

def score(outputs, targets):
    return (outputs - targets).abs().amax(1)

score.higher_is_better = False
score.unit = "V"

def evaluate(network):
    x, y = data()["search"]
    with torch.no_grad():
        return float((network(x) - y).square().mean())

evaluate.higher_is_better = False

def aimless(outputs, targets):
    return outputs[:, 0]
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter(tmp_path, monkeypatch, JOB)
    return tmp_path


def run(objective: str, data: str = "data", *more: str) -> int:
    given = {"--network": "small_job:network", "--data": f"small_job:{data}", "--objective": objective, "--out": "run"}
    given |= {"--hw": "edge", "--budget": "0.9", "--solver": "random", "--evaluations": "3", "--finetune-epochs": "0"}
    words = [word for pair in given.items() for word in pair]
    return run_command(lambda: search.main([*words, *more]))


@pytest.mark.parametrize(
    ("objective", "data", "title"),
    [
        ("mse", "data", "mean squared error"),
        ("small_job:score", "data", "score"),
        ("small_job:evaluate", "data", "evaluate"),
        ("small_job:score+robust", "bytes", "worst-case score"),
    ],
)
def test_objectives_from_the_command_line(
    job: Path, capsys: pytest.CaptureFixture[str], objective: str, data: str, title: str
) -> None:
    assert run(objective, data) == 0, capsys.readouterr().err
    said = " ".join(capsys.readouterr().out.split())
    assert title in said
    assert "accuracy" not in said
    record = json.loads((job / "run" / "problem.json").read_text())
    assert not record["higher_is_better"]


TASK_JOB = """
from tests.problem.test_objectives import task

given = task(NAME)

def network():
    return given.network

def data():
    return dict.fromkeys(("train", "search", "test"), (given.inputs, given.targets))
"""


@pytest.mark.parametrize("name", ["miou", *(pytest.param(name, marks=pytest.mark.slow) for name in TASKS if name != "miou")])
def test_every_task_from_the_command_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(tmp_path, monkeypatch, TASK_JOB.replace("NAME", repr(name)))
    given = task(name)
    assert run(given.objective) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    run_of_it = SearchRun.load(tmp_path / "run")
    problem = SearchTask.build(run_of_it.config).problem
    found = problem.quantized(run_of_it.load_policy())
    by_hand = float(given.value(outputs_of(found, given.inputs), given.targets))
    for split in ("search", "test"):
        assert record["found"][f"{split}_{given.objective}"] == pytest.approx(by_hand, rel=1e-4)


def test_what_the_command_line_refuses(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for objective, data, message in (
        ("small_job:aimless", "data", "objective 'aimless' doesn't say whether larger values are better"),
        ("mse", "unlabelled", "has no targets to tell the mean squared error by: search with --objective cosine"),
        ("top5", "data", "has targets that are no classes to tell the top-5 accuracy by"),
        ("mse+robust", "data", "taken as they are, so the range that an attack must stay in isn't known"),
        ("map+robust", "bytes", "objective 'map' can't be attacked"),
        ("f1", "data", "'f1' takes targets of 0 and 1"),
    ):
        assert run(objective, data) == EXIT_BAD_INPUT
        assert message in " ".join(capsys.readouterr().err.split())


def test_all_are_listed() -> None:
    rows = {row.name: row.line for row in OBJECTIVES.rows()}
    assert {"mse", "miou", "NAME+robust"} <= set(rows)
    for name in OBJECTIVES.names():
        kind = OBJECTIVES.get(name)
        assert kind.name == name
        assert kind.title
    assert OBJECTIVES.get("psnr+robust").attacked


# Solvers, sensitivities, workers.


def tiny(objective: Any) -> haq.Problem:
    """Four layers, of which the second is searched."""
    pinned = dict.fromkeys(("1", "5", "7"), (8, 8))
    return problem_of(task("mse"), objective=objective, bits=(3, 4), budget=0.95, pinned=pinned)


def squared(network: nn.Module) -> float:
    given = task("mse")
    return float(F.mse_loss(outputs_of(network, given.inputs), given.targets))


@pytest.fixture(params=["mse", "black box"])
def judged(request: pytest.FixtureRequest) -> Any:
    if request.param == "mse":
        return "mse"
    return haq.objective(squared, higher_is_better=False)


@pytest.mark.parametrize("solver", SOLVERS.names())
def test_every_solver_goes_downhill(judged: Any, solver: str) -> None:
    problem = tiny(judged)
    result = haq.solve(problem, solver, evaluations=4)
    values = [trial.evaluation.value for trial in result.session.trials if problem.within_budget(trial.cost)]
    assert result.trial.evaluation.value == min(values)
    assert result.trial.evaluation.value == pytest.approx(squared(problem.quantized(result.trial.policy)), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_sensitivities(judged: Any, kind: str) -> None:
    problem = tiny(judged)
    result = haq.solve(problem, "ilp", evaluations=30, sensitivities=kind)
    increases = result.session.sensitivities.table(problem)
    assert bool((increases >= 0).all())
    assert increases.max() > 0


def evaluations(judged: Any, **options: Any) -> list[object]:
    result = haq.solve(tiny(judged), "random", evaluations=3, seed=1, **options)
    return [trial.evaluation for trial in result.session.trials]


def test_outputs_that_cannot_be_held_against_others_have_no_such_sensitivities() -> None:
    problem = problem_of(task("map"))
    assert problem.float_result.divergence is None
    assert problem.float_result.loss == -problem.float_result.value
    for kind in ("kl", "hessian", "gradient"):
        with pytest.raises(ValueError, match="objective 'map'"):
            haq.solve(problem, "ilp", evaluations=3, sensitivities=kind)


def test_a_seed_and_a_copy_elsewhere_give_the_same(judged: Any) -> None:
    assert evaluations(judged) == evaluations(judged)
    problem = tiny(judged)
    elsewhere = pickle.loads(cloudpickle.dumps(problem.evaluator))
    policy = problem.uniform(3, keep_pinned=True)
    assert elsewhere.evaluate(policy) == problem.evaluate(policy)


@pytest.mark.slow
def test_workers_give_the_same(judged: Any) -> None:
    assert evaluations(judged, workers=2) == evaluations(judged)


@pytest.mark.parametrize("name", ["f1", "miou"])
def test_a_result_is_finetuned_without_targets(name: str) -> None:
    given = task(name)
    result = haq.solve(problem_of(given), "random", evaluations=2, seed=0)
    result.finetune(given.inputs, epochs=1)
    assert result.quantized is not None

"""Objectives of any task: their values are those of torchmetrics, solvers look for them, and what doesn't fit is refused."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import haq
import quantizers as Q
from haq.attacks.proxy import AttackedNetwork, ProxyAttack
from haq.attacks.threat_model import PerturbationBall
from haq.problem import KINDS, OBJECTIVES
from haq.problem.chance import doubts
from haq.problem.distribution import Bernoulli, Categorical, Gaussian
from haq.problem.given import robust
from haq.problem.metrics import F1, MeanAP, MeanIoU, Perplexity, Psnr, import_torchmetrics
from haq.problem.objective import BlackBox, Objective, ValueObjective, find_objective
from haq.solvers import SOLVERS
from tests.conftest import brightest, fitted_network, images

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

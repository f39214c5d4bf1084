"""Attacks find what those of another library find, the Adversarial Robustness Toolbox: FGSM, PGD, APGD and Square, on a
network trained on the data set that comes with the project."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("art")
from art.attacks import evasion
from art.estimators.classification import PyTorchClassifier

from haq import data
from haq.attacks import base
from haq.attacks.base import AttackBudget
from haq.attacks.classifier import Classifier
from haq.attacks.evaluation_attacks import pgd
from haq.attacks.suite import suite
from haq.attacks.threat_model import ThreatModel

IMAGES, STEPS, QUERIES = 400, 10, 80
# Where accuracy is half or so of that without an attack.
MIDDLE = {"linf": 12 / 255, "l2": 0.8}


class Pair(NamedTuple):
    victim: Classifier
    art: Any
    x: Tensor
    y: Tensor


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """A small network, some images that it wasn't trained on, and what shows it to the other library."""
    split, test = data.load().train, data.load().test
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(1, 12, 5, 3), nn.ReLU(), nn.Conv2d(12, 16, 3, 2), nn.ReLU()), nn.Flatten(), nn.Linear(144, 10)
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in range(2):
            for batch in torch.randperm(len(split.labels)).split(100):
                optimizer.zero_grad()
                images = split.images[batch].float() / 255
                nn.functional.cross_entropy(network(images), split.labels[batch]).backward()
                optimizer.step()
    victim, state = Classifier(network), np.random.get_state()
    art = PyTorchClassifier(
        victim,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    yield Pair(victim, art, test.images[torch.arange(IMAGES)].float() / 255, test.labels[:IMAGES])
    np.random.set_state(state)


@pytest.fixture(autouse=True)
def same_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base.ATTACK_BUDGETS, "standard", AttackBudget(STEPS, 1, STEPS, 3, QUERIES, 1))


def ours(pair: Pair, name: str, threat: ThreatModel) -> Tensor:
    (one,) = suite(name, pair.victim, threat, 10)
    return one.run(pair.x, pair.y, 0)


def theirs(pair: Pair, kind: str, threat: ThreatModel, **options: Any) -> Tensor:
    """The other library's images. It draws from numpy's global generator."""
    np.random.seed(0)
    norm = np.inf if threat.norm == "linf" else 2
    made = getattr(evasion, kind)(pair.art, norm=norm, eps=threat.eps, batch_size=IMAGES, **options)
    found = torch.as_tensor(made.generate(pair.x.numpy(), y=pair.y.numpy()))
    assert threat.within(pair.x, found)
    return found


def agree(pair: Pair, mine: Tensor, other: Tensor, differing: float) -> None:
    """Both accuracies are as close as two samples of n images: |p1 - p2| <= 3 sqrt(2 p (1 - p) / n). As the images are the
    same, more can be asked: all but a share of them are fooled by both or by neither."""
    a, b = pair.victim.right(mine, pair.y), pair.victim.right(other, pair.y)
    first, second = float(a.double().mean()), float(b.double().mean())
    p = (first + second) / 2
    assert 0.2 < p < 0.7
    assert abs(first - second) <= 3 * math.sqrt(2 * p * (1 - p) / IMAGES), (first, second)
    assert float((a != b).double().mean()) <= differing, (first, second)


def test_without_an_attack_both_see_the_same_network(pair: Pair) -> None:
    logits = torch.as_tensor(pair.art.predict(pair.x.numpy()))
    with torch.no_grad():
        torch.testing.assert_close(logits, pair.victim(pair.x), rtol=1e-4, atol=1e-4)
    assert pair.victim.right(pair.x, pair.y).double().mean() > 0.7


@pytest.mark.parametrize("norm", MIDDLE)
def test_fgsm_is_the_same_image(pair: Pair, norm: str) -> None:
    """Pixel by pixel."""
    threat = ThreatModel(MIDDLE[norm], norm)
    mine, other = ours(pair, "fgsm", threat), theirs(pair, "FastGradientMethod", threat)
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    assert (mine - pair.x).abs().max() > 0.04
    agree(pair, mine, other, 0)


@pytest.mark.parametrize("norm", MIDDLE)
def test_pgd_fools_the_same_images(pair: Pair, norm: str) -> None:
    """As many steps, of the same size, from random starts that differ."""
    threat = ThreatModel(MIDDLE[norm], norm)
    options = {"eps_step": 2.5 * threat.eps / STEPS, "max_iter": STEPS, "num_random_init": 1, "verbose": False}
    other = theirs(pair, "ProjectedGradientDescentPyTorch", threat, **options)
    agree(pair, ours(pair, "pgd", threat), other, 0.03)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        agree(pair, pgd(pair.victim, pair.x, pair.y, threat, steps=STEPS), other, 0.03)


@pytest.mark.parametrize("norm", MIDDLE)
@pytest.mark.parametrize(("name", "loss"), [("apgd-ce", "cross_entropy"), ("apgd-dlr", "difference_logits_ratio")])
def test_apgd_fools_the_same_images(pair: Pair, norm: str, name: str, loss: str) -> None:
    """On either loss, from random starts that differ."""
    threat = ThreatModel(MIDDLE[norm], norm)
    options = {"eps_step": 2 * threat.eps, "max_iter": STEPS, "nb_random_init": 1, "loss_type": loss, "verbose": False}
    agree(pair, ours(pair, name, threat), theirs(pair, "AutoProjectedGradientDescent", threat, **options), 0.04)


def test_square_fools_as_many_images(pair: Pair) -> None:
    """In linf, with as many queries, in a ball where so few fool half of the images. (In l2 the other library divides by
    zero where an image is black.)"""
    threat = ThreatModel(0.1)
    other = theirs(pair, "SquareAttack", threat, max_iter=QUERIES, verbose=False)
    agree(pair, ours(pair, "square", threat), other, 0.15)

"""Small networks whose channels can be removed, and problems of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import haq
import quantizers as Q
from haq.problem.channels import ChannelProblem

CLASSES = 4
SHAPE = (3, 8, 8)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """Two branches that are added, then a pool and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.side = conv(3, 8), nn.Sequential(conv(8, 16), conv(16, 16)), conv(8, 16, 1)
        self.head, self.classifier = conv(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.body(x) + self.side(x)
        return self.classifier(self.head(x).mean((2, 3)))


class Separable(nn.Module):
    """Depthwise and pointwise convolutions, and a linear layer after a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = conv(3, 8), conv(8, 16, 1)
        self.depth, self.project = conv(16, 16, groups=16, stride=2), conv(16, 8, 1)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.project(self.depth(self.expand(self.stem(x)))))


class Joined(nn.Module):
    """Outputs of several layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.mix = conv(3, 8), conv(8, 8), conv(8, 16, 1), conv(32, 8)
        self.pool, self.classifier = nn.MaxPool2d(2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.mix(torch.cat([x, self.left(x), self.right(x)], 1))
        return self.classifier(self.pool(x).mean((2, 3)))


class Grouped(nn.Module):
    """Convolutions in groups, and one that makes two channels of each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped, self.twice = conv(3, 16), conv(16, 16, groups=4), conv(16, 32, groups=16)
        self.mix, self.classifier = conv(32, 8, 1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.mix(self.twice(self.grouped(self.stem(x)))).mean((2, 3)))


NETWORKS = {"grouped": Grouped, "residual": Residual, "separable": Separable, "joined": Joined}


def network_of(name: str) -> nn.Module:
    """One of the networks, with weights and statistics as after some training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[name]()
        network.train()
        with torch.no_grad():
            for _ in range(3):
                network(torch.randn(16, *SHAPE))
            # Answers that differ from image to image, about as many of every class.
            last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
            last.weight.mul_(20)
            outputs = network.eval()(torch.randn(64, *SHAPE))
            last.bias.sub_(outputs.mean(0))
    return network.eval()


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def samples(count: int = 64) -> tuple[Tensor, Tensor]:
    return images(count, 1), torch.arange(count) % CLASSES


def problem_of(network: str | nn.Module = "residual", target: Any = "edge", **options: Any) -> ChannelProblem:
    """A problem of a network, of which channels are chosen."""
    if isinstance(network, str):
        network = network_of(network)
    options = {"budget": 0.5, "prune": "0.25:1", "objective": "agreement", "pinned": {}} | options
    made = haq.Problem(network, images(24), samples(), target, **options)
    assert isinstance(made, ChannelProblem)
    return made


def drawn(problem: ChannelProblem, seed: int) -> Q.BitPolicy:
    """A policy at random."""
    draws = np.random.default_rng(seed)
    numbers = [draws.integers(len(decision.counts)) for decision in problem.channel_decisions]
    pairs = [decision.pairs[draws.integers(len(decision.pairs))] for decision in problem.decisions]
    return problem.decide(pairs, problem.keep_of(numbers))

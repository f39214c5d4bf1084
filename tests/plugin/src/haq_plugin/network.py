"""A network for grey images of 8x8 pixels and four classes."""

from __future__ import annotations

import torch
from torch import nn

from haq.networks import Network


def build(classes: int | None = None, pretrained: bool = True) -> Network:
    """Build the network; its weights are always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential()
        module.add_module("stem", nn.Conv2d(1, 8, 3, 2, 1))
        module.add_module("relu", nn.ReLU())
        module.add_module("wide", nn.Conv2d(8, 16, 3, 2, 1))
        module.add_module("relu2", nn.ReLU())
        module.add_module("flatten", nn.Flatten())
        module.add_module("hidden", nn.Linear(64, 16))
        module.add_module("relu3", nn.ReLU())
        module.add_module("classifier", nn.Linear(16, classes or 4))
    return Network("plugin_net", module.eval(), (1, 8, 8), (0.5,), (0.25,))

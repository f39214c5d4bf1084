"""A data source: grey images of 8x8 pixels, and which quarter of each is brightest."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from haq.data import Dataset, Split

QUARTERS = ("top left", "top right", "bottom left", "bottom right")


def load() -> Dataset:
    """Make the three splits."""
    train, search, test = (split(count, seed) for seed, count in enumerate((96, 96, 96)))
    return Dataset("plugin_data", QUARTERS, train, search, test, "made up")


def split(count: int, seed: int) -> Split:
    """Make images with one brighter quarter each."""
    generator = torch.Generator().manual_seed(seed)
    quarters = torch.rand(count, 1, 2, 2, generator=generator)
    images = (255 * F.interpolate(quarters, scale_factor=4)).round().to(torch.uint8)
    return Split(images, quarters.flatten(1).argmax(1))

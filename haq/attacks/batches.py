"""Images in batches that fit memory: what a backward pass needs is many times as much as the images."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

IMAGES = 125
NUMBERS = 1 << 22


def batch_size(images: Tensor) -> int:
    """Return how many images (N, C, H, W) are looked at together."""
    return min(IMAGES, max(1, NUMBERS // images[0].numel()))


def batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through images and their labels."""
    size = batch_size(images)
    return zip(images.split(size), labels.split(size), strict=True)


def batches_where(mask: Tensor, images: Tensor) -> tuple[Tensor, ...]:
    """Return the indices of images for which a mask (N,) is true, in batches."""
    where = mask.nonzero()[:, 0]
    if not len(where):
        return ()
    return where.split(batch_size(images))


def share(mask: Tensor) -> float:
    """Return how much of a mask is true, 0..1."""
    return float(mask.double().mean())

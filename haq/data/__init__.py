"""Data sets by name, each cut into the three splits that a search needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lazy_loader

from hw_models.registry import Registry

if TYPE_CHECKING:
    from haq.data.dataset import SPLIT_SEED as SPLIT_SEED
    from haq.data.dataset import UNLABELLED as UNLABELLED
    from haq.data.dataset import Dataset as Dataset
    from haq.data.dataset import ImageFiles as ImageFiles
    from haq.data.dataset import Split as Split
    from haq.data.dataset import balanced as balanced
    from haq.data.dataset import without as without
    from haq.data.download import cache_folder as cache_folder
    from haq.data.fashion_mnist import fashion_mnist_12k_rows as fashion_mnist_12k_rows
    from haq.data.image_folder import IMAGE_ENDINGS as IMAGE_ENDINGS
    from haq.data.loading import fetch as fetch
    from haq.data.loading import has_any_size as has_any_size
    from haq.data.loading import load as load

DEFAULT = "fashion-mnist-12k"  # the data that commands take where none are named


def _lacking(thing: Any) -> str:
    if callable(thing):
        return ""
    return "a way to be called: it must be a function that returns a haq.data.Dataset"


# A source is called without arguments, or with `image_size` if it takes that, and returns a `Dataset`. It may have a method
# `fetch` that downloads what isn't there.
DATASETS: Registry[Any] = Registry(
    "data set",
    "haq.data",
    {
        DEFAULT: ("haq.data.fashion_mnist:embedded", "12,000 images of clothes, 28x28, shipped with haq"),
        "fashion-mnist": ("haq.data.fashion_mnist:FASHION_MNIST", "70,000 images of clothes, 28x28 (30 MB)"),
        "cifar10": ("haq.data.cifar10:CIFAR_10", "60,000 photographs of ten classes, 32x32 (170 MB)"),
    },
    check=_lacking,
    forms={
        "imagefolder:PATH": "photographs in PATH/train/CLASS/ and PATH/val/CLASS/",
        "images:PATH": "photographs without labels, in folders of any kind",
    },
)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["cifar10", "dataset", "download", "fashion_mnist", "image_folder", "loading"],
    submod_attrs={
        "dataset": ["SPLIT_SEED", "UNLABELLED", "Dataset", "ImageFiles", "Split", "balanced", "without"],
        "download": ["cache_folder"],
        "fashion_mnist": ["fashion_mnist_12k_rows"],
        "image_folder": ["IMAGE_ENDINGS"],
        "loading": ["fetch", "has_any_size", "load"],
    },
)
__all__ += ["DATASETS", "DEFAULT"]

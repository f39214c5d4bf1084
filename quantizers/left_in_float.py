"""What a quantized network computes in float: never without a word."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from quantizers.policy import QUANTIZABLE

# Modules that multiply by weights, whatever these are called.
MULTIPLYING = (_ConvNd, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
# Modules whose weights multiply nothing but the value of their own place, or are looked up.
POINTWISE = (nn.LayerNorm, nn.Embedding, nn.EmbeddingBag)
POINTWISE_WORDS = ("norm", "embed")  # in the names of other people's classes
# Attributes by which torch's transformers decide whether they compute everything in one fast
# operation, which reads the weights of their layers and calls none of them; and the value that
# stands for no.
FAST_PATHS: tuple[tuple[type[nn.Module], str, object], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
KEPT = "_before_quantize"  # what such attributes were


class LeftInFloat(UserWarning):
    """Says what a quantized network computes in float, though nobody asked for it."""


class Guard:
    """A forward pre-hook of a layer that isn't in the policy, since calibration never reached it: it has no bits.

    In evaluation it must not be called. In training it may be, as heads that only help training
    are: that is said once.
    """

    def __init__(self, name: str) -> None:
        """Take the layer's name."""
        self.name = name

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Raise ValueError, or warn in training, naming the layer."""
        if not module.training:
            raise ValueError(
                f"layer {self.name!r} is called, but the policy lacks it, since calibration never reached it: calibrate with "
                "inputs that reach it, and give it bits; (None, None) leaves it in float"
            )
        warnings.warn(f"layer {self.name!r} is trained in float: the policy lacks it", LeftInFloat, stacklevel=2)


def close_fast_paths(network: nn.Module) -> None:
    """Let torch's transformers call their layers one by one, in evaluation too."""
    for module in network.modules():
        for kind, name, closed in FAST_PATHS:
            if isinstance(module, kind) and hasattr(module, name):
                module.__dict__.setdefault(KEPT, {})[name] = getattr(module, name)
                setattr(module, name, closed)


def make_float(network: nn.Module) -> None:
    """Undo, in place, what `quantize` does to the modules that it doesn't quantize."""
    for module in network.modules():
        for name, value in module.__dict__.pop(KEPT, {}).items():
            setattr(module, name, value)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Guard):
                del module._forward_pre_hooks[key]


def read_by_attention(network: nn.Module) -> dict[nn.Module, str]:
    """Return the linear layers that nobody calls: torch's attention reads their weight, and computes in float. With its kind."""
    found: dict[nn.Module, str] = {}
    for module in network.modules():
        if isinstance(module, NonDynamicallyQuantizableLinear):
            found.setdefault(module, "what it belongs to")
        if isinstance(module, nn.MultiheadAttention):
            found[module.out_proj] = type(module).__name__
    return found


def warn_of_float(network: nn.Module, policy: Container[str], stacklevel: int) -> None:
    """Warn, once, of the modules of a quantized network that multiply by weights in float.

    Args:
        network: Quantized.
        policy: The layers that were asked for.
        stacklevel: Whose line the warning shows.
    """
    found = [f"{name or 'the network'} ({type(module).__name__})" for name, module in _multiplying(network, policy)]
    if found:
        warnings.warn(
            f"left in float: {', '.join(found)}; quantized are Conv1d, Conv2d and Linear layers that are called",
            LeftInFloat,
            stacklevel=stacklevel + 1,
        )


def _multiplying(network: nn.Module, policy: Container[str]) -> Iterator[tuple[str, nn.Module]]:
    uncalled = read_by_attention(network)
    inside: set[nn.Module] = set()  # modules of a layer, such as what computes its weight
    for name, module in network.named_modules():
        if module in inside:
            continue
        if isinstance(module, QUANTIZABLE):
            inside.update(module.modules())
            if module in uncalled and name not in policy:
                yield name, module
        elif isinstance(module, MULTIPLYING) or _has_matrix(module):
            yield name, module


def _has_matrix(module: nn.Module) -> bool:
    """Say whether a module that is no norm or table has a weight of two dimensions or more, as layers have."""
    if isinstance(module, POINTWISE) or any(word in type(module).__name__.lower() for word in POINTWISE_WORDS):
        return False
    parameters = list(module.named_parameters(recurse=False))
    if parametrize.is_parametrized(module):
        parameters += module.get_submodule("parametrizations").named_parameters()
    return any("weight" in name and _is_matrix(parameter) for name, parameter in parameters)


def _is_matrix(tensor: Tensor) -> bool:
    if isinstance(tensor, UninitializedParameter):
        return True
    return tensor.is_floating_point() and sum(side > 1 for side in tensor.shape) > 1

"""What a quantized network computes in float: never without a word."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from quantizers.policy import QUANTIZABLE, Bits

# Modules that multiply by weights, whatever these are called.
MULTIPLYING = (_ConvNd, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
# Modules whose weights multiply nothing but the value of their own place, or are looked up.
POINTWISE = (nn.LayerNorm, nn.Embedding, nn.EmbeddingBag)
POINTWISE_WORDS = ("norm", "embed")  # in the names of other people's classes
# Functions of torch that multiply by weights: parts of their names.
PRODUCTS = ("linear", "conv", "mm", "matmul", "mv", "dot", "einsum", "inner", "outer", "multi_head", "rnn", "lstm", "gru")
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


def read_by_others(network: nn.Module, reads: Mapping[str, str]) -> dict[nn.Module, str]:
    """Return modules whose weight somebody reads, with who does it: of torch's attention, and of what a pass has shown.

    Linear layers of torch's attention are never called; others may be called besides.

    Args:
        network: The network.
        reads: As in `warn_of_float`.

    Returns:
        By module, who reads its weight, in words.
    """
    found: dict[nn.Module, str] = {}
    for module in network.modules():
        if isinstance(module, NonDynamicallyQuantizableLinear):
            found.setdefault(module, "what it is a part of")
        if isinstance(module, nn.MultiheadAttention):
            found[module.out_proj] = type(module).__name__
    for name, function in reads.items():
        owner, _, key = name.rpartition(".")
        if "weight" in key:
            found.setdefault(network.get_submodule(owner), f"a function ({function})")
    return found


class Reads(TorchFunctionMode):
    """Within a `with`, finds parameters that products read though no quantizable layer is called for them.

    Such as F.linear(x, layer.weight), or x @ parameter.

    Attributes:
        found: The function that reads a parameter, by the parameter's name.
    """

    def __init__(self, network: nn.Module) -> None:
        """Take the network, which is to be called within the `with`."""
        super().__init__()
        self.found: dict[str, str] = {}
        self._network = network
        self._names: dict[int, str] = {}
        self._inside: list[set[int]] = []  # of the layers that are being called: what belongs to them
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Reads:
        """Begin to watch."""
        self._names = {_storage(parameter): name for name, parameter in self._network.named_parameters()}
        for module in self._network.modules():
            if isinstance(module, QUANTIZABLE):
                # Before other hooks, which may compute its weight.
                self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        """End."""
        super().__exit__(*reason)
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        named = module.named_parameters()
        self._inside.append({_storage(parameter) for name, parameter in named if "weight" in name or "bias" in name})

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, and note which parameters are multiplied outside of the layers that are followed."""
        function = func.__name__.strip("_")
        if any(word in function for word in PRODUCTS):
            own: set[int] = set()
            if self._inside:
                own = self._inside[-1]
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and (place := _storage(tensor)) in self._names and place not in own:
                    self.found[self._names[place]] = function
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    try:
        identity: int = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError, ValueError):  # a sparse tensor, or one without a shape yet
        return id(tensor)
    return identity


def warn_of_float(network: nn.Module, policy: Mapping[str, Bits], reads: Mapping[str, str], stacklevel: int) -> None:
    """Warn, once, of what a quantized network computes in float, though nobody asked for it.

    Args:
        network: Quantized.
        policy: The layers that were asked for.
        reads: The functions that read parameters past their layers, by the parameter's name (`Reads`).
        stacklevel: Whose line the warning shows.
    """
    modules = dict(_multiplying(network, policy))
    found = [f"{name or 'the network'} ({type(module).__name__})" for name, module in modules.items()]
    asked = [name for name, bits in policy.items() if bits == (None, None)]
    known = tuple(f"{name}." for name in (*modules, *asked))
    weights = {name.rpartition(".")[0] for name in reads if not name.endswith("bias")}
    for name, function in reads.items():
        told_by_weight = name.endswith("bias") and name.rpartition(".")[0] in weights
        if not name.startswith(known) and not told_by_weight:
            found.append(f"{name} (read by {function})")
    if found:
        warnings.warn(
            f"left in float: {', '.join(found)}; quantized are Conv1d, Conv2d and Linear layers where they are called",
            LeftInFloat,
            stacklevel=stacklevel + 1,
        )


def _multiplying(network: nn.Module, policy: Container[str]) -> Iterator[tuple[str, nn.Module]]:
    uncalled = read_by_others(network, {})
    inside: set[nn.Module] = set()  # modules of a layer, such as what computes its weight
    for name, module in network.named_modules():
        if isinstance(module, QUANTIZABLE):
            if module in uncalled and name not in policy:
                yield name, module
            inside.update(module.modules())
        elif module not in inside and (isinstance(module, MULTIPLYING) or _has_matrix(module)):
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

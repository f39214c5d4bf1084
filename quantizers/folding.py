"""Explicit steps before quantization: batch norms folded into the layer before, shifts of activations into that behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from quantizers.batches import Parts, copied, first_of, running
from quantizers.calling import Forward, device_of, leaves, to_device
from quantizers.copying import copy_network, make_plain
from quantizers.observers import Output, first_input
from quantizers.policy import QUANTIZABLE

# What makes activations unsigned: a little more than the least that they give.
SHIFTS: dict[type[nn.Module], float] = {nn.SiLU: 0.2785, nn.GELU: 0.1701, nn.Hardswish: 0.3751, nn.Mish: 0.3089}
SAME = 1e-5  # of the largest output: what float networks may differ by that compute the same


@torch.inference_mode(False)
@torch.no_grad()
def fold_batch_norm(network: nn.Module, *example: Any, forward: Forward | None = None) -> nn.Module:
    """Make a copy of a network, in evaluation mode, without the batch norms that directly follow a convolution or Linear.

        w' = w gamma / sqrt(var + eps)          b' = (b - mean) gamma / sqrt(var + eps) + beta

    What follows what is seen in one forward pass on the first sample of `example`; a layer or norm that is called twice
    is left alone. A folded norm becomes an Identity; one of somebody else's class (with an
    activation inside, say) stays, and does nothing but its other work. Where a folded layer's
    weight was computed from others (weight_norm, prune, parametrizations), it is a parameter now.

    Args:
        network: The network; it is left alone.
        *example: Its inputs, of any structure (`quantizers.calling`).
        forward: `forward(network, *example)` runs the network; None: it is called with the example.

    Returns:
        The copy.

    Raises:
        ValueError: If the copy doesn't compute the same on `example`, which happens if a layer's
            output is used elsewhere than in its norm.
    """
    made = copy_network(network).eval()
    run = running(forward)
    example = to_device(example, device_of(made))
    return fold_norms(made, example, run)


def fold_norms(made: nn.Module, example: Any, run: Forward) -> nn.Module:
    """Fold batch norms as `fold_batch_norm` does, in place.

    Args:
        made: The network, in evaluation mode; it is of no use where this raises.
        example: What `run` takes.
        run: Runs the network on it.

    Returns:
        The network.

    Raises:
        ValueError: If it doesn't compute the same on `example` afterwards.
    """
    before = outputs_of(made, example, run)
    pairs = _pairs(made, first_of(made, example, run), run)
    for layer, norm in pairs:
        _fold(layer, norm)
    folded = {norm for _, norm in pairs}
    for parent in list(made.modules()):
        for name, child in list(parent._modules.items()):
            if child in folded and type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
                setattr(parent, name, nn.Identity())
    after = outputs_of(made, example, run)
    for old, new in zip(before, after, strict=True):
        if not torch.allclose(old, new, rtol=1e-3, atol=1e-4 * float(old.abs().max().clamp_min(1))):
            worst = float((old - new).abs().max())
            raise ValueError(
                f"folding changes what the network computes (by up to {worst:.3g}): "
                "the output of one of its layers is used elsewhere than in its batch norm"
            )
    return made


def _pairs(network: nn.Module, example: Any, run: Forward) -> list[tuple[nn.Module, _BatchNorm]]:
    calls: dict[nn.Module, int] = {}
    outputs: list[tuple[Output, nn.Module]] = []
    pairs: list[tuple[nn.Module, _BatchNorm]] = []

    def before(module: _BatchNorm, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = first_input(module, inputs, named)
        pairs.extend((layer, module) for made, layer in outputs if made.is_unchanged(given))

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        # A Linear's outputs are its last dimension, a norm's channels the second.
        if not isinstance(module, _BatchNorm) and not (isinstance(module, nn.Linear) and output.dim() != 2):
            outputs.append((Output(output), module))

    handles = []
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if isinstance(module, (*QUANTIZABLE, _BatchNorm)):
            handles.append(module.register_forward_hook(after))
    try:
        run(network, copied(example))
    finally:
        for handle in handles:
            handle.remove()
    once = [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1 and pair[1].running_mean is not None]
    return [pair for pair in once if sum(pair[0] is other[0] for other in pairs) == 1]


def _fold(layer: nn.Module, norm: _BatchNorm) -> None:
    make_plain(layer)
    make_plain(norm)
    fuse: Any = fuse_conv_bn_weights
    if isinstance(layer, nn.Linear):
        fuse = fuse_linear_bn_weights
    mean, var = norm.running_mean, norm.running_var
    learns_bias = _learns_bias(layer)
    layer.weight, layer.bias = fuse(layer.weight, layer.bias, mean, var, norm.eps, norm.weight, norm.bias)
    layer.bias.requires_grad_(learns_bias)
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    mean.zero_()
    var.fill_(1)
    norm.eps = 0
    for parameter, value in ((norm.weight, 1.0), (norm.bias, 0.0)):
        if parameter is not None:
            parameter.fill_(value)


def _learns_bias(layer: nn.Module) -> bool:
    """Say whether a layer's folded bias requires gradients: as the bias before did, and a new one as the weights do."""
    bias = layer.bias
    if bias is None:
        bias = layer.weight
    assert isinstance(bias, Tensor)
    return bias.requires_grad


def outputs_of(network: nn.Module, example: Any, run: Forward) -> list[Tensor]:
    """Run a network on an example, part by part where its activations take much memory (`batches.Parts`).

    Args:
        network: The network.
        example: What `run` takes.
        run: Runs the network on it.

    Returns:
        All tensors of its outputs.
    """
    return [tensor for part in Parts(network, run).of(example) for tensor in leaves(run(network, copied(part)))]


def called_with(network: nn.Module, example: Any, run: Forward) -> list[Tensor]:
    """Run a network on an example of the user's, as `outputs_of` does.

    Args:
        network: The network.
        example: What `run` takes.
        run: Runs the network on it.

    Returns:
        All tensors of its outputs.

    Raises:
        ValueError: Saying why, if the network can't take it.
    """
    if not leaves(example):
        raise ValueError("an example is needed: give the network's inputs, of at least one image")
    try:
        return outputs_of(network, example, run)
    except ValueError:
        raise
    except Exception as error:  # whatever a network raises for inputs that aren't its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"the network can't be called with the example ({reason}): give the inputs that it takes") from error


class Shifted(nn.Module):
    """An activation plus a constant that makes it unsigned, with the padding of the layers that read it.

    Attributes:
        activation: The activation.
        shift: The constant.
        padding: What is put around the result, of that constant, as `torch.nn.functional.pad` takes it.
    """

    def __init__(self, activation: nn.Module, shift: float, padding: tuple[int, ...]) -> None:
        """Take an activation and what is done to its result."""
        super().__init__()
        self.activation, self.shift, self.padding = activation, shift, padding

    def forward(self, x: Tensor) -> Tensor:
        """Compute the activation, and shift and pad it."""
        made: Tensor = self.activation(x) + self.shift
        if any(self.padding):
            made = F.pad(made, self.padding, value=self.shift)
        return made

    def extra_repr(self) -> str:
        """Return the shift and the padding."""
        return f"shift={self.shift:g}, padding={self.padding}"


@torch.inference_mode(False)
@torch.no_grad()
def fold_shifts(network: nn.Module, *example: Any, forward: Forward | None = None) -> nn.Module:
    """Make a copy of a network, in evaluation mode, in which activations that are a little negative are unsigned.

        y = f(x) + c          b' = b - sum_k W_k c

    with c = -min f for SiLU, GELU, Hardswish, Mish and ELU, and padding of c in place of zeros.
    Quantized symmetrically such an activation wastes half of its levels on a few negative values:
    "shift negative correction" of Habi et al., "HPTQ: Hardware-Friendly Post Training Quantization"
    (arXiv 2109.09113). Where hardware has zero points, `Linear(asymmetric=True)` does as
    well, and keeps real 0 exact.

    What reads an activation is seen in one forward pass on the first sample of `example`. It is left alone unless all
    that reads it are convolutions and linear layers that are called once, with the same padding, and
    unless the network computes the same on `example` with the shift: where it is added up or
    multiplied besides, it doesn't.

    Args:
        network: The network; it is left alone.
        *example: Its inputs, of any structure (`quantizers.calling`).
        forward: `forward(network, *example)` runs the network; None: it is called with the example.

    Returns:
        The copy. A shifted activation is a `Shifted`; its layers pad no more, and have a bias.

    Raises:
        ValueError: For an example that the network can't be called with, or whose outputs aren't finite.
    """
    made = copy_network(network).eval()
    run = running(forward)
    example = to_device(example, device_of(made))
    before = called_with(made, example, run)
    if not all(bool(tensor.isfinite().all()) for tensor in before):
        raise ValueError("the network's outputs on the example aren't finite, so that they can't be compared")
    for activation, layers in _readers(made, first_of(made, example, run), run):
        shift, padding = _shift_of(activation), _common_padding(layers)
        if shift is None or padding is None:
            continue
        kept = [(layer, layer.bias, getattr(layer, "padding", None)) for layer in layers]
        shifted = Shifted(activation, shift, padding)
        _replace(made, activation, shifted)
        for layer in layers:
            _take_off(layer, shift)
        after = _tried(made, example, run)
        if after is not None and _are_same(before, after):
            before = after
            continue
        _replace(made, shifted, activation)
        for layer, bias, own in kept:
            layer.bias = bias
            if own is not None:
                layer.padding = own
    return made


def _readers(network: nn.Module, example: Any, run: Forward) -> Iterator[tuple[nn.Module, list[Any]]]:
    """Return the activations that are called once, each with the layers that read it and are called once."""
    calls: dict[nn.Module, int] = {}
    outputs: list[tuple[Output, nn.Module]] = []
    readers: dict[nn.Module, list[Any]] = {}

    def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls[module] = calls.get(module, 0) + 1
        given = first_input(module, inputs, named)
        for made, activation in outputs:
            if made.is_unchanged(given):
                readers.setdefault(activation, []).append(module)

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(output, Tensor):
            outputs.append((Output(output), module))

    handles = []
    for module in network.modules():
        if isinstance(module, QUANTIZABLE):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        elif _shift_of(module) is not None:
            handles.append(module.register_forward_hook(after))
    try:
        run(network, copied(example))
    finally:
        for handle in handles:
            handle.remove()
    for activation, layers in readers.items():
        if all(calls[module] == 1 for module in (activation, *layers)):
            yield activation, layers


def _shift_of(module: nn.Module) -> float | None:
    """Return what makes an activation unsigned; None if it is another, or one that is below any bound."""
    if type(module) is nn.ELU:
        return float(module.alpha)
    return SHIFTS.get(type(module))


def _common_padding(layers: list[Any]) -> tuple[int, ...] | None:
    """Return the zeros that all of some layers put around their input, as `pad` takes them; None if they differ."""
    found = {_zeros_around(layer) for layer in layers}
    if len(found) == 1:
        return found.pop()
    return None


def _zeros_around(layer: Any) -> tuple[int, ...] | None:
    """Return the zeros that a layer puts around its input; None for a class that may do so in a way of its own."""
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros" or layer.padding in ("valid", 0):
        return ()
    sides: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [layer.padding[axis]] * 2
    if not any(sides):
        return ()
    if type(layer) not in QUANTIZABLE:
        return None
    return tuple(sides)


def _take_off(layer: Any, shift: float) -> None:
    """Take a constant that all inputs of a layer have too much off its bias; zeros around them are put elsewhere."""
    make_plain(layer)
    sums = layer.weight.double().flatten(1).sum(1) * shift
    bias = -sums
    if layer.bias is not None:
        bias = layer.bias.double() - sums
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), _learns_bias(layer))
    if _zeros_around(layer):
        layer.padding = (0,) * len(layer.kernel_size)


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if child is old and parent is not new:
                parent._modules[name] = new


def _tried(network: nn.Module, example: Any, run: Forward) -> list[Tensor] | None:
    """Return what a network computes; None where an activation that is padded now has the wrong size for somebody else."""
    try:
        return outputs_of(network, example, run)
    except (RuntimeError, ValueError):
        return None


def _are_same(before: list[Tensor], after: list[Tensor]) -> bool:
    if [x.shape for x in before] != [x.shape for x in after]:
        return False
    return all(torch.allclose(x, y, rtol=0, atol=SAME * float(x.abs().max())) for x, y in zip(before, after, strict=True))

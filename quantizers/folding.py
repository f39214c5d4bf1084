"""Batch norm folded into the convolution or linear layer before it, as an explicit step before quantization."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils._pytree import tree_map_only

from quantizers.copying import copy_network, make_plain
from quantizers.observers import Output, first_input
from quantizers.policy import QUANTIZABLE


@torch.inference_mode(False)
@torch.no_grad()
def fold_batch_norm(network: nn.Module, *example: Any) -> nn.Module:
    """Make a copy of a network, in evaluation mode, without the batch norms that directly follow a convolution or Linear.

        w' = w gamma / sqrt(var + eps)          b' = (b - mean) gamma / sqrt(var + eps) + beta

    What follows what is seen in one forward pass on `example`; a layer or norm that is called twice
    is left alone. A folded norm becomes an Identity; one of somebody else's class (with an
    activation inside, say) stays, and does nothing but its other work. Where a folded layer's
    weight was computed from others (weight_norm, prune, parametrizations), it is a parameter now.

    Args:
        network: The network; it is left alone.
        *example: Its inputs.

    Returns:
        The copy.

    Raises:
        ValueError: If the copy doesn't compute the same on `example`, which happens if a layer's
            output is used elsewhere than in its norm.
    """
    made = copy_network(network).eval()
    before = made(*copied_inputs(example))
    pairs = _pairs(made, example)
    for layer, norm in pairs:
        _fold(layer, norm)
    folded = {norm for _, norm in pairs}
    for parent in list(made.modules()):
        for name, child in list(parent._modules.items()):
            if child in folded and type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
                setattr(parent, name, nn.Identity())
    after = made(*copied_inputs(example))
    for old, new in zip(output_tensors(before), output_tensors(after), strict=True):
        if not torch.allclose(old, new, rtol=1e-3, atol=1e-4 * float(old.abs().max().clamp_min(1))):
            worst = float((old - new).abs().max())
            raise ValueError(
                f"folding changes what the network computes (by up to {worst:.3g}): "
                "the output of one of its layers is used elsewhere than in its batch norm"
            )
    return made


def _pairs(network: nn.Module, example: tuple[Any, ...]) -> list[tuple[nn.Module, _BatchNorm]]:
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
        network(*copied_inputs(example))
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
    layer.weight, layer.bias = fuse(layer.weight, layer.bias, mean, var, norm.eps, norm.weight, norm.bias)
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    mean.zero_()
    var.fill_(1)
    norm.eps = 0
    for parameter, value in ((norm.weight, 1.0), (norm.bias, 0.0)):
        if parameter is not None:
            parameter.fill_(value)


def copied_inputs(example: Any) -> Any:
    """Copy inputs for one pass: a network may normalise them in place."""
    return tree_map_only(Tensor, torch.clone, example)


def output_tensors(output: Any) -> list[Tensor]:
    """Return the tensors of whatever a network returns."""
    if isinstance(output, Tensor):
        return [output]
    parts: list[Any] = []
    if isinstance(output, dict):
        parts = list(output.values())
    elif isinstance(output, list | tuple):
        parts = list(output)
    elif is_dataclass(output):
        parts = list(vars(output).values())
    return [tensor for part in parts for tensor in output_tensors(part)]

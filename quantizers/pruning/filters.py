"""Pruning whole filters of binary networks: masks that are learned, and filters that are taken out for good.

Magnitudes can't tell which binary filters matter, since all of their weights are as large: a mask
per filter is trained instead (main/subsidiary networks: Xu et al., CVPR 2019, arXiv 1812.04210).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from quantizers.binary_training import RPReLU, RSign
from quantizers.copying import copy_network
from quantizers.functional import along_channels
from quantizers.layers import QuantConv1d, QuantConv2d, QuantLayer, QuantLinear
from quantizers.network import quant_layers
from quantizers.scheme import SchemeLayer, tensor_of
from quantizers.schemes.binary import Binary, binarize

MASK = "filter_mask"  # the tensor of a layer
MASK_START = 1e-4  # masks start within this of their threshold


@dataclass(frozen=True)
class MainSubsidiary(Binary, name="main-subsidiary"):
    """Binary weights whose filters can be switched off (Xu et al., CVPR 2019, arXiv 1812.04210).

    A learned value m_f per output channel (`filter_mask`, a parameter of the layer) keeps the
    filter where O_f = sign(m_f) is +1, and makes it zero where O_f is -1: w_f (1 + O_f) / 2. O's
    gradient is that of the clipped sign. At first all filters are kept. The channel of a filter
    that is off is exactly the constant that the norm behind makes of zero, which is not zero:
    `remove_filters` takes it along.

    A layer's tensors: those of `Binary`, and filter_mask (C_out,), learned. Weights have one bit,
    or are float; activations may have any width.
    """

    summary: ClassVar[str] = "binary weights whose filters learned masks switch off, to be removed (Xu et al. 2019)"
    learned: ClassVar[tuple[str, ...]] = (MASK,)
    of_weight: ClassVar[tuple[str, ...]] = (MASK,)

    def check(self, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> None:
        """Refuse weights of more than one bit: masks are for signs."""
        super().check(weight_bits, activation_bits, signed)
        if weight_bits not in (1, None):
            raise ValueError(f"scheme {self.name!r} has no weights of {weight_bits} bits: it takes 1, or None")

    def start(self, layer: SchemeLayer) -> dict[str, Tensor]:
        """Return `Binary`'s tensors, and masks that keep all filters."""
        return {**super().start(layer), MASK: torch.full((layer.weight.shape[0],), MASK_START)}

    def weight(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return the weight's signs, and zeros for filters that are off."""
        weight = super().weight(layer, bits)
        return weight * along_channels(_kept(layer), weight)


def _kept(layer: SchemeLayer) -> Tensor:
    """Return 1 per filter that is kept, 0 per filter that is off, with the gradient of training."""
    return (1 + binarize(tensor_of(layer, MASK))) / 2


def masked_layers(network: nn.Module) -> dict[str, QuantLayer]:
    """Return the one-bit layers of a network whose filters have masks, by name, in the order of its modules.

    Args:
        network: A quantized network.

    Returns:
        Layers by their dotted module names.
    """
    layers = quant_layers(network).items()
    return {name: m for name, m in layers if MASK in m.scheme.learned and m.weight_bits == 1}


def _prunable(network: nn.Module, names: Iterable[str] | None) -> dict[str, QuantLayer]:
    layers = masked_layers(network)
    last = list(quant_layers(network))[-1:]
    if names is None:
        names = [name for name in layers if name not in last]
    chosen = list(names)
    if unknown := [name for name in chosen if name not in layers]:
        raise ValueError(f"layer {unknown[0]!r} has no filter mask; those that have: {', '.join(layers) or 'none'}")
    if not chosen:
        raise ValueError("no layer but the last has a filter mask: only one-bit layers of scheme 'main-subsidiary' have")
    return {name: layers[name] for name in chosen}


def kept_share(network: nn.Module, names: Iterable[str] | None = None) -> Tensor:
    """Return the share of kept filters, to be added to a loss: its gradient pushes every mask down.

    (The paper's penalty counts O + 1. Its published code counts |O| unless told otherwise, which is
    the same number whatever the masks are.)

    Args:
        network: A network with masked layers.
        names: Of which layers; else of all masked ones but the network's last layer, whose filters
            are the classes.

    Returns:
        One number, with its gradient.

    Raises:
        ValueError: For a layer without a mask, or if there is none.
    """
    return torch.cat([_kept(layer) for layer in _prunable(network, names).values()]).mean()


def layerwise_pruning(
    network: nn.Module, names: Iterable[str] | None = None, generator: torch.Generator | None = None
) -> Generator[tuple[str, Literal["mask", "weights"], list[nn.Parameter]], None, None]:
    """Go through the layers in the order of training of Xu et al. (CVPR 2019): from the first to the last, twice each.

    Masks are frozen at the end, and other parameters as they were. Keep the norms in evaluation
    mode while a mask is trained: one that follows its batches undoes whatever size a filter has, so
    that its mask would learn next to nothing.

    Args:
        network: A network with masked layers.
        names: As `kept_share` has them.
        generator: Draws the masks' starts.

    Yields:
        (layer name, "mask", [its mask]), where nothing else requires a gradient and the mask starts
        anew, uniform in +-1e-4; then (layer name, "weights", all parameters but masks), where no
        mask does. Train these, then go on.

    Raises:
        ValueError: For a layer without a mask, or if there is none.
    """
    chosen = _prunable(network, names)
    masks = [layer.get_parameter(MASK) for layer in masked_layers(network).values()]
    trained = [p for p in network.parameters() if p.requires_grad and not any(p is mask for mask in masks)]
    try:
        for name, layer in chosen.items():
            for parameter in (*trained, *masks):
                parameter.requires_grad_(False)
            mask = layer.get_parameter(MASK)
            mask.requires_grad_(True)
            with torch.no_grad():
                mask.copy_(MASK_START * (2 * torch.rand(mask.shape, generator=generator) - 1))
            yield name, "mask", [mask]
            mask.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            yield name, "weights", trained
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for mask in masks:
            mask.requires_grad_(False)


# What may stand between a layer whose filters are removed and the next one: modules that treat all
# channels alike,
_ALIKE: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Hardswish, nn.SiLU, nn.GELU, nn.ELU, nn.Tanh, nn.Sigmoid),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d),
)
# with values per channel,
_PER_CHANNEL: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU, RSign, RPReLU)
# and those that leave a channel that is one constant at that constant (they pad with minus
# infinity).
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)


class WithConstants(nn.Module):
    """A layer some of whose input channels were constants, and are gone: what they added to its output is added here.

    The constants times their weights are gathered in the weight of one input channel of ones,
    `constant`. It is one number per output channel inside the image; near its edge it depends on
    how much of the kernel lies on padding.
    """

    constant: Tensor

    def __init__(self, layer: QuantLayer, constant: Tensor) -> None:
        """Take the layer without those channels, and the weight of the channel of ones."""
        super().__init__()
        self.layer = layer
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer, and add what the constants add."""
        out: Tensor = self.layer(x)
        if isinstance(self.layer, QuantConv1d | QuantConv2d):
            ones = torch.ones_like(x[:1, :1])
            return out + self.layer._conv_forward(ones, self.constant, None)
        return out + self.constant


@torch.no_grad()
def remove_filters(network: nn.Module, *, exact: bool = True) -> nn.Module:
    """Make a copy of a network without the filters whose masks are off, in evaluation mode the same function.

    For layers in a row of an nn.Sequential (nested ones too): a masked layer, whatever norms,
    activations and max-pooling follow, and the next layer. A filter that is off makes a channel of
    one constant: zero (or the layer's bias) taken through what follows, and through the next
    layer's sign. Times its weights it is added back (`WithConstants`, in the next layer's place).
    If all filters of a layer are off, one of them stays.

    With `exact` the outputs are the same bit for bit, as both layers then add up integers, in
    whatever order. (So where convolution is direct or by matrix product. Winograd's, with its
    fractions, rounds.)

    Layers behind it with `xnor` scales are always refused: their scale is a mean over the weights
    that would go.

    Args:
        network: A network with masked layers.
        exact: Whether only layers of bits (1, 1), scaling `none` and no bias are taken. Otherwise
            layers with float inputs or a bias are taken too, and the outputs are the same up to
            rounding.

    Returns:
        The smaller network.

    Raises:
        ValueError: Naming the layer, where filters can't be removed, or not exactly.
    """
    made = copy_network(network)
    sequences = _sequences(made)
    pruned = [name for name, layer in masked_layers(made).items() if not (_kept(layer) > 0).all()]
    for name in reversed(pruned):
        sequence = next((sequence for sequence in sequences if name in sequence), None)
        if sequence is None:
            raise ValueError(f"filters of layer {name!r} can't be removed: it doesn't stand in an nn.Sequential")
        _remove(made, name, sequence, exact)
    return made


def _sequences(network: nn.Module) -> list[dict[str, nn.Module]]:
    """Return the modules that nn.Sequential, and such inside them, call one after the other, by name."""

    def plain(module: nn.Module) -> bool:
        return type(module).forward is nn.Sequential.forward

    def leaves(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if not plain(module):
            yield name, module
            return
        for child, inner in module._modules.items():
            if inner is not None:
                yield from leaves(f"{name}.{child}".removeprefix("."), inner)

    # The outermost come first, and whoever looks a layer up takes the first sequence that has it.
    return [dict(leaves(name, module)) for name, module in network.named_modules() if plain(module)]


def _remove(network: nn.Module, name: str, sequence: dict[str, nn.Module], exact: bool) -> None:
    """Remove the filters of one layer, in place."""
    layer = sequence[name]
    between, next_name = _until_next(name, sequence)
    following = sequence[next_name]
    assert isinstance(layer, QuantLayer)
    assert isinstance(following, QuantLayer)
    for which, whose in ((name, layer), (next_name, following)):
        if _places(network, whose) > 1:
            raise ValueError(f"filters of layer {name!r} can't be removed: {which!r} stands in several places")
        if reason := _obstacle(whose, exact):
            raise ValueError(f"filters of layer {name!r} can't be removed: {reason} ({which!r})")
    if following.weight_bits == 1 and _scaling(following) not in (None, "none"):
        raise ValueError(f"filters of layer {name!r} can't be removed: {next_name!r} has scales of its whole weight")

    kept = _kept(layer) > 0
    if not kept.any():
        kept[0] = True
    channels, features = len(kept), following.weight.shape[1]
    constants = _constants(layer)
    _keep_filters(layer, kept)
    for module in between:
        if isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
            positions = features // channels
            kept = kept.repeat_interleave(positions)
            constants = constants.flatten(1).repeat_interleave(positions, 1)
        elif isinstance(module, _ALIKE + _PER_CHANNEL):
            constants = copy_network(module).eval()(constants)
            if isinstance(module, _PER_CHANNEL) and not _has_one_slope(module):
                if _places(network, module) > 1:
                    kind = type(module).__name__
                    raise ValueError(
                        f"filters of layer {name!r} can't be removed: the {kind} behind it stands in several places"
                    )
                _keep_channels(module, kept)
        elif not isinstance(module, _POOLS):
            raise ValueError(f"filters of layer {name!r} can't be removed: a {type(module).__name__} follows it")
    if len(kept) != features:
        raise ValueError(f"filters of layer {name!r} can't be removed: {next_name!r} doesn't take its {channels} channels")
    if following.activation_bits is not None:
        constants = following.scheme.activation(following, constants, following.activation_bits)
    constant = _contribution(following.quantized_weight()[:, ~kept], constants.flatten()[~kept])
    following.weight = nn.Parameter(following.weight[:, kept], following.weight.requires_grad)
    following.cache.clear()
    _set_counts(following, ("in_channels", "in_features"), int(kept.sum()))
    parent, _, child = next_name.rpartition(".")
    setattr(network.get_submodule(parent), child, WithConstants(following, constant))


def _places(network: nn.Module, module: nn.Module) -> int:
    """Count the names that a module has in a network."""
    return sum(child is module for parent in network.modules() for child in parent._modules.values())


def _until_next(name: str, sequence: dict[str, nn.Module]) -> tuple[list[nn.Module], str]:
    """Return the modules between a layer and the next quantized one, and that one's name."""
    names = list(sequence)
    between: list[nn.Module] = []
    for other in names[names.index(name) + 1 :]:
        if isinstance(sequence[other], QuantLayer):
            return between, other
        between.append(sequence[other])
    raise ValueError(f"filters of layer {name!r} can't be removed: no quantized layer follows it in its nn.Sequential")


def _constants(layer: QuantLayer) -> Tensor:
    """Return what the layer's filters give if they are off: a batch of one with one position."""
    constants = layer.weight.new_zeros(layer.weight.shape[0])
    if layer.bias is not None:
        constants = layer.get_parameter("bias").detach()
    return constants.view(1, -1, *[1] * (layer.weight.dim() - 2))


def _contribution(gone: Tensor, constants: Tensor) -> Tensor:
    """Return what constant input channels add to a layer's output, given the weights (C_out, gone, ...) that multiply them."""
    products = gone * constants.view(-1, *[1] * (gone.dim() - 2))
    return products.sum(1, keepdim=gone.dim() > 2)


def _has_one_slope(module: nn.Module) -> bool:
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def _scaling(layer: QuantLayer) -> str | None:
    """Return how a binary scheme scales one-bit weights; None for other schemes."""
    scaling: str | None = getattr(layer.scheme, "scaling", None)
    return scaling


def _obstacle(layer: QuantLayer, exact: bool) -> str | None:
    """Say why a layer can't lose channels, or not exactly."""
    if type(layer) not in (QuantConv1d, QuantConv2d, QuantLinear):
        return f"a {type(layer).__name__} has a forward of its own"
    if "weight" not in layer._parameters:
        return "the weight of a layer is computed from other tensors"
    if getattr(layer, "groups", 1) != 1:
        return "a layer has groups"
    if exact and not (_scaling(layer) == "none" and layer.weight_bits == layer.activation_bits == 1 and layer.bias is None):
        return "only layers of bits (1, 1), scaling 'none' and no bias add up integers; `exact=False` takes others"
    return None


def _keep_filters(layer: QuantLayer, kept: Tensor) -> None:
    """Keep some filters of a masked layer."""
    for key in ("weight", "bias", MASK):
        parameter = layer._parameters[key]
        if parameter is not None:
            layer._parameters[key] = nn.Parameter(parameter[kept], parameter.requires_grad)
    layer.weight_scale = layer.weight_scale[:, kept]
    layer.cache.clear()
    _set_counts(layer, ("out_channels", "out_features"), int(kept.sum()))


def _keep_channels(module: nn.Module, kept: Tensor) -> None:
    """Keep some channels of a module between two layers: entries of everything that it has one of per channel."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[key] = nn.Parameter(parameter[kept], parameter.requires_grad)
    for key, buffer in module._buffers.items():
        if buffer is not None and buffer.dim():
            module._buffers[key] = buffer[kept]
    _set_counts(module, ("num_features", "num_parameters"), int(kept.sum()))


def _set_counts(module: nn.Module, names: tuple[str, ...], count: int) -> None:
    for name in names:
        if hasattr(module, name):
            setattr(module, name, count)

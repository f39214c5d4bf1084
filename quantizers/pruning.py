"""Pruning whole filters of binary networks: masks that are learned, and filters that are taken out for good.

Magnitudes can't tell which binary filters matter, since all of their weights are as large: a mask per filter is trained
instead (main/subsidiary networks: Xu et al., CVPR 2019, arXiv 1812.04210).
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from quantizers.binary import Binary, RPReLU, RSign, binarize
from quantizers.layers import QuantConv1d, QuantConv2d, QuantLayer, QuantLinear, quant_layers
from quantizers.scheme import along_channels


@dataclass(frozen=True)
class MainSubsidiary(Binary, name="main-subsidiary"):
    """Binary weights whose filters can be switched off (Xu et al., CVPR 2019, arXiv 1812.04210).

    A learned value m_f per output channel (`filter_mask`, a parameter of the layer) keeps the filter where O_f = sign(m_f)
    is +1, and makes it zero where O_f is -1: w_f (1 + O_f) / 2. O's gradient is that of the clipped sign. At first all
    filters are kept. The channel of a filter that is off is exactly the constant that the norm behind makes of zero, which
    is not zero: `remove_filters` takes it along.
    """

    learned: ClassVar[tuple[str, ...]] = ("filter_mask",)
    of_weight: ClassVar[tuple[str, ...]] = ("filter_mask",)

    def start(self, layer: QuantLayer) -> dict[str, Tensor]:
        return {"filter_mask": torch.full((layer.weight.shape[0],), MASK_START)}

    def weight(self, layer: QuantLayer, bits: int) -> Tensor:
        return super().weight(layer, bits) * along_channels(_kept(layer), layer.weight)


MASK_START = 1e-4  # masks start within this of their threshold


def _kept(layer: QuantLayer) -> Tensor:
    """1 per filter that is kept, 0 per filter that is off, with the gradient of training."""
    return (1 + binarize(layer.get_parameter("filter_mask"))) / 2


def masked_layers(network: nn.Module) -> dict[str, QuantLayer]:
    """The one-bit layers of a network whose filters have masks, by name, in the order of its modules."""
    layers = quant_layers(network).items()
    return {name: m for name, m in layers if isinstance(m.scheme, MainSubsidiary) and m.weight_bits == 1}


def _prunable(network: nn.Module, names: Iterable[str] | None) -> dict[str, QuantLayer]:
    layers = masked_layers(network)
    last = list(quant_layers(network))[-1:]
    chosen = [name for name in layers if name not in last] if names is None else list(names)
    if unknown := [name for name in chosen if name not in layers]:
        raise ValueError(f"layer {unknown[0]!r} has no filter mask; those that have: {', '.join(layers) or 'none'}")
    if not chosen:
        raise ValueError("no layer but the last has a filter mask: only one-bit layers of scheme 'main-subsidiary' have")
    return {name: layers[name] for name in chosen}


def kept_share(network: nn.Module, names: Iterable[str] | None = None) -> Tensor:
    """The share of kept filters, to be added to a loss: its gradient pushes every mask down.

    (The paper's penalty counts O + 1. Its published code counts |O| unless told otherwise, which is the same number whatever
    the masks are.)

    names: of which layers; else of all masked ones but the network's last layer, whose filters are the classes.
    """
    return torch.cat([_kept(layer) for layer in _prunable(network, names).values()]).mean()


def layerwise_pruning(
    network: nn.Module, names: Iterable[str] | None = None, generator: torch.Generator | None = None
) -> Generator[tuple[str, Literal["mask", "weights"], list[nn.Parameter]], None, None]:
    """The order of training of Xu et al. (CVPR 2019): from the first layer to the last, twice each.

    Yields (layer name, "mask", [its mask]), where nothing else requires a gradient and the mask starts anew, uniform in
    +-1e-4; then (layer name, "weights", all parameters but masks), where no mask does. Train what is yielded, then go on.
    Masks are frozen at the end, and other parameters as they were. Keep the norms in evaluation mode while a mask is trained:
    one that follows its batches undoes whatever size a filter has, so that its mask would learn next to nothing.

    names: as `kept_share` has them.
    """
    chosen = _prunable(network, names)
    masks = [layer.get_parameter("filter_mask") for layer in masked_layers(network).values()]
    trained = [p for p in network.parameters() if p.requires_grad and not any(p is mask for mask in masks)]
    try:
        for name, layer in chosen.items():
            for parameter in (*trained, *masks):
                parameter.requires_grad_(False)
            mask = layer.get_parameter("filter_mask")
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


# What may stand between a layer whose filters are removed and the next one: modules that treat all channels alike,
_ALIKE: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Hardswish, nn.SiLU, nn.GELU, nn.ELU, nn.Tanh, nn.Sigmoid),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d),
)
# with values per channel,
_PER_CHANNEL: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU, RSign, RPReLU)
# and those that leave a channel that is one constant at that constant (they pad with minus infinity).
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)


class WithConstants(nn.Module):
    """A layer some of whose input channels were constants, and are gone: what they added to its output is added here.

    The constants times their weights are gathered in the weight of one input channel of ones, `constant`. It is one number
    per output channel inside the image; near its edge it depends on how much of the kernel lies on padding.
    """

    constant: Tensor

    def __init__(self, layer: QuantLayer, constant: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        if isinstance(self.layer, QuantConv1d | QuantConv2d):
            ones = torch.ones_like(x[:1, :1])
            return out + self.layer._conv_forward(ones, self.constant, None)
        return out + self.constant


@torch.no_grad()
def remove_filters(network: nn.Module, *, exact: bool = True) -> nn.Module:
    """A copy of a network without the filters whose masks are off, in evaluation mode the same function.

    For layers in a row of an nn.Sequential (nested ones too): a masked layer, whatever norms, activations and max-pooling
    follow, and the next layer. A filter that is off makes a channel of one constant: zero (or the layer's bias) taken
    through what follows, and through the next layer's sign. Times its weights it is added back (`WithConstants`, in the
    next layer's place). If all filters of a layer are off, one of them stays.

    exact
        the outputs are the same bit for bit, as both layers then add up integers, in whatever order: bits (1, 1), scaling
        `none` and no bias. (So where convolution is direct or by matrix product. Winograd's, with its fractions, rounds.)
        ValueError names the layer where this doesn't hold. Without `exact`, layers with float inputs or a bias are taken
        too, and the outputs are the same up to rounding.

    Layers behind it with `xnor` scales are always refused: their scale is a mean over the weights that would go.
    """
    made = copy.deepcopy(network)
    rows = _rows(made)
    pruned = [name for name, layer in masked_layers(made).items() if not (_kept(layer) > 0).all()]
    for name in reversed(pruned):
        row = next((row for row in rows if name in row), None)
        if row is None:
            raise ValueError(f"filters of layer {name!r} can't be removed: it doesn't stand in an nn.Sequential")
        _remove(made, name, row, exact)
    return made


def _rows(network: nn.Module) -> list[dict[str, nn.Module]]:
    """The modules that nn.Sequential, and such inside them, call one after the other."""

    def plain(module: nn.Module) -> bool:
        return type(module).forward is nn.Sequential.forward

    def leaves(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if not plain(module):
            yield name, module
            return
        for child, inner in module._modules.items():
            if inner is not None:
                yield from leaves(f"{name}.{child}" if name else child, inner)

    # The outermost come first, and whoever looks a layer up takes the first row that has it.
    return [dict(leaves(name, module)) for name, module in network.named_modules() if plain(module)]


def _remove(network: nn.Module, name: str, row: dict[str, nn.Module], exact: bool) -> None:
    layer, names = row[name], list(row)
    behind = names[names.index(name) + 1 :]
    position = next((i for i, other in enumerate(behind) if isinstance(row[other], QuantLayer)), None)
    if position is None:
        raise ValueError(f"filters of layer {name!r} can't be removed: no quantized layer follows it in its nn.Sequential")
    between, next_name = [row[other] for other in behind[:position]], behind[position]
    following = row[next_name]
    assert isinstance(layer, QuantLayer)
    assert isinstance(following, QuantLayer)
    for which, whose in ((name, layer), (next_name, following)):
        if reason := _obstacle(whose, exact):
            raise ValueError(f"filters of layer {name!r} can't be removed: {reason} ({which!r})")
    if isinstance(following.scheme, Binary) and following.weight_bits == 1 and following.scheme.scaling != "none":
        raise ValueError(f"filters of layer {name!r} can't be removed: {next_name!r} has scales of its whole weight")

    kept = _kept(layer) > 0
    if not kept.any():
        kept[0] = True
    channels, features = len(kept), following.weight.shape[1]
    # The constants, as a batch of one with one position.
    values = layer.weight.new_zeros(channels) if layer.bias is None else layer.get_parameter("bias").detach()
    values = values.view(1, -1, *[1] * (layer.weight.dim() - 2))
    _keep(layer, kept)
    for module in between:
        if isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
            positions = features // channels
            kept, values = kept.repeat_interleave(positions), values.flatten(1).repeat_interleave(positions, 1)
        elif isinstance(module, _ALIKE + _PER_CHANNEL):
            values = copy.deepcopy(module).eval()(values)
            if isinstance(module, _PER_CHANNEL) and not (isinstance(module, nn.PReLU) and module.num_parameters == 1):
                _keep(module, kept)
        elif not isinstance(module, _POOLS):
            raise ValueError(f"filters of layer {name!r} can't be removed: a {type(module).__name__} follows it")
    if len(kept) != features:
        raise ValueError(f"filters of layer {name!r} can't be removed: {next_name!r} doesn't take its {channels} channels")
    if following.activation_bits is not None:
        values = following.scheme.activation(following, values, following.activation_bits)
    gone = following.quantized_weight()[:, ~kept]
    constant = (gone * values.flatten()[~kept].view(-1, *[1] * (gone.dim() - 2))).sum(1, keepdim=gone.dim() > 2)
    following.weight = nn.Parameter(following.weight[:, kept], following.weight.requires_grad)
    following._bank.clear()  # weights kept of the old shape
    _set_counts(following, ("in_channels", "in_features"), int(kept.sum()))
    parent, _, child = next_name.rpartition(".")
    setattr(network.get_submodule(parent), child, WithConstants(following, constant))


def _obstacle(layer: QuantLayer, exact: bool) -> str | None:
    if type(layer) not in (QuantConv1d, QuantConv2d, QuantLinear):
        return f"a {type(layer).__name__} has a forward of its own"
    if getattr(layer, "groups", 1) != 1:
        return "a layer has groups"
    integers = isinstance(layer.scheme, Binary) and layer.scheme.scaling == "none"
    if exact and not (integers and layer.weight_bits == layer.activation_bits == 1 and layer.bias is None):
        return "only layers of bits (1, 1), scaling 'none' and no bias add up integers; `exact=False` takes others"
    return None


def _keep(module: nn.Module, kept: Tensor) -> None:
    """Keep some entries of everything that a module has one of per (output) channel."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[key] = nn.Parameter(parameter[kept], parameter.requires_grad)
    for key, buffer in module._buffers.items():
        if buffer is not None and buffer.dim():
            module._buffers[key] = buffer[kept]
    _set_counts(module, ("out_channels", "out_features", "num_features", "num_parameters"), int(kept.sum()))


def _set_counts(module: nn.Module, names: tuple[str, ...], count: int) -> None:
    for name in names:
        if hasattr(module, name):
            setattr(module, name, count)

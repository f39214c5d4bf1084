"""Binary networks: signs for weights and activations, what trains them, and the removal of whole binary filters.

A sign is +1 at zero (0 would make a third value of it). Its derivative is nought nearly everywhere, so training uses another
slope in its place, one of `ESTIMATORS`. All are written out as masks, never as the gradient of a clamp: that gradient at its
bounds differs between versions of torch, and clipped weights stay exactly at the bounds.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from quantizers.layers import QuantConv1d, QuantConv2d, QuantLayer, QuantLinear, quant_layers
from quantizers.scheme import Scheme, along_channels

if TYPE_CHECKING:
    from quantizers.calibrate import Observer

SWISH = 5.0


def _clipped(x: Tensor) -> Tensor:
    return (x.abs() <= 1).to(x.dtype)


def _approx_sign(x: Tensor) -> Tensor:
    return torch.where(x.abs() <= 1, 2 - 2 * x.abs(), 0.0)


def _swish_sign(x: Tensor) -> Tensor:
    # Beyond 60 the slope is nought in every type, and cosh would overflow.
    scaled = (SWISH * x).clamp(-60, 60)
    return SWISH * (2 - scaled * (scaled / 2).tanh()) / (1 + scaled.cosh())


# The slope that stands for the derivative of a sign. A sign jumps by 2, and so does the integral of each slope but the first.
ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.ones_like,
    "clipped": _clipped,
    "approx_sign": _approx_sign,
    "swish_sign": _swish_sign,
    "stochastic": _clipped,
}


class _Binarized(torch.autograd.Function):
    """alpha * sign(x), or +1 with probability clip((x + 1) / 2, 0, 1) if `random`; see `binarize` and `Binary`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, estimator: str, random: bool, alpha: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.estimator = estimator
        if random:
            # torch's own generator, as dropout's: `torch.manual_seed` repeats it, and checkpointing replays it.
            sign = torch.where(torch.rand_like(x) < (x + 1) / 2, 1.0, -1.0).to(x.dtype)
        else:
            sign = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
        return sign if alpha is None else sign * alpha

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, alpha = ctx.saved_tensors
        slope = ESTIMATORS[ctx.estimator](x)
        if alpha is not None:
            slope = slope * alpha + 1 / x[0].numel()
        return gradients[0] * slope, None, None, None


def binarize(x: Tensor, estimator: str = "clipped", *, random: bool = False) -> Tensor:
    """sign(x) in {-1, +1}, +1 at zero, with the slope s(x) of an estimator in place of the sign's derivative.

    identity
        s = 1 (Bengio et al. 2013, arXiv 1308.3432; "vanilla" in Alizadeh et al., ICLR 2019).
    clipped
        s = 1 where |x| <= 1, both bounds included (Hubara et al., NeurIPS 2016, section 1.3).
    approx_sign
        s = 2 - 2|x| where |x| <= 1 (Bi-Real Net, Liu et al., ECCV 2018, section 3.3).
    swish_sign
        s = b (2 - b x tanh(b x / 2)) / (1 + cosh(b x)), b = 5 (BNN+, Darabi et al. 2018, arXiv 1812.11800).
    stochastic
        the slope of `clipped`; with `random`, the value is +1 with probability clip((x + 1) / 2, 0, 1) and -1 otherwise
        (BinaryConnect, Courbariaux et al., NIPS 2015, section 2.2), drawn from torch's global generator.
    """
    _known("estimator", estimator, ESTIMATORS)
    result: Tensor = _Binarized.apply(x, estimator, random and estimator == "stochastic", None)
    return result


def _known(what: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(choices)}")


@dataclass(frozen=True)
class Binary(Scheme, name="binary"):
    """One-bit weights, and one-bit or float activations: both are signs. No data are needed.

    weight_estimator, activation_estimator
        names in `ESTIMATORS`, described at `binarize`.
    scaling
        `none`: weights are -1 and +1, so that sums of binary products are integers. `xnor`: times alpha = mean |w| of each
        output channel, where the squared error is smallest (XNOR-Net, Rastegari et al., ECCV 2016, equation 6). Its gradient
        is that of section 3.1, with the estimator's slope s in place of 1{|w| <= 1}: dL/dw = dL/dw^ (1 / n + alpha s(w)), n
        weights to a channel. (It leaves out how a weight moves its neighbours through alpha.) A channel of zeros stays zeros.
        XNOR-Net's scale K of the activations is not here: it is a float operation at every position.

    Bits are (1, 1); (1, None), which is BinaryConnect; or (None, None), a layer left in float. Padding stays zero.

    Only training draws `stochastic` weights: in training mode and with gradients enabled. Otherwise they are the sign, the
    likelier value (BinaryConnect, section 2.6, first method). The authors of the empirical study evaluate with the float
    weights instead: that would be a network of 32 bits under a policy of one.
    """

    weight_estimator: str = "clipped"
    activation_estimator: str = "clipped"
    scaling: str = "none"
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _known("estimator", self.weight_estimator, ESTIMATORS)
        _known("estimator", self.activation_estimator, ESTIMATORS)
        _known("scaling", self.scaling, ("none", "xnor"))

    def check(self, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> None:
        if (weight_bits, activation_bits) not in ((1, 1), (1, None), (None, None)):
            bits = (weight_bits, activation_bits)
            raise ValueError(
                f"scheme {self.name!r} has no meaning for bits {bits}: it takes (1, 1), (1, None) or (None, None)"
            )

    def start(self, layer: QuantLayer) -> dict[str, Tensor]:
        return {}

    def calibrate(self, layer: QuantLayer, observer: Observer | None) -> None:
        if not layer.weight.isfinite().all():
            raise ValueError(f"a weight of shape {tuple(layer.weight.shape)} holds values that are not finite")

    def weight(self, layer: QuantLayer, bits: int) -> Tensor:
        weight, alpha = layer.weight, None
        if self.scaling == "xnor":
            alpha = along_channels(weight.detach().flatten(1).abs().mean(1), weight)
        result: Tensor = _Binarized.apply(weight, self.weight_estimator, self._random(layer, self.weight_estimator), alpha)
        return result

    def activation(self, layer: QuantLayer, x: Tensor, bits: int) -> Tensor:
        estimator = self.activation_estimator
        return binarize(x, estimator, random=self._random(layer, estimator))

    @staticmethod
    def _random(layer: QuantLayer, estimator: str) -> bool:
        # A layer keeps the weight that it makes without gradients, for evaluation too: a drawn one must not be kept.
        return estimator == "stochastic" and layer.training and torch.is_grad_enabled()


class RSign(nn.Module):
    """sign(x - a_c), with a learned threshold per channel, at first 0 (ReActNet, Liu et al., ECCV 2020, section 4.2).

    The sign of a layer behind it that has binary activations changes nothing in the values, but multiplies the gradient by
    its own slope at -1 and +1: 1 with `identity` and `clipped`, and 0 with `approx_sign`.
    """

    def __init__(self, channels: int, estimator: str = "approx_sign") -> None:
        super().__init__()
        _known("estimator", estimator, ESTIMATORS)
        self.estimator = estimator
        self.threshold = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        random = self.training and torch.is_grad_enabled()
        return binarize(x - _to_channels(self.threshold, x), self.estimator, random=random)


class RPReLU(nn.Module):
    """x - g_c + z_c where x > g_c, and b_c (x - g_c) + z_c elsewhere; learned per channel, at first g = z = 0 and b = 1/4
    (ReActNet, Liu et al., ECCV 2020, section 4.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.shift_out = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        moved = x - _to_channels(self.shift_in, x)
        bent = torch.where(moved > 0, moved, _to_channels(self.slope, x) * moved)
        return bent + _to_channels(self.shift_out, x)


def _to_channels(values: Tensor, x: Tensor) -> Tensor:
    """One value per channel, shaped to broadcast against (N, C, ...)."""
    return values.view(-1, *[1] * (x.dim() - 2))


def split_parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The one-bit weights of a quantized network, and all its other parameters."""
    binary = {id(layer.weight) for layer in quant_layers(network).values() if layer.weight_bits == 1}
    parameters = list(network.parameters())
    return [p for p in parameters if id(p) in binary], [p for p in parameters if id(p) not in binary]


class WeightClipping:
    """What `clip_weights` returns. `share` is of the latest step, `mean_share` of all steps so far: the share of the one-bit
    weights that lay outside the bounds, and so were changed. Where it is nought, clipping did nothing."""

    def __init__(self, network: nn.Module, low: float, high: float) -> None:
        if not low < high:
            raise ValueError(f"weights can't be clipped to {low}..{high}: low must be below high")
        self.network, self.low, self.high = network, low, high
        self.weights = self.seen = 0
        self._latest = self._clipped = torch.zeros((), dtype=torch.long)

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        weights = split_parameters(self.network)[0]
        self.weights, latest = sum(w.numel() for w in weights), torch.zeros((), dtype=torch.long)
        for weight in weights:
            # Counted where the weight is: fetching a number from an accelerator at every step would make it wait.
            latest = latest.to(weight.device) + ((weight < self.low) | (weight > self.high)).sum()
            weight.clamp_(self.low, self.high)
        self._latest, self._clipped = latest, self._clipped.to(latest.device) + latest
        self.seen += self.weights

    @property
    def share(self) -> float:
        return int(self._latest) / max(1, self.weights)

    @property
    def mean_share(self) -> float:
        return int(self._clipped) / max(1, self.seen)


def clip_weights(network: nn.Module, low: float = -1.0, high: float = 1.0) -> WeightClipping:
    """Clip the float weights behind one-bit ones after every step (BinaryConnect, section 2.4), and count how many it was:

    clipping = clip_weights(network)
    handle = optimizer.register_step_post_hook(clipping)
    """
    return WeightClipping(network, low, high)


class Bop(torch.optim.Optimizer):
    """Flips binary weights where the gradients have long said so (Helwegen et al., NeurIPS 2019, algorithm 1):

        m <- (1 - gamma) m + gamma gradient;        w <- -w where |m| > tau and sign(m) = sign(w)

    `lr` is gamma, so that torch's schedulers decay it, and `threshold` is tau; the defaults are those of section 5.2. There
    are no float weights behind: those given become their signs here and now. Give everything else to a usual optimizer:

        binary, others = split_parameters(network)
        optimizers = Bop(binary), torch.optim.Adam(others, 1e-2)

    `flip_ratio` is the share of the weights that the latest step flipped. Weights are always -1 or +1, so layers must have an
    estimator that passes gradients there: `identity` or `clipped`.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float = 1e-4, threshold: float = 1e-8) -> None:
        if not 0 < lr <= 1:
            raise ValueError(f"lr (gamma) must be above 0 and at most 1, not {lr}")
        if threshold < 0:
            raise ValueError(f"the threshold must not be negative, as {threshold} is")
        super().__init__(weights, {"lr": lr, "threshold": threshold})
        self._flips, self._weights = torch.zeros((), dtype=torch.long), 0
        with torch.no_grad():
            parameters = [weight for group in self.param_groups for weight in group["params"]]
            for weight in parameters:
                if weight.dim() < 2:
                    raise ValueError(f"Bop takes weights only, not a parameter of shape {tuple(weight.shape)}")
            for weight in parameters:
                weight.copy_(binarize(weight))

    @property
    def flip_ratio(self) -> float:
        return int(self._flips) / max(1, self._weights)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._flips, self._weights = torch.zeros((), dtype=torch.long), 0
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, group["lr"])
                flips = momentum * weight > group["threshold"]
                weight.copy_(torch.where(flips, -weight, weight))
                self._flips = self._flips.to(weight.device) + flips.sum()
                self._weights += weight.numel()
        return loss


@dataclass(frozen=True)
class Stage:
    """What one stage of training sets. `enter` sets it; the rest of the loop is anyone's."""

    epochs: int
    lr: float  # of the first epoch,
    last_lr: float  # and of the last; exponential in between
    weight_estimator: str
    clip: bool  # weights, after every step
    norm_momentum: float  # torch's: the weight of the new batch, 1 - Keras's

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch of this stage, counted from 0."""
        return float(self.lr * (self.last_lr / self.lr) ** (epoch / max(1, self.epochs - 1)))

    def enter(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> WeightClipping | None:
        """Set the estimator of all `Binary` layers, the norms' momentum and the optimizer's learning rate, and start clipping
        if the stage has it: the hook is returned for its counts."""
        for layer in quant_layers(network).values():
            if isinstance(layer.scheme, Binary):
                layer.scheme = dataclasses.replace(layer.scheme, weight_estimator=self.weight_estimator)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = self.norm_momentum
        for group in optimizer.param_groups:
            group["lr"] = self.lr
            # A scheduler made for this stage would go on from where that of the stage before began.
            group.pop("initial_lr", None)
        if not self.clip:
            return None
        clipping = clip_weights(network)
        optimizer.register_step_post_hook(clipping)
        return clipping


def two_stages(epochs: int, lr: float = 3e-3, norm_momentum: float = 0.1) -> tuple[Stage, Stage]:
    """The recipe of Alizadeh et al. (ICLR 2019): first the vanilla estimator and no clipping, at a high learning rate; then
    the clipped estimator and clipped weights, at a low one, with norms that average over fewer batches. For Adam: the study
    finds that SGD gets stuck.

    The directions are the paper's; how far, and that the second stage takes a third of the epochs and starts at a tenth of
    `lr`, is our choice. (The paper changes over when accuracy stops rising: a loop can do that too, and `enter` then.)

        for stage in two_stages(60):
            clipping = stage.enter(network, optimizer)
            for epoch in range(stage.epochs): ...
    """
    if epochs < 2:
        raise ValueError(f"two stages need at least 2 epochs, not {epochs}")
    second = max(1, epochs // 3)
    return (
        Stage(epochs - second, lr, lr / 10, "identity", clip=False, norm_momentum=norm_momentum),
        Stage(second, lr / 10, lr / 1000, "clipped", clip=True, norm_momentum=min(1.0, 3 * norm_momentum)),
    )


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
    Masks are frozen at the end, and other parameters as they were. Norms still follow their batches in training mode.

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

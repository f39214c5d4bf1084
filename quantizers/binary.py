"""Binary networks: signs for weights and activations, and what trains them.

A sign is +1 at zero (0 would make a third value of it). Its derivative is nought nearly everywhere, so training uses another
slope in its place, one of `ESTIMATORS`. All are written out as masks, never as the gradient of a clamp: that gradient at its
bounds differs between versions of torch, and clipped weights stay exactly at the bounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from quantizers.layers import QuantLayer, quant_layers
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

    `stochastic` wants weights that fill -1..1 from the start, and clipping: near 0 it is a coin toss. Only training draws
    `stochastic` weights: in training mode and with gradients enabled. Otherwise they are the sign, the
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

    def activation_step(self, layer: QuantLayer, bits: int) -> Tensor:
        return layer.weight.new_ones(())

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

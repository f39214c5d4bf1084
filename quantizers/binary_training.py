"""What trains binary networks beside the scheme: clipped weights, an optimizer that flips signs, stages, two activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.network import quant_layers
from quantizers.schemes.binary import ESTIMATORS, binarize, known_name


class RSign(nn.Module):
    """sign(x - a_c), with a learned threshold per channel, at first 0 (ReActNet, Liu et al., ECCV 2020, section 4.2).

    The sign of a layer behind it that has binary activations changes nothing in the values, but
    multiplies the gradient by its own slope at -1 and +1: 1 with `identity` and `clipped`, and 0
    with `approx_sign`.
    """

    def __init__(self, channels: int, estimator: str = "approx_sign") -> None:
        """Start with thresholds of 0 for so many channels. Raises ValueError for an unknown estimator."""
        super().__init__()
        known_name("estimator", estimator, ESTIMATORS)
        self.estimator = estimator
        self.threshold = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the signs of x (N, C, ...)."""
        random = self.training and torch.is_grad_enabled()
        return binarize(x - _to_channels(self.threshold, x), self.estimator, random=random)


class RPReLU(nn.Module):
    """A PReLU whose bend is moved: x - g_c + z_c where x > g_c, and b_c (x - g_c) + z_c elsewhere.

    All three are learned per channel, at first g = z = 0 and b = 1/4 (ReActNet, Liu et al., ECCV
    2020, section 4.2).
    """

    def __init__(self, channels: int) -> None:
        """Start as a PReLU for so many channels."""
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.shift_out = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the function of x (N, C, ...)."""
        moved = x - _to_channels(self.shift_in, x)
        sloped = torch.where(moved > 0, moved, _to_channels(self.slope, x) * moved)
        return sloped + _to_channels(self.shift_out, x)


def _to_channels(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value per channel to broadcast against (N, C, ...)."""
    return values.view(-1, *[1] * (x.dim() - 2))


def split_parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the one-bit weights of a quantized network, and all its other parameters.

    Args:
        network: A quantized network, at its present bits.

    Returns:
        Both lists, in the order of the network's parameters.
    """
    binary = {id(layer.weight) for layer in quant_layers(network).values() if layer.weight_bits == 1}
    weights, others = [], []
    for parameter in network.parameters():
        if id(parameter) in binary:
            weights.append(parameter)
        else:
            others.append(parameter)
    return weights, others


class WeightClipping:
    """A hook that clips one-bit weights after every step of an optimizer, and counts them; see `clip_weights`.

    `share` is of the latest step, `mean_share` of all steps so far: the share of the one-bit
    weights that lay outside the bounds, and so were changed. Where it is nought, clipping did
    nothing.
    """

    def __init__(self, network: nn.Module, low: float, high: float) -> None:
        """Take a quantized network and the bounds.

        Args:
            network: The quantized network.
            low: The smallest value of a weight.
            high: The largest.

        Raises:
            ValueError: Unless `low` is below `high`.
        """
        if not low < high:
            raise ValueError(f"weights can't be clipped to {low}..{high}: low must be below high")
        self.network, self.low, self.high = network, low, high
        self.weights = 0  # how many were looked at in the latest step,
        self.seen = 0  # and in all
        self._latest = torch.zeros((), dtype=torch.long)
        self._clipped = torch.zeros((), dtype=torch.long)

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        """Clip the weights that have one bit now: a step's post-hook."""
        weights = split_parameters(self.network)[0]
        self.weights = sum(w.numel() for w in weights)
        latest = torch.zeros((), dtype=torch.long)
        for weight in weights:
            # Counted where the weight is: fetching a number from an accelerator at every step would
            # make it wait.
            latest = latest.to(weight.device) + ((weight < self.low) | (weight > self.high)).sum()
            weight.clamp_(self.low, self.high)
        self._latest = latest
        self._clipped = self._clipped.to(latest.device) + latest
        self.seen += self.weights

    @property
    def share(self) -> float:
        """The share of the weights that the latest step clipped."""
        return int(self._latest) / max(1, self.weights)

    @property
    def mean_share(self) -> float:
        """The share of the weights that a step clipped, over all steps so far."""
        return int(self._clipped) / max(1, self.seen)


def clip_weights(network: nn.Module, low: float = -1.0, high: float = 1.0) -> WeightClipping:
    """Clip the float weights behind one-bit ones after every step (BinaryConnect, section 2.4), and count how many it was.

        clipping = clip_weights(network)
        handle = optimizer.register_step_post_hook(clipping)

    Args:
        network: A quantized network.
        low: The smallest value that weights may keep.
        high: The largest.

    Returns:
        The hook, with its counts.

    Raises:
        ValueError: Unless low is below high.
    """
    return WeightClipping(network, low, high)


class Bop(torch.optim.Optimizer):
    """Flips binary weights where the gradients have long said so (Helwegen et al., NeurIPS 2019, algorithm 1).

        m <- (1 - gamma) m + gamma gradient;        w <- -w where |m| > tau and sign(m) = sign(w)

    `lr` is gamma, so that torch's schedulers decay it, and `threshold` is tau; the defaults are
    those of section 5.2. There are no float weights behind: those given become their signs here and
    now. Give everything else to a usual optimizer:

        binary, others = split_parameters(network)
        optimizers = Bop(binary), torch.optim.Adam(others, 1e-2)

    `flip_ratio` is the share of the weights that the latest step flipped. Weights are always -1 or
    +1, so layers must have an estimator that passes gradients there: `identity` or `clipped`.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float = 1e-4, threshold: float = 1e-8) -> None:
        """Make the weights their signs.

        Args:
            weights: Weights of at least two dimensions.
            lr: gamma, above 0 and at most 1.
            threshold: tau, not negative.

        Raises:
            ValueError: For values out of range, and for parameters that are no weights.
        """
        if not 0 < lr <= 1:
            raise ValueError(f"lr (gamma) must be above 0 and at most 1, not {lr}")
        if threshold < 0:
            raise ValueError(f"the threshold must not be negative, as {threshold} is")
        super().__init__(weights, {"lr": lr, "threshold": threshold})
        self._flips = torch.zeros((), dtype=torch.long)
        self._weights = 0
        with torch.no_grad():
            parameters = [weight for group in self.param_groups for weight in group["params"]]
            for weight in parameters:
                if weight.dim() < 2:
                    raise ValueError(f"Bop takes weights only, not a parameter of shape {tuple(weight.shape)}")
            for weight in parameters:
                weight.copy_(binarize(weight))

    @property
    def flip_ratio(self) -> float:
        """The share of the weights that the latest step flipped."""
        return int(self._flips) / max(1, self._weights)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Flip weights; `closure`, as in other optimizers, computes the loss anew and is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._flips = torch.zeros((), dtype=torch.long)
        self._weights = 0
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
        """Return the learning rate of an epoch of this stage.

        Args:
            epoch: Counted from 0.

        Returns:
            The rate, which falls geometrically from `lr` to `last_lr`.
        """
        return float(self.lr * (self.last_lr / self.lr) ** (epoch / max(1, self.epochs - 1)))

    def enter(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> WeightClipping | None:
        """Set what the stage says: estimators of binary weights, the norms' momentum, the learning rate, and clipping.

        Args:
            network: The quantized network; layers of other schemes stay as they are.
            optimizer: Its optimizer.

        Returns:
            The clipping hook, for its counts, if the stage has it.
        """
        for layer in quant_layers(network).values():
            scheme: Any = layer.scheme
            if hasattr(scheme, "weight_estimator"):
                layer.scheme = dataclasses.replace(scheme, weight_estimator=self.weight_estimator)
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
    """Return the recipe of Alizadeh et al. (ICLR 2019), for Adam: the study finds that SGD gets stuck.

    First the vanilla estimator and no clipping, at a high learning rate; then the clipped estimator
    and clipped weights, at a low one, with norms that average over fewer batches.

    The directions are the paper's; how far, and that the second stage takes a third of the epochs
    and starts at a tenth of `lr`, is our choice. (The paper changes over when accuracy stops
    rising: a loop can do that too, and `enter` then.)

        for stage in two_stages(60):
            clipping = stage.enter(network, optimizer)
            for epoch in range(stage.epochs): ...

    Args:
        epochs: Of both stages together, at least 2.
        lr: The first learning rate.
        norm_momentum: torch's momentum of the norms in the first stage.

    Returns:
        The two stages.

    Raises:
        ValueError: For fewer than 2 epochs.
    """
    if epochs < 2:
        raise ValueError(f"two stages need at least 2 epochs, not {epochs}")
    second = max(1, epochs // 3)
    return (
        Stage(epochs - second, lr, lr / 10, "identity", clip=False, norm_momentum=norm_momentum),
        Stage(second, lr / 10, lr / 1000, "clipped", clip=True, norm_momentum=min(1.0, 3 * norm_momentum)),
    )

"""LSQ and LSQ+: the step of every grid is learned. Every gradient is written out, ties at the bounds included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantizers.functional import (
    FEW_BITS,
    MAX_BITS,
    WIDE_BITS,
    WIDTHS,
    along_channels,
    applied,
    computed_in,
    differentiated,
    inside,
    integer_range,
    positive,
    refuse_infinite,
    relative_error,
    rounded,
    row,
    row_of,
    scaled_gradient,
    with_value,
)
from quantizers.observers import BINS, Observer, widest_grid
from quantizers.scheme import (
    IntegerActivations,
    Scheme,
    SchemeLayer,
    check_activations,
    later_option,
    refuse_negative,
    tensor_of,
)


@dataclass(frozen=True)
class LSQ(Scheme, name="lsq"):
    """Esser et al., "Learned Step Size Quantization" (ICLR 2020): v^ = round(clip(v / s, -QN, QP)) s with a learned step s.

        signed (weights, and inputs that were negative)   QN = 2^(b-1), QP = 2^(b-1) - 1
        unsigned                                          QN = 0, QP = 2^b - 1
        dv^/ds = round(v/s) - v/s where -QN < v/s < QP;   -QN below, QP above     (equation 3)
        dv^/dv = 1 where -QN < v/s < QP, else 0                                   (equation 5)

    Exactly on a bound counts as beyond it: the value gets no gradient, and the step that bound. A
    step's is multiplied by 1 / sqrt(N QP), N being the number of weights that share it, or of an
    input's features (section 2.2). Steps start at 2 mean|v| / sqrt(QP), of the weights and of the
    calibration data (section 2.1), and are used as max(|s|, 1e-8) with the gradient of |s|, so that
    an update past zero does no harm. At 16 bits, where nothing need be clipped, they start at max|v| /
    QP.

    One signed bit has no meaning: its QP is 0. A layer's tensors, by width (`WIDTHS`): weight_scale
    (9, C_out) or (9, 1) and activation_scale (9,), both learned; weight_error (9,) and
    activation_error (9,), those of the start.

    Attributes:
        per_channel: One step per output channel for the weights; False: one per layer, as in the
            paper.
        power_of_two: Whether steps are used as the power of two that is nearest in the logarithm; the
            gradient passes to the learned step as if they weren't.
        activations: Which integers inputs are, `auto`, `signed` or `unsigned`, as in `Linear`.
    """

    per_channel: bool = True
    power_of_two: bool = later_option(False)
    activations: str = later_option("auto")
    summary: ClassVar[str] = "evenly spaced levels whose distance is learned, 2 bits or more (Esser et al. 2020)"
    learned: ClassVar[tuple[str, ...]] = ("weight_scale", "activation_scale")
    of_weight: ClassVar[tuple[str, ...]] = ("weight_scale",)
    has_integer_weights: ClassVar[bool] = True
    has_integer_activations: ClassVar[bool] = True
    narrow: ClassVar[bool] = False
    trains_step: ClassVar[bool] = True
    least_bits: ClassVar[int] = 2
    most_weight_bits: ClassVar[int] = WIDE_BITS
    most_activation_bits: ClassVar[int] = WIDE_BITS
    choices: ClassVar[Mapping[str, str]] = {
        "per_channel": "per_channel",
        "power_of_two": "power_of_two",
        "activations": "activations",
    }

    def __post_init__(self) -> None:
        """Raise ValueError for integers that there aren't."""
        check_activations(self.activations)

    def check(self, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> None:
        """Refuse one bit for weights, and for inputs that are signed; and negative inputs where integers are unsigned."""
        of_one_bit = f"of 1 bit, which would be the integers -1 and 0: use 2 to {MAX_BITS}, {WIDE_BITS} or float"
        if weight_bits == 1:
            raise ValueError(f"{self.name} has no weights {of_one_bit}")
        super().check(weight_bits, activation_bits)
        if activation_bits is None:
            return
        if signed and self.activations == "unsigned":
            refuse_negative(self, activation_bits)
        if activation_bits == 1 and (signed or self.activations == "signed"):
            raise ValueError(f"{self.name} has no signed inputs {of_one_bit}")

    def start(self, layer: SchemeLayer) -> dict[str, Tensor]:
        """Return steps and errors of 1."""
        sharing = 1
        if self.per_channel:
            sharing = layer.weight.shape[0]
        rows = len(WIDTHS)
        return {
            "weight_scale": torch.ones(rows, sharing),
            "activation_scale": torch.ones(rows),
            "weight_error": torch.ones(rows),
            "activation_error": torch.ones(rows),
        }

    def calibrate(self, layer: SchemeLayer, observer: Observer | None) -> None:
        """Let the steps start where the paper says, and measure the errors."""
        refuse_infinite(layer.weight)
        rows = layer.weight.detach().double().flatten(1)
        if not self.per_channel:
            rows = rows.reshape(1, -1)
        for bits in WIDTHS[1:]:
            if bits == WIDE_BITS:
                start = rows.abs().amax(1) / integer_range(bits, True)[1]
            else:
                start = self._start_of_weights(rows, bits)
            layer.weight_scale[row_of(bits)] = _step_or_one(start)
            layer.weight_error[row_of(bits)] = relative_error(layer.weight, self.weight(layer, bits))
        if observer is not None:
            self._start_activations(layer, observer)
            self.measure_activation_errors(layer, observer)

    def _start_of_weights(self, rows: Tensor, bits: int) -> Tensor:
        return 2 * rows.abs().mean(1) / math.sqrt(integer_range(bits, True)[1])

    def _start_activations(self, layer: SchemeLayer, observer: Observer) -> None:
        mean = observer.sample().double().abs().mean()
        signed = observer.signed or self.activations == "signed"
        for bits in FEW_BITS:
            if bits > 1 or not signed:
                high = integer_range(bits, signed)[1]
                layer.activation_scale[row_of(bits)] = _step_or_one(2 * mean / math.sqrt(high))
        layer.activation_scale[row_of(WIDE_BITS)] = widest_grid(observer, signed).scale

    def weight(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return the weight on its grid."""
        weight = layer.weight
        low, high = integer_range(bits, True, narrow=False)
        step = self.weight_step(layer, bits)
        step = scaled_gradient(step, _factor(weight.numel() // len(step), high))
        return learned_step(weight, along_channels(step, weight), low, high)

    def activation(self, layer: SchemeLayer, x: Tensor, bits: int) -> Tensor:
        """Return the input on its grid."""
        low, high = integer_range(bits, self.has_signed_inputs(layer, bits), narrow=False)
        step = scaled_gradient(self.activation_step(layer, bits), _factor(x.shape[1:].numel(), high))
        return learned_step(x, step, low, high, reuse=True)

    def activation_step(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return the input's step."""
        return self._used(row(layer.activation_scale, bits))

    def weight_step(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return the step of each output channel, or that of all."""
        return self._used(row(layer.weight_scale, bits))

    def _used(self, step: Tensor) -> Tensor:
        """Return a learned step as it is used."""
        step = positive(step)
        if self.power_of_two:
            step = with_value(step, 2 ** step.detach().log2().round())
        return step

    def has_signed_inputs(self, layer: SchemeLayer, bits: int) -> bool:
        """Say whether the integers of a layer's input are signed: where calibration saw a negative one, or always."""
        return layer.signed or self.activations == "signed"


@dataclass(frozen=True)
class LSQPlus(LSQ, name="lsqplus"):
    """LSQ whose inputs have a learned offset beta, for activations such as swish that are a little negative.

    Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better
    initialization" (CVPR Workshops 2020):

        x^ = round(clip((x - beta) / s, 0, 2^b - 1)) s + beta          (unsigned codes)
        dx^/ds as in LSQ of x - beta;  dx^/dbeta = 0 where 0 < (x - beta) / s < 2^b - 1, else 1

    The offset's gradient gets the factor of the step's. Both start where the squared error of the
    calibration data is smallest, the weights' step at max(|mu - 3 sigma|, |mu + 3 sigma|) /
    2^(b-1). Inputs of one bit have two levels, beta and beta + s; weights of one bit have no
    meaning, as in LSQ.

    Real 0 isn't on the grid of an input with an offset. A convolution pads its quantized input with
    true zeros.

    A layer's tensors: those of LSQ and activation_offset (9,), learned. At 16 bits the grid starts at
    the smallest value that was seen, and ends at the largest.

    Raises:
        ValueError: For `activations` other than `auto`, and for scales that are powers of two.
    """

    summary: ClassVar[str] = "lsq with a learned offset of the inputs, which can't be deployed (Bhalgat et al. 2020)"
    learned: ClassVar[tuple[str, ...]] = (*LSQ.learned, "activation_offset")
    has_integer_activations: ClassVar[bool] = False
    choices: ClassVar[Mapping[str, str]] = {"per_channel": "per_channel"}

    def __post_init__(self) -> None:
        """Raise ValueError for what inputs with an offset can't be."""
        if self.activations != "auto" or self.power_of_two:
            raise ValueError(f"scheme {self.name!r} has inputs with a learned offset: activations are 'auto', no power_of_two")

    def check(self, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> None:
        """Refuse one bit for weights; inputs are unsigned, with an offset."""
        super().check(weight_bits, activation_bits)

    def start(self, layer: SchemeLayer) -> dict[str, Tensor]:
        """Return LSQ's tensors, and offsets of 0."""
        return {**super().start(layer), "activation_offset": torch.zeros(len(WIDTHS))}

    def _start_of_weights(self, rows: Tensor, bits: int) -> Tensor:
        mean, spread = rows.mean(1), 3 * rows.std(1, correction=0)
        return torch.maximum((mean - spread).abs(), (mean + spread).abs()) / 2 ** (bits - 1)

    def _start_activations(self, layer: SchemeLayer, observer: Observer) -> None:
        steps, offsets = least_squares_grids(observer.sample())
        step = (observer.high - observer.low) / integer_range(WIDE_BITS, False)[1]
        layer.activation_scale.copy_(torch.cat([steps, _step_or_one(steps.new_tensor([step]))]))
        tensor_of(layer, "activation_offset").copy_(torch.cat([offsets, offsets.new_tensor([observer.low])]))

    def activation(self, layer: SchemeLayer, x: Tensor, bits: int) -> Tensor:
        """Return the input on its grid."""
        low, high = integer_range(bits, False)
        factor = _factor(x.shape[1:].numel(), high)
        step = scaled_gradient(self.activation_step(layer, bits), factor)
        offset = scaled_gradient(row(tensor_of(layer, "activation_offset"), bits), factor)
        return learned_step(x, step, low, high, offset)

    def integer_activations(self, layer: SchemeLayer) -> IntegerActivations:
        """Raise ValueError: integers times a scale have no offset."""
        raise ValueError(f"activations of scheme {self.name!r} have an offset")


def learned_step(x: Tensor, step: Tensor, low: int, high: int, offset: Tensor | None = None, *, reuse: bool = False) -> Tensor:
    """Compute round(clip((x - offset) / step, low, high)) step + offset, with the gradients of LSQ and LSQ+.

    Args:
        x: Real values.
        step: The distance of two levels, positive; must broadcast against x.
        low: The smallest integer.
        high: The largest.
        offset: The real value of integer 0; must broadcast against x. None: 0.
        reuse: As in `fake_quantize`; not with an offset.

    Returns:
        Real values on the grid, of x's shape and type.
    """
    if offset is None and not differentiated(x, step):
        return rounded(x, step, low, high, rescale=True, reuse=reuse)
    return applied(_LearnedStep, x, step, offset, low, high)


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, offset: Tensor | None, low: int, high: int) -> Tensor:
        ratio = x.to(computed_in(x))
        ctx.bounds = low, high
        ctx.step_shape, ctx.offset_shape = step.shape, None
        if offset is not None:
            ctx.offset_shape = offset.shape
            ratio = ratio - offset
        ratio = ratio / step
        codes = ratio.round().clamp_(low, high)
        made = codes * step
        if offset is not None:
            made.add_(offset)
        saved_codes = None
        if ctx.needs_input_grad[1]:
            saved_codes = codes
        ctx.save_for_backward(ratio, saved_codes)
        return made.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        ratio, codes = ctx.saved_tensors
        gradient = gradients[0].to(ratio.dtype)
        within = inside(gradient, ratio, *ctx.bounds, strict=True)
        to_x = to_step = to_offset = None
        if ctx.needs_input_grad[0]:
            to_x = within.to(gradients[0].dtype)
        if ctx.needs_input_grad[1]:
            # Within the bounds the code minus the ratio; beyond them the code, which is the bound.
            # In two sums, because each is small beside the codes.
            to_step = (codes - ratio).mul_(within).sum_to_size(ctx.step_shape)
            to_step = to_step + (gradient - within).mul_(codes).sum_to_size(ctx.step_shape)
        if ctx.needs_input_grad[2]:
            to_offset = (gradient - within).sum_to_size(ctx.offset_shape)
        return to_x, to_step, to_offset, None, None


def least_squares_grids(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Find unsigned grids step * (0..2^b - 1) + offset, for widths 1..8, with a small squared error on a sample.

    A first grid is the best of some that cut off both tails of the sample; then codes and grid take
    turns, the grid being the straight line through (code, value) with the smallest squared error.
    Neither turn can make the error larger.

    Returns:
        Steps (8,) and offsets (8,).
    """
    values, counts = _histogram(sample.detach().double())
    if len(values) < 2:
        return torch.ones(MAX_BITS), values.float().sum().expand(MAX_BITS)
    bottoms, tops = _ranges(values, counts)
    grids = [_Grids(values, counts, integer_range(bits, False)[1]).best(bottoms, tops) for bits in FEW_BITS]
    steps, offsets = zip(*grids, strict=True)
    return torch.stack(steps).float(), torch.stack(offsets).float()


def _ranges(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs of values, a lower and a higher one, outside of which are shares of the sample from 0 to 30 %."""
    share = (counts.cumsum(0) - counts / 2) / counts.sum()
    tails = share.new_tensor([0, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.2, 0.3])
    lowest = values[torch.searchsorted(share, tails).clamp(max=len(values) - 1)]
    highest = values[(torch.searchsorted(share, 1 - tails, right=True) - 1).clamp(min=0)]
    lowest[0], highest[0] = values[0], values[-1]
    bottoms, tops = lowest.repeat_interleave(len(tails)), highest.repeat(len(tails))
    sensible = tops > bottoms
    return bottoms[sensible], tops[sensible]


class _Grids:
    """Grids of integers 0..high for values that occur so many times each."""

    def __init__(self, values: Tensor, counts: Tensor, high: int) -> None:
        self.values, self.counts, self.high = values, counts, high

    def codes(self, step: Tensor, offset: Tensor) -> Tensor:
        return ((self.values - offset) / step).round_().clamp_(0, self.high)

    def error(self, step: Tensor, offset: Tensor, codes: Tensor) -> Tensor:
        return (self.counts * (codes * step + offset - self.values).square()).sum(-1)

    def best(self, bottoms: Tensor, tops: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step and the offset of the best grid that is found from these ranges."""
        step, offset = ((tops - bottoms) / self.high)[:, None], bottoms[:, None]
        index = self.error(step, offset, self.codes(step, offset)).argmin()
        step, offset = step[index, 0], offset[index, 0]
        best, error = (step, offset), torch.full_like(step, torch.inf)
        for _ in range(50):
            codes = self.codes(step, offset)
            left = self.error(step, offset, codes)
            mean_code, mean_value = self._mean(codes), self._mean(self.values)
            spread = (self.counts * (codes - mean_code).square()).sum()
            if not left < error * (1 - 1e-6) or spread == 0:
                break
            best, error = (step, offset), left
            step = (self.counts * (codes - mean_code) * (self.values - mean_value)).sum() / spread
            offset = mean_value - step * mean_code
        return best

    def _mean(self, x: Tensor) -> Tensor:
        return (self.counts * x).sum() / self.counts.sum()


def _histogram(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the number of the values in each bin that isn't empty, in order."""
    low, high = values.min(), values.max()
    if low == high:
        return low.view(1), values.new_tensor([float(values.numel())])
    index = ((values - low) / (high - low) * (BINS - 1)).long()
    counts, sums = torch.bincount(index), torch.bincount(index, weights=values)
    return (sums / counts)[counts > 0], counts[counts > 0].double()


def _factor(values: int, high: int) -> float:
    """Return LSQ's factor of a step's gradient, 1 / sqrt(N QP)."""
    return 1 / math.sqrt(max(1, values) * high)


def _step_or_one(step: Tensor) -> Tensor:
    """Return 1 in place of a step of 0: data that are all zero say nothing about a step."""
    return torch.where(step > 0, step, 1.0).float()

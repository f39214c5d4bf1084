"""Schemes that are trained: DoReFa, PACT, LSQ and LSQ+. Every gradient is written out, ties at the bounds included."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from quantizers import calibrate as calibration
from quantizers.functional import (
    MAX_BITS,
    _computed_in,
    _rounded,
    _sign,
    _workspace,
    blocks,
    blockwise,
    differentiated,
    inside,
    integer_range,
)
from quantizers.layers import quant_layers
from quantizers.linear import scaled_gradient
from quantizers.scheme import Scheme, along_channels, row

if TYPE_CHECKING:
    from quantizers.calibrate import Observer
    from quantizers.layers import QuantLayer

# Steps and clips are used as max(|s|, FLOOR): whatever an optimizer makes of them, they are positive.
FLOOR = 1e-8
WIDTHS = range(1, MAX_BITS + 1)


def learned_parameters(network: nn.Module) -> list[nn.Parameter]:
    """What the layers' schemes learn beside the weights: steps, offsets, clips, codebooks. Give them to an optimizer in a
    group without weight decay, which would pull them to zero."""
    return [getattr(layer, name) for layer in quant_layers(network).values() for name in layer.scheme.learned]


def pact_penalty(network: nn.Module, strength: float) -> Tensor:
    """strength x the sum of alpha^2 over the layers whose input PACT clips, to be added to the loss: larger, and the clips
    move further down (Choi et al. 2018, section 3.1; their strength is that of the weights' decay)."""
    clips = [
        _tensor(layer, "activation_clip")
        for layer in quant_layers(network).values()
        if isinstance(layer.scheme, PACT) and layer.activation_bits is not None
    ]
    if not clips:
        raise ValueError("no layer of the network has its input clipped by PACT")
    return strength * torch.stack(clips).square().sum()


@dataclass(frozen=True)
class DoReFa(Scheme, name="dorefa"):
    """Zhou et al. 2016, "DoReFa-Net" (arXiv 1606.06160), with q_k(r) = round((2^k - 1) r) / (2^k - 1):

        weights, k > 1     2 q_k(tanh(w) / (2 max|tanh w|) + 1/2) - 1          (section 2.3)
        weights, k = 1     sign(w) mean|w|, one mean per layer, sign(0) = +1
        activations        q_k(clip(x, 0, 1))                                  (section 2.4)

    Rounding passes the gradient on; the rest of the weights' formula has its own, that of the maximum included. At one bit
    it passes as it is; activations pass it where 0 <= x <= 1, both included. Gradients themselves aren't quantized.

    Weights end up in -1..1 whatever they were, without a level at zero, and activations above 1 or below 0 are lost: this
    is for training a network with batch norms, not for quantizing one that is trained. It needs no data.

    A layer's tensors: weight_error (8,), relative and up to a factor, and activation_error (8,), 1 if there are no data.
    """

    needs_data: ClassVar[bool] = False

    def start(self, layer: QuantLayer) -> dict[str, Tensor]:
        return {"weight_error": torch.ones(MAX_BITS), "activation_error": torch.ones(MAX_BITS)}

    def calibrate(self, layer: QuantLayer, observer: Observer | None) -> None:
        _refuse_infinite(layer.weight)
        for bits in WIDTHS:
            layer.weight_error[bits - 1] = _error_up_to_a_factor(layer.weight, self.weight(layer, bits))
        if observer is not None:
            _measure_activations(self, layer, observer)

    def weight(self, layer: QuantLayer, bits: int) -> Tensor:
        return dorefa_weight(layer.weight, bits)

    def activation(self, layer: QuantLayer, x: Tensor, bits: int) -> Tensor:
        return dorefa_activation(x, bits, reuse=True)

    def activation_step(self, layer: QuantLayer, bits: int) -> Tensor:
        return layer.weight.new_tensor(1 / integer_range(bits, False)[1])


@dataclass(frozen=True)
class PACT(DoReFa, name="pact"):
    """Choi et al. 2018, "PACT: Parameterized Clipping Activation for Quantized Neural Networks" (arXiv 1805.06085):
    activations are clipped at a learned alpha, one per layer, and the weights are DoReFa's.

        y = clip(x, 0, alpha)     y_q = round(y (2^k - 1) / alpha) alpha / (2^k - 1)     (equations 1 and 2)
        dy_q/dalpha = 1 where x >= alpha, else 0        dy_q/dx = 1 where 0 <= x < alpha, else 0     (equation 3)

    At x = alpha the gradient goes to alpha alone. The paper's inputs follow a ReLU. An input that is negative in the
    calibration data is clipped at -alpha as well, with the symmetric integers -(2^(k-1) - 1)..2^(k-1) - 1 (one bit: -alpha
    and +alpha), and its gradient to alpha is -1 where x <= -alpha.

    clip
        alpha before training: 10, as in the paper; None takes what leaves the smallest squared error at 4 bits on the
        calibration data.

    Add `pact_penalty` to the loss, which makes alpha find its place. A layer's tensors: activation_clip (), learned, and the
    errors of DoReFa.
    """

    clip: float | None = 10.0
    learned: ClassVar[tuple[str, ...]] = ("activation_clip",)
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"PACT's clip must be positive and finite, or None, not {self.clip!r}")

    def start(self, layer: QuantLayer) -> dict[str, Tensor]:
        return {"activation_clip": torch.tensor(10.0 if self.clip is None else float(self.clip)), **super().start(layer)}

    def calibrate(self, layer: QuantLayer, observer: Observer | None) -> None:
        if self.clip is None and observer is not None:
            scales, _ = calibration.activation_scales(observer.sample(), observer.largest, observer.signed)
            _tensor(layer, "activation_clip").copy_(row(scales, 4) * integer_range(4, observer.signed)[1])
        super().calibrate(layer, observer)

    def activation(self, layer: QuantLayer, x: Tensor, bits: int) -> Tensor:
        return pact(x, _positive(_tensor(layer, "activation_clip")), bits, layer.signed, reuse=True)

    def activation_step(self, layer: QuantLayer, bits: int) -> Tensor:
        return _positive(_tensor(layer, "activation_clip")) / integer_range(bits, layer.signed)[1]


@dataclass(frozen=True)
class LSQ(Scheme, name="lsq"):
    """Esser et al., "Learned Step Size Quantization" (ICLR 2020): v^ = round(clip(v / s, -QN, QP)) s with a learned step s.

        signed (weights, and inputs that were negative)   QN = 2^(b-1), QP = 2^(b-1) - 1
        unsigned                                          QN = 0, QP = 2^b - 1
        dv^/ds = round(v/s) - v/s where -QN < v/s < QP;   -QN below, QP above     (equation 3)
        dv^/dv = 1 where -QN < v/s < QP, else 0                                   (equation 5)

    Exactly on a bound counts as beyond it: the value gets no gradient, and the step that bound. A step's is multiplied by
    1 / sqrt(N QP), N being the number of weights that share it, or of an input's features (section 2.2). Steps start at
    2 mean|v| / sqrt(QP), of the weights and of the calibration data (section 2.1), and are used as max(|s|, 1e-8) with the
    gradient of |s|, so that an update past zero does no harm.

    per_channel
        one step per output channel for the weights; False: one per layer, as in the paper.

    One signed bit has no meaning: its QP is 0. A layer's tensors: weight_scale (8, C_out) or (8, 1) and activation_scale
    (8,), both learned; weight_error (8,) and activation_error (8,), those of the start.
    """

    per_channel: bool = True
    learned: ClassVar[tuple[str, ...]] = ("weight_scale", "activation_scale")
    of_weight: ClassVar[tuple[str, ...]] = ("weight_scale",)

    def check(self, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> None:
        super().check(weight_bits, activation_bits)
        if weight_bits == 1:
            raise ValueError(f"{self.name} has no weights of 1 bit, which would be the integers -1 and 0: use 2 to 8")
        if activation_bits == 1 and signed:
            raise ValueError(f"{self.name} has no signed inputs of 1 bit, which would be the integers -1 and 0: use 2 to 8")

    def start(self, layer: QuantLayer) -> dict[str, Tensor]:
        return {
            "weight_scale": torch.ones(MAX_BITS, layer.weight.shape[0] if self.per_channel else 1),
            "activation_scale": torch.ones(MAX_BITS),
            "weight_error": torch.ones(MAX_BITS),
            "activation_error": torch.ones(MAX_BITS),
        }

    def calibrate(self, layer: QuantLayer, observer: Observer | None) -> None:
        _refuse_infinite(layer.weight)
        rows = layer.weight.detach().double().flatten(1)
        rows = rows if self.per_channel else rows.reshape(1, -1)
        for bits in WIDTHS[1:]:
            layer.weight_scale[bits - 1] = _step_or_one(self._weight_step(rows, bits))
            layer.weight_error[bits - 1] = _error(layer.weight, self.weight(layer, bits))
        if observer is not None:
            self._start_activations(layer, observer)
            _measure_activations(self, layer, observer, self._input_widths(observer.signed))

    def _weight_step(self, rows: Tensor, bits: int) -> Tensor:
        return 2 * rows.abs().mean(1) / math.sqrt(integer_range(bits, True)[1])

    def _start_activations(self, layer: QuantLayer, observer: Observer) -> None:
        mean = observer.sample().double().abs().mean()
        for bits in self._input_widths(observer.signed):
            high = integer_range(bits, observer.signed)[1]
            layer.activation_scale[bits - 1] = _step_or_one(2 * mean / math.sqrt(high))

    def _input_widths(self, signed: bool) -> range:
        return WIDTHS[1:] if signed else WIDTHS

    def weight(self, layer: QuantLayer, bits: int) -> Tensor:
        low, high = integer_range(bits, True, narrow=False)
        step = _positive(row(layer.weight_scale, bits))
        step = scaled_gradient(step, _factor(layer.weight.numel() // len(step), high))
        return learned_step(layer.weight, along_channels(step, layer.weight), low, high)

    def activation(self, layer: QuantLayer, x: Tensor, bits: int) -> Tensor:
        low, high = integer_range(bits, layer.signed, narrow=False)
        step = scaled_gradient(_positive(row(layer.activation_scale, bits)), _factor(x.shape[1:].numel(), high))
        return learned_step(x, step, low, high, reuse=True)

    def activation_step(self, layer: QuantLayer, bits: int) -> Tensor:
        return _positive(row(layer.activation_scale, bits))


@dataclass(frozen=True)
class LSQPlus(LSQ, name="lsqplus"):
    """Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better initialization" (CVPR
    Workshops 2020): LSQ whose inputs have a learned offset beta, for activations such as swish that are a little negative.

        x^ = round(clip((x - beta) / s, 0, 2^b - 1)) s + beta          (unsigned codes)
        dx^/ds as in LSQ of x - beta;  dx^/dbeta = 0 where 0 < (x - beta) / s < 2^b - 1, else 1

    The offset's gradient gets the factor of the step's. Both start where the squared error of the calibration data is
    smallest, the weights' step at max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1). Inputs of one bit have two levels, beta and
    beta + s; weights of one bit have no meaning, as in LSQ.

    Real 0 isn't on the grid of an input with an offset. A convolution pads its quantized input with true zeros.

    A layer's tensors: those of LSQ and activation_offset (8,), learned.
    """

    learned: ClassVar[tuple[str, ...]] = (*LSQ.learned, "activation_offset")

    def check(self, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> None:
        super().check(weight_bits, activation_bits)  # its inputs are unsigned, with an offset

    def start(self, layer: QuantLayer) -> dict[str, Tensor]:
        return {**super().start(layer), "activation_offset": torch.zeros(MAX_BITS)}

    def _weight_step(self, rows: Tensor, bits: int) -> Tensor:
        mean, spread = rows.mean(1), 3 * rows.std(1, correction=0)
        return torch.maximum((mean - spread).abs(), (mean + spread).abs()) / 2 ** (bits - 1)

    def _input_widths(self, signed: bool) -> range:
        return WIDTHS

    def _start_activations(self, layer: QuantLayer, observer: Observer) -> None:
        steps, offsets = least_squares_grids(observer.sample())
        layer.activation_scale.copy_(steps)
        _tensor(layer, "activation_offset").copy_(offsets)

    def activation(self, layer: QuantLayer, x: Tensor, bits: int) -> Tensor:
        low, high = integer_range(bits, False)
        factor = _factor(x.shape[1:].numel(), high)
        step = scaled_gradient(_positive(row(layer.activation_scale, bits)), factor)
        offset = scaled_gradient(row(_tensor(layer, "activation_offset"), bits), factor)
        return learned_step(x, step, low, high, offset)


def dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    """The weights of DoReFa; see there."""
    w = weight.to(_computed_in(weight))
    if bits == 1:
        made: Tensor = _SignTimesMean.apply(w)
        return made.to(weight.dtype)
    levels = integer_range(bits, False)[1]
    squashed = torch.tanh(w)
    largest = squashed.abs().max() if w.numel() else w.new_ones(())
    squashed = squashed / (2 * torch.where(largest > 0, largest, 1)) + 0.5
    rounded: Tensor = _Round.apply(squashed * levels)
    return (2 * (rounded / levels) - 1).to(weight.dtype)


def dorefa_activation(x: Tensor, bits: int, *, reuse: bool = False) -> Tensor:
    """The activations of DoReFa: round((2^k - 1) clip(x, 0, 1)) / (2^k - 1). `reuse` as in `fake_quantize`."""
    levels = integer_range(bits, False)[1]
    if not differentiated(x):
        return _unit_range(x, levels, reuse)
    made: Tensor = _UnitRange.apply(x, levels)
    return made


def pact(x: Tensor, clip: Tensor, bits: int, signed: bool = False, *, reuse: bool = False) -> Tensor:
    """Equations 1 to 3 of PACT, and their symmetric twin for signed inputs; `clip` is positive, one number. `reuse` as in
    `fake_quantize`."""
    if not differentiated(x, clip):
        return _clipped(x, clip, bits, signed, reuse)
    made: Tensor = _Clip.apply(x, clip, bits, signed)
    return made


def learned_step(x: Tensor, step: Tensor, low: int, high: int, offset: Tensor | None = None, *, reuse: bool = False) -> Tensor:
    """round(clip((x - offset) / step, low, high)) step + offset, with the gradients of LSQ and LSQ+. `step` is positive; both
    it and `offset` must broadcast against x. `reuse` as in `fake_quantize`."""
    if offset is None and not differentiated(x, step):
        return _rounded(x, step, low, high, rescale=True, reuse=reuse)
    made: Tensor = _LearnedStep.apply(x, step, offset, low, high)
    return made


def least_squares_grids(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Steps and offsets, both (8,), of unsigned grids step * (0..2^b - 1) + offset with a small squared error on a sample.

    A first grid is the best of some that cut off both tails of the sample; then codes and grid take turns, the grid being
    the straight line through (code, value) with the smallest squared error. Neither turn can make the error larger.
    """
    values, counts = _histogram(sample.detach().double())
    if len(values) < 2:
        return torch.ones(MAX_BITS), values.float().sum().expand(MAX_BITS)
    share = (counts.cumsum(0) - counts / 2) / counts.sum()
    tails = share.new_tensor([0, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.2, 0.3])
    lowest = values[torch.searchsorted(share, tails).clamp(max=len(values) - 1)]
    highest = values[(torch.searchsorted(share, 1 - tails, right=True) - 1).clamp(min=0)]
    lowest[0], highest[0] = values[0], values[-1]
    bottoms, tops = lowest.repeat_interleave(len(tails)), highest.repeat(len(tails))
    bottoms, tops = bottoms[tops > bottoms], tops[tops > bottoms]

    def codes_of(step: Tensor, offset: Tensor, high: int) -> Tensor:
        return ((values - offset) / step).round_().clamp_(0, high)

    def error_of(step: Tensor, offset: Tensor, codes: Tensor) -> Tensor:
        return (counts * (codes * step + offset - values).square()).sum(-1)

    steps, offsets = [], []
    for bits in WIDTHS:
        high = integer_range(bits, False)[1]
        step, offset = ((tops - bottoms) / high)[:, None], bottoms[:, None]
        index = error_of(step, offset, codes_of(step, offset, high)).argmin()
        step, offset = step[index, 0], offset[index, 0]
        error = torch.full_like(step, torch.inf)
        for _ in range(50):
            codes = codes_of(step, offset, high)
            left = error_of(step, offset, codes)
            mean_code, mean_value = (counts * codes).sum() / counts.sum(), (counts * values).sum() / counts.sum()
            spread = (counts * (codes - mean_code).square()).sum()
            if not left < error * (1 - 1e-6) or spread == 0:
                break
            best, error = (step, offset), left
            step = (counts * (codes - mean_code) * (values - mean_value)).sum() / spread
            offset = mean_value - step * mean_code
        steps.append(best[0])
        offsets.append(best[1])
    return torch.stack(steps).float(), torch.stack(offsets).float()


def _histogram(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the number of the values in each bin that isn't empty, in order."""
    low, high = values.min(), values.max()
    if low == high:
        return low.view(1), values.new_tensor([float(values.numel())])
    index = ((values - low) / (high - low) * (calibration.BINS - 1)).long()
    counts, sums = torch.bincount(index), torch.bincount(index, weights=values)
    return (sums / counts)[counts > 0], counts[counts > 0].double()


class _Round(torch.autograd.Function):
    """Half to even; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _SignTimesMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sign(x) * x.abs().mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _unit_range(x: Tensor, levels: int, reuse: bool = False) -> Tensor:
    wide = x.to(_computed_in(x))
    made = _workspace(wide) if reuse and blockwise(wide) else torch.empty_like(wide)
    for source, target in blocks(wide, made):
        torch.clamp(source, 0, 1, out=target).mul_(levels).round_().div_(levels)
    return made.to(x.dtype)


class _UnitRange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int) -> Tensor:
        ctx.save_for_backward(x)
        return _unit_range(x, levels)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return inside(gradients[0], x, 0, 1), None


class _Positive(torch.autograd.Function):
    """max(|x|, FLOOR) with the gradient of |x|, 1 at zero: below the floor too, so that what fell there can leave it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.abs().clamp_(min=max(FLOOR, torch.finfo(x.dtype).tiny))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x >= 0, gradients[0], -gradients[0])


def _clipped(x: Tensor, clip: Tensor, bits: int, signed: bool, reuse: bool = False) -> Tensor:
    if signed and bits == 1:
        return (_sign(x).to(_computed_in(x)) * clip).to(x.dtype)
    low, high = integer_range(bits, signed)
    return _rounded(x, clip / high, low, high, rescale=True, reuse=reuse)


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, bits: int, signed: bool) -> Tensor:
        wide = x.to(_computed_in(x))
        ctx.save_for_backward(wide, clip)
        ctx.signed = signed
        return _clipped(x, clip, bits, signed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        x, clip = ctx.saved_tensors
        above = x >= clip
        below = x <= -clip if ctx.signed else x < 0
        to_clip = torch.where(above, gradient, 0).sum()
        if ctx.signed:
            to_clip = to_clip - torch.where(below, gradient, 0).sum()
        return torch.where(above | below, 0, gradient), to_clip, None, None


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, offset: Tensor | None, low: int, high: int) -> Tensor:
        ratio = x.to(_computed_in(x))
        ratio = (ratio if offset is None else ratio - offset) / step
        ctx.bounds = low, high
        ctx.shapes = step.shape, None if offset is None else offset.shape
        codes = ratio.round().clamp_(low, high)
        made = codes * step
        ctx.save_for_backward(ratio, codes if ctx.needs_input_grad[1] else None)
        return (made if offset is None else made.add_(offset)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        ratio, codes = ctx.saved_tensors
        gradient = gradients[0].to(ratio.dtype)
        within = inside(gradient, ratio, *ctx.bounds, strict=True)
        to_step = to_offset = None
        if ctx.needs_input_grad[1]:
            # Within the bounds the code minus the ratio; beyond them the code, which is the bound. In two sums, because
            # each is small beside the codes.
            to_step = (codes - ratio).mul_(within).sum_to_size(ctx.shapes[0])
            to_step = to_step + (gradient - within).mul_(codes).sum_to_size(ctx.shapes[0])
        if ctx.needs_input_grad[2]:
            to_offset = (gradient - within).sum_to_size(ctx.shapes[1])
        return within.to(gradients[0].dtype) if ctx.needs_input_grad[0] else None, to_step, to_offset, None, None


def _tensor(layer: QuantLayer, name: str) -> Tensor:
    tensor: Tensor = getattr(layer, name)
    return tensor


def _positive(x: Tensor) -> Tensor:
    made: Tensor = _Positive.apply(x)
    return made


def _factor(values: int, high: int) -> float:
    """LSQ's factor of a step's gradient, 1 / sqrt(N QP)."""
    return 1 / math.sqrt(max(1, values) * high)


def _step_or_one(step: Tensor) -> Tensor:
    """Data that are all zero say nothing about a step."""
    return torch.where(step > 0, step, 1.0).float()


def _refuse_infinite(weight: Tensor) -> None:
    if not weight.isfinite().all():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds values that are not finite")


def _error(x: Tensor, quantized: Tensor) -> Tensor:
    """sum (x - x^)^2 / sum x^2; 0 where x is all zero."""
    x = x.double()
    return (x - quantized).square().sum() / x.square().sum().clamp_min(torch.finfo(x.dtype).tiny)


def _error_up_to_a_factor(x: Tensor, quantized: Tensor) -> Tensor:
    """The smallest such error over all multiples of x^, which a batch norm makes up for: 1 - cos^2 of the angle."""
    x, y = x.double(), quantized.double()
    product = x.square().sum() * y.square().sum()
    return 1 - (x * y).sum().square() / product if product > 0 else x.new_zeros(())


def _measure_activations(scheme: Scheme, layer: QuantLayer, observer: Observer, widths: range = WIDTHS) -> None:
    """Set activation_error from the calibration data."""
    sample, layer.signed = observer.sample(), observer.signed
    for bits in widths:
        layer.activation_error[bits - 1] = _error(sample, scheme.activation(layer, sample, bits))

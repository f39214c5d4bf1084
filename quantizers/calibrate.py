"""Scales from data, for every width at once: by smallest squared error, largest value, percentile or divergence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.functional import MAX_BITS, integer_range, quantize

GRID = 80  # candidate clipping points, from the largest magnitude downwards
SAMPLES = 1 << 16  # activations kept per layer
BINS = 2048
PERCENTILE = 0.9999
RULES = ("mse", "max", "percentile", "kl")

Batches = Iterable[Any] | Tensor


def weight_scales(weight: Tensor, rule: str = "mse", power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Per-channel symmetric scales of a weight for widths 1..8, and the error each leaves.

    `weight` is (C_out, ...). Returns scales, shape (8, C_out), and relative errors sum (w - w^)^2 / sum w^2 of the whole
    tensor, shape (8,). Rule `mse` minimises the error over clipping points max|w| * k / 80; `max` and `kl` take max|w|,
    `percentile` the 99.99th of |w|. At one bit the scale is mean |w|, which is optimal (Rastegari et al. 2016, equation 6). A
    channel of zeros gets scale 1. Raises ValueError for a weight that isn't finite.
    """
    rows = weight.detach().flatten(1).double()
    if not rows.isfinite().all():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds values that are not finite")
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    live = largest > 0
    clip = rows.abs().quantile(PERCENTILE, dim=1) if rule == "percentile" else largest
    energy = rows.square().sum().clamp_min(torch.finfo(rows.dtype).tiny)

    def error_of(scale: Tensor, bits: int) -> Tensor:
        return (rows - quantize(rows, scale[:, None], bits, True) * scale[:, None]).square().sum(1)

    def best_of(candidates: Iterable[Tensor], bits: int) -> Tensor:
        best, error = torch.ones_like(largest), torch.full_like(largest, torch.inf)
        for candidate in candidates:
            scale = torch.where(live & (candidate > 0), candidate, 1.0)
            left = error_of(scale, bits)
            better = left < error
            best, error = torch.where(better, scale, best), torch.where(better, left, error)
        return best

    scales, errors = [], []
    for bits in range(1, MAX_BITS + 1):
        high = integer_range(bits, True)[1]
        if bits == 1:
            scale = torch.where(live, rows.abs().mean(1), 1.0)
        elif rule == "mse":
            # Below half the step of the next width down, clipping has long cost more than it saves.
            scale = best_of((largest * (step / GRID / high) for step in range(GRID, GRID // 8, -1)), bits)
        else:
            scale = torch.where(live & (clip > 0), clip / high, 1.0)
        if power_of_two:
            scale = best_of((2 ** scale.log2().floor(), 2 ** scale.log2().ceil()), bits)
        scales.append(scale)
        errors.append(error_of(scale, bits)[live].sum() / energy)
    return torch.stack(scales).float(), torch.stack(errors).float()


def activation_scales(
    sample: Tensor, largest: float, signed: bool, rule: str = "mse", power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Per-tensor scales of an activation for widths 1..8, and the relative error each leaves; both of shape (8,).

    `sample` is a sample of the values, `largest` the largest magnitude of all of them. The error is taken over a histogram
    of the magnitudes; exact zeros, which every width represents, are left out of it (but for one signed bit). Rule `mse`
    minimises it, `max` clips at `largest`, `percentile` at the 99.99th percentile of the sample, `kl` where the divergence of
    the histogram before and after is smallest (`kl_threshold`).
    """
    magnitudes = sample.detach().abs().double()
    if largest <= 0:
        return torch.ones(MAX_BITS), torch.zeros(MAX_BITS)
    live = magnitudes[magnitudes > 0]
    counts = torch.histc(live, BINS, 0, largest)
    centres = (torch.arange(BINS, dtype=torch.double) + 0.5) * (largest / BINS)
    energy = (counts * centres.square()).sum()
    clips = largest * torch.arange(GRID, 0, -1, dtype=torch.double) / GRID
    # Low widths of heavy-tailed data clip further down than the linear grid reaches.
    clips = torch.cat([clips, clips[-1] * 0.8 ** torch.arange(1, 12, dtype=torch.double)])

    def errors_of(grid: Tensor, bits: int) -> Tensor:
        # Signed or not, a magnitude's error is that of its positive side.
        high = integer_range(bits, signed)[1]
        rounded = (centres / grid[:, None]).round().clamp(max=high) * grid[:, None]
        return (counts * (centres - rounded).square()).sum(1)

    scales, errors = [], []
    for bits in range(1, MAX_BITS + 1):
        high = integer_range(bits, signed)[1]
        if bits == 1 and signed:
            mean = magnitudes.mean()
            grid = torch.stack([2 ** mean.log2().floor(), 2 ** mean.log2().ceil()]) if power_of_two else mean.view(1)
            at_zero = (len(magnitudes) - len(live)) * grid.square()
            error, index = ((counts * (centres - grid[:, None]).square()).sum(1) + at_zero).min(0)
            scale = grid[index]
        else:
            if rule == "mse":
                grid = clips / high
            elif rule == "kl":
                grid = kl_threshold(counts, largest, high + 1).view(1) / high
            else:
                top = torch.quantile(magnitudes, PERCENTILE) if rule == "percentile" else torch.tensor(largest).double()
                grid = (top if top > 0 else torch.tensor(largest).double()).view(1) / high
            if power_of_two:
                grid = torch.cat([2 ** grid.log2().floor(), 2 ** grid.log2().ceil()])
            error, index = errors_of(grid, bits).min(0)
            scale = grid[index]
        scales.append(scale)
        errors.append(error / energy.clamp_min(torch.finfo(energy.dtype).tiny))
    return torch.stack(scales).float(), torch.stack(errors).float()


def kl_threshold(counts: Tensor, largest: float, levels: int) -> Tensor:
    """Where to clip a histogram of magnitudes (BINS bins over 0..largest) so that its distribution changes least.

    For every 16th number i of bins kept, from 128: P is the histogram up to i with all that lies beyond added to its last
    bin; Q is P's own part (without what lies beyond) merged into `levels` groups of bins, each group's count spread evenly
    over its bins that aren't empty. The clipping point is that of the smallest Kullback-Leibler divergence of P from Q
    (Migacz, "8-bit Inference with TensorRT", GTC 2017).

    Many equal values (an image's constant background, seen through a convolution) make a spike that no merging of bins
    leaves alone: the rule then clips far too much.
    """
    width, total = largest / BINS, counts.sum()
    best, least = counts.new_tensor(largest), counts.new_tensor(torch.inf)
    for kept in range(max(128, -(-levels // 16) * 16), BINS + 1, 16):
        own = counts[:kept]
        p = own.clone()
        p[-1] += total - own.sum()
        group = torch.arange(kept, device=counts.device) * levels // kept
        filled = (own > 0).double()
        sums = counts.new_zeros(levels).index_add_(0, group, own)
        bins = counts.new_zeros(levels).index_add_(0, group, filled)
        q = filled * (sums / bins.clamp_min(1))[group]
        p, q = p / total, q / q.sum().clamp_min(1e-12)
        seen = p > 0
        # A bin that P fills and Q doesn't (the last one, with what lies beyond) counts as nearly impossible.
        divergence = (p[seen] * (p[seen] / q[seen].clamp_min(1e-12)).log()).sum()
        if divergence < least:
            best, least = counts.new_tensor((kept + 0.5) * width), divergence
    return best.clamp(max=largest)


class Observer:
    """What a layer's input looked like: a sample of its values, its largest magnitude and whether it was ever negative."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.largest, self.signed = 0.0, False

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        values = inputs[0].detach()
        if values.numel() == 0:
            return
        low, high = float(values.min()), float(values.max())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError("an activation that isn't finite appeared during calibration")
        self.largest, self.signed = max(self.largest, -low, high), self.signed or low < 0
        # A contiguous view in memory order, then every n-th value: an odd stride meets all channels alike.
        flat = values.reshape(-1)
        self.values.append(flat[:: max(1, flat.numel() // SAMPLES) | 1][:SAMPLES].float())

    def sample(self) -> Tensor:
        values = torch.cat(self.values)
        return values[:: max(1, values.numel() // SAMPLES) | 1]


def observe(network: nn.Module, layers: dict[str, nn.Module], batches: Batches) -> dict[str, Observer]:
    """Run a network over calibration batches and watch the inputs of `layers`; layers never called stay unseen.

    `batches` is a tensor (one batch), or an iterable of tensors or of (inputs, labels). Raises ValueError if it is empty.
    """
    observers = {name: Observer() for name in layers}
    handles = [module.register_forward_pre_hook(observers[name]) for name, module in layers.items()]
    training, seen = network.training, 0
    try:
        network.eval()
        with torch.no_grad():
            for batch in [batches] if isinstance(batches, Tensor) else batches:
                inputs = batch[0] if isinstance(batch, list | tuple) else batch
                network(inputs)
                seen += len(inputs)
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("calibration needs at least one image; `calibrate` gave none")
    return observers

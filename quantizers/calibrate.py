"""Scales from data: for every width at once, the scale with the smallest squared error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.functional import MAX_BITS, integer_range, quantize

GRID = 80  # candidate clipping points, from the largest magnitude downwards
SAMPLES = 1 << 16  # activations kept per layer
BINS = 2048

Batches = Iterable[Any] | Tensor


def weight_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel symmetric scales of a weight for widths 1..8, and the error each leaves.

    `weight` is (C_out, ...). Returns scales, shape (8, C_out), that minimise sum (w - w^)^2 over clipping points
    max|w| * k / 80, and relative errors sum (w - w^)^2 / sum w^2 of the whole tensor, shape (8,). At one bit the scale is
    mean |w|, which is optimal (Rastegari et al. 2016, equation 6). A channel of zeros gets scale 1.
    Raises ValueError for a weight that isn't finite.
    """
    rows = weight.detach().flatten(1).double()
    if not rows.isfinite().all():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds values that are not finite")
    largest = rows.abs().amax(1)
    live = largest > 0
    energy = rows.square().sum().clamp_min(torch.finfo(rows.dtype).tiny)
    scales, errors = [], []
    for bits in range(1, MAX_BITS + 1):
        if bits == 1:
            best = torch.where(live, rows.abs().mean(1), 1.0)
            error = (rows - quantize(rows, best[:, None], 1, True) * best[:, None]).square().sum(1)
        else:
            high = integer_range(bits, True)[1]
            best, error = torch.ones_like(largest), torch.full_like(largest, torch.inf)
            # Below half the step of the next width down, clipping has long cost more than it saves.
            for step in range(GRID, GRID // 8, -1):
                scale = torch.where(live, largest * (step / GRID / high), 1.0)
                left = (rows - quantize(rows, scale[:, None], bits, True) * scale[:, None]).square().sum(1)
                better = left < error
                best, error = torch.where(better, scale, best), torch.where(better, left, error)
        scales.append(best)
        errors.append(error[live].sum() / energy)
    return torch.stack(scales).float(), torch.stack(errors).float()


def activation_scales(sample: Tensor, largest: float, signed: bool) -> tuple[Tensor, Tensor]:
    """Per-tensor scales of an activation for widths 1..8, and the relative error each leaves; both of shape (8,).

    `sample` is a sample of the values, `largest` the largest magnitude of all of them. The error is taken over a histogram
    of the magnitudes; exact zeros, which every width represents, are left out of it (but for one signed bit).
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
    scales, errors = [], []
    for bits in range(1, MAX_BITS + 1):
        if bits == 1 and signed:
            scale = magnitudes.mean()
            error = (counts * (centres - scale).square()).sum() + (len(magnitudes) - len(live)) * scale.square()
        else:
            # Signed or not, a magnitude's error is that of its positive side.
            grid = (clips / integer_range(bits, signed)[1])[:, None]
            high = integer_range(bits, signed)[1]
            left = (counts * (centres - (centres / grid).round().clamp(max=high) * grid).square()).sum(1)
            error, index = left.min(0)
            scale = grid[index, 0]
        scales.append(scale)
        errors.append(error / energy.clamp_min(torch.finfo(energy.dtype).tiny))
    return torch.stack(scales).float(), torch.stack(errors).float()


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

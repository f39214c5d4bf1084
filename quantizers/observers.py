"""What calibration sees of a layer's input, and scales from data, for every width at once.

Scales are found by the smallest squared error, the largest value, a percentile, or divergence
(`RULES`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.batches import Batches, Parts, batches_of, called, copied, prepared
from quantizers.calling import Forward
from quantizers.clipping import output_scales
from quantizers.functional import FEW_BITS, MAX_BITS, WIDE_BITS, WIDTHS, integer_range, quantize_tensor, refuse_infinite
from quantizers.histogram import Grid, Histogram, importance_of_inputs
from quantizers.moments import InputMoments

HEADROOM = 2  # of inputs at 16 bits: how far beyond the values of calibration the grid reaches
GRID = 80  # candidate clipping points, from the largest magnitude downwards
SAMPLES = 1 << 16  # activations of a batch that are looked at, and of all batches that a scheme is shown, per layer
# Activations that are kept per layer at most: more are thinned, by a number that the sizes of layers
# are rarely multiples of, so that every channel keeps its share.
MOST_SAMPLES = 16 * SAMPLES
THINNING = 11
PIECES = 64  # tensors in which they are kept at most
CACHED_VALUES = 1 << 15  # float64 numbers with which all temporaries fit into the cache
BINS = 2048
PERCENTILE = 0.9999
RULES = ("mse", "max", "percentile", "kl")
WEIGHT_RULES = (*RULES, "output")

OnProgress = Callable[[int, int, str], None]  # how many are done, of how many, of what


def no_progress(*told: object) -> None:
    """Tell nobody."""


def fit_weight_scales(
    weight: Tensor,
    rule: str = "mse",
    power_of_two: bool = False,
    moments: InputMoments | None = None,
    *,
    per_channel: bool = True,
    widths: Collection[int] = WIDTHS,
) -> tuple[Tensor, Tensor]:
    """Find symmetric scales of a weight for all widths, and the error each leaves.

    Rule `mse` minimises the error over clipping points max|w| * k / 80; `max` and `kl` take max|w|,
    `percentile` the 99.99th of |w|. At one bit the scale is mean |w|, which is optimal (Rastegari
    et al. 2016, equation 6). Rule `output` minimises the error of the layer's output
    (`quantizers.clipping`); where nothing is known of the layer's input it is `mse`. At 16 bits all
    rules take max|w|.

    Args:
        weight: A weight (C_out, ...).
        rule: One of `WEIGHT_RULES`.
        power_of_two: Whether scales are rounded to powers of two.
        moments: What the layer's input was like, for rule `output`.
        per_channel: Whether each output channel has a scale of its own; False: all have one.
        widths: Those that are looked at; the rows of others are 1.

    Returns:
        Scales (9, C_out), or (9, 1), 1 for a channel of zeros; and relative errors sum (w - w^)^2 /
        sum w^2 of the whole tensor (9,).

    Raises:
        ValueError: For a weight that isn't finite.
    """
    refuse_infinite(weight)
    rows = weight.detach().flatten(1).double()
    if not per_channel:
        rows = rows.reshape(1, -1)
    few: tuple[Tensor, Tensor] | None = None
    if rule == "output":
        if moments is not None and moments.patches and weight.numel():
            few = output_scales(weight, moments, power_of_two, per_channel=per_channel, widths=widths)
        rule = "mse"
    channels = _Channels(rows, rule)
    if few is None:
        few = channels.fitted(FEW_BITS, rule, power_of_two, widths)
    scales, errors = channels.fitted([WIDE_BITS], "max", power_of_two, widths)
    return torch.cat([few[0], scales.to(few[0])]), torch.cat([few[1], errors.to(few[1])])


class _Channels:
    """The rows (channels) of a weight, and where they may be clipped."""

    def __init__(self, rows: Tensor, rule: str) -> None:
        self.rows = rows
        self.largest = rows.new_zeros(len(rows))
        if rows.shape[1]:
            self.largest = rows.abs().amax(1)
        self.live = self.largest > 0
        self.clip = self.largest
        if rule == "percentile":
            self.clip = rows.abs().quantile(PERCENTILE, dim=1)
        self.energy = rows.square().sum().clamp_min(torch.finfo(rows.dtype).tiny)

    def fitted(self, widths: Iterable[int], rule: str, power_of_two: bool, asked: Collection[int]) -> tuple[Tensor, Tensor]:
        """Return scales (widths, channels) by a rule, and relative errors (widths,), float32; 1 where nobody asks."""
        scales, errors = [], []
        for bits in widths:
            if bits not in asked:
                scales.append(torch.ones_like(self.largest))
                errors.append(self.energy.new_ones(()))
                continue
            scale = self.scale(bits, rule)
            if bits > MAX_BITS:
                # A step of weights that are next to nothing would be none in float32.
                scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
            if power_of_two:
                scale = self.best_of(torch.stack([2 ** scale.log2().floor(), 2 ** scale.log2().ceil()]), bits)
            scales.append(scale)
            errors.append(self.errors(scale, bits)[self.live].sum() / self.energy)
        return torch.stack(scales).float(), torch.stack(errors).float()

    def scale(self, bits: int, rule: str) -> Tensor:
        """Return a scale per channel, by a rule."""
        high = integer_range(bits, True)[1]
        if bits == 1:
            return torch.where(self.live, self.rows.abs().mean(1), 1.0)
        if rule == "mse":
            # Below half the step of the next width down, clipping has long cost more than it saves.
            factors = [step / GRID / high for step in range(GRID, GRID // 8, -1)]
            return self.best_of(self.largest * self.largest.new_tensor(factors)[:, None], bits)
        clip = self.clip
        if rule == "max":
            clip = self.largest
        return torch.where(self.live & (clip > 0), clip / high, 1.0)

    def best_of(self, candidates: Tensor, bits: int) -> Tensor:
        """Return for each channel the candidate, of (candidates, channels), with the smallest error: the first of equals."""
        best, error = torch.ones_like(self.largest), torch.full_like(self.largest, torch.inf)
        scales = torch.where(self.live & (candidates > 0), candidates, 1.0)
        # Those of a small layer all at once: most of the time would go into calls for a few numbers.
        for some in scales.split(max(1, CACHED_VALUES // max(1, self.rows.numel()))):
            left, index = self.errors(some, bits).min(0)
            better = left < error
            best = torch.where(better, some.gather(0, index[None])[0], best)
            error = torch.where(better, left, error)
        return best

    def errors(self, scale: Tensor, bits: int) -> Tensor:
        """Return the squared error of each channel, for scales (..., channels)."""
        # A few channels at a time, so that all temporaries stay in the processor's cache. Rows that
        # are too long for that are summed at once: some threads would add in another order.
        count = CACHED_VALUES // max(1, self.rows.shape[1])
        if count < 4:
            count = max(1, len(self.rows))
        parts = []
        for rows, step in zip(self.rows.split(count), scale[..., None].split(count, -2), strict=True):
            left = quantize_tensor(rows.expand(*step.shape[:-1], -1), step, bits, True).mul_(step)
            parts.append(torch.sub(rows, left, out=left).square_().sum(-1))
        return torch.cat(parts, -1)


def fit_activation_scales(
    sample: Tensor, largest: float, signed: bool, rule: str = "mse", power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Find per-tensor scales of an activation for widths 1..8, and the relative error each leaves.

    The error is taken over a histogram of the magnitudes; exact zeros, which every width
    represents, are left out of it (but for one signed bit). Rule `mse` minimises it, `max` clips at
    `largest`, `percentile` at the 99.99th percentile of the sample, `kl` where the divergence of
    the histogram before and after is smallest (`kl_threshold`).

    Args:
        sample: A sample of the values.
        largest: The largest magnitude of all of them.
        signed: Whether any of them is negative.
        rule: One of `RULES`.
        power_of_two: Whether scales are rounded to powers of two.

    Returns:
        Scales (8,) and relative errors (8,).
    """
    if largest <= 0:
        return torch.ones(MAX_BITS), torch.zeros(MAX_BITS)
    magnitudes = _Magnitudes(sample.detach().abs().double().cpu(), largest, signed)
    scales, errors = [], []
    for bits in FEW_BITS:
        if bits == 1 and signed:
            grid, error = magnitudes.of_signs(power_of_two)
        else:
            grid = magnitudes.candidates(bits, rule)
            if power_of_two:
                grid = torch.cat([2 ** grid.log2().floor(), 2 ** grid.log2().ceil()])
            error = magnitudes.errors(grid, bits)
        least, index = error.min(0)
        scales.append(grid[index])
        errors.append(least / magnitudes.energy.clamp_min(torch.finfo(torch.double).tiny))
    return torch.stack(scales).float(), torch.stack(errors).float()


def widest_grid(observer: Observer, signed: bool, asymmetric: bool = False, power_of_two: bool = False) -> Grid:
    """Return the grid of an input at 16 bits: it reaches HEADROOM times as far as the values that were seen.

    Other data have larger values now and then. Clipping them loses more than the bit that it takes
    to hold them.

    Args:
        observer: What was seen of the input.
        signed: Whether integers are signed, where there is no zero point.
        asymmetric: Whether there is one.
        power_of_two: Whether the scale is a power of two: the next one above.

    Returns:
        Its scale and its zero point.
    """
    span, levels = observer.largest, integer_range(WIDE_BITS, signed)[1]
    if asymmetric:
        span, levels = observer.high - observer.low, integer_range(WIDE_BITS, False)[1]
    if span <= 0:
        return Grid(1.0, 0.0)
    scale = max(HEADROOM * span / levels, torch.finfo(torch.float32).tiny)
    if power_of_two:
        scale = 2.0 ** math.ceil(math.log2(scale))
    zero_point = 0.0
    if asymmetric:
        zero_point = float(round(-HEADROOM * observer.low / scale))
    return Grid(scale, zero_point)


class _Magnitudes:
    """A histogram of an activation's magnitudes, and where they may be clipped."""

    def __init__(self, magnitudes: Tensor, largest: float, signed: bool) -> None:
        self.all = magnitudes
        self.largest = largest
        self.signed = signed
        live = magnitudes[magnitudes > 0]
        self.zeros = len(magnitudes) - len(live)
        self.counts = torch.histc(live, BINS, 0, largest)
        self.centres = (torch.arange(BINS, dtype=torch.double) + 0.5) * (largest / BINS)
        self.energy = (self.counts * self.centres.square()).sum()
        clips = largest * torch.arange(GRID, 0, -1, dtype=torch.double) / GRID
        # Low widths of heavy-tailed data clip further down than the linear grid reaches.
        self.clips = torch.cat([clips, clips[-1] * 0.8 ** torch.arange(1, 12, dtype=torch.double)])

    def candidates(self, bits: int, rule: str) -> Tensor:
        """Return the scales among which a rule chooses that of the smallest error."""
        high = integer_range(bits, self.signed)[1]
        if rule == "mse":
            return self.clips / high
        if rule == "kl":
            return kl_threshold(self.counts, self.largest, high + 1).view(1) / high
        top = torch.tensor(self.largest).double()
        if rule == "percentile":
            quantile = torch.quantile(self.all, PERCENTILE)
            if quantile > 0:
                top = quantile
        return top.view(1) / high

    def errors(self, grid: Tensor, bits: int) -> Tensor:
        """Return the squared error of each scale. Signed or not, a magnitude's error is that of its positive side."""
        high = integer_range(bits, self.signed)[1]
        # In place: these are large enough for a new piece of memory each.
        left = (self.centres / grid[:, None]).round_().clamp_(max=high).mul_(grid[:, None])
        return torch.sub(self.centres, left, out=left).square_().mul_(self.counts).sum(1)

    def of_signs(self, power_of_two: bool) -> tuple[Tensor, Tensor]:
        """Return the scales to choose from for one signed bit, and the squared error of each."""
        mean = self.all.mean()
        grid = mean.view(1)
        if power_of_two:
            grid = torch.stack([2 ** mean.log2().floor(), 2 ** mean.log2().ceil()])
        at_zero = self.zeros * grid.square()
        return grid, (self.counts * (self.centres - grid[:, None]).square()).sum(1) + at_zero


def kl_threshold(counts: Tensor, largest: float, levels: int) -> Tensor:
    """Find where to clip a histogram of magnitudes so that its distribution changes least.

    For every 16th number i of bins kept, from 128: P is the histogram up to i with all that lies
    beyond added to its last bin; Q is P's own part (without what lies beyond) merged into `levels`
    groups of bins, each group's count spread evenly over its bins that aren't empty. The clipping
    point is that of the smallest Kullback-Leibler divergence of P from Q (Migacz, "8-bit Inference
    with TensorRT", GTC 2017).

    Many equal values (an image's constant background, seen through a convolution) make a spike that
    no merging of bins leaves alone: the rule then clips far too much.

    Args:
        counts: The histogram, BINS numbers.
        largest: The largest magnitude, where the last bin ends.
        levels: How many levels magnitudes will have.

    Returns:
        The clipping point, one number.
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
        # A bin that P fills and Q doesn't (the last one, with what lies beyond) counts as nearly
        # impossible.
        divergence = (p[seen] * (p[seen] / q[seen].clamp_min(1e-12)).log()).sum()
        if divergence < least:
            best, least = counts.new_tensor((kept + 0.5) * width), divergence
    return best.clamp(max=largest)


class Observer:
    """What a layer's input looked like.

    Attributes:
        values: A sample of its values, in pieces.
        low: The smallest of all values that were seen, 0 if none was below.
        high: The largest of them, likewise.
        largest: The largest magnitude.
        signed: Whether any was negative.
        histogram: All values, counted; each channel weighs what the layer makes of it.
        moments: The second moments of its patches, where a scheme asks for them (`Scheme.needs_moments`).
    """

    def __init__(self, layer: str = "") -> None:
        """Have seen nothing yet of a layer, whose name is for messages."""
        self.layer = layer
        self.moments: InputMoments | None = None
        self.values: list[Tensor] = []
        self.low, self.high, self.largest, self.signed = 0.0, 0.0, 0.0, False
        self.histogram: Histogram | None = None
        # Of the values that batches give, every so manyth is kept.
        self._every, self._given, self._kept = 1, 0, 0

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any] | None = None) -> None:
        """Look at a layer's input: a forward pre-hook, with keywords or without.

        Args:
            module: The layer.
            inputs: What it is called with.
            named: And by which keywords.

        Raises:
            ValueError: For an input that isn't finite, or is no tensor.
        """
        values = first_input(module, inputs, named or {})
        if not isinstance(values, Tensor):
            raise ValueError(f"layer {self.layer!r} is called with {type(values).__name__}: only tensors can be quantized")
        values = values.detach()
        if values.numel() == 0:
            return
        low, high = (float(end) for end in torch.aminmax(values))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError(f"an activation that isn't finite appeared during calibration, at layer {self.layer!r}")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.largest, self.signed = max(self.largest, -low, high), self.signed or low < 0
        if self.histogram is None:
            self.histogram = Histogram(importance_of_inputs(module))
        self.histogram.add(values, max(-low, high), channel_dimension(module))
        # A contiguous view in memory order, then every n-th value: an odd stride meets all channels
        # alike.
        flat = values.reshape(-1)
        self._keep(flat[:: max(1, flat.numel() // SAMPLES) | 1][:SAMPLES])

    def _keep(self, values: Tensor) -> None:
        """Add values of a batch to the sample."""
        taken = values[-self._given % self._every :: self._every]
        self._given += len(values)
        self._kept += len(taken)
        # A copy: the network, or whoever gives the batches, may write over the values next.
        self.values.append(taken.to(torch.float32, copy=True))
        if self._kept > MOST_SAMPLES:
            self.values = [torch.cat(self.values)[::THINNING].clone()]
            self._every *= THINNING
            self._kept = len(self.values[0])
        elif len(self.values) > PIECES:
            self.values = [torch.cat(self.values)]

    def sample(self) -> Tensor:
        """Return a sample of all values that were seen, float32."""
        values = torch.cat(self.values)
        return values[:: max(1, values.numel() // SAMPLES) | 1]


def channel_dimension(layer: nn.Module) -> int:
    """Return which dimension of a convolution's or linear layer's input its channels are, counted from the last, -1."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() > 2:
        return 1 - weight.dim()
    return -1


def input_name(kind: type[nn.Module]) -> str:
    """Return what the forward of a class of modules calls its first input; nothing if it has none."""
    return next(iter(list(inspect.signature(kind.forward).parameters)[1:]), "")


def first_input(module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """Find the first input of a call, as hooks see it: given by its place or by its name.

    Args:
        module: What is called.
        inputs: The inputs by place.
        named: The inputs by name.

    Returns:
        The input; None if there is none.
    """
    if inputs:
        return inputs[0]
    name = getattr(module, "input_name", None) or input_name(type(module))
    return named.get(name, next(iter(named.values()), None))


class Output:
    """A layer's output, which tells whether a tensor that appears later is it, with the values that it had.

    An activation that works in place gives the layer's own tensor to what follows. Torch counts
    writes; those through `tensor.data` or NumPy it misses, and they are seen in the values.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Keep the tensor and a copy of its values."""
        self._tensor, self._writes, self._values = tensor, tensor._version, tensor.clone()

    def is_unchanged(self, tensor: Any) -> bool:
        """Say whether a tensor is this output as the layer made it."""
        return tensor is self._tensor and tensor._version == self._writes and torch.equal(tensor, self._values)


def observe(
    network: nn.Module,
    layers: dict[str, nn.Module],
    batches: Batches,
    first_pass: AbstractContextManager[object] | None = None,
    also: Iterable[Mapping[str, Callable[..., None]]] = (),
    on_progress: OnProgress = no_progress,
    forward: Forward | None = None,
) -> dict[str, Observer]:
    """Run a network over calibration batches, in evaluation mode, and watch the inputs of some layers.

    Afterwards every module is in the mode in which it was before. The batches stay as they are. Those
    whose activations would take too much memory are gone through in parts (`batches.Parts`).

    Args:
        network: The network.
        layers: Modules of it, by name.
        batches: As in `batches.batches_of`. Inputs of a floating type are taken in that of the network.
        first_pass: Within what the first batch is run.
        also: What else looks at the inputs of layers: further pre-hooks by name.
        on_progress: Is told how many of how many batches are done, where their number is known.
        forward: What runs the network on a batch; None: `calling.call`, on its inputs.

    Returns:
        An observer by layer; one that is never called has seen nothing.

    Raises:
        ValueError: If there are no images, for batches that the network can't be called with, or for
            an activation that isn't finite.
    """
    observers = {name: Observer(name) for name in layers}
    parts = Parts(network, forward)
    modes = [(module, module.training) for module in network.modules()]
    training, seen = network.training, 0
    try:
        network.eval()
        with torch.no_grad():
            every = batches_of(batches, network)
            for done, batch in enumerate(every, 1):
                for part in parts.of(prepared(batch, network, forward)):
                    with _watched(layers, (observers, *also)), first_pass or nullcontext():
                        called(network, copied(part), forward)
                    first_pass = None
                    seen += parts.count(part)
                if isinstance(every, Sized):
                    on_progress(done, len(every), "batches")
    finally:
        # Modules that do something of their own when the mode changes are told first.
        network.train(training)
        for module, mode in modes:
            module.training = mode
    if not seen:
        raise ValueError("calibration needs at least one image; `calibrate` gave none")
    return observers


@contextmanager
def _watched(layers: Mapping[str, nn.Module], hooks: Iterable[Mapping[str, Callable[..., None]]]) -> Iterator[None]:
    """Let pre-hooks, by name, look at the inputs of layers within a `with`."""
    handles = []
    try:
        for name, module in layers.items():
            found = [by_name[name] for by_name in hooks if name in by_name]
            handles += [module.register_forward_pre_hook(hook, with_kwargs=True) for hook in found]
        yield
    finally:
        for handle in handles:
            handle.remove()

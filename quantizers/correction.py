"""Bias correction: quantized weights and inputs shift the mean of a layer's outputs, and its bias can take that back.

Nagel, van Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization and
Bias Correction", ICCV 2019, section 4.2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantizers.batches import Batches, called, collect, copied
from quantizers.calling import Forward, call, leaves
from quantizers.copying import evaluating
from quantizers.functional import FEW_BITS, WIDE_BITS, computed_in, row_of
from quantizers.layers import QuantLayer, float_class, tailor
from quantizers.observers import OnProgress, first_input, no_progress
from quantizers.policy import QUANTIZABLE

TOLERANCE = 1e-4  # of the outputs' size: what a layer may compute otherwise for being no sum of products
SAME_WEIGHT = 1e-5  # what weights may differ by, all together, that were computed anew
MOST_BYTES = 1 << 30  # of the largest output of a layer, for which all images are taken through the network together
Shape = tuple[int, ...]


class MeanInput:
    """The mean of a layer's inputs over all images that it is called with: a forward pre-hook.

    A convolution's is a map (C, H, W), one for each size of inputs, so that a layer's outputs for it
    are the mean outputs, whatever happens at the borders. A Linear's is a vector. Memory: that of
    one image, in float64.
    """

    def __init__(self) -> None:
        """Have seen nothing yet."""
        self.sums: dict[Shape, Tensor] = {}
        self.counts: dict[Shape, int] = {}
        self.is_alone = True  # whether nothing but one tensor was ever given

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any] | None = None) -> None:
        """Add the input of one call."""
        named = named or {}
        x = first_input(module, inputs, named)
        if len(inputs) + len(named) != 1 or not isinstance(x, Tensor):
            self.is_alone = False
            return
        x = _images(module, x.detach())
        if not len(x):
            return
        total = x.sum(0, dtype=computed_in(x)).double()  # images of one batch are few: float32 will do
        if total.shape in self.sums:
            self.sums[total.shape] += total
            self.counts[total.shape] += len(x)
        else:
            self.sums[total.shape] = total
            self.counts[total.shape] = len(x)

    def maps(self) -> Iterator[tuple[Tensor, int]]:
        """Return the mean inputs, with one image in a batch, and of how many images each is the mean."""
        for shape, total in self.sums.items():
            yield (total / self.counts[shape]).unsqueeze(0), self.counts[shape]


def _images(module: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's input as a batch: of vectors for a Linear, of images for a convolution."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    if x.dim() == module.weight.dim() - 1:  # type: ignore[union-attr,operator]
        return x.unsqueeze(0)
    return x


class MeanOutput:
    """The mean of a layer's outputs, per channel: the sum over images and places, and their number."""

    def __init__(self) -> None:
        """Have seen nothing yet."""
        self.total: Tensor | None = None
        self.places = 0
        self.calls = 0
        self.first = 0  # the place of the first call among those of all layers
        self.largest = 0  # bytes of all images' outputs

    def add(self, module: nn.Module, output: Tensor, weight: int = 1) -> None:
        """Add the outputs of one call.

        Args:
            module: The layer.
            output: Its outputs.
            weight: How often each of them counts.
        """
        rows = _channels_last(module, output.detach())
        self.places += len(rows) * weight
        self.calls += 1
        self.largest += rows.numel() * rows.element_size()
        total = rows.sum(0, dtype=torch.float64) * weight
        if self.total is None:
            self.total = total
        else:
            self.total += total

    def mean(self) -> Tensor | None:
        """Return the mean, (C_out,); None if there were no outputs."""
        if self.total is None or not self.places:
            return None
        return self.total / self.places


def _channels_last(module: nn.Module, output: Tensor) -> Tensor:
    """Return a layer's outputs as rows, one for each image and place."""
    channel = -1
    if not isinstance(module, nn.Linear):
        channel = 1 - module.weight.dim()  # type: ignore[union-attr,operator]
    last = output.movedim(channel, -1)
    return last.reshape(-1, last.shape[-1])


@torch.no_grad()
def correct_weights(layer: QuantLayer, inputs: MeanInput) -> bool:
    """Set a layer's `bias_shift`: at every width b += E[W x] - E[Wq x], by its mean input x.

    Inputs are taken as they are in float. With padding, stride and groups this is exact, since a
    layer's outputs are linear in its inputs. A layer of somebody else's class for which that isn't
    true stays without correction.

    Args:
        layer: The layer, calibrated, in evaluation mode.
        inputs: Its mean input.

    Returns:
        Whether the layer is corrected; a layer that was never called has nothing to correct.
    """
    maps = list(inputs.maps())
    if not inputs.is_alone:
        return False
    if not maps:
        return True
    bits = layer.weight_bits, layer.activation_bits
    layer.bias_shift = None
    known = len(layer.weight_error)
    shift = layer.weight.new_zeros(known, layer.weight.shape[0], dtype=torch.float64)
    try:
        layer.activation_bits = None
        layer.weight_bits = None
        if not _is_linear(layer, maps):
            return False
        expected = _mean_output(layer, maps)
        for width in (WIDE_BITS, *FEW_BITS):
            if layer.only_bits is not None and width != layer.only_bits[0]:
                continue
            if row_of(width) < known and layer.scheme.takes(width, None, layer.signed):
                layer.weight_bits = width
                shift[row_of(width)] = expected - _mean_output(layer, maps)
        layer.bias_shift = shift.to(layer.weight.dtype)
        if not _is_corrected(layer, maps, expected):
            layer.bias_shift = None
        return layer.bias_shift is not None
    finally:
        layer.weight_bits, layer.activation_bits = bits
        layer.cache.clear()  # weights of widths that may never be asked for


def _is_linear(layer: QuantLayer, maps: list[tuple[Tensor, int]]) -> bool:
    """Say whether a layer is linear in its input, so that mean inputs give mean outputs; torch's own layers are.

    That of somebody else's class is asked for f(x) + f(-x) = 2 f(0), which a ReLU in it breaks.
    """
    if float_class(layer) in QUANTIZABLE:
        return True
    for inputs, _ in maps:
        x = inputs.to(layer.weight.dtype)
        above, below, middle = layer.forward(x), layer.forward(-x), layer.forward(torch.zeros_like(x))
        if not isinstance(above, Tensor):
            return False
        size = above.abs().max() + below.abs().max()
        room = max(TOLERANCE, 8 * torch.finfo(above.dtype).eps)
        if not (above + below - 2 * middle).abs().max() <= room * size:
            return False
    return True


def _mean_output(layer: QuantLayer, maps: list[tuple[Tensor, int]]) -> Tensor:
    """Return a layer's mean outputs at its present bits, (C_out,), float64."""
    means = MeanOutput()
    for inputs, images in maps:
        means.add(layer, layer.forward(inputs.to(layer.weight.dtype)), images)
    mean = means.mean()
    assert mean is not None
    return mean


def _is_corrected(layer: QuantLayer, maps: list[tuple[Tensor, int]], expected: Tensor) -> bool:
    """Say whether a layer's mean outputs are corrected at the last width that was set."""
    left = (_mean_output(layer, maps) - expected).abs().max()
    return bool(left <= TOLERANCE * expected.abs().max().clamp_min(1))


class Correction(NamedTuple):
    """What `correct_bias` did.

    Attributes:
        kept: Whether the network's outputs came no further away from the float network's.
        before: How far they were (`distance`).
        after: How far they are, or would be.
        errors: The largest mean error of a channel that was taken back, by layer.
    """

    kept: bool
    before: float
    after: float
    errors: dict[str, float]


def correct_bias(
    qnetwork: nn.Module,
    network: nn.Module,
    batches: Batches,
    *,
    on_progress: OnProgress = no_progress,
    forward: Forward | None = None,
) -> Correction:
    """Correct the biases of a quantized network for the policy that it has now, layer by layer.

    b += E[y] - E[yq], where y are a layer's outputs in the float network and yq those in the
    quantized one, whose layers before it are corrected already (Nagel et al., ICCV 2019, section
    4.2.2, in the order of the layers' first calls). It takes the place of the correction that
    `quantize` makes for each width, as long as the network has this policy.

    All images go through the network together, if a layer's outputs take no more than 1 GiB, or
    else batch by batch as often as there are layers.

    Args:
        qnetwork: From `quantize`; it is changed.
        network: The float network that it was made of.
        batches: Inputs, as `quantize` takes them for `calibrate`.
        on_progress: Is told how many of how many layers are done.
        forward: What runs a network on a batch, as in `quantize`.

    Returns:
        What it did. Where the network's outputs get further away from the float network's, nothing
        is kept.

    Raises:
        ValueError: For networks that aren't of the same layers, and for what is no input.
    """
    layers = {name: module for name, module in qnetwork.named_modules() if isinstance(module, QuantLayer)}
    floats = float_layers(network, layers)
    with torch.inference_mode(False), torch.no_grad(), evaluating(network), evaluating(qnetwork):
        inputs = collect(batches, network, forward)
        expected = _mean_outputs(network, floats, inputs, forward)
        before = distance(qnetwork, network, inputs, forward)
        held = {layer: _tailored(layer) for layer in layers.values()}
        errors: dict[str, float] = {}
        order = sorted((name for name in expected if expected[name].calls), key=lambda name: expected[name].first)
        together = _together(inputs, [expected[name] for name in order])
        if together is not None:
            chosen = {name: layers[name] for name in order}
            errors = _correct_on_the_way(qnetwork, chosen, expected, together, forward)
        else:
            for done, name in enumerate(order):
                on_progress(done, len(order), "layers")
                given = _mean_outputs(qnetwork, {name: layers[name]}, inputs, forward)[name].mean()
                errors[name] = _shift(layers[name], given, expected[name].mean())
        on_progress(len(order), len(order), "layers")
        for layer in layers.values():
            tailor(layer)
        after = distance(qnetwork, network, inputs, forward)
        is_better = after <= before
        if not is_better:
            for layer, values in held.items():
                layer.tailored_for, layer.tailored, layer.tailored_shift, layer.tailored_offset = values
    return Correction(is_better, before, after, errors)


def _tailored(layer: QuantLayer) -> tuple[Any, ...]:
    return layer.tailored_for, layer.tailored, layer.tailored_shift, layer.tailored_offset


def float_layers(network: nn.Module, layers: Mapping[str, QuantLayer]) -> dict[str, nn.Module]:
    """Find the layers of the float network that a quantized one was made of.

    Args:
        network: The float network.
        layers: The quantized layers by name.

    Returns:
        The float layers by the same names.

    Raises:
        ValueError: Naming the first layer that isn't there, or whose weight or bias has other values.
    """
    if not layers:
        raise ValueError("the network isn't quantized: give what `quantize` returned")
    modules = dict(network.named_modules())
    floats = {}
    for name, layer in layers.items():
        module = modules.get(name)
        if isinstance(module, QuantLayer):
            raise ValueError(
                f"layer {name!r} of the float network is quantized: give the network that was given to `quantize`"
            )
        weight = getattr(module, "weight", None)
        if module is None or weight is None or weight.shape != layer.weight.shape:
            raise ValueError(
                f"the float network has no layer {name!r} of {tuple(layer.weight.shape)} weights: it is another one"
            )
        if not _has_values_of(module, layer):
            raise ValueError(
                f"layer {name!r} has another weight or bias in the float network: give the very network that was given to "
                "`quantize` (what equalize, smooth or fold_batch_norm returned), or for one that was trained since then "
                "`float_copy` of the quantized one"
            )
        floats[name] = module
    return floats


def _has_values_of(module: nn.Module, layer: QuantLayer) -> bool:
    """Say whether a float layer has the weight and the bias of a quantized one, up to how weights that are computed round."""
    for name in ("weight", "bias"):
        one, other = getattr(module, name, None), getattr(layer, name, None)
        if one is None or other is None:
            if one is not other:
                return False
            continue
        if one.shape != other.shape:
            return False
        one, other = one.detach().to(other), other.detach()
        most = SAME_WEIGHT * other.abs().sum()
        if not (torch.equal(one, other) or (one - other).abs().sum() <= most):
            return False
    return True


def _mean_outputs(
    network: nn.Module, layers: Mapping[str, nn.Module], inputs: list[Any], forward: Forward | None
) -> dict[str, MeanOutput]:
    """Run a network over all inputs, and return the mean outputs of some layers of it by name."""
    means = {name: MeanOutput() for name in layers}
    order = itertools.count()

    def looking(mean: MeanOutput) -> Any:
        def look(module: nn.Module, given: Any, output: Any) -> None:
            # A layer of somebody else's class that returns more than one tensor stays as it is.
            if not isinstance(output, Tensor):
                return
            if not mean.calls:
                mean.first = next(order)
            mean.add(module, output)

        return look

    # Before other hooks, which may make something else of an output: it is the layer's that is corrected.
    handles = [layers[name].register_forward_hook(looking(mean), prepend=True) for name, mean in means.items()]
    try:
        for batch in inputs:
            called(network, copied(batch), forward)
    finally:
        for handle in handles:
            handle.remove()
    return means


def _together(inputs: list[Any], means: list[MeanOutput]) -> Tensor | None:
    """Return all images as one batch; None if that can't be, takes too much memory, or some layer is called twice."""
    if any(mean.calls != len(inputs) or mean.largest > MOST_BYTES for mean in means):
        return None
    if len(inputs) == 1:
        return inputs[0]
    if not all(isinstance(batch, Tensor) and batch.shape[1:] == inputs[0].shape[1:] for batch in inputs):
        return None
    return torch.cat(inputs)


def _correct_on_the_way(
    qnetwork: nn.Module,
    layers: Mapping[str, QuantLayer],
    expected: Mapping[str, MeanOutput],
    inputs: Any,
    forward: Forward | None,
) -> dict[str, float]:
    """Correct each layer in one forward pass, before its outputs go on to the next."""
    errors = {}

    def correcting(name: str) -> Any:
        def correct(layer: QuantLayer, given: Any, named: Any, output: Tensor) -> Tensor:
            mean = MeanOutput()
            mean.add(layer, output)
            errors[name] = _shift(layer, mean.mean(), expected[name].mean())
            return layer.forward(*given, **named)

        return correct

    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(correcting(name), prepend=True, with_kwargs=True))
    try:
        (forward or call)(qnetwork, copied(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return errors


def _shift(layer: QuantLayer, given: Tensor | None, expected: Tensor | None) -> float:
    """Add to a layer's bias what its mean outputs lack. Returns the most of it."""
    if given is None or expected is None:
        return 0.0
    lack = expected - given
    if not lack.isfinite().all():
        return math.inf
    before = layer.shift_of_bias()
    if before is not None:
        shift = before.double() + lack
    else:
        shift = lack
    tailor(layer, shift=shift)
    return float(lack.abs().max())


def _check_comparable(expected: list[Tensor], given: list[Tensor]) -> None:
    if not expected:
        raise ValueError("the float network returns no tensor, so that nothing can be compared with it")
    shapes, others = [tuple(one.shape) for one in expected], [tuple(other.shape) for other in given]
    if shapes != others:
        raise ValueError(f"the float network's outputs have shapes {shapes}, the quantized one's {others}: it is another one")
    if not all(bool(one.isfinite().all()) for one in expected):
        raise ValueError(
            "the float network's outputs on the calibration images aren't finite: look at the images and the weights"
        )


def distance(qnetwork: nn.Module, network: nn.Module, inputs: list[Any], forward: Forward | None = None) -> float:
    """Tell how far a quantized network's outputs are from the float network's.

    Args:
        qnetwork: The quantized network.
        network: The float network.
        inputs: Batches of inputs, as `batches.collect` returns them.
        forward: What runs a network on one of them, as in `quantize`.

    Returns:
        For class scores, (N, classes), the mean Kullback-Leibler divergence, in nats; for other
        outputs the squared error as a share of their squares. Infinite for outputs that aren't finite.

    Raises:
        ValueError: For inputs that the networks can't be called with, for a float network whose outputs
            aren't finite, and for outputs that can't be compared.
    """
    divergence = error = energy = 0.0
    count = 0
    are_scores = True
    for batch in inputs:
        expected = leaves(called(network, copied(batch), forward))
        given = leaves(called(qnetwork, copied(batch), forward))
        _check_comparable(expected, given)
        are_scores = are_scores and len(expected) == 1 and expected[0].dim() == 2 and expected[0].shape[1] > 1
        for one, other in zip(expected, given, strict=True):
            one, other = one.double(), other.double()
            if not other.isfinite().all():
                return math.inf
            error += float((one - other).square().sum())
            energy += float(one.square().sum())
            if are_scores:
                before, after = one.log_softmax(1), other.log_softmax(1)
                divergence += float((before.exp() * (before - after)).sum())
                count += len(one)
    if are_scores:
        return divergence / count
    return error / max(energy, 1e-300)

"""What a program of integers computes: a slow, exact reference, and its comparison with the fake-quantized network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.deployment.lowering import integer_activations
from haq.deployment.nodes import Taps, Window, max_pool, sum_pool, sum_ranges
from haq.deployment.program import (
    Array,
    Codes,
    Convolution,
    Epilogue,
    Fixed,
    FloatConvolution,
    Lookup,
    Move,
    Pool,
    Product,
    Program,
    Quantize,
    Resize,
    Table,
    Value,
)
from haq.deployment.tables import to_codes
from haq.store.units import percent
from hw_models.tvm_cpu.conv import Conv, fma

OUTPUT_SHARE = 0.02  # of the largest output: what may be between outputs that were computed from the same integers


def check_images(images: Array, shape: tuple[int, ...], taker: str = "the program takes images") -> None:
    """Raise ValueError unless images are what a network takes.

    Args:
        images: What was given.
        shape: Channels, height and width of an image; channels and length of a signal; or the size of a vector.
        taker: How the message begins.

    Raises:
        ValueError: Unless they are finite, float32 and (N, *shape).
    """
    if images.shape[1:] != tuple(shape) or images.dtype != np.float32:
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"{taker} (N, {sizes}), not {images.dtype} of {images.shape}; they must be float32")
    if not np.isfinite(images).all():
        worst = int(np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(1))[0])
        raise ValueError(f"{taker} of finite numbers; image {worst} has NaN or infinity")


def run(
    program: Program, images: Array, given: Mapping[str, Array] | None = None
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.int32]]]:
    """Compute what a program does with images, slowly and exactly.

    Args:
        program: The program.
        images: Images (N, C, H, W), or signals (N, C, L), or vectors.
        given: Integers by the names of convolution steps, that layers compute with in place of those that reach them.

    Returns:
        The outputs, (N, classes) or (N, C, H, W), and the integers that enter each layer, (N, C, H, W), by the name of the
        convolution step.

    Raises:
        ValueError: For images of another shape than the program's, not of float32, or with NaN or infinity in them.
    """
    held, entered = _compute(program, images, given)
    output = _first(held[program.output]).reshape(-1, *program.output_dims[1:])
    return np.ascontiguousarray(output), entered


def compute_values(program: Program, images: Array) -> dict[str, Array]:
    """Compute all values of a program as they are stored, (N, *shape), by name; see `run`."""
    return _compute(program, images, None)[0]


def _compute(
    program: Program, images: Array, given: Mapping[str, Array] | None
) -> tuple[dict[str, Array], dict[str, NDArray[np.int32]]]:
    check_images(images, program.input_dims[1:])
    held: dict[str, Array] = {program.input: _stored(images, program.values[program.input])}
    entered: dict[str, NDArray[np.int32]] = {}
    for step in program.steps:
        if isinstance(step, Quantize):
            codes = program.values[step.output].representation
            assert isinstance(codes, Codes)
            held[step.output] = to_codes(held[step.input] / np.float32(codes.scale), codes)
            continue
        if isinstance(step, Move):
            held[step.output] = _moved(step, held, program.values[step.output])
            continue
        if isinstance(step, Lookup):
            for output, entries in zip(step.outputs, step.entries, strict=True):
                held[output] = entries[held[step.input]]
            continue
        x = _integers(step.input, held, program.values)
        if isinstance(step, Convolution | FloatConvolution):
            representation = program.values[step.input].representation
            if isinstance(representation, Codes):
                entered[step.name] = _first(x)
                if given is not None and step.name in given:
                    x = _last(given[step.name].reshape(entered[step.name].shape)).astype(np.int32)
            sums = _layer_sums(step, x, representation)
        elif isinstance(step, Pool):
            sums = _pool_sums(step, x)
        elif isinstance(step, Product):
            sums = x.astype(np.float32) * _integers(step.other, held, program.values).astype(np.float32)
        elif isinstance(step, Resize):
            sums = _between_rows(step, x.astype(np.float32))
        else:
            sums = x
        _finish(step.epilogue, sums, held, program.values)
    return held, entered


def _stored(images: Array, value: Value) -> Array:
    """Return images with their channels last."""
    height, width, channels = value.shape
    return _last(images.reshape(-1, channels, height, width))


def _integers(name: str, held: Mapping[str, Array], values: Mapping[str, Value]) -> Array:
    """Return a value's integers, of codes without their zero; of Float the numbers."""
    representation = values[name].representation
    if isinstance(representation, Codes):
        made: Array = held[name].astype(np.int32) - representation.zero
        return made
    return held[name]


def _moved(step: Move, held: Mapping[str, Array], value: Value) -> Array:
    zero: Any = 0
    if isinstance(value.representation, Codes):
        zero = to_codes(np.zeros(1), value.representation)[0]
    count = len(held[step.inputs[0]])
    dtype = np.dtype(value.representation.dtype)
    parts = [held[name].reshape(count, -1) for name in step.inputs]
    flat = np.concatenate([*parts, np.full((count, 1), zero, dtype)], 1)
    return flat[:, step.index.reshape(-1)].reshape(count, *value.shape)


def _between_rows(step: Resize, x: Array) -> Array:
    """Interpolate bilinearly: along the rows' columns, then between the rows."""
    weight = step.columns.weight.astype(np.float32)[:, None]
    top = _between_columns(x[:, step.rows.first], step.columns, weight)
    bottom = _between_columns(x[:, step.rows.second], step.columns, weight)
    return fma(bottom - top, step.rows.weight.astype(np.float32)[:, None, None], top)


def _between_columns(x: Array, columns: Taps, weight: Array) -> Array:
    left = x[:, :, columns.first]
    return fma(x[:, :, columns.second] - left, weight, left)


def _layer_sums(step: Convolution | FloatConvolution, x: Array, representation: object) -> Array:
    if isinstance(step, Convolution):
        return _convolve(step.conv, x, step.weights, torch.float64)  # exact below 2^53, at 16 bits too
    if isinstance(representation, Codes):
        x = x.astype(np.float32) * np.float32(representation.scale)
    return _convolve(step.conv, x, step.weights, torch.float32)


def _pool_sums(step: Pool, x: Array) -> Array:
    image = torch.from_numpy(_first(x).astype(np.float64))
    if step.kind == "max":
        return _last(max_pool(image, step.window, step.output_size).numpy())
    if step.ranges is not None:
        assert step.factors is not None
        sums = _last(sum_ranges(image, step.ranges).numpy())
        made: Array = sums.astype(np.float32) * step.factors[:, :, None]
        return made
    assert step.window is not None
    return _last(sum_pool(image, step.window, step.output_size).numpy())


def _first(x: Array) -> Array:
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _last(x: Array) -> Array:
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def _convolve(conv: Conv, x: Array, weights: Array, dtype: torch.dtype) -> Array:
    window = Window(conv.kernel, conv.stride, conv.padding, conv.dilation)
    image = torch.from_numpy(_first(x.reshape(len(x), *conv.input_size, conv.in_channels))).to(dtype)
    image = window.padded(image, conv.output_size, 0.0)
    made = F.conv2d(image, torch.from_numpy(weights).to(dtype), None, conv.stride, 0, conv.dilation, conv.groups)
    return _last(made.numpy())


def _finish(epilogue: Epilogue, sums: Array, held: dict[str, Array], values: Mapping[str, Value]) -> None:
    v = fma(sums.astype(np.float32), epilogue.multiplier, epilogue.offset)
    for residual in epilogue.residuals:
        v = fma(_integers(residual.value, held, values).astype(np.float32), residual.factor, v)
    if epilogue.slope is not None:
        v = np.where(v >= 0, v, v * epilogue.slope)
    if epilogue.table is not None:
        v = apply_table(epilogue.table, v)
    v = v.clip(np.float32(epilogue.low), np.float32(epilogue.high))
    for output in epilogue.outputs:
        u = v * np.float32(output.factor)
        representation = values[output.value].representation
        if isinstance(representation, Codes):
            held[output.value] = to_codes(u, representation)
        elif isinstance(representation, Fixed):
            held[output.value] = np.rint(u).clip(-representation.limit, representation.limit).astype(np.int32)
        else:
            held[output.value] = u


def apply_table(table: Table, v: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute a table's function as `program.Table` says."""
    start, inverse = np.float32(table.start), np.float32(table.inverse)
    i = np.floor(fma(v, inverse, start)).clip(0, table.segments - 1)
    r = fma(v, inverse, (start - i).astype(np.float32))
    constant, linear, square = table.coefficients[i.astype(np.int64)].transpose(-1, *range(v.ndim))
    return fma(fma(square, r, linear), r, constant)


@dataclass(frozen=True)
class LayerDifference:
    """The integers that enter a layer in all images, against those of the fake-quantized network.

    values      how many there are
    different   how many of them are others, and by how many steps at most (`largest`)
    own         how many are others although every layer before got the same integers: what this step's rounding does, ties
                and the last digits of float32; the rest of `different` follows from those of earlier layers
    own_largest by how many steps those are
    """

    layer: str
    values: int
    different: int
    largest: int
    own: int
    own_largest: int


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    `same_answers` is the share of images with the same largest output, `output_difference` the largest between outputs.
    `fault` says, in words that continue "it", where they differ by more than rounding; nothing if they don't.
    """

    layers: tuple[LayerDifference, ...]
    same_answers: float
    output_difference: float
    fault: str = ""

    @property
    def values(self) -> int:
        """How many integers enter layers."""
        return sum(layer.values for layer in self.layers)

    @property
    def different(self) -> int:
        """How many of them are others."""
        return sum(layer.different for layer in self.layers)

    @property
    def own(self) -> int:
        """How many are others by a layer's own rounding."""
        return sum(layer.own for layer in self.layers)

    def __str__(self) -> str:
        """Describe each layer that differs in a line, and all of them in the last."""
        lines = [
            f"{x.layer}: {x.different} of {x.values} integers differ, by up to {x.largest}; {x.own} by its own rounding"
            for x in self.layers
            if x.different
        ]
        equal = len(self.layers) - len(lines)
        lines.append(
            f"{equal} of {len(self.layers)} layers are equal bit for bit; of {self.values} integers {self.different} differ, "
            f"{self.own} by their own rounding; same answer on {percent(self.same_answers)} of the images, "
            f"outputs differ by up to {self.output_difference:.3g}"
        )
        return "\n".join(lines)


@torch.no_grad()
def fake_quantized(network: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, NDArray[np.int32]]]:
    """Return the outputs of the fake-quantized network, and the integers that enter its layers, by the names of `run`.

    The integers are in the layers' own shapes, with what `padding_mode` puts around them unless it is zeros. For images of
    float64 all but the quantized weights is computed in float64.
    """
    network = Q.copy_network(network).eval()
    if images.dtype == torch.float64:
        for layer in Q.quant_layers(network).values():
            bias = layer.effective_bias()
            if bias is not None:
                layer.bias = nn.Parameter(bias)
            layer.weight = nn.Parameter(layer.quantized_weight())
            layer.weight_bits = None
        network.double()
    entered: dict[str, NDArray[np.int32]] = {}

    def watch(name: str, layer: Q.QuantLayer) -> None:
        codes = integer_activations(name, layer)
        calls = 0

        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal calls
            calls += 1
            key = name
            if calls > 1:
                key = f"{name}@{calls}"
            real = layer.scheme.activation(layer, inputs[0], codes.bits)
            made = (real / codes.scale).round()
            if getattr(module, "padding_mode", "zeros") != "zeros":
                made = F.pad(made, module._reversed_padding_repeated_twice, mode=module.padding_mode)  # type: ignore[arg-type]
            entered[key] = made.to(torch.int32).numpy()

        layer.register_forward_pre_hook(before)

    for name, layer in Q.quant_layers(network).items():
        if layer.activation_bits is not None:
            watch(name, layer)
    return network(images), entered


def between_layers(network: nn.Module) -> float:
    """Say by how much what enters a layer may be off where all layers before it got the same integers.

    Where branches meet that are rounded on their own, each may be a step off at a tie. A step there may be several of the
    layer's: its grid can be coarser, since it covers what is below zero too.

    Args:
        network: The quantized network.

    Returns:
        A real number, which an integer of the layer's own rounding comes on top of; 0 without residual quantizers.
    """
    return max((2 * quantizer.scale for quantizer in Q.residual_quantizers(network).values()), default=0.0)


def compare(network: nn.Module, program: Program, images: Tensor) -> Comparison:
    """Compare a program with the fake-quantized network it was made of.

    One integer that differs at a tie makes others differ behind it, at 8 bits many: the fake-quantized network in float32
    and in float64 (give images of float64) differ from each other as much. So both are counted: all, and those that a
    layer's own rounding made.

    Args:
        network: The quantized network.
        program: Its program.
        images: Images (N, C, H, W).

    Returns:
        What differs, by layer and in the answers.

    Raises:
        ValueError: If there are no images.
    """
    plain = images.float().numpy()
    if not len(plain):
        raise ValueError("a program is compared on images, and there are none")
    outputs, entered = run(program, plain)
    expected, before = fake_quantized(network, images)
    outputs_alone, alone = run(program, plain, before)
    layers = []
    for name, q in before.items():
        if name not in entered:
            continue
        gap = np.abs(entered[name].reshape(q.shape) - q)
        own = np.abs(alone[name].reshape(q.shape) - q)
        counts = (int((gap > 0).sum()), int(gap.max()), int((own > 0).sum()), int(own.max()))
        layers.append(LayerDifference(name, q.size, *counts))
    real = expected.numpy().reshape(outputs.shape)
    same = outputs.argmax(1) == real.argmax(1)
    fault = _fault(program, layers, set(before), set(entered), between_layers(network))
    apart = float(np.abs(outputs_alone - real).max())
    if not fault and not apart <= OUTPUT_SHARE * float(np.abs(real).max()):
        fault = f"gives outputs that are off by {apart:.3g} where every layer gets the same integers"
    return Comparison(tuple(layers), float(same.mean()), float(np.abs(outputs - real).max()), fault)


def _fault(program: Program, layers: list[LayerDifference], expected: set[str], entered: set[str], between: float) -> str:
    """Say which layer gets other integers than in the network, by more than its own rounding and what is rounded between."""
    for name in sorted(expected ^ entered):
        if name in entered:
            return f"rounds what enters layer {name!r}, which the network doesn't"
        return f"doesn't round what enters layer {name!r}, which the network does"
    inputs = {step.name: step.input for step in program.steps if isinstance(step, Convolution | FloatConvolution)}
    for layer in layers:
        codes = program.values[inputs[layer.layer]].representation
        assert isinstance(codes, Codes)
        if layer.own_largest > codes.one_step + between / codes.scale:
            return f"gives layer {layer.layer!r} integers that are off by up to {layer.own_largest}, from the same ones before"
    return ""


def check(network: nn.Module, program: Program, images: Tensor) -> None:
    """Check that a program computes what its network does, but for rounding.

    Args:
        network: The quantized network.
        program: Its program.
        images: Images (N, C, H, W) to compare on.

    Raises:
        ValueError: Naming the layer, if it doesn't.
    """
    found = compare(network, program, images)
    if found.fault:
        # Sums that nearly cancel lose digits in the network's own float32.
        found = compare(network, program, images.double())
    if found.fault:
        raise ValueError(f"{type(network).__name__} can't be deployed: its integer program {found.fault}")

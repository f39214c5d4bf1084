"""A quantized network of any operations, with inputs and outputs of any structure, as an ONNX file.

What `haq.deployment.graph` can't write down, torch.export can. The file has the integers of weights and the operations of
the fake-quantized network, in float32, for any number of samples.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import quantizers as Q
from haq.deployment.exporter import AnySamples, Verdict
from haq.deployment.interpreter import OUTPUT_SHARE
from haq.deployment.lowering import integer_weights
from haq.store.files import write
from hw_models.extras import install_line
from quantizers.calling import call, count_of, leaves, map_tensors, samples

CHECKED = 4  # samples on which a file is compared before it is put in its place
TOGETHER = 64  # samples that are compared at once
INTEGERS, STEPS = "weight_integers", "weight_steps"  # tensors of a layer


def export_any(network: nn.Module, given: AnySamples, path: Path) -> None:
    """Write a network to an ONNX file, if the file computes what the network does.

    Inputs are named by the network's arguments or a mapping's keys, outputs by a mapping's keys, or output_0, output_1 ...
    The first dimension of what has one entry for each sample may have any size, and so may the second of token ids.

    Args:
        network: The quantized network, in evaluation mode.
        given: Samples, and what runs the network on them.
        path: The file.

    Raises:
        ValueError: For a network that torch can't write down, and where the file computes something else.
        ImportError: Naming what to install.
    """
    package("onnxscript")
    count = count_of(given.example[0])
    inputs, targets = samples(given.example, count, 0, _together(given.example[0], 2))
    names = [name for name, _ in _named(inputs, network, given.forward)]
    runner = _Runner(_with_integers(network), inputs, targets, given.forward)
    tensors = tuple(leaves(inputs))
    with torch.no_grad():
        outputs = [name for name, _ in _parts_of(runner.outputs(*tensors), "output")]
    if not outputs:
        raise ValueError(f"{type(network).__name__} can't be deployed: it returns no tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(
                runner, tensors, dynamic_shapes=(_sizes(tensors, inputs, min(count, 2)),), strict=False
            )
            program: Any = torch.onnx.export(
                exported, tensors, input_names=names, output_names=outputs, optimize=False, verbose=False, dynamo=True
            )
        except Exception as error:  # whatever in a network torch can't follow shows as one of many kinds of errors
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(
                f"{type(network).__name__} can't be deployed: torch can't write down what it does ({reason})"
            ) from error
    content: bytes = program.model_proto.SerializeToString()
    verdict = _compared(network, given, content, CHECKED)
    if verdict.most_different:
        raise ValueError(f"{type(network).__name__} can't be deployed: as a file of onnx it {verdict.most_different}")
    write(path, content)


def compare_any(network: nn.Module, given: AnySamples, path: Path) -> Verdict:
    """Run a file of `export_any` beside the network in PyTorch.

    Args:
        network: The quantized network.
        given: The samples.
        path: The file.

    Returns:
        What differs, of every output.
    """
    found = _compared(network, given, path.read_bytes(), count_of(given.compared[0]))
    rows = [(found.what, f"{found.same:,} of {found.count:,} test samples")]
    for name, (difference, largest) in found.outputs.items():
        rows.append((f"largest difference of {name} from PyTorch's", f"{difference:.3g} (the largest value is {largest:.3g})"))
    return Verdict(found.same == found.count, tuple(rows))


def package(name: str) -> Any:
    """Import onnx, onnxruntime, onnxscript or qonnx: they are optional, so it is done where they are needed.

    Raises:
        ImportError: With what to install, if it isn't there.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"ONNX files need the package {name.partition('.')[0]}: {install_line('onnx')}") from error


class _Comparison:
    """What came of running a file beside a network.

    Attributes:
        count: How many samples there were.
        same: How many of them gave the same: the same class, where outputs are the scores of classes, or else numbers
            that differ by no more than OUTPUT_SHARE of the largest.
        what: What is counted, in words.
        outputs: By name, the largest difference and the largest value.
    """

    def __init__(self) -> None:
        """Have compared nothing."""
        self.count = self.same = 0
        self.what = "same outputs as in PyTorch"
        self.outputs: dict[str, tuple[float, float]] = {}

    @property
    def most_different(self) -> str:
        """What is wrong with the file, in words that continue "it", where no sample gives the same; nothing otherwise."""
        if self.same:
            return ""
        name, (difference, largest) = max(self.outputs.items(), key=lambda item: item[1][0])
        return f"gives other numbers: {name} is off by {difference:.3g}, where the largest is {largest:.3g}"

    def add(self, names: list[str], expected: list[Any], found: list[Any], count: int) -> None:
        """Add the outputs of some samples."""
        same = np.ones(count, bool)
        scores = len(expected) == 1 and expected[0].ndim == 2 and expected[0].shape[0] == count and expected[0].shape[1] > 1
        for name, one, other in zip(names, expected, found, strict=True):
            one, other = one.astype(np.float64), other.reshape(one.shape).astype(np.float64)
            apart, largest = np.abs(one - other), float(np.abs(one).max(initial=0))
            before = self.outputs.get(name, (0.0, 0.0))
            self.outputs[name] = max(before[0], float(apart.max(initial=0))), max(before[1], largest)
            if scores:
                self.what = "same answer as in PyTorch"
                same = one.argmax(1) == other.argmax(1)
            elif one.ndim and len(one) == count:
                same &= (apart <= OUTPUT_SHARE * largest).reshape(count, -1).all(1)
            else:
                same &= bool((apart <= OUTPUT_SHARE * largest).all())
        self.same += int(same.sum())
        self.count += count


@torch.no_grad()
def _compared(network: nn.Module, given: AnySamples, content: bytes, most: int) -> _Comparison:
    session = package("onnxruntime").InferenceSession(content, providers=["CPUExecutionProvider"])
    taken = [entry.name for entry in session.get_inputs()]
    made = [entry.name for entry in session.get_outputs()]
    found = _Comparison()
    count = count_of(given.compared[0])
    together = _together(given.compared[0], TOGETHER)
    for begin in range(0, min(most, count), together):
        inputs, targets = samples(given.compared, count, begin, min(begin + together, most, count))
        feeds = {name: tensor.numpy() for name, tensor in _named(inputs, network, given.forward)}
        expected = leaves(_run(network, inputs, targets, given.forward))
        outputs = session.run(made, {name: feeds[name] for name in taken})
        found.add(made, [tensor.numpy() for tensor in expected], outputs, count_of(inputs))
    return found


class _Runner(nn.Module):
    """A network that is called with the tensors of its inputs, and returns those of its outputs."""

    def __init__(self, network: nn.Module, inputs: Any, targets: Any, forward: Callable[..., Any] | None) -> None:
        super().__init__()
        self.network = network
        self._inputs, self._targets, self._forward = inputs, targets, forward

    def outputs(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        inputs = map_tensors(self._inputs, lambda tensor: next(given))
        return _run(self.network, inputs, self._targets, self._forward)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaves(self.outputs(*tensors)))


def _run(network: nn.Module, inputs: Any, targets: Any, forward: Callable[..., Any] | None) -> Any:
    inputs = map_tensors(inputs, torch.clone)
    if forward is not None:
        return forward(network, (inputs, targets))
    return call(network, inputs)


def _named(inputs: Any, network: nn.Module, forward: Callable[..., Any] | None) -> list[tuple[str, Tensor]]:
    """Return the tensors of inputs with the names that they have in a file."""
    if forward is None and isinstance(inputs, tuple):
        parameters = list(inspect.signature(network.forward).parameters)
        if len(parameters) >= len(inputs):
            return [pair for name, part in zip(parameters, inputs, strict=False) for pair in _parts_of(part, name)]
    return list(_parts_of(inputs, "input"))


def _parts_of(structure: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Go through the tensors of a structure, each with its name: that of its key, or that of the structure with a number."""
    if isinstance(structure, Tensor):
        yield name, structure
        return
    parts: dict[str, Any] = {}
    if isinstance(structure, Mapping):
        parts = {str(key): value for key, value in structure.items()}
    elif isinstance(structure, list | tuple):
        parts = {f"{name}_{number}": value for number, value in enumerate(structure)}
    elif is_dataclass(structure) and not isinstance(structure, type):
        parts = {field.name: getattr(structure, field.name) for field in fields(structure)}
    elif leaves(structure):
        yield name, leaves(structure)[0]
    for key, part in parts.items():
        yield from _parts_of(part, key)


def _together(inputs: Any, most: int) -> int:
    """Return how many samples a file takes at a time: of a list, as of a detector's images, it has an input for each."""
    if isinstance(inputs, list):
        return 1
    return most


def _sizes(tensors: tuple[Tensor, ...], inputs: Any, count: int) -> tuple[dict[int, Any], ...]:
    """Return which dimensions of inputs may have any size: of samples, of tokens, and of images in a list."""
    if isinstance(inputs, list):
        return tuple(dict.fromkeys(range(1, tensor.dim()), torch.export.Dim.AUTO) for tensor in tensors)
    tokens = {tensor.shape[:2] for tensor in tensors if tensor.dim() == 2 and not tensor.is_floating_point()}
    sizes: list[dict[int, Any]] = []
    for tensor in tensors:
        free: dict[int, Any] = {}
        if tensor.dim() and len(tensor) == count:
            free[0] = torch.export.Dim.AUTO
        if tensor.shape[:2] in tokens:
            free[1] = torch.export.Dim.AUTO
        sizes.append(free)
    return tuple(sizes)


class _Integers(Q.Scheme):
    """A layer's scheme with its weights as the integers that they are, for a file."""

    def __init__(self, inner: Q.Scheme) -> None:
        self.inner = inner

    def weight(self, layer: Q.SchemeLayer, bits: int) -> Tensor:
        """Return the quantized weight."""
        made: Tensor = getattr(layer, INTEGERS).to(layer.weight.dtype) * getattr(layer, STEPS)
        return made

    def activation(self, layer: Q.SchemeLayer, x: Tensor, bits: int) -> Tensor:
        """Return the quantized input."""
        return self.inner.activation(layer, x, bits)


def _with_integers(network: nn.Module) -> nn.Module:
    """Make a copy of a quantized network that holds the integers of its weights, int8 or int16."""
    made = Q.copy_network(network).eval()
    for quantizer in Q.residual_quantizers(made).values():
        quantizer.in_operations = True
    for name, layer in Q.quant_layers(made).items():
        if layer.weight_bits is None:
            continue
        integers, steps, _ = integer_weights(name, layer)
        layer.register_buffer(INTEGERS, torch.from_numpy(integers))
        layer.register_buffer(STEPS, torch.from_numpy(steps).to(layer.weight.dtype).view(-1, *[1] * (integers.ndim - 1)))
        layer.scheme = _Integers(layer.scheme)
        layer.weight.requires_grad_()  # what is computed of it isn't kept then, but written down
    return made

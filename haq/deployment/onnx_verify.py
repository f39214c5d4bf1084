"""An ONNX file of any flavour beside the fake-quantized network that it was made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

import quantizers as Q
from haq.deployment.answers import Answers
from haq.deployment.exporter import Exporter, Verdict
from haq.deployment.interpreter import OUTPUT_SHARE, between_layers, fake_quantized
from haq.deployment.lowering import integer_activations
from haq.deployment.onnx_any import package
from haq.deployment.onnx_compact import layer_call
from haq.deployment.program import Codes
from haq.store.units import counted, percent

BATCH = 64
CHECKED = 4  # images on which a file is compared before it is put in its place

Array = NDArray[Any]
# The outputs for images, and the tensors of these names.
Runner = Callable[[Array, list[str]], tuple[Array, list[Array]]]


@dataclass(frozen=True)
class Verification:
    """An ONNX file against the fake-quantized network it was made of.

    same_answers        the share of images with the same largest output
    output_difference   the largest difference of outputs, and `largest_output` the largest output there is
    values, different   how many integers enter layers, and how many of them are others; by how many steps at most (`steps`)
    fault               in words that continue "it", where the file differs by more than rounding; nothing if it doesn't
    ties                how many of the other answers are nearly as large in PyTorch: within OUTPUT_SHARE of the largest output
    further             further lines about the file
    """

    flavour: str
    images: int
    same_answers: float
    output_difference: float
    largest_output: float
    values: int
    different: int
    steps: int
    fault: str = ""
    ties: int = 0
    further: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """Describe it in a sentence."""
        by = ""
        if self.different:
            by = f", by up to {self.steps}"
        images = counted(self.images, "images")
        return (
            f"{self.flavour}: same answer on {percent(self.same_answers)} of {images}, outputs differ by up to "
            f"{self.output_difference:.3g} (the largest is {self.largest_output:.3g}); of {self.values} integers that enter "
            f"layers {self.different} differ{by}"
        )

    def verdict(self, answers: Answers | None = None) -> Verdict:
        """Describe it in lines of a table, with the answers on all test images where there are any."""
        if answers is None:
            answers = Answers(self.images, round(self.same_answers * self.images), self.ties)
            answers.difference, answers.largest = self.output_difference, self.largest_output
        others = f"{self.different:,}"
        if self.different:
            others = f"{self.different:,}, by up to {self.steps}"
        rows = (
            *answers.rows(),
            ("integers that enter layers", f"{self.values:,}, of {counted(self.images, 'images')}"),
            ("  other than in PyTorch", others),
            *self.further,
        )
        return Verdict(answers.all_same, rows)


class VerifiedExporter(Exporter):
    """An exporter of one ONNX file, which stays only if it computes what the network does."""

    @abstractmethod
    def verify(self, path: Path, network: nn.Module, images: Tensor) -> Verification:
        """Run a file beside the network in PyTorch.

        Args:
            path: The file.
            network: The quantized network.
            images: Images (N, C, H, W).

        Returns:
            What differs.
        """

    def check_written(self, path: Path, network: nn.Module, images: Tensor) -> Verification:
        """Verify a file, and take it away if it computes something else.

        Args:
            path: The file.
            network: The quantized network.
            images: Images (N, C, H, W).

        Returns:
            What differs by rounding.

        Raises:
            ValueError: If more than rounding differs, and for a file that can't be run.
        """
        try:
            found = self.verify(path, network, images)
            if found.fault:
                raise ValueError(f"{type(network).__name__} can't be deployed: as a file of {self.name} it {found.fault}")
        except ValueError:
            path.unlink(missing_ok=True)
            raise
        return found


def compare(
    path: str | Path,
    network: nn.Module,
    images: Tensor,
    *,
    flavour: str,
    make_runner: Callable[[Any], Runner],
    held: nn.Module | None = None,
) -> Verification:
    """Run a file on images beside the network in PyTorch.

    Runners add in another order: where a float32 sum falls on the other side of a tie, an integer differs by one step, and in
    deep networks at 8 bits many do behind it (see `haq.deployment.interpreter.compare`).

    Args:
        path: The file.
        network: The quantized network that it was made of.
        images: Images (N, C, H, W).
        flavour: What the file is called in messages.
        make_runner: Makes what runs the file, of onnx's model.
        held: What the file says, if it is another network than the one that answers and outputs are compared with.

    Returns:
        What differs.

    Raises:
        ValueError: Without images, for NaN or infinity in them, and for a file that isn't ONNX.
        ImportError: Naming what to install.
    """
    if not len(images):
        raise ValueError("a file is verified on images, and there are none")
    images = images.float()
    if not images.isfinite().all():
        raise ValueError("a file is verified on images of finite numbers, and these have NaN or infinity")
    model = read_model(path)
    run = make_runner(model)
    held = held or network
    between = between_layers(held)
    inputs = {}
    for name, layer in Q.quant_layers(held).items():
        if layer.activation_bits is not None:
            inputs[name] = integer_activations(name, layer)
    # By the name of a layer, and of its call: the tensor that enters it.
    rounded: dict[str, str] = {}
    for node in model.graph.node:
        for output in node.output:
            call = layer_call(output, list(Q.quant_layers(held)))
            if call is not None:
                rounded[call] = output
    same = ties = values = different = steps = 0
    worst = largest = 0.0
    fault = ""
    for batch in images.split(BATCH):
        expected, integers = fake_quantized(held, batch)
        fault = fault or _other_layers(integers.keys() ^ rounded.keys(), rounded.keys())
        names = [name for name in integers if name in rounded]
        outputs, entered = run(batch.numpy(), [rounded[name] for name in names])
        said = real = expected.numpy()
        if held is not network:
            real = fake_quantized(network, batch)[0].numpy()
        outputs = outputs.reshape(real.shape)
        equal_answers, nearly = _answers(outputs, real)
        same += equal_answers
        ties += nearly
        worst = max(worst, float(np.abs(outputs - real).max()))
        largest = max(largest, float(np.abs(real).max()))
        equal = np.ones(len(real), bool)  # images all of whose integers were the same so far
        for name, x in zip(names, entered, strict=True):
            codes, q = inputs[_layer_of(name, inputs)], integers[name]
            gap = np.abs(_integers(x, codes).reshape(q.shape) - q)
            values += q.size
            different += int((gap > 0).sum())
            steps = max(steps, int(gap.max()))
            of_image = gap.reshape(len(gap), -1).max(1)
            most = int(of_image[equal].max(initial=0))
            if most > codes.one_step + between / codes.scale:
                fault = fault or f"gives layer {name!r} integers that are off by up to {most}, from the same ones before"
            equal &= of_image == 0
        apart = float(np.abs(outputs - said)[equal].max(initial=0))
        if not apart <= OUTPUT_SHARE * np.abs(said).max():
            fault = fault or f"gives outputs that are off by {apart:.3g} where every layer gets the same integers"
    return Verification(flavour, len(images), same / len(images), worst, largest, values, different, steps, fault, ties)


def _layer_of(call: str, layers: Collection[str]) -> str:
    """Return the layer of a call, which is named after it, with @2 behind at the second; a layer's own name may have an @."""
    if call in layers:
        return call
    return call.rpartition("@")[0]


def _integers(x: Array, codes: Codes) -> Array:
    """Return the integers of what enters a layer; signs may have any scale in a file, and the layer's sums another."""
    if codes.one_step == 2:
        return np.sign(x).astype(int)
    return np.rint(x / np.float32(codes.scale)).astype(int)


def _answers(outputs: Array, real: Array) -> tuple[int, int]:
    """Count the samples whose answers are the same, and those whose answer is nearly as large as the right one."""
    answers, right = outputs.argmax(1, keepdims=True), real.argmax(1, keepdims=True)
    behind = np.take_along_axis(real, right, 1) - np.take_along_axis(real, answers, 1)
    same = (answers == right).reshape(len(real), -1).all(1)
    near = (behind <= OUTPUT_SHARE * np.abs(real).max()).reshape(len(real), -1).all(1)
    return int(same.sum()), int((near & ~same).sum())


def _other_layers(other: Set[str], rounded: Set[str]) -> str:
    """Say of some layers' inputs which is another than in the network."""
    for name in sorted(other):
        if name in rounded:
            return f"rounds what enters layer {name!r}, which the network doesn't"
        return f"doesn't round what enters layer {name!r}, which the network does"
    return ""


def read_model(path: str | Path) -> Any:
    """Read a file of ONNX; raises ValueError for what isn't one."""
    reader = package("onnx")
    try:
        return reader.load(str(path))
    except FileNotFoundError:
        raise
    except Exception as error:  # those of protobuf, which is onnx's affair
        raise ValueError(f"{path} is not a file of ONNX: {error}") from error

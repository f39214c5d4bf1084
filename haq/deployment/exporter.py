"""What an exporter is: a class that writes a quantized network as something that runs, and compares it with the network.

Adding one is one file: a subclass of `Exporter`, registered in `haq.deployment.EXPORTERS`, offered by an installed package
under the entry points `haq.exporters`, or given as module:Name on the command line. This module imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from haq.store.files import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from haq.deployment.graph import Graph

OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Samples:
    """Images for an exporter, as the network takes them: float32 (N, C, H, W).

    calibration  of the train split, to find how large values become
    compared     of the test split, to compare integers on
    test         goes through the whole test split: (images, labels), as often as it is called
    labelled     whether the labels mean anything
    """

    calibration: Tensor
    compared: Tensor
    test: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    labelled: bool = True


@dataclass(frozen=True)
class AnySamples:
    """Samples of any structure for an exporter: pairs (inputs, targets), as the network takes them.

    example    of the train split
    compared   of the test split
    forward    runs a network on such a pair; None: it is called with the inputs (`quantizers.calling`)
    """

    example: tuple[Any, Any]
    compared: tuple[Any, Any]
    forward: Callable[[nn.Module, Any], Any] | None = None


@dataclass(frozen=True)
class Verdict:
    """What came of comparing a written network with the one in PyTorch.

    same_answers   whether all answers are equal
    rows           lines about it
    latency_s      what an image takes on this machine, measured; None if it wasn't
    machine        all that this depends on, as `key` of a measured target has it
    """

    same_answers: bool
    rows: tuple[tuple[str, str], ...]
    latency_s: float | None = None
    machine: Mapping[str, Any] | None = None


class Exporter(ABC):
    """Writes quantized networks in one format.

    name      by which it is chosen: `haq deploy RUN --to NAME`
    summary   one line about it
    output    what is written within a run's folder, a file or a folder, unless --out says otherwise
    options   options of `haq deploy` that it takes:
              "threads", "target", "cold"   where kernels are measured; `export` is given their values
              "flavour"     --for NAME, one of `flavours`; `export` is given the name
              "residuals"   --residuals 8: it writes nodes of kind "quantize", so that there may be quantizers in front of
                            additions and poolings; nothing of it is given to `export`
    flavours  what it can write for (`--for`)
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    output: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    flavours: ClassVar[tuple[str, ...]] = ()

    def check_path(self, path: Path) -> None:  # noqa: B027 - an exporter that writes anywhere has none
        """Raise ValueError, naming what is in the way, for a path that can't be written; called before anything is loaded."""

    @abstractmethod
    def check(self, network: nn.Module) -> None:
        """Raise ValueError, naming the layer and the reason, for a quantized network that can't be written.

        It is called before anything is captured, compiled or written.
        """

    def check_operations(  # noqa: B027 - an exporter that refuses nothing more has none
        self, network: nn.Module, graph: Graph, images: Tensor, *, options: Mapping[str, Any]
    ) -> None:
        """Raise ValueError for a captured network that `export` would refuse, and for nothing else.

        It is what `haq deploy --check` asks, before there is a run: it compiles nothing and writes nothing.

        Args:
            network: The quantized network, in evaluation mode.
            graph: Its operations.
            images: Images (N, C, H, W), as the network takes them.
            options: Those of `Exporter.options` that were given, by name.

        Raises:
            ValueError: Naming the layer, the operation and the reason.
        """

    @abstractmethod
    def export(
        self,
        network: nn.Module,
        graph: Graph,
        images: Tensor,
        path: Path,
        *,
        notes: Mapping[str, Any],
        options: Mapping[str, Any],
        on_progress: OnProgress,
    ) -> None:
        """Write a network.

        Args:
            network: The quantized network, in evaluation mode.
            graph: Its operations, from `haq.deployment.graph.capture`.
            images: Images (N, C, H, W) of the train split, as the network takes them.
            path: The file or folder to write; its folder is there.
            notes: What the network is, where the format has a place for it.
            options: Those of `Exporter.options` that were given, by name.
            on_progress: Told what is done, of how much, and what it is.

        Raises:
            ValueError: For what can't be written.
            ImportError: For a missing package, with what to install.
        """

    @abstractmethod
    def compare(self, network: nn.Module, graph: Graph, samples: Samples, path: Path) -> Verdict:
        """Run what was written beside the network in PyTorch.

        Args:
            network: The quantized network.
            graph: Its operations.
            samples: The images.
            path: What `export` wrote.

        Returns:
            What differs.
        """

    def export_any(self, network: nn.Module, samples: AnySamples, path: Path) -> None:
        """Write a network whose inputs or operations `haq.deployment.graph` doesn't know.

        Args:
            network: The quantized network, in evaluation mode.
            samples: Samples of any structure.
            path: The file or folder to write; its folder is there.

        Raises:
            NotImplementedError: Unless the exporter overrides this, and `compare_any`.
        """
        raise NotImplementedError

    def compare_any(self, network: nn.Module, samples: AnySamples, path: Path) -> Verdict:
        """Run what `export_any` wrote beside the network in PyTorch.

        Args:
            network: The quantized network.
            samples: Samples of any structure.
            path: What `export_any` wrote.

        Returns:
            What differs.
        """
        raise NotImplementedError

    @classmethod
    def takes_any(cls) -> bool:
        """Say whether an exporter writes networks with inputs of any structure, and of any operations."""
        return cls.export_any is not Exporter.export_any


def check_is_no_folder(path: Path, to: str) -> None:
    """Raise ValueError for a folder, where an exporter writes a file.

    Args:
        path: Where it is to be written.
        to: The exporter's name.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and --to {to} writes a file: give its name, too")


def check_own_folder(folder: Path, to: str, names: Collection[str], description: str, formats: str) -> None:
    """Raise ValueError for a file, and for a folder with files of somebody else that would be written over.

    Args:
        folder: Where an exporter is to write.
        to: Its name.
        names: The files that it writes besides its description.
        description: The name of that.
        formats: What the format begins with that its description names, of any version.
    """
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{folder} is a file; --to {to} writes a folder")
        return
    strange = [name for name in names if (folder / name).exists()]
    if (folder / description).exists():
        strange = []
        try:
            if not str(read_json(folder / description).get("format")).startswith(formats):
                strange = [description]
        except ValueError:
            pass  # damaged: deploying again mends that
    if strange:
        raise ValueError(
            f"{folder / strange[0]} isn't of an earlier --to {to}, which would write over it: give another folder by --out"
        )


def policy_storage_bytes(network: nn.Module, images: Tensor) -> int:
    """Count what a search prints as the storage of a policy: weights at their bits, scales and biases, but no norms.

    Args:
        network: The quantized network, at its present bits.
        images: Images (N, C, H, W), of which the first is run through it.

    Returns:
        Bytes.
    """
    import numpy as np

    import hw_models
    import quantizers as Q
    from hw_models.storage import FLOAT_BYTES, untied_bytes
    from hw_models.widths import FLOAT, places

    workload = hw_models.trace(Q.float_copy(network).eval(), images[:1])
    policy = Q.get_policy(network)
    layers = Q.quant_layers(network)
    bits = np.array([[width or FLOAT for width in policy.get(layer.name, (None, None))] for layer in workload.layers])
    total = float(untied_bytes(workload, bits[:, 0]))
    stored = hw_models.storage_bytes(workload)
    for row, layer, (w, a), w_bits in zip(stored, workload.layers, places(bits), bits[:, 0], strict=True):
        total += row[w, a]
        if layer.name not in layers or w_bits == FLOAT:
            continue
        scheme = layers[layer.name].scheme
        total += scheme.storage_overhead_bytes(int(w_bits), layer.weights)
        if getattr(scheme, "per_channel", True) is False:
            total -= FLOAT_BYTES * (layer.out_channels - 1)
    return round(total)


# Our own, in a line each.
SUMMARIES = {
    "tvm": "a folder with one library for this machine's processor, integers from end to end",
    "onnx": "a file with QuantizeLinear and DequantizeLinear, for ONNX Runtime and others",
    "qonnx": "a file of QONNX, for tools of FPGAs",
    "c": "a folder with a C99 file, for microcontrollers: integers from end to end, weights at their bits",
    "executorch": "a file of torch.export with Q/DQ operators, and one for ExecuTorch on phones",
}
REQUIRED = ("name", "summary", "output", "check", "export", "compare")


def lacking(exporter: Any) -> str:
    """Name what a class lacks to be an exporter, in words that continue "it lacks"; nothing if it is one."""
    from hw_models.registry import join_words

    abstract = getattr(exporter, "__abstractmethods__", ())
    return join_words([name for name in REQUIRED if name in abstract or not hasattr(exporter, name)])

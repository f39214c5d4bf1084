"""A quantized network as a C99 file that any compiler takes: for microcontrollers, and wherever nothing else runs.

What is written is a folder of four files, two of them named after it:

    NAME.c, NAME.h    the network: weights at their bits, integers end to end, no allocation, nothing of a library but memcpy
    main.c            an example that reads images and prints their outputs
    network.json      what the network is, where in its arena every value lies, and what it takes of flash and RAM

`haq.deployment.c_source` writes the code, which computes what `haq.deployment.fixed_point` does, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import quantizers as Q
from haq.deployment import fixed_point, interpreter
from haq.deployment.answers import compare_answers
from haq.deployment.c_source import CCode, generate, identifier, value_bytes
from haq.deployment.exporter import SUMMARIES, Exporter, OnProgress, Samples, Verdict, check_own_folder, policy_storage_bytes
from haq.deployment.fixed_point import FixedProgram
from haq.deployment.graph import Graph
from haq.deployment.lowering import check_integers, lower
from haq.deployment.program import BYTE_BITS, Convolution, Step, read_by, written_by
from haq.store import files
from haq.store.units import counted, describe_bytes

FORMATS = "haq-c-"  # of any version
FORMAT = f"{FORMATS}1"
DESCRIPTION = "network.json"
CHECKED = 8  # images on which a network is compared before it is written
# Compilers whose sizes are told, the first that is there, with the options of a usual target.
COMPILERS = (
    ("arm-none-eabi-gcc", ("-mcpu=cortex-m4", "-mthumb")),
    ("arm-linux-gnueabihf-gcc", ("-mthumb",)),
    ("gcc", ()),
)
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")


# --------------------------------------------------------------------------------------------------------- what it compiles to


@dataclass(frozen=True)
class Sizes:
    """Bytes of the compiled network: `flash` holds code and constants, `ram` what is written; by which compiler."""

    flash: int
    ram: int
    compiler: str


def compiled_sizes(folder: Path, name: str) -> Sizes | None:
    """Compile a network for size and ask how large it became; None without a compiler."""
    for compiler, options in COMPILERS:
        size = shutil.which(compiler.replace("gcc", "size"))
        if shutil.which(compiler) is None or size is None:
            continue
        with tempfile.TemporaryDirectory() as place:
            made = Path(place) / "network.o"
            command = [compiler, "-std=c99", "-Os", *options, "-c", str(folder / f"{name}.c"), "-o", str(made)]
            _run(command)
            text, data, bss = map(int, _run([size, str(made)]).decode().splitlines()[1].split()[:3])
        return Sizes(text + data, data + bss, " ".join([compiler, *options, "-Os"]))
    return None


def _run(command: Sequence[str], given: bytes = b"") -> bytes:
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise ValueError(f"{command[0]} ended with {done.returncode}: {message[-500:]}")
    return done.stdout


class Compiled:
    """A folder's network with its main.c, compiled: called with float32 images (N, C, H, W) it returns integers (N, outputs).

    Usable in a `with` statement, which takes the compiled program away.
    """

    def __init__(self, folder: Path, compiler: Sequence[str] = ("gcc", "-O3"), runner: Sequence[str] = ()) -> None:
        """Compile.

        Args:
            folder: What was written.
            compiler: The compiler and its options.
            runner: What runs its programs, if this machine doesn't.
        """
        name = _described(folder)["name"]
        self._place = tempfile.TemporaryDirectory()
        program = Path(self._place.name) / "network"
        self._command = [*runner, str(program)]
        try:
            _run([*compiler, *STRICT, str(folder / f"{name}.c"), str(folder / "main.c"), "-o", str(program)])
        except ValueError:
            self._place.cleanup()
            raise

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.int64]:
        """Compute the outputs' integers."""
        lines = _run(self._command, np.ascontiguousarray(images, "<f4").tobytes()).decode().splitlines()
        return np.array([line.split() for line in lines], np.int64).reshape(len(images), -1)

    def __enter__(self) -> Compiled:
        """Return the program itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Delete the program's folder."""
        self._place.cleanup()


# ----------------------------------------------------------------------------------------------------------------- exporter


def convert(network: nn.Module, graph: Graph, images: Tensor) -> FixedProgram:
    """Make the program without floats of a quantized network, and check it on some images.

    Args:
        network: The quantized network.
        graph: Its operations.
        images: Images (N, C, H, W) of the train split.

    Returns:
        The program.

    Raises:
        ValueError: Naming the layer, for what has no integer form, and where integers would be others than in PyTorch by more
            than rounding.
    """
    program = lower(graph, network, images)
    interpreter.check(network, program, images[:CHECKED])
    fixed = fixed_point.fixed_point(program)
    if fault := fixed_point.compare(network, program, fixed, images[:CHECKED]).fault:
        raise ValueError(f"{type(network).__name__} can't be written in C: its program without floats {fault}")
    return fixed


def write(folder: Path, fixed: FixedProgram, notes: Mapping[str, Any]) -> None:
    """Write a network's folder, its description last.

    Args:
        folder: The folder; it may be there.
        fixed: The program.
        notes: What the description says besides.
    """
    code = generate(fixed, identifier(folder.resolve().name))
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = _mark_unfinished(folder)
    for name, text in code.files.items():
        files.write(folder / name, text)
    content = {"format": FORMAT, "name": code.name, **notes, **_description(fixed, code)}
    sizes = compiled_sizes(folder, code.name)
    if sizes is not None:
        content |= {"flash_bytes": sizes.flash, "ram_bytes": sizes.ram, "compiler": sizes.compiler}
    content["files"] = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in code.files.items()}
    files.write(description, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _check_folder(folder: Path) -> None:
    """Raise ValueError for a file, and for a folder with C files of somebody else's: a name such as main.c is anyone's."""
    name = identifier(folder.resolve().name)
    check_own_folder(folder, CExporter.name, (f"{name}.c", f"{name}.h", "main.c"), DESCRIPTION, FORMATS)


def _mark_unfinished(folder: Path) -> Path:
    """Write a description that says whose folder it is, and describes no network; return its path."""
    description = folder / DESCRIPTION
    files.write(description, json.dumps({"format": FORMAT}) + "\n")
    return description


def _description(fixed: FixedProgram, code: CCode) -> dict[str, Any]:
    height, width, channels = fixed.shape
    return {
        "input": {"shape": [channels, height, width], "values": [image.value for image in fixed.image]},
        "output": {"shape": list(fixed.values[fixed.output].shape), "scale": fixed.output_scale},
        "arena_bytes": code.arena.size,
        "constant_bytes": dict(code.bytes),
        "steps": [_described_step(step) for step in fixed.steps],
        "values": {
            name: {"at": place, "bytes": value_bytes(fixed.values[name]), "shape": list(fixed.values[name].shape)}
            | {"numbers": fixed.values[name].representation.kind, "scale": fixed.values[name].representation.unit}
            for name, place in code.arena.places.items()
        },
    }


def _described_step(step: Step) -> dict[str, Any]:
    described: dict[str, Any] = {"name": step.name, "step": type(step).__name__.lower()}
    described |= {"reads": list(read_by(step)), "writes": list(written_by(step))}
    if isinstance(step, Convolution):
        described |= {"weight_bits": step.w_bits, "activation_bits": step.a_bits, "macs": step.conv.macs}
    return described


def _described(folder: Path) -> dict[str, Any]:
    """Read what describes a folder, and check that its files are as they were written.

    Raises FileNotFoundError and ValueError for a folder that isn't one, and for files that changed.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {DESCRIPTION}: haq deploy RUN --to c writes such a folder")
    content = files.read_json(path, "the description of a network in C")
    if content.get("format") != FORMAT or not isinstance(content.get("files"), dict):
        raise ValueError(f"{path} isn't of format {FORMAT!r}: deploy the network again")
    for name, digest in content["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{folder / name} isn't as it was written, by its SHA-256: deploy the network again")
    return content


class CExporter(Exporter):
    """A folder with a network in C99, for microcontrollers."""

    name = "c"
    summary = SUMMARIES["c"]
    output = "network"
    options = ("residuals",)

    def check_path(self, path: Path) -> None:
        """Raise ValueError for a file, and for a folder with files of somebody else's."""
        _check_folder(path)

    def check(self, network: nn.Module) -> None:
        """Raise ValueError, naming the layer, unless all layers are of 1 to 8 bits, integers times a scale."""
        for name, layer in Q.quant_layers(network).items():
            for what, bits in (("weights", layer.weight_bits), ("activations", layer.activation_bits)):
                if bits is not None and bits <= BYTE_BITS:
                    continue
                found = "in float"
                if bits is not None:
                    found = f"of {bits} bits"
                raise ValueError(f"layer {name!r} can't be written in C: its {what} are {found}; --to c takes 1 to 8 bits")
        check_integers(network)

    def check_operations(self, network: nn.Module, graph: Graph, images: Tensor, *, options: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the layer, for what has no program without floats; see `Exporter.check_operations`."""
        fixed_point.fixed_point(lower(graph, network, images))

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
        """Write a network; see `Exporter.export`."""
        fixed = convert(network, graph, images)
        notes = {"policy": Q.get_policy(network).to_dict(), "schemes": Q.scheme_records(network), **notes}
        write(path, fixed, {**notes, "policy_storage_bytes": policy_storage_bytes(network, images)})

    def compare(self, network: nn.Module, graph: Graph, samples: Samples, path: Path) -> Verdict:
        """Compare the program's answers on all test images, and compiled code with it on some; see `Exporter.compare`.

        Code that is compiled with whatever gcc is there isn't fast enough for all images of any network.
        """
        described = _described(path)
        program = lower(graph, network, samples.calibration)
        fixed = fixed_point.fixed_point(program)
        comparison = fixed_point.compare(network, program, fixed, samples.compared)
        if comparison.fault:
            _mark_unfinished(path)
            raise ValueError(
                f"{type(network).__name__} can't be written in C: its program without floats {comparison.fault}; what is in"
                f" {path} is no network"
            )

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(fixed_point.run(fixed, images.numpy())[0])

        answers = compare_answers(network, run, samples)
        rows = answers.rows()
        of_own = f"{comparison.different:,}, {comparison.own:,} of them by an end in integers instead of float32"
        rows += [
            ("integers that enter layers", f"{comparison.values:,}, of {counted(len(samples.compared), 'images')}"),
            ("  other than in PyTorch", of_own),
        ]
        unequal = 0
        if shutil.which("gcc"):
            expected, _ = fixed_point.run_integers(fixed, samples.compared.numpy())
            with Compiled(path) as code:
                unequal = int((code(samples.compared.numpy()) != expected.reshape(len(expected), -1)).sum())
            rows.append(("outputs of compiled code other than the program's", f"{unequal:,} of {expected.size:,}"))
        else:
            rows.append(("compiled code", "not run here: there is no gcc; answers are its integer program's"))
        rows += _size_rows(described)
        return Verdict(answers.all_same and not unequal, tuple(rows))


def _size_rows(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    constants = described["constant_bytes"]
    total = sum(constants.values())
    parts = ", ".join(f"{name} {describe_bytes(size)}" for name, size in constants.items() if size)
    flash = f"{describe_bytes(total)} of constants alone, as there is no compiler here: {parts}"
    ram = f"{describe_bytes(described['arena_bytes'])}, the arena; there is no compiler here to ask for more"
    if "compiler" in described:
        code = describe_bytes(described["flash_bytes"] - total)
        flash = f"{describe_bytes(described['flash_bytes'])}: {parts}, code and sizes {code} ({described['compiler']})"
        ram = f"{describe_bytes(described['ram_bytes'])}, of which the arena {describe_bytes(described['arena_bytes'])}"
    storage = describe_bytes(described["policy_storage_bytes"])
    return [("flash", flash), ("RAM, beside the stack", ram), ("storage of the policy", storage)]

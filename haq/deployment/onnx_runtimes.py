"""ONNX files in the runtimes that compute them: what comes out, and what is computed in integers."""

from __future__ import annotations

import importlib
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quantizers as Q
from haq.deployment.onnx_any import package
from haq.deployment.onnx_integers import FLAVOUR
from haq.deployment.onnx_verify import Array, Runner, read_model
from haq.deployment.program import BYTE_BITS
from hw_models.extras import install_line
from hw_models.measured.processor import lacks_vnni
from hw_models.registry import join_words
from hw_models.runtimes.openvino import same_signal_stack

# Operators with weights, by whether ONNX Runtime computes them in integers.
INTEGER_LAYERS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger")
REAL_LAYERS = ("Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits")
# The same in OpenVINO, which names the numbers that an operator reads.
LAYERS_OF_OPENVINO = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")
BYTES = ("u8", "i8")
# On x86 without VNNI, ONNX Runtime adds products of bytes by pairs in 16 bits, too few for two of 8 bits, unless this is 1.
# It changes no result on others.
EXACT = "session.x64quantprecision"
# OpenVINO does so too, and nothing changes it. Two products fit unless both operands have all bits of a byte.
OVERFLOW = "OpenVINO adds two products in 16 bits there, which is too few; ONNX Runtime can add in 32 (--to onnx alone)"
SERIOUS = 3  # what ONNX Runtime logs: errors
MOST_NAMES = 4  # of layers, in a message
MOST_REASON = 300  # letters of a runtime's own message


def flavour_of(path: str | Path) -> str | None:
    """Return what a file is for, as its properties say; None for one that is for any runtime."""
    properties = {entry.key: entry.value for entry in read_model(path).metadata_props}
    return properties.get(FLAVOUR)


def openvino() -> Any:
    """Import openvino. Raises ImportError with the line that installs it."""
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise ImportError(f"files for OpenVINO are run by the package openvino: {install_line('runtimes')}") from error


def _session(model: bytes, optimized: Path | None = None) -> Any:
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry(EXACT, "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.log_severity_level = SERIOUS
    try:
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # one class for each kind, none of which is a ValueError
        raise ValueError(_not_loaded(f"ONNX Runtime {runtime.__version__}", error)) from error


def _not_loaded(runtime: str, error: Exception) -> str:
    """Say that a runtime doesn't load a file, in one line."""
    reason = " ".join(str(error).split())[:MOST_REASON]
    return f"{runtime} doesn't load the file that was written for it: {reason}"


def onnxruntime_runner(model: Any) -> Runner:
    """Make what runs a model in ONNX Runtime on the CPU, with the optimizations that it makes by default."""
    # What is looked into can't be optimized away, so the file is run as it is, too.
    plain = _session(model.SerializeToString())
    opened = None

    def run(images: Array, names: list[str]) -> tuple[Array, list[Array]]:
        nonlocal opened
        if opened is None:
            opened = _session(_with_outputs(model, names).SerializeToString())
        entered = []
        if names:
            entered = opened.run(names, {"input": images})
        return plain.run(["output"], {"input": images})[0], entered

    return run


def _with_outputs(model: Any, names: list[str]) -> Any:
    """Make tensors outputs of a model."""
    model.graph.output.extend(package("onnx").helper.make_tensor_value_info(name, 1, None) for name in names)
    return model


def openvino_runner(model: Any) -> Runner:
    """Make what runs a model in OpenVINO on the CPU, where what isn't integers is computed in float32."""
    plain = _compiled(model)
    opened = None

    def run(images: Array, names: list[str]) -> tuple[Array, list[Array]]:
        nonlocal opened
        if opened is None:
            opened = _compiled(_with_outputs(model, names))
        found = opened(images)
        return plain(images)[0], [found[1 + place] for place in range(len(names))]

    return run


def _compiled(model: Any) -> Any:
    core = openvino().Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    try:
        with same_signal_stack():
            return core.compile_model(core.read_model(model.SerializeToString(), b""), "CPU", settings)
    except RuntimeError as error:
        raise ValueError(_not_loaded("OpenVINO", error)) from error


def overflow_words(network: nn.Module, flavour: str | None) -> str:
    """Say what overflows in a runtime on x86 processors without VNNI; nothing where all sums fit.

    Args:
        network: The quantized network.
        flavour: Of its file.

    Returns:
        The layers, and why.
    """
    if flavour != "openvino":
        return ""
    wide = []
    for name, layer in Q.quant_layers(network).items():
        # Of 16 bits, or in float, a layer isn't computed in bytes.
        if layer.weight_bits is None or layer.activation_bits != BYTE_BITS:
            continue
        if layer.scheme.integer_weight_bits(layer.weight_bits) == BYTE_BITS:
            wide.append(name)
    if not wide:
        return ""
    layers = join_words(wide[:MOST_NAMES])
    if len(wide) > MOST_NAMES:
        layers = f"{', '.join(wide[:MOST_NAMES])} and {len(wide) - MOST_NAMES} more"
    return f"weights and inputs of {layers} are integers of 8 bits: {OVERFLOW}"


def overflows_here(network: nn.Module, flavour: str | None) -> str:
    """Say why a runtime's sums may be wrong on this processor, to be put behind what is wrong; nothing if that can't be why.

    Args:
        network: The quantized network.
        flavour: Of its file.

    Returns:
        The reason, in brackets.
    """
    words = overflow_words(network, flavour)
    if words and lacks_vnni():
        return f" (this processor has no VNNI, which may be why: {words})"
    return ""


def operators(path: str | Path, flavour: str | None) -> tuple[tuple[str, str], ...]:
    """Count what a runtime computes in integers, of the operators that it has made of a file.

    Args:
        path: The file.
        flavour: What it is for.

    Returns:
        Lines of a table.
    """
    if flavour == "tensorrt":
        whole, real = _between_integers(read_model(path))
        return (("layers between integers of 8 bits", f"{whole:,} of {whole + real:,}"),)
    if flavour == "openvino":
        kinds = openvino_kinds(path)
        whole = sum(count for (kind, precision), count in kinds.items() if kind in LAYERS_OF_OPENVINO and precision in BYTES)
        every = sum(count for (kind, _), count in kinds.items() if kind in LAYERS_OF_OPENVINO)
        return (("layers that OpenVINO computes in integers", f"{whole:,} of {every:,}"),)
    kinds_here = onnxruntime_kinds(path)
    whole = sum(kinds_here.get(kind, 0) for kind in INTEGER_LAYERS)
    real = sum(kinds_here.get(kind, 0) for kind in REAL_LAYERS)
    named = ", ".join(
        f"{count:,} {kind}"
        for kind, count in sorted(kinds_here.items())
        if kind in INTEGER_LAYERS or kind.startswith("QLinear")
    )
    rows = [("layers that ONNX Runtime computes in integers", f"{whole:,} of {whole + real:,}")]
    if named:
        rows.append(("  its operators of integers", named))
        rows.append(("  on x86 without VNNI", f"set {EXACT} to 1 in its session options, as was done here"))
    return tuple(rows)


def onnxruntime_kinds(path: str | Path) -> Mapping[str, int]:
    """Count the operators of the model that ONNX Runtime makes of a file when it loads it, by kind."""
    with tempfile.TemporaryDirectory() as place:
        optimized = Path(place, "optimized.onnx")
        _session(Path(path).read_bytes(), optimized)
        return Counter(node.op_type for node in read_model(optimized).graph.node)


def openvino_kinds(path: str | Path) -> Mapping[tuple[str, str], int]:
    """Count the operators that OpenVINO runs, by kind and by the numbers that they read."""
    found: Counter[tuple[str, str]] = Counter()
    for node in _compiled(read_model(path)).get_runtime_model().get_ops():
        facts = node.get_rt_info()
        found[facts["layerType"].value, str(facts["runtimePrecision"].value)] += 1
    return found


def _between_integers(model: Any) -> tuple[int, int]:
    """Count the layers whose input and weights are dequantized integers, and the others."""
    made_by = {output: node.op_type for node in model.graph.node for output in node.output}
    whole = real = 0
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            if all(made_by.get(name) == "DequantizeLinear" for name in node.input[:2]):
                whole += 1
            else:
                real += 1
    return whole, real

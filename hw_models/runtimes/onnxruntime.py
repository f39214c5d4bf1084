"""ONNX Runtime on the processor: QLinearConv, QGemm and MatMulNBits, and float operators."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from hw_models.runtimes.operators import INTEGER, WHOLE_FLOAT, Operator
from hw_models.runtimes.runtime import Call, check_installed, example

SEVERE = 4  # of what it logs, only what is fatal: a pair that it can't do is no news
PROVIDERS = ["CPUExecutionProvider"]


class OnnxRuntime:
    """The package `onnxruntime`. Raises ImportError saying what to install, without it or `onnx`."""

    name = "onnxruntime"
    title = "ONNX Runtime"

    def __init__(self) -> None:
        """Check that it can be imported."""
        check_installed(self.name, "onnx", "onnxruntime")

    @property
    def version(self) -> str:
        """Of the installed package."""
        import onnxruntime

        return str(onnxruntime.__version__)

    def load(self, operator: Operator, threads: int) -> Call:
        """Make what runs a graph; inputs and outputs are bound once, and all outputs to one piece of memory.

        That is as in a network, where what was read of an activation is free for the next.
        """
        import onnxruntime

        session = onnxruntime.InferenceSession(operator.model(), _options(threads), providers=PROVIDERS)
        (given,) = session.get_inputs()
        x = example(given.shape, "uint8" in given.type)
        names = [output.name for output in session.get_outputs()]
        (first, *_) = session.run(names[:1], {given.name: x})
        binding = session.io_binding()
        held = onnxruntime.OrtValue.ortvalue_from_numpy(x)
        made = onnxruntime.OrtValue.ortvalue_from_numpy(first)
        binding.bind_ortvalue_input(given.name, held)
        for name in names:
            binding.bind_ortvalue_output(name, made)

        def call() -> None:
            session.run_with_iobinding(binding)

        return call

    def computes(self, operator: Operator) -> bool:
        """Read the optimized model: the one operator of integers must be in it, and no float one.

        Raises:
            ValueError: If the runtime can't do the layer in float.
        """
        import onnx
        import onnxruntime

        wanted = {"conv": "Conv", "conv1d": "Conv", "linear": "Gemm"}[operator.form]
        if operator.pair == INTEGER:
            wanted = {"conv": "QLinearConv", "conv1d": "QLinearConv", "linear": "QGemm"}[operator.form]
        elif operator.pair != WHOLE_FLOAT:
            wanted = "MatMulNBits"
        with tempfile.TemporaryDirectory() as folder:
            options = _options(threads=1)
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            try:
                onnxruntime.InferenceSession(replace(operator, copies=1).model(), options, providers=PROVIDERS)
            except Exception as error:  # its errors have no common class but this one
                if operator.pair == WHOLE_FLOAT:
                    raise ValueError(" ".join(str(error).split())) from error
                return False
            optimized = onnx.load(options.optimized_model_filepath)
        found = {node.op_type for node in optimized.graph.node}
        return wanted in found and "DequantizeLinear" not in found


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = SEVERE
    # Threads that have nothing to do would go on spinning, and slow down whatever session is read next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options

"""OpenVINO on the processor: convolutions and matrix products of 8-bit integers, of packed weights, and in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hw_models.runtimes.operators import INTEGER, WHOLE_FLOAT, Operator
from hw_models.runtimes.runtime import Call, check_installed, example

PRODUCTS = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")
BYTES = ("u8", "i8")
PACKED = ("u2", "u4", "u8", "i2", "i4", "i8")


class OpenVino:
    """The package `openvino`. Raises ImportError saying what to install, without it or `onnx`.

    What isn't integers is computed in float32: of itself it would take bfloat16 where a processor has it.
    """

    name = "openvino"
    title = "OpenVINO"

    def __init__(self) -> None:
        """Check that it can be imported."""
        check_installed(self.name, "onnx", "openvino")

    @property
    def version(self) -> str:
        """Of the installed package, without the name of its build."""
        import openvino

        return str(openvino.__version__).partition("-")[0]

    def load(self, operator: Operator, threads: int) -> Call:
        """Make what runs a graph of one output; it and the input are bound once."""
        import openvino

        compiled = _compiled(operator, threads)
        (given,) = compiled.inputs
        request = compiled.create_infer_request()
        x = example(tuple(given.shape), given.element_type == openvino.Type.u8)
        # They share this memory, which must live as long as the request.
        held = openvino.Tensor(x, shared_memory=True)
        request.set_input_tensor(held)

        def call() -> object:
            request.infer()
            return held

        return call

    def computes(self, operator: Operator) -> bool:
        """Read the compiled model: its product must take activations and weights of the operator's widths."""
        try:
            # Two: with a single reader of the quantized input it takes another path, which no network of several layers takes.
            compiled = _compiled(replace(operator, copies=2), threads=1)
        except Exception as error:  # its errors have no common class but this one
            if operator.pair == WHOLE_FLOAT:
                raise ValueError(" ".join(str(error).split())) from error
            return False
        for node in compiled.get_runtime_model().get_ops():
            if node.get_rt_info()["layerType"].value in PRODUCTS:
                activation, weight = (node.input(port).get_element_type().get_type_name() for port in (0, 1))
                if operator.pair == INTEGER:
                    return activation in BYTES and weight in BYTES
                if operator.pair == WHOLE_FLOAT:
                    return activation == weight == "f32"
                return activation == "f32" and weight in PACKED and weight.endswith(str(operator.pair[0]))
        return False


def _compiled(operator: Operator, threads: int) -> Any:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return core.compile_model(core.read_model(operator.model(joined=True), b""), "CPU", settings)

"""OpenVINO on the processor: convolutions and matrix products of 8-bit integers, of packed weights, and in float32."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
        """Read the compiled model: its product must take activations and weights of the operator's widths.

        Raises:
            ValueError: If the runtime can't do the layer in float.
        """
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


class SignalStack(ctypes.Structure):
    """What sigaltstack(2) of Linux takes: where a thread's handlers of signals run."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))
    NONE = 2  # of flags: the thread's ordinary stack

    @classmethod
    def present(cls) -> SignalStack:
        """Return that of this thread."""
        found = cls()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
        return found

    def is_set(self) -> bool:
        """Make it that of this thread; False if it can't be."""
        failed: int = ctypes.CDLL(None).sigaltstack(ctypes.byref(self), None)
        return not failed


@contextmanager
def same_signal_stack() -> Iterator[None]:
    """Give this thread its stack for signals back, after whatever compiles a network with OpenVINO.

    OpenVINO's plugin for processors sets a stack of its own and frees its memory, but not the setting, with the last core: the
    next signal that Python handles, as that of a child process that ends, would end this process then.
    """
    if sys.platform != "linux":
        yield
        return
    before = SignalStack.present()
    try:
        yield
    finally:
        # One that has become too small, as OpenVINO asked for a processor's larger registers, can't be set again.
        if not before.is_set():
            SignalStack(flags=SignalStack.NONE).is_set()


def _compiled(operator: Operator, threads: int) -> Any:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    with same_signal_stack():
        return core.compile_model(core.read_model(operator.model(joined=True), b""), "CPU", settings)
